"""GGUF files, as llama.cpp keeps models, read by the `gguf` package.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

from stagecraft.errors import UserError, install


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        path: the file.
        values: {key: value} of its metadata.
        tensors: {name: `gguf.ReaderTensor`}, whose data is mapped into memory.
    """

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Any]

    def get(self, key: str, kind: type | tuple, default: Any = None) -> Any:
        """Returns a value of the metadata.

        Args:
            key: its name.
            kind: its type, or types.
            default: where there is none; None for a value that must be there.
        """
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.path}: has no {key} in its metadata")
        names = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, names) or (bool not in names and value is True):
            wanted = " or ".join(one.__name__ for one in names)
            raise UserError(
                f"{self.path}: {key}: expected {wanted}, got {type(value).__name__}"
            )
        return value


def read(path: str | Path) -> Content:
    """Reads a file's metadata, and where its tensors lie.

    Raises:
        UserError: there is none, it is no GGUF, or it is cut short.
    """
    path = Path(path)
    if path.suffix != ".gguf" or not path.is_file():
        raise UserError(f"{path}: no such file; expected a model's file.gguf")
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4)
def _read(path, changed, size):
    del changed, size  # part of the key
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(f"{path}: needs the gguf package: {install('gguf')}") from None
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file (it does not begin with GGUF)")
    try:
        reader = gguf.GGUFReader(path)
        values = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the package checks little of what it reads
        line = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"{path}: damaged or cut short ({line}); fetch it again"
        ) from None
    if values.get("split.count", 1) > 1:
        raise UserError(
            f"{path}: is one of {values['split.count']} parts; join them first "
            "(llama-gguf-split --merge)"
        )
    return Content(path, values, {tensor.name: tensor for tensor in reader.tensors})
