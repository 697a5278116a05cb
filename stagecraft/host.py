"""The host's memory allocator, told that a training step asks for the same again."""

import ctypes
import sys

# glibc's mallopt: parameters by number, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_memory():
    """Lets freed memory stay in the process, where glibc is the allocator.

    On a CPU backend every step frees and asks again for the same large buffers. glibc
    hands each back to the system and gets it zeroed page by page: about 44,000 page
    faults and a quarter of the step for the quickstart's model. Does nothing on other
    systems. Call it before the first computation.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_ARENA_MAX, 1)
