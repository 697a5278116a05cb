"""Pre-tokenised text on disk: memory-mapped ids that no process ever holds whole.

    FOLDER/manifest.json       dtype, counts, tokenizer; size and SHA-256 of each file
    FOLDER/tokens-00000.bin    a shard's documents one after the other, little endian
    FOLDER/offsets-00000.npy   i64[N + 1]: where each document begins, the end last
    FOLDER/COLUMN-00000.npy    one value a document, where columns were written; of a
                               column of bytes, where each begins in COLUMN-00000.bin

A folder is written as a stream and appears whole or not at all. Documents are stored as
they are trained on, bos and eos included (`text.chat.document`).
"""

import functools
import hashlib
import json
import mmap
import os
from pathlib import Path

import numpy as np

from stagecraft import storage
from stagecraft.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "stagecraft-shards"
VERSION = 1
# A shard is closed after the document that brings it to this many tokens.
SHARD_TOKENS = 2**27
# Tokens, or bytes of a column, collected before they are written.
_BUFFER = 2**20
# What the manifest says of a column of bytes, in place of the names of its texts.
BYTES = "bytes"


def is_folder(path):
    """Whether a path is a folder of shards."""
    return (Path(path) / MANIFEST).is_file()


# -- reading ---------------------------------------------------------------------------


class Shards:
    """The documents of a folder, by number: `shards[i]` is an array of ids.

    Files are opened when first looked into. Pickled, it is its path alone: an open
    memory map would ship all its bytes to every worker.

    Args:
        folder: what `write` made.

    Attributes:
        manifest: the manifest's dict.
        tokens: of all documents together.
        digest: SHA-256 of what the shards hold, whatever folder they are in.
    """

    def __init__(self, folder):
        self.path = Path(folder)
        self.manifest = _manifest(self.path)
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self.tokens = self.manifest["tokens"]
        self.digest = storage.digest(
            [self.manifest["dtype"], [s["files"] for s in self.manifest["shards"]]]
        )
        counts = [shard["documents"] for shard in self.manifest["shards"]]
        self._ends = np.cumsum(counts)
        self._check_sizes()
        self._open = {}  # (what, shard number): (values, offsets)

    def __len__(self):
        return self.manifest["documents"]

    def __getitem__(self, number):
        if not -len(self) <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        return self.read(number % len(self))

    def read(self, number, start=0, stop=None):
        """Returns the ids of a document from `start` to before `stop`; a view."""
        return self._slice("tokens", number, start, stop)

    def bytes_of(self, name, number, start=0, stop=None):
        """Returns a document's value of a column of bytes, or a part; a view, u8[n]."""
        return self._slice(name, number, start, stop)

    def _slice(self, what, number, start, stop):
        shard = 0
        if len(self._ends) > 1:
            shard = int(np.searchsorted(self._ends, number, side="right"))
            number -= int(self._ends[shard - 1]) if shard else 0
        values, offsets = self._mapped(what, shard)
        first, end = int(offsets[number]), int(offsets[number + 1])
        last = end if stop is None else min(first + stop, end)
        return values[first + start : last]

    @functools.cached_property
    def lengths(self):
        """Returns the tokens of each document, i64[N]."""
        shards = range(len(self._ends))
        every = [np.diff(self._mapped("tokens", i)[1]) for i in shards]
        return np.concatenate(every)

    def begins_with(self, token):
        """Whether each document's first id is this one, bool[N]."""
        every = []
        for number in range(len(self._ends)):
            ids, offsets = self._mapped("tokens", number)
            some = np.flatnonzero(np.diff(offsets))
            first = np.zeros(len(offsets) - 1, bool)
            first[some] = ids[offsets[some]] == token
            every.append(first)
        return np.concatenate(every)

    def column(self, name):
        """Returns one value a document: numbers, or texts as an array of objects.

        A column of bytes is read by `bytes_of`.
        """
        columns = self.manifest["columns"]
        if name not in columns:
            raise UserError(
                f"{self.path}: no column {name!r}; it has "
                f"{', '.join(map(repr, columns)) or 'none'}"
            )
        values = np.concatenate(
            [
                np.load(self.path / _name(name, i), allow_pickle=False)
                for i in range(len(self._ends))
            ]
        )
        names = columns[name]
        return values if names is None else np.array(names, object)[values]

    def verify(self):
        """Reads every byte once and compares its SHA-256; returns self."""
        for path, written in self._files():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != written["sha256"]:
                raise UserError(
                    f"{path}: its content is not what {MANIFEST} says (SHA-256 "
                    f"{digest[:12]}, expected {written['sha256'][:12]}); it was "
                    "damaged or changed: write the shards again"
                )
        return self

    def check_tokenizer(self, digest, vocab_size):
        """Refuses shards that another tokenizer wrote; returns self."""
        own = self.manifest["tokenizer"]
        if own != digest:
            raise UserError(
                f"{self.path}: was tokenised by another tokenizer (digest {own[:12]}, "
                f"{self.manifest['vocab_size']} ids) than this run's ({digest[:12]}, "
                f"{vocab_size} ids); set tokenizer.path to that one, or tokenise the "
                "text again"
            )
        return self

    def __getstate__(self):
        return {"path": str(self.path)}

    def __setstate__(self, state):
        self.__init__(state["path"])

    def __repr__(self):
        # Grain compares it when an iterator goes on from a saved state.
        return f"Shards({str(self.path)!r}, {self.digest[:12]})"

    def _mapped(self, what, number):
        """Returns the values of a shard one after the other, and where each begins."""
        if (what, number) not in self._open:
            tokens = what == "tokens"
            dtype = self.dtype if tokens else np.dtype(np.uint8)
            path = self.path / _name(what, number, "bin")
            values = np.zeros(0, dtype)
            if path.stat().st_size:  # an empty file cannot be mapped
                with open(path, "rb") as file:
                    bytes_ = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                # A plain array over the map: slicing np.memmap is ten times slower.
                values = np.frombuffer(bytes_, dtype)
            path = self.path / _name("offsets" if tokens else what, number)
            offsets = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            self._open[what, number] = values, offsets
        return self._open[what, number]

    def _files(self):
        """Yields (path, what the manifest says of it) of every file."""
        for shard in self.manifest["shards"]:
            for name, written in shard["files"].items():
                yield self.path / name, written

    def _check_sizes(self):
        for path, written in self._files():
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise UserError(
                    f"{path}: missing, but {MANIFEST} names it; restore it, or write "
                    "the shards again"
                )
            if size != written["bytes"]:
                raise UserError(
                    f"{path}: has {size} bytes, expected {written['bytes']}: it was "
                    "cut off or changed; copy it again, or write the shards again"
                )


