"""Text tokenised once: shards by what they were made of.

    CACHE/KEY/    the shards of one files spec
    CACHE/KEY.lock

KEY is a digest of the files' contents, the tokenizer and how text is cut, so that
nothing else needs to be compared. Of several processes that need the same, one works
and the others wait; a process that dies leaves no lock behind, since the system drops
it, and no part of a folder, since that appears whole.
"""

import contextlib
import logging
import os
import shutil
from pathlib import Path

from stagecraft import processes, storage
from stagecraft.data import containers, files, readers, shards
from stagecraft.data.rendering import spelled
from stagecraft.data.tally import Tally
from stagecraft.errors import UserError
from stagecraft.text import chat

# Raised when the same text would become other ids, or what is beside them changes.
VERSION = 2
_log = logging.getLogger("stagecraft.data")


def tokens(spec, mapping, tokenizer, folder, counts=None) -> list[shards.Shards]:
    """Returns the documents of a files spec as shards, tokenised once.

    Args:
        spec: files of text, folders of shards, or both.
        mapping: {"our key": "the file's key"}.
        tokenizer: has `digest` and `vocab_size`.
        folder: the cache.
        counts: a `Tally` of the stage's records, or None.

    Returns:
        verified ones: those named, then those of the text.
    """
    paths = files.expand(spec)
    identity = (tokenizer.digest, tokenizer.vocab_size)
    ready = [path for path in paths if files.shards_here(path)]
    every = []
    for path in ready:
        one = shards.Shards(path).check_tokenizer(*identity).verify()
        _log.info("%s: shards, %d documents, %d tokens", path, len(one), one.tokens)
        every.append(one)
    text = [path for path in paths if not files.shards_here(path)]
    if text:
        counts = counts or Tally()
        one = _tokenised(text, mapping or {}, tokenizer, Path(folder), counts)
        counts.add(one.manifest["settings"]["reading"], text)
        every.append(one)
    return every


def _tokenised(paths, mapping, tokenizer, folder, counts):
    suffixes = [containers.suffix(path) for path in paths]
    settings = {
        "version": VERSION,
        "content": files.digest(paths),
        "containers": suffixes,
        "document": containers.DOCUMENT if ".txt" in suffixes else 0,
        "key": mapping.get("text", "text"),
        "tokenizer": tokenizer.digest,
    }
    # Further settings where they make other ids, so that older folders stay of use.
    settings |= {"control_tokens": "parse"} if getattr(tokenizer, "parses", 0) else {}
    settings |= {"bad": "drop"} if counts.drops_bad else {}
    name = f"{paths[0]} and {len(paths) - 1} more" if paths[1:] else paths[0]

    def write(target):
        here = Tally(counts.data)
        shards.write(
            target,
            _ids(readers.texts(paths, mapping, here), tokenizer, here, settings, paths),
            tokenizer_digest=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            settings=settings,
        )

    return once(folder, settings, write, f"{name}: tokens")


def once(folder, settings, write, what) -> shards.Shards:
    """Returns the shards that were made with these settings, made now where due.

    Args:
        folder: the cache.
        settings: a dict of JSON values that decide what the shards hold; `write` may
            add to it.
        write: (target) -> None, makes the shards.
        what: what to call them in the line that says they are there.
    """
    return processes.in_turn(lambda: _once(folder, settings, write, what), "cache")


def _once(folder, settings, write, what):
    folder = Path(folder)
    target = folder / storage.digest(settings)[:32]
    if (cached := _cached(target)) is not None:
        counts = len(cached), cached.tokens
        _log.info("%s from the cache, %d documents, %d tokens", what, *counts)
        return cached
    with _alone(target) as alone:
        there = target.exists()
        # Another process may have done it while this one waited.
        if (cached := _cached(target, say=True)) is not None:
            return cached
        # What is damaged, and what a process that was killed here left unfinished;
        # without locks it may be another's that is still at work.
        unfinished = folder.glob(f".{target.name}.*") if alone else ()
        for rest in (*[target] * there, *unfinished):
            shutil.rmtree(rest, ignore_errors=True)
        try:
            write(target)
        except UserError:
            if alone or not shards.is_folder(target):
                raise
    return shards.Shards(target)


def _ids(documents, tokenizer, counts, settings, paths):
    """Yields the ids of documents; then what became of them is in the settings."""
    for text in documents:
        if tokenizer.spells(text):
            counts.notes[spelled(tokenizer)] += 1
        yield chat.document(text, tokenizer)[0]
    settings["reading"] = counts.kept_beside(paths)


def _cached(target, say=False):
    """Returns the shards of a folder; None where there are none, or damaged ones.

    Args:
        say: whether to warn of what is damaged.
    """
    if not shards.is_folder(target):
        return None
    try:
        return shards.Shards(target).verify()
    except UserError as error:
        if say:
            _log.warning("%s; made again", error)
        return None


@contextlib.contextmanager
def _alone(target):
    """Holds other processes off, and says whether it can.

    Without locks in the system several may work, and the first rename wins.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(f"{target}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(
            f"{target.parent}: cannot write here ({error.strerror}); name another "
            "folder with data.cache"
        ) from None
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
            locks = True
        except ImportError:
            locks = False
        yield locks
    finally:
        os.close(handle)
