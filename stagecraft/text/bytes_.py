"""Bytes as a tokenizer: nothing to train, nothing it cannot write."""

import hashlib

BYTES = 256
# The file that says so in a run's folder.
FILE = "bytes.txt"
NOTE = b"ids 0 to 255 are bytes of UTF-8, then pad, bos, eos, system, user, assistant, "
NOTE += b"end of turn\n"


class Bytes:
    """Text to ids and back; the ids of control pieces lie above those of bytes."""

    template = None
    pad, bos, eos, system, user, assistant, end = range(BYTES, BYTES + 7)
    vocab_size = BYTES + 7
    stops = (end,)
    control_ids = (system, user, assistant, end)
    files = {FILE: NOTE}
    digest = hashlib.sha256(NOTE).hexdigest()

    def encode(self, text):
        """Ids of a text, without bos or eos."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids):
        """The text of ids; control pieces have none, nor have halves of characters."""
        kept = bytes(int(i) for i in ids if 0 <= int(i) < BYTES)
        return kept.decode("utf-8", errors="replace")
