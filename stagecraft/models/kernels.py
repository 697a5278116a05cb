"""Which attention kernel runs, and why: chosen while tracing, logged once.

| kernel    | runs on | segments | windows | soft-cap | dtypes    | channels        |
| xla       | all     | yes      | yes     | yes      | all       | all             |
| blockwise | all     | yes      | yes     | yes      | all       | all             |
| cudnn     | GPU     | yes      | yes     | no       | bf16, f16 | 8, 16, ... 128  |
| splash    | TPU     | yes      | yes     | yes      | all       | all             |

"xla" holds all scores of a layer, [B, H, T, T]; "blockwise" and "splash" never do, and
"cudnn" holds a mask [B, 1, T, T], since it has no segments of its own. "cudnn" and
"splash" were not run on hardware here: their calls are tested without it.
"""

import functools
import logging
from typing import NamedTuple

from stagecraft import sharding
from stagecraft.errors import UserError

LOGGER = logging.getLogger("stagecraft")

# The native kernel of each platform.
NATIVE = {"gpu": "cudnn", "tpu": "splash"}

# From here on blocks are taken on a CPU, for their memory: four layers of 4096 tokens
# keep 75 MiB for the backward pass at any length, where "xla" keeps about 230 at 512
# tokens, 400 at 1024 and 750 at 2048. They take 1.4 times the CPU time at 512 tokens
# and 1.2 times at 1024.
LONG = 512


class Request(NamedTuple):
    """The shapes and options a kernel must support.

    Attributes:
        length: T.
        channels: C.
        dtype: name of the queries' dtype.
        softcap: 0 for none.
        parts: of a row that lie on different devices, over the mesh's `context`.
    """

    length: int
    channels: int
    dtype: str
    softcap: float
    parts: int = 1


class Choice(NamedTuple):
    """A kernel, and why it was chosen.

    Attributes:
        kernel: its name.
        reason: in words.
        fallback: whether it replaces another.
    """

    kernel: str
    reason: str
    fallback: bool = False


def missing(kernel: str, request: Request, platform: str) -> str:
    """Returns why a kernel cannot serve a request; "" where it can."""
    home = {native: device for device, native in NATIVE.items()}.get(kernel)
    if home is not None and platform != home:
        return f"{kernel} runs on a {home.upper()}, and this is a {platform.upper()}"
    if home is not None and request.parts > 1:
        return (
            f"{kernel} takes whole rows, and mesh.context={request.parts} splits them"
        )
    if kernel != "cudnn":
        return ""
    if request.softcap:
        return "cudnn has no soft-cap"
    if request.dtype not in ("bfloat16", "float16"):
        return f"cudnn takes bfloat16 and float16, not {request.dtype}"
    if request.channels % 8 or request.channels > 128:
        return (
            f"cudnn takes heads of a multiple of 8 channels up to 128, not "
            f"{request.channels}"
        )
    if request.length % 2:
        return f"cudnn takes rows of even length under a mask, not {request.length}"
    return ""


def choose(
    asked: str, request: Request, *, strict: bool = False, platform: str | None = None
) -> Choice:
    """Chooses the kernel of attention over whole sequences.

    Args:
        asked: a name of the table above, or "auto".
        strict: whether a fall-back is an error.
        platform: "cpu", "gpu" or "tpu"; None for that of the mesh, or JAX's default.

    Raises:
        UserError: strict, and the kernel asked for (or this device's own) cannot do it.
    """
    platform = platform or sharding.platform()
    best = "blockwise" if request.length >= LONG else "xla"
    if asked == "auto" and platform not in NATIVE:
        side = "from" if best == "blockwise" else "below"
        return Choice(best, f"auto: the one for a CPU {side} {LONG} tokens")
    wanted = NATIVE[platform] if asked == "auto" else asked
    reason = missing(wanted, request, platform)
    if not reason:
        auto = f"auto: this {platform.upper()}'s own"
        return Choice(wanted, auto if asked == "auto" else "asked for")
    if strict:
        raise UserError(
            f"model.attention={asked!r}: {reason}; change it, or allow {best} with "
            "model.strict_kernels=False"
        )
    return Choice(best, f"instead of {wanted}: {reason}", fallback=True)


@functools.cache
def log_once(operation: str, choice: Choice) -> None:
    """Logs a choice the first time it is made, a fall-back as a warning."""
    level = logging.WARNING if choice.fallback else logging.INFO
    LOGGER.log(level, "%s: %s (%s)", operation, choice.kernel, choice.reason)
