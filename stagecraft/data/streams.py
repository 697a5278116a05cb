"""Bytes of a file, on this machine or on remote storage, decompressed as a stream.

A path that holds "://" (gs://, s3://, ...) is read through fsspec, with the package of
that storage installed.
"""

import importlib
import zlib
from pathlib import Path
from typing import NamedTuple

from stagecraft import stores
from stagecraft.errors import UserError, install

COMPRESSED = (".gz", ".zst")
_CHUNK = 2**20  # bytes


class Remote(NamedTuple):
    """A file on remote storage, by its whole address."""

    address: str

    @property
    def name(self) -> str:
        return self.address.rsplit("/", 1)[-1]

    def __str__(self):
        return self.address


class Damage(UserError):
    """A file ends too early, or does not hold what its suffix says.

    Attributes:
        detail: what is wrong, without the path.
    """

    def __init__(self, path, what, detail):
        self.detail = " ".join(str(detail).split())[:200]
        super().__init__(f"{path}: {what} ({self.detail})")


def path_of(text: str) -> Path | Remote:
    """Returns the path that `str` of it gave."""
    return Remote(text) if "://" in text else Path(text)


def compression(path) -> str:
    """Returns ".gz" or ".zst"; "" for a file that is not compressed."""
    return next((end for end in COMPRESSED if path.name.endswith(end)), "")


def unreadable(path, error: OSError) -> UserError:
    """Returns the one line about a file that the system refuses."""
    why = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path}: cannot read it ({why})")


def open_bytes(path):
    """Opens a file for reading its bytes, as they are stored."""
    try:
        if isinstance(path, Remote):
            system, inner = stores.file_system(path.address)
            return system.open(inner, "rb")
        return open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from None


def size(path) -> int:
    """Returns the bytes of a file, as it is stored."""
    try:
        if isinstance(path, Remote):
            system, inner = stores.file_system(path.address)
            return system.size(inner)
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None


def stored(path, digest=None, start=0):
    """Yields the bytes of a file as they are stored, in chunks.

    Args:
        path: Path or Remote.
        digest: a hash that is updated with each chunk, or None.
        start: the first byte.
    """
    try:
        with open_bytes(path) as file:
            file.seek(start)
            while chunk := file.read(_CHUNK):
                if digest:
                    digest.update(chunk)
                yield chunk
    except OSError as error:
        raise unreadable(path, error) from None


def chunks(path, digest=None):
    """Yields the decompressed bytes of a file; Damage after the last good chunk.

    Args:
        path, digest: as of `stored`; the digest is of the stored bytes.
    """
    how = compression(path)
    pieces = stored(path, digest)
    if how == ".gz":
        # gzip allows zeros after each of its members.
        yield from _members(path, pieces, _gzip_member, "gzip", zlib.error, b"\0")
    elif how == ".zst":
        zstandard = optional("zstandard", path)
        fresh = zstandard.ZstdDecompressor().decompressobj
        yield from _members(path, pieces, fresh, "zstd", zstandard.ZstdError)
    else:
        yield from pieces


def stretch(path, start=0, end=None):
    """Yields the decompressed bytes from `start` to `end`, by default the last."""
    if end is None and not start:
        yield from chunks(path)
    elif start == end:
        return
    elif compression(path):
        yield from _between(path, chunks(path), start, end)
    else:
        yield from _between(path, stored(path, start=start), 0, end - start)


def _between(path, pieces, start, end):
    passed = 0
    for piece in pieces:
        wanted = piece[max(start - passed, 0) : max(end - passed, 0)]
        passed += len(piece)
        if wanted:
            yield wanted
        if passed >= end:
            return
    raise UserError(f"{path}: became shorter while it was read; start again")


def lines(pieces):
    """Yields the lines of a stream of bytes, each with the end it has."""
    rest = []
    for piece in pieces:
        *whole, last = piece.split(b"\n")
        for line in whole:
            yield b"".join((*rest, line, b"\n"))
            rest.clear()
        if last:
            rest.append(last)
    if rest:
        yield b"".join(rest)


def _gzip_member():
    return zlib.decompressobj(wbits=31)


def _members(path, pieces, fresh, name, broken, padding=b""):
    """Decompresses the streams that lie in a file one after the other.

    zstandard's own stream reader ends early without an error, gzip's loses what was
    good before the damage.
    """
    what = f"damaged or cut-off {name} file"
    stream, begun, between = fresh(), False, b""
    for piece in pieces:
        while piece := piece if begun else piece.lstrip(between):
            try:
                data = stream.decompress(piece)
            except broken as error:
                detail = " ".join(str(error).split())
                raise Damage(path, what, f"damaged {name} data ({detail})") from None
            begun, piece = True, b""
            if data:
                yield data
            if stream.eof:
                piece, stream, begun = stream.unused_data, fresh(), False
                between = padding
    if begun:
        raise Damage(path, what, f"{name} file is cut off")


def optional(name, path):
    """Returns a package that only some files need, or says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise UserError(
            f"{path}: needs the package {package}: {install('data')}"
        ) from None
