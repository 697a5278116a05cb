"""Tokenizers: what each offers, SentencePiece's own, and how they are found on disk.

The SentencePiece model we train has control symbols for turns, which have ids but no
spelling, so that a user's "<|end|>" is ordinary text. Bytes outside the vocabulary fall
back to byte pieces, so that every string survives encode and decode.
"""

import hashlib
import io
import re
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece as spm

from stagecraft import hub, storage
from stagecraft.errors import UserError
from stagecraft.text import byte_tokenizer, tokenizer_gguf
from stagecraft.text.template import Template
from stagecraft.text.tokenizer_json import MAIN, HuggingFaceTokenizer

CHAT_PIECES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# SentencePiece writes a space as this character, and so would read it back as one.
SPACE = "\u2581"
# What a usable model gives back as it was: spaces, line ends, what it never saw.
PROBE = "  a\n\tb \U0001f600 \u2460 "

# Characters of text to train on; more changes a small vocabulary little.
ENOUGH = 2_000_000
# SentencePiece silently drops longer training lines: they are cut instead.
LINE = 1000


# The file's name in a folder.
FILE = "tokenizer.model"


class Tokenizer(Protocol):
    """What every tokenizer offers.

    Attributes:
        pad, bos, eos: ids that fill up, begin and end a text; bos is None where none is
            put; pad differs from both.
        stops: ids that end an assistant's turn.
        control_ids: other ids that plain text never holds.
        vocab_size: number of ids.
        digest: a hash of everything that decides ids.
        files: {name: bytes}, what `keep` writes.
        template: a chat `Template`; where it is None, turns begin with the ids system,
            user, assistant and an answer ends with the id end (None: it cannot chat).
    """

    pad: int
    bos: int | None
    eos: int
    system: int | None
    user: int | None
    assistant: int | None
    end: int | None
    stops: tuple[int, ...]
    control_ids: tuple[int, ...]
    vocab_size: int
    digest: str
    files: dict[str, bytes]
    template: Template | None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without bos or eos and without control ids."""

    def decode(self, ids) -> str:
        """Returns the text of ids; control ids have none."""

    def spells(self, text: str) -> bool:
        """Whether a text spells a control token."""

    def parsing(self) -> "Tokenizer":
        """Returns a tokenizer that reads spelled control tokens as those tokens."""

    def name(self, id_: int) -> str:
        """Returns how an id is shown: "<|user|>"."""


def load(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.

    Args:
        path: a SentencePiece .model, a Hugging Face folder or tokenizer.json, the
            folder of one that was kept, a .gguf file, the id of a model in the hub's
            cache, or the word "bytes".
    """
    if str(path) == "bytes":
        return byte_tokenizer.ByteTokenizer()
    name = str(path).removeprefix("hf:").removeprefix("gguf:")
    path = hub.find(name, files=("tokenizer*",)) or Path(name)
    if not path.exists():
        more = f"; {hub.absent(name)}" if "/" in name and hub.is_id(name) else ""
        raise UserError(f"{path}: no such tokenizer file or folder{more}")
    if path.name == MAIN:  # what lies beside it belongs to it
        path = path.parent
    if path.suffix == tokenizer_gguf.SUFFIX:
        return tokenizer_gguf.load(path)
    if path.is_file():
        is_json = path.suffix == ".json"
        reader = HuggingFaceTokenizer if is_json else SentencePiece
        return reader.load(path)
    if (path / MAIN).is_file():
        return HuggingFaceTokenizer.load(path)
    if (path / FILE).is_file():
        return SentencePiece.load(path / FILE)
    if (path / byte_tokenizer.FILE).is_file():
        return byte_tokenizer.ByteTokenizer()
    raise UserError(f"{path}: no tokenizer here ({MAIN} or {FILE})")


# Why a tokenizer takes no template.
NO_TEMPLATE = (
    "tokenizer.template: a chat template is for the tokenizer of a Hugging Face folder "
    "(tokenizer.path); others have pieces for turns"
)


def with_template(tokenizer: Tokenizer, path: str | Path) -> Tokenizer:
    """Returns a Hugging Face tokenizer with the chat template of a file."""
    path = Path(path)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise UserError(NO_TEMPLATE)
    if not path.is_file():
        raise UserError(f"tokenizer.template={path}: no such file")
    # A folder's templates by other names would be taken for conversations with tools.
    files = {n: d for n, d in tokenizer.files.items() if not n.endswith(".jinja")}
    files["chat_template.jinja"] = path.read_bytes()
    return HuggingFaceTokenizer(files, f"tokenizer.template={path}")


