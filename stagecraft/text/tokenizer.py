"""A SentencePiece tokenizer whose control pieces no text can forge.

pad, bos, eos and the chat pieces are control symbols: they have ids but no spelling, so
that a user's "<|end|>" is ordinary text. Bytes outside the vocabulary fall back to byte
pieces, so that every string survives encode and decode.
"""

import hashlib
import io
import re
from pathlib import Path

import numpy as np
import sentencepiece as spm

from stagecraft import workdir
from stagecraft.errors import UserError

CHAT_PIECES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# SentencePiece writes a space as this character, and so would read it back as one.
SPACE = "\u2581"
# What a usable model gives back as it was: spaces, line ends, what it never saw.
PROBE = "  a\n\tb \U0001f600 \u2460 "

# Characters of text to train on; more changes a small vocabulary little.
ENOUGH = 2_000_000
# SentencePiece drops longer training lines without a word: they are cut instead.
LINE = 1000


class Tokenizer:
    """Text to ids and back.

    Args:
        model: the bytes of a SentencePiece model.
    """

    def __init__(self, model):
        self._processor = spm.SentencePieceProcessor(model_proto=model)
        self.digest = hashlib.sha256(model).hexdigest()
        piece = self._processor.piece_to_id
        self.pad, self.bos, self.eos = piece("<pad>"), piece("<s>"), piece("</s>")
        self.system, self.user, self.assistant, self.end = map(piece, CHAT_PIECES)
        self.stops = (self.end,)
        self.vocab_size = self._processor.get_piece_size()
        self._space = [piece(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @property
    def control_ids(self):
        """Ids of the chat pieces, which plain text never holds."""
        return (self.system, self.user, self.assistant, self.end)

    def encode(self, text):
        """Ids of a text, without bos or eos: `decode` gives the same text back."""
        first, *rest = text.split(SPACE)
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._space + self._processor.encode(part)
        return ids

    def decode(self, ids):
        """The text of ids; control pieces have none."""
        return self._processor.decode([int(i) for i in ids])

    @classmethod
    def load(cls, path):
        """Reads a .model file with all the pieces this project needs."""
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: no such tokenizer file")
        try:
            found = cls(path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model ({error})") from error
        # A piece that is missing has the id of <unk>, which is no control piece.
        ids = (found.pad, found.bos, found.eos, *found.control_ids)
        if not all(map(found._processor.is_control, ids)) or len(set(ids)) < len(ids):
            raise UserError(
                f"{path}: needs distinct control pieces <pad>, <s>, </s>, "
                f"{', '.join(CHAT_PIECES)}; train one with tokenizer.files"
            )
        if found.decode(found.encode(PROBE)) != PROBE:
            raise UserError(
                f"{path}: does not give text back as it was (needs byte fallback and "
                "no normalisation); train one with tokenizer.files"
            )
        return found

    @classmethod
    def train(cls, texts, vocab_size, path):
        """Trains a byte-fallback BPE; the same texts give the same file.

        Args:
            texts: iterable of str.
            vocab_size: pieces, with 256 bytes and 8 control pieces among them.
            path: where the model file goes, whole or not at all.
        """
        lines = _training_lines(texts)
        if not lines:
            raise UserError("tokenizer.files: hold no text to train a tokenizer on")
        model = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                character_coverage=0.9995,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                split_digits=True,
                pad_id=0,
                unk_id=1,
                bos_id=2,
                eos_id=3,
                control_symbols=list(CHAT_PIECES),
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(_why(error, vocab_size)) from error
        workdir.write_bytes(path, model.getvalue())
        return cls(model.getvalue())


def _training_lines(texts):
    """Lines of bounded length; an even sample of them when there is a lot of text."""
    lines = []
    for text in texts:
        for line in text.split("\n"):
            lines += [line[i : i + LINE] for i in range(0, len(line), LINE)]
    size = sum(map(len, lines))
    if size > ENOUGH:
        keep = np.linspace(0, len(lines) - 1, int(len(lines) * ENOUGH / size))
        lines = [lines[int(i)] for i in keep]
    return [line for line in lines if line]


def _why(error, vocab_size):
    most = re.search(r"value <= (\d+)", str(error))
    if most:
        return (
            f"tokenizer.vocab_size={vocab_size}: the text is too small for it; the "
            f"largest possible is {most[1]}"
        )
    least = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
    if least:
        return (
            f"tokenizer.vocab_size={vocab_size}: too small for 256 bytes, 8 control "
            f"pieces and the text's characters; use {least[1]} or more"
        )
    return f"tokenizer: SentencePiece refused the text ({' '.join(str(error).split())})"