def _manifest(folder):
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no shards here (no {MANIFEST})")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format is {manifest['format']!r}, expected {FORMAT!r}")
        if manifest["version"] != VERSION:
            raise ValueError(f"version {manifest['version']}, this reads {VERSION}")
        totals = {
            k: sum(s[k] for s in manifest["shards"]) for k in ("documents", "tokens")
        }
        for key, total in totals.items():
            if manifest[key] != total:
                raise ValueError(f"{key}={manifest[key]}, but its shards have {total}")
        _ = (
            manifest["tokenizer"][:12],
            manifest["vocab_size"],
            manifest["columns"].keys(),
        )
        if manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {manifest['dtype']!r}, expected uint16 or uint32")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path}: not a usable manifest of shards ({why}); write the shards again"
        ) from None
    return manifest


# -- writing ---------------------------------------------------------------------------


def write(
    folder,
    documents,
    *,
    tokenizer_digest,
    vocab_size,
    columns=(),
    settings=None,
    shard_tokens=SHARD_TOKENS,
    empty=False,
):
    """Writes documents as they come; holds no more than a buffer of them.

    Args:
        folder: where to; it must not exist, or be empty.
        documents: iterable of ids (lists or arrays); with columns, of
            (ids, {column: value}).
        tokenizer_digest: the tokenizer's `digest`, compared when a run reads them.
        vocab_size: ids are below it; up to 65,536 they take two bytes, else four.
        columns: names of values kept beside each document: numbers or texts, such as
            "score" or "source", or bytes of any length.
        settings: a dict of JSON values kept in the manifest: how it was made.
        shard_tokens: a shard ends with the document that reaches this many.
        empty: whether there may be no document.

    Returns:
        the manifest's dict. Raises UserError, and leaves nothing behind, where there is
        no document and must be one, an id is outside the vocabulary, or the disk is
        full.
    """
    # Every process of a program may fill a cache of its own machine.
    with storage.new_folder(folder, concurrent=True) as temporary:
        writer = _Writer(temporary, vocab_size, tuple(columns), shard_tokens)
        for document in documents:
            writer.add(*document) if columns else writer.add(document)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": writer.dtype.name,
            "vocab_size": vocab_size,
            "tokenizer": tokenizer_digest,
            "settings": settings or {},
            **writer.finish(),
        }
        if not (manifest["documents"] or empty):
            raise UserError(f"{folder}: no document to write")
        text = storage.json_text(manifest)
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