def keep(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes a tokenizer's files unchanged, all or none; `load(folder)` reads them.

    Args:
        folder: where they go; must not exist yet.
    """
    with storage.new_folder(folder) as temporary:
        for name, data in tokenizer.files.items():
            storage.write_bytes(temporary / name, data)


class SentencePiece:
    """A SentencePiece model, ours or another's.

    One of ours writes back every text and has pieces for turns. Another's is for plain
    text, with the normalisation it was trained with.

    Args:
        model: the bytes of the model.
        where: what to call it in messages.
    """

    template = None

    def __init__(self, model, where="tokenizer"):
        self._processor = processor = spm.SentencePieceProcessor(model_proto=model)
        self.digest = hashlib.sha256(model).hexdigest()
        self.files = {FILE: model}
        self.vocab_size = processor.get_piece_size()
        self._space = []
        self._own = self._has_pieces()
        piece = processor.piece_to_id
        if self._own:
            self.pad, self.bos, self.eos = piece("<pad>"), piece("<s>"), piece("</s>")
            self.system, self.user, self.assistant, self.end = map(piece, CHAT_PIECES)
            self.stops = (self.end,)
            self.control_ids = (self.system, self.user, self.assistant, self.end)
            self._space = [piece(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        else:
            self._read_special_ids(where)

    def _has_pieces(self):
        # A piece that is missing has the id of <unk>, which is no control piece.
        ids = [self._processor.piece_to_id(p) for p in ("<pad>", "<s>", "</s>")]
        ids += map(self._processor.piece_to_id, CHAT_PIECES)
        return all(map(self._processor.is_control, ids)) and len(set(ids)) == len(ids)

    def _read_special_ids(self, where):
        """Takes the special ids of a model that lacks our pieces."""
        processor = self._processor
        self.eos = processor.eos_id()
        if self.eos < 0:
            raise UserError(f"{where}: has no piece that ends a text (eos)")
        self.bos = processor.bos_id() if processor.bos_id() >= 0 else None
        # Masks say what is real, so that any id but these will do as padding.
        candidates = (processor.pad_id(), processor.unk_id(), *range(self.vocab_size))
        taken = (-1, self.bos, self.eos)
        self.pad = next(i for i in candidates if i not in taken)
        self.system = self.user = self.assistant = self.end = None
        self.stops = (self.eos,)
        self.control_ids = tuple(
            i
            for i in range(self.vocab_size)
            if processor.is_control(i) and i not in (self.bos, self.eos, self.pad)
        )

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without bos or eos."""
        if not self._own:
            return self._processor.encode(text)
        # `decode` gives the same text back, also where it holds this character.
        first, *rest = text.split(SPACE)
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._space + self._processor.encode(part)
        return ids

    def decode(self, ids) -> str:
        """Returns the text of ids; control pieces have none."""
        return self._processor.decode([int(i) for i in ids])

    spells, parsing = byte_tokenizer.spells, byte_tokenizer.parsing

    def name(self, id_: int) -> str:
        """Returns how an id is shown."""
        return self._processor.id_to_piece(int(id_))

    @classmethod
    def load(cls, path: str | Path) -> "SentencePiece":
        """Reads a .model file."""
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: no such tokenizer file")
        try:
            tokenizer = cls(path.read_bytes(), path)
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model ({error})") from error
        if tokenizer._own and tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
            raise UserError(
                f"{path}: does not give text back as it was (needs byte fallback and "
                "no normalisation); train one with tokenizer.files"
            )
        return tokenizer

    @classmethod
    def train(cls, texts, vocab_size: int, path) -> "SentencePiece":
        """Trains a byte-fallback BPE; the same texts give the same file.

        Args:
            texts: iterable of str.
            vocab_size: pieces, with 256 bytes and 8 control pieces among them.
            path: where the model file goes; it appears complete or not at all.
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
            raise UserError(_training_error(error, vocab_size)) from error
        storage.write_bytes(path, model.getvalue())
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


def _training_error(error, vocab_size):
    """Returns what SentencePiece's training error asks of the user, in one line."""
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
