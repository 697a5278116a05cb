"""Folders of safetensors files: read tensor by tensor, written as a stream.

The format is 8 bytes of header length, a JSON header of names, dtypes, shapes and
offsets, and the bytes (https://github.com/huggingface/safetensors). It is read here and
not by its library so that a tensor's pages leave memory with the tensor, and written
here because the library wants all tensors at once.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from stagecraft.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Sizes of dtypes that no weight of ours has, in bytes, to check a header.
OTHER = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U32": 4}
OTHER |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U64": 8}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The library's own limit: a longer header means a damaged file.
LONGEST_HEADER = 100_000_000


class Tensor(NamedTuple):
    """The position of one tensor in a file.

    Attributes:
        path: the file.
        dtype: the format's name, such as "BF16".
        shape: tuple of ints.
        start: offset of its first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def open(self) -> np.ndarray:
        """Maps the tensor into memory: pages are read when they are used."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, DTYPES[self.dtype])
        return np.memmap(
            self.path, DTYPES[self.dtype], "r", offset=self.start, shape=self.shape
        )


def read_folder(folder: str | Path) -> dict[str, Tensor]:
    """Reads the headers of a folder's files: {name: Tensor}.

    Raises:
        UserError: a shard is missing, cut short or damaged, or all are pickles.
    """
    folder = Path(folder)
    tensors = {}
    for path in files(folder):
        header = read_header(path)
        for name in tensors.keys() & header.keys():
            other = tensors[name].path.name
            raise UserError(
                f"{folder}: {other} and {path.name} both hold {name}; only one can be "
                "meant: move the other file away"
            )
        tensors |= header
    index = folder / INDEX
    if index.exists() and not (folder / SINGLE).exists():
        for name, file in _weight_map(index).items():
            if name not in tensors:
                raise UserError(
                    f"{folder / file}: lacks {name}, which {INDEX} says it holds"
                )
    return tensors


def read_header(path: str | Path) -> dict[str, Tensor]:
    """Reads {name: Tensor} of one file; checks offsets against the file's size."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise UserError(
                f"{path}: damaged: says its header is {length} bytes long, the file "
                f"has {size}; fetch it again"
            )
        try:
            header = json.loads(file.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            return {
                k: _tensor(path, k, v, 8 + length, size) for k, v in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: damaged: its header is not that of a safetensors file; "
                "fetch it again"
            ) from error


def _tensor(path, name, entry, offset, size):
    """Returns the `Tensor` of a header's entry; `offset` is where the data begins."""
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    item = DTYPES[dtype].itemsize if dtype in DTYPES else OTHER.get(dtype)
    if item is not None and stop - start != math.prod(shape) * item:
        raise UserError(
            f"{path}: damaged: {name} has {stop - start} bytes, {list(shape)} of "
            f"{dtype} need {math.prod(shape) * item}; fetch it again"
        )
    if not 0 <= start <= stop <= size - offset:
        raise UserError(
            f"{path}: cut short: {name} ends at byte {offset + stop}, the file at "
            f"{size}; fetch it again"
        )
    return Tensor(path, dtype, shape, offset + start)


def files(folder: Path) -> list[Path]:
    """Lists the safetensors files of a folder, as transformers chooses them.

    A file of all weights comes first, then the files of an index, then any.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        names = sorted(set(_weight_map(folder / INDEX).values()))
        for name in names:
            if not (folder / name).exists():
                raise UserError(
                    f"{folder / name}: is missing; {INDEX} names {len(names)} files: "
                    "fetch the rest"
                )
        return [folder / name for name in names]
    if paths := sorted(folder.glob("*.safetensors")):
        return paths
    pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
    if pickles:
        raise UserError(
            f"{folder}: holds its weights as pickles only ({sorted(pickles)[0]}), "
            "which can run any code when opened; convert them to safetensors first"
        )
    raise UserError(f"{folder}: holds no *.safetensors file")


def unread(folder: Path) -> list[str]:
    """Lists further files of a model's weights, which are not read."""
    read = files(folder)
    others = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return sorted(path.name for path in others if path not in read)


def equal(one: Tensor, other: Tensor, rows: int = 1 << 14) -> bool:
    """Tells whether two tensors hold the same numbers, some rows at a time."""
    if one.shape != other.shape:
        return False
    a, b = one.open(), other.open()
    starts = range(0, len(a), rows)
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in starts)


def _weight_map(path):
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): Path(file).name for name, file in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not an index of safetensors files (no weight_map); fetch it again"
        ) from error


def write_folder(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    make: Callable[[str], np.ndarray],
    *,
    dtype: str,
    shard_size: int,
) -> None:
    """Writes tensors into one file, or into several with an index.

    Args:
        folder: an existing folder.
        shapes: {name: shape}, in the order to write.
        make: (name) -> array of that shape and dtype, called once for each in order;
            only one is held at a time.
        dtype: a name of `DTYPES`.
        shard_size: bytes of tensors in a file, at most, unless one is larger.
    """
    item = DTYPES[dtype].itemsize
    shards, filled = [[]], 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    paths = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        paths = [SINGLE]
    for file, names in zip(paths, shards, strict=True):
        write_file(folder / file, {n: shapes[n] for n in names}, make, dtype)
    if count > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * item
        where = {n: f for f, names in zip(paths, shards, strict=True) for n in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def write_file(path: Path, shapes: dict, make: Callable, dtype: str) -> None:
    """Writes one file; see `write_folder`."""
    item, start = DTYPES[dtype].itemsize, 0
    header = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        stop = start + math.prod(shape) * item
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[start, stop])
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # aligned for vector loads
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            array = np.ascontiguousarray(make(name), DTYPES[dtype])
            assert array.shape == tuple(shape), (name, array.shape, shape)
            file.write(array.reshape(-1).view(np.uint8).data)