class _Writer:
    """Appends documents to the open shard, and closes it when it is full."""

    def __init__(self, folder, vocab_size, columns, shard_tokens):
        self.folder, self.vocab_size = folder, vocab_size
        self.shard_tokens = shard_tokens
        self.dtype = np.dtype("uint16" if vocab_size <= 2**16 else "uint32")
        self.columns = {name: None for name in columns}  # names of a text column
        self.codes = {name: {} for name in columns}  # text: its number
        for name in columns:
            if not name.isidentifier() or name in ("tokens", "offsets"):
                raise UserError(
                    f"column {name!r}: expected a name of letters, digits and _, and "
                    "neither tokens nor offsets"
                )
        self.shards, self.documents, self.tokens = [], 0, 0
        self._begin()

    def add(self, ids, values=None):
        ids = np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise UserError(
                f"document {self.documents}: its ids are {ids.dtype}, expected whole "
                "numbers"
            )
        self.buffer.append(ids)
        self.buffered += len(ids)
        self.lengths.append(len(ids))
        if self.columns:
            self._add_values(values)
        self.documents += 1
        self.tokens += len(ids)
        if self.buffered >= _BUFFER:
            self._flush()
        if self.tokens - self.began >= self.shard_tokens:
            self._close()
            self._begin()

    def finish(self):
        if self.lengths or not self.shards:
            self._close()
        else:
            self.file.close()
            (self.folder / _name("tokens", len(self.shards), "bin")).unlink()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "columns": self.columns,
            "shards": self.shards,
        }

    def _begin(self):
        self.file = _File(self.folder / _name("tokens", len(self.shards), "bin"))
        self.beside = {}  # column of bytes: its file
        self.buffer, self.buffered, self.began = [], 0, self.tokens
        self.lengths, self.values = [], {name: [] for name in self.columns}

    def _flush(self):
        if not self.buffered:
            return
        # In 64 bits first: a small type would wrap ids outside its range.
        ids = np.concatenate([b.astype(np.int64) for b in self.buffer])
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(
                f"one of documents {self.documents - len(self.buffer)} to "
                f"{self.documents}: has id {bad}, outside the tokenizer's "
                f"{self.vocab_size} ids"
            )
        self.file.write(ids.astype(self.dtype.newbyteorder("<")).tobytes())
        self.buffer, self.buffered = [], 0

    def _add_values(self, values):
        if values is None or values.keys() != self.columns.keys():
            raise UserError(
                f"document {self.documents}: expected a value for each column "
                f"{', '.join(self.columns)}, got {values!r}"
            )
        for name, value in values.items():
            if isinstance(value, bytes):
                value = self._add_bytes(name, value)
            elif isinstance(value, str):
                value = self.codes[name].setdefault(value, len(self.codes[name]))
                self.columns[name] = list(self.codes[name])
            elif self.columns[name] is not None:
                raise UserError(
                    f"document {self.documents}: column {name!r} is {value!r}, where "
                    "those before are texts"
                )
            self.values[name].append(value)

    def _add_bytes(self, name, value):
        """Writes a value of a column of bytes; returns its length."""
        self.columns[name] = BYTES
        if name not in self.beside:
            path = self.folder / _name(name, len(self.shards), "bin")
            self.beside[name] = _File(path)
        self.beside[name].write(value)
        return len(value)

    def _close(self):
        self._flush()
        number, files = len(self.shards), {}
        for file in (self.file, *self.beside.values()):
            files[file.path.name] = file.close()
        arrays = {"offsets": _offsets(self.lengths)}
        for name, values in self.values.items():
            dtype = np.float64 if self.columns[name] is None else np.int32
            has_bytes = self.columns[name] == BYTES
            arrays[name] = _offsets(values) if has_bytes else np.array(values, dtype)
        for name, array in arrays.items():
            path = self.folder / _name(name, number)
            np.save(path, array, allow_pickle=False)
            data = path.read_bytes()
            files[path.name] = {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        self.shards.append(
            {
                "documents": len(self.lengths),
                "tokens": self.tokens - self.began,
                "files": files,
            }
        )


class _File:
    """A file that is appended to, and hashed meanwhile."""

    def __init__(self, path):
        self.path, self._hash, self._size = path, hashlib.sha256(), 0
        self._file = path.open("wb", buffering=_BUFFER)

    def write(self, data):
        self._hash.update(data)
        self._file.write(data)
        self._size += len(data)

    def close(self):
        """Returns what the manifest says of the file, once it is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}


def _offsets(lengths):
    """Returns where each of several values begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype("<i8")


def _name(what, number, suffix="npy"):
    return f"{what}-{number:05d}.{suffix}"
