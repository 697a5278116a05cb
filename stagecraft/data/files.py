"""Which files a spec names, here or on remote storage, and their bytes.

A spec is a file, a folder or a glob; several are separated by commas. What holds "://"
(gs://, s3://, ...) is read through fsspec, with the package of that storage installed.
Compressed files are read as a stream; one that was cut off is told, never read in part.
"""

import functools
import glob
import gzip
import hashlib
import importlib
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from stagecraft.data import shards
from stagecraft.errors import UserError

# Containers of records that may be compressed, and those that are not.
STREAMS = (".txt", ".jsonl", ".json")
COMPRESSED = (".gz", ".zst")
BINARY = (".parquet", ".arrow", ".array_record")
SUFFIXES = (
    *(stream + how for stream in STREAMS for how in ("", *COMPRESSED)),
    *BINARY,
)
# What lies beside data in folders of data sets and is none itself.
METADATA = (
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
)
_CHUNK = 2**20  # bytes


class Remote(NamedTuple):
    """A file on remote storage, by its whole address."""

    address: str

    @property
    def name(self):
        return self.address.rsplit("/", 1)[-1]

    def __str__(self):
        return self.address


def expand(spec):
    """The files a spec names, sorted within each part.

    Args:
        spec: a file, a directory (with what is in it, but nothing hidden) or a glob;
            several separated by commas, or a tuple. A folder that `datasets` saved
            stands for its Arrow files, a folder of shards for itself.

    Returns:
        list of Path and `Remote`, not empty. Raises UserError for what is missing or
        unreadable.
    """
    parts = [spec] if isinstance(spec, os.PathLike) else spec
    parts = spec.split(",") if isinstance(spec, str) else map(str, parts)
    found = []
    for part in (p.strip() for p in parts if p.strip()):
        found += _expand_remote(part) if "://" in part else _expand_local(part)
    for path in found:
        if not path.name.endswith(SUFFIXES) and not shards_here(path):
            raise UserError(f"{path}: expected a {', '.join(SUFFIXES)} file")
    if not found:
        raise UserError(f"files={spec!r}: names no file")
    return found


def shards_here(path):
    """Whether a path that `expand` gave is a folder of shards."""
    return isinstance(path, Path) and shards.is_folder(path)


def suffix(path):
    """(".jsonl", ".gz") of a file's name: its container and its compression, or ""."""
    name = path.name
    how = next((h for h in COMPRESSED if name.endswith(h)), "")
    name = name.removesuffix(how)
    return next(s for s in (*STREAMS, *BINARY) if name.endswith(s)), how


def digest(paths):
    """SHA-256 of the files' contents in order; names and places do not count.

    Shards are taken at their manifest's word, which `Shards.verify` checks.
    """
    total = hashlib.sha256()
    for path in paths:
        if shards_here(path):
            total.update(bytes.fromhex(shards.Shards(path).digest))
            continue
        one = hashlib.sha256()
        for chunk in chunks(path):
            one.update(chunk)
        total.update(one.digest())
    return total.hexdigest()


def lines(path):
    """The lines of a file as bytes, each with the end it has."""
    rest = []
    for chunk in chunks(path):
        *whole, last = chunk.split(b"\n")
        for line in whole:
            yield b"".join((*rest, line, b"\n"))
            rest.clear()
        rest.append(last)
    if last := b"".join(rest):
        yield last


def chunks(path):
    """The bytes of a file, decompressed, in pieces."""
    how = suffix(path)[1]
    try:
        with open_bytes(path) as file:
            if how == ".zst":
                yield from _unpacked(path, file)
                return
            source = gzip.GzipFile(fileobj=file) if how else file
            while chunk := source.read(_CHUNK):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut-off gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({_why(error)})") from None


def open_bytes(path):
    """A file opened for reading bytes, as they are stored."""
    try:
        if isinstance(path, Remote):
            system, inner = storage(path.address)
            return system.open(inner, "rb")
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({_why(error)})") from None


def storage(address):
    """The fsspec file system of an address, and the path in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise UserError(f"{address}: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise UserError(f"{address}: not a known storage ({error})") from None


def _why(error):
    return error.strerror or " ".join(str(error).split()) or type(error).__name__


def _unpacked(path, file):
    """The frames of a zstd file. Its own stream reader ends early without a word."""
    zstandard = optional("zstandard", path)
    frame = zstandard.ZstdDecompressor().decompressobj()
    begun = False
    try:
        while chunk := file.read(_CHUNK):
            while chunk:
                begun = True
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged or cut-off zstd file ({error})") from None
    if begun:
        raise UserError(f"{path}: damaged or cut-off zstd file (ends inside a frame)")


def optional(name, path):
    """A package that only some files need, or the line that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise UserError(
            f"{path}: needs the package {package}; pip install 'stagecraft[data]', or "
            f"{package} alone"
        ) from None


# -- local and remote specs ------------------------------------------------------------


def _expand_local(part):
    path = Path(part)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return [path]
    if glob.has_magic(part) and (matches := sorted(glob.glob(part, recursive=True))):
        found = []
        for match in map(Path, matches):
            whole = match.is_dir() and (_saved(match) or shards.is_folder(match))
            if match.name not in METADATA:
                found += _folder(match) if whole else [match]
        return found
    raise UserError(f"{part}: no such file, folder or glob; check the path")


def _folder(path):
    inside = list(_inside(path))
    if not inside:
        raise UserError(
            f"{path}: holds no {', '.join(SUFFIXES)} files; name a folder that does"
        )
    return inside


def _inside(folder):
    """Data below a folder, depth first by name."""
    if shards.is_folder(folder):
        yield folder
        return
    if _saved(folder):
        yield from _arrow_files(folder)
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _inside(path)
        elif path.name.endswith(SUFFIXES) and path.name not in METADATA:
            yield path


def _saved(folder):
    """Whether `datasets` saved a set, or a dict of splits, here."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _arrow_files(folder):
    """The Arrow files of a folder that `save_to_disk` wrote, in its own order."""
    if (folder / "dataset_dict.json").is_file():
        splits = _told(folder / "dataset_dict.json", "splits")
        if len(splits) != 1:
            raise UserError(
                f"{folder}: holds the splits {', '.join(splits) or 'none'}; name one, "
                f"as in {folder / (splits or ['train'])[0]}"
            )
        folder = folder / splits[0]
    files = _told(folder / "state.json", "_data_files")
    return [folder / file["filename"] for file in files]


def _told(path, key):
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({_why(error)})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: not as `datasets` writes it (no {key!r}); save the set again"
        ) from None


def _expand_remote(part):
    system, inner = storage(part)
    address = functools.partial(_address, system)
    try:
        if system.isdir(inner):
            found = [p for p in sorted(system.find(inner)) if _wanted(p, inner)]
            if not found:
                raise UserError(
                    f"{part}: holds no {', '.join(SUFFIXES)} files; name a folder that "
                    "does"
                )
        elif glob.has_magic(inner):
            found = sorted(system.glob(inner))
        else:
            found = [inner] if system.exists(inner) else []
    except OSError as error:
        raise UserError(f"{part}: cannot read it ({_why(error)})") from None
    if not found:
        raise UserError(f"{part}: no such file, folder or glob; check the address")
    return [Remote(address(path)) for path in found]


def _wanted(path, folder):
    below = path.removeprefix(folder).strip("/").split("/")
    hidden = any(part.startswith(".") for part in below)
    return path.endswith(SUFFIXES) and below[-1] not in METADATA and not hidden


def _address(system, path):
    return path if "://" in path else system.unstrip_protocol(path)
