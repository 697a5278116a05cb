"""Which files a spec names, here or on remote storage, and a digest of them.

A spec is a file, a folder, a glob, or "hf:OWNER/NAME" for a dataset in the cache of the
Hugging Face hub; several are separated by commas.
"""

import functools
import glob
import hashlib
import json
import logging
import os
import re
from pathlib import Path

from stagecraft import hub, stores
from stagecraft.data import shards, streams
from stagecraft.data.containers import SUFFIXES
from stagecraft.data.streams import Remote
from stagecraft.errors import UserError

# What the id of a dataset on the hub begins with: "hf:OWNER/NAME".
HUB = "hf:"
# Words in the names of files and folders, and the split that each names.
SPLITS = dict.fromkeys(("train", "training"), "train")
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
_log = logging.getLogger("stagecraft.data")
# Files that lie beside the data in folders of data sets and hold none.
METADATA = (
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
)


def expand(spec) -> list[Path | Remote]:
    """Returns the files a spec names, sorted within each part; never an empty list.

    Args:
        spec: a file, a directory (with what is in it, but nothing hidden) or a glob;
            several separated by commas, or a tuple. A folder that `datasets` saved
            stands for its Arrow files, a folder of shards for itself.

    Raises UserError for what is missing or unreadable.
    """
    return [path for path, _ in by_part(spec)]


def by_part(spec) -> list[tuple[Path | Remote, str]]:
    """Returns the files that `expand` does, each with the part of the spec it is of."""
    parts = [spec] if isinstance(spec, os.PathLike) else spec
    parts = spec.split(",") if isinstance(spec, str) else map(str, parts)
    paths = []
    for part in (p.strip() for p in parts if p.strip()):
        inside = _expand_remote(part) if "://" in part else _expand_local(part)
        paths += [(path, part) for path in inside]
    for path, _ in paths:
        if not path.name.endswith(SUFFIXES) and not shards_here(path):
            raise UserError(f"{path}: expected a {', '.join(SUFFIXES)} file")
    if not paths:
        raise UserError(f"files={spec!r}: names no file")
    return paths


def shards_here(path) -> bool:
    """Whether a path that `expand` gave is a folder of shards."""
    return isinstance(path, Path) and shards.is_folder(path)


def refuse_shards(path):
    """Refuses a folder of shards where text is wanted."""
    if shards_here(path):
        raise UserError(f"{path}: holds ids, not text; expected {', '.join(SUFFIXES)}")


def digest(paths) -> str:
    """Returns the SHA-256 of the files' contents in order, whatever their names.

    Files are decompressed. Of shards the manifest's digest is taken, which
    `Shards.verify` checks.
    """
    total = hashlib.sha256()
    for path in paths:
        if shards_here(path):
            total.update(bytes.fromhex(shards.Shards(path).digest))
            continue
        one = hashlib.sha256()
        for chunk in streams.chunks(path):
            one.update(chunk)
        total.update(one.digest())
    return total.hexdigest()


# -- local and remote specs ------------------------------------------------------------


def _expand_local(part):
    path = _of_the_hub(part) if part.startswith(HUB) else Path(part)
    if path.is_dir():
        return _train_split(part, _folder(path), path)
    if path.is_file():
        return [path]
    if glob.has_magic(part) and (matches := sorted(glob.glob(part, recursive=True))):
        paths = []
        for match in map(Path, matches):
            whole = match.is_dir() and (_saved(match) or shards.is_folder(match))
            if match.name not in METADATA:
                paths += _folder(match) if whole else [match]
        return _train_split(part, paths, _before_magic(part))
    raise UserError(f"{part}: no such file, folder or glob; check the path")


def _of_the_hub(part):
    """Returns the folder of a dataset that the hub's client downloaded."""
    name = part.removeprefix(HUB)
    names = tuple(f"**/*{suffix}" for suffix in SUFFIXES)
    folder = hub.find(name, files=names, kind="dataset")
    if folder is None:
        raise UserError(hub.absent(name, "dataset"))
    return folder


def _train_split(part, paths, root):
    """Returns the files without other splits than train, where there is one.

    What lies beside it is to measure by. Splits are told by the names of files and
    folders below `root`, as the hub's `datasets` does.
    """
    splits = {}
    for path in paths:
        below = str(path).removeprefix(str(root))
        splits.setdefault(_split(below), []).append(path)
    others = [name for name in splits if name not in ("train", "")]
    if "train" not in splits or not others:
        return paths
    files = ", ".join(
        f"{name} ({len(splits[name])} file{'s' * (len(splits[name]) > 1)}, such as "
        f"{splits[name][0]})"
        for name in others
    )
    _say(
        f"{part}: the train split is read, {len(splits['train'])} of {len(paths)} "
        f"files; not {files}: name it in data.heldout to evaluate on it"
    )
    return [path for path in paths if path not in sum(map(splits.get, others), [])]


def _before_magic(part):
    """Returns the folder that a glob begins with."""
    return os.path.dirname(re.split(r"[*?[]", part)[0])


def _split(below):
    """Returns the split that a path says it is of: the last word of its that is one.

    >>> _split("/data/train-00000-of-00001.parquet"), _split("/latest/test.jsonl")
    ('train', 'test')
    """
    words = re.split(r"[^A-Za-z]+", below.lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "")


@functools.cache
def _say(line):
    """Logs a line once: a spec is expanded several times."""
    _log.info(line)


def _folder(path):
    inside = list(_inside(path))
    if not inside:
        raise UserError(
            f"{path}: holds no {', '.join(SUFFIXES)} files; name a folder that does"
        )
    return inside


def _inside(folder):
    """Yields the data below a folder, depth first by name."""
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
    """Returns the Arrow files that `save_to_disk` wrote, in its own order."""
    if (folder / "dataset_dict.json").is_file():
        splits = _metadata(folder / "dataset_dict.json", "splits")
        if len(splits) != 1:
            raise UserError(
                f"{folder}: holds the splits {', '.join(splits) or 'none'}; name one, "
                f"as in {folder / (splits or ['train'])[0]}"
            )
        folder = folder / splits[0]
    files = _metadata(folder / "state.json", "_data_files")
    return [folder / file["filename"] for file in files]


def _metadata(path, key):
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except OSError as error:
        raise streams.unreadable(path, error) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: not as `datasets` writes it (no {key!r}); save the set again"
        ) from None


def _expand_remote(part):
    system, inner = stores.file_system(part)
    address = functools.partial(_address, system)
    try:
        if system.isdir(inner):
            paths = [p for p in sorted(system.find(inner)) if _wanted(p, inner)]
            if not paths:
                raise UserError(
                    f"{part}: holds no {', '.join(SUFFIXES)} files; name a folder that "
                    "does"
                )
        elif glob.has_magic(inner):
            paths = sorted(system.glob(inner))
        else:
            paths = [inner] if system.exists(inner) else []
    except OSError as error:
        raise streams.unreadable(part, error) from None
    if not paths:
        raise UserError(f"{part}: no such file, folder or glob; check the address")
    root = inner if system.isdir(inner) else _before_magic(inner)
    paths = _train_split(part, paths, root)
    return [Remote(address(path)) for path in paths]


def _wanted(path, folder):
    below = path.removeprefix(folder).strip("/").split("/")
    hidden = any(part.startswith(".") for part in below)
    return path.endswith(SUFFIXES) and below[-1] not in METADATA and not hidden


def _address(system, path):
    return path if "://" in path else system.unstrip_protocol(path)
