"""Bytes as a tokenizer: nothing to train, nothing it cannot write."""

import hashlib

from stagecraft.errors import UserError

BYTES = 256
# The file in a run's folder that marks its tokenizer as this one.
FILE = "bytes.txt"
NOTE = b"ids 0 to 255 are bytes of UTF-8, then pad, bos, eos, system, user, assistant, "
NOTE += b"end of turn\n"


def spells(self, text: str) -> bool:
    """Returns False: control pieces have ids but no spelling."""
    del self, text
    return False


def parsing(self):
    """Refuses: control pieces have no spelling that a text could hold."""
    raise UserError(
        "data.control_tokens='parse': the control tokens of this tokenizer have no "
        "spelling; it is for tokenizers of Hugging Face folders"
    )


class ByteTokenizer:
    """Text to ids and back; the ids of control pieces lie above those of bytes."""

    template = None
    pad, bos, eos, system, user, assistant, end = range(BYTES, BYTES + 7)
    vocab_size = BYTES + 7
    stops = (end,)
    control_ids = (system, user, assistant, end)
    files = {FILE: NOTE}
    digest = hashlib.sha256(NOTE).hexdigest()

    def name(self, id_: int) -> str:
        """Returns how an id is shown."""
        pieces = ("pad", "bos", "eos", "system", "user", "assistant", "end")
        return f"<|{pieces[id_ - BYTES]}|>" if id_ >= BYTES else f"<0x{id_:02X}>"

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without bos or eos."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids) -> str:
        """Returns the text of ids; control pieces and half characters have none."""
        data = bytes(int(i) for i in ids if 0 <= int(i) < BYTES)
        return data.decode("utf-8", errors="replace")

    spells, parsing = spells, parsing
