"""Raw text to curated text: the steps in order, the work folder, the result.

    OUT/text/*.jsonl.gz     {"text", "source", "where", "score", and what else it had}
    OUT/shards/             the same as ids, where there is a tokenizer
    OUT/quarantine.jsonl    lines that could not be read: where, why, how they begin
    OUT/quality-HASH.npy    the classifier, where one was used
    OUT/curation.json       the config and every count
    OUT/examples.json       of what each step removed, and why

OUT appears whole or not at all. What is half done lies in OUT.work/HASH, named by the
config and the contents of all it reads: the same command goes on there, another starts
afresh.
"""

import contextlib
import hashlib
import logging
import shutil
import time
from importlib import metadata
from pathlib import Path

from stagecraft import schema, storage
from stagecraft.curate import classifier, inputs
from stagecraft.curate.config import resolve
from stagecraft.errors import UserError, install
from stagecraft.text import tokenizer

# Work of another version of these steps is not gone on with.
VERSION = 2
_log = logging.getLogger("stagecraft.curate")


def curate(config, *, executor="local", workers=2):
    """Curates text; done before, it does nothing.

    Args:
        config: a ConfigDict or dict with keys of `curate.config.defaults()`.
        executor: "local", "ray:ADDRESS" or "slurm:partition=NAME,time=HH:MM:SS".
        workers: tasks at once.

    Returns:
        the result's curation.json as a dict; None where a cluster goes on with it.
    """
    c = resolve(config)
    schema.positive("--workers", workers)
    _needs_datatrove()
    from stagecraft.curate import engine, pipeline, publish

    engine.check(executor)
    # A tokenizer that cannot be read is refused before the input is.
    digest = tokenizer.load(c.tokenizer).digest if c.tokenizer else ""
    out = Path(c.out)
    _check_out(out)
    began = time.monotonic()
    survey = inputs.survey(c.files, c.text_key, c.document, c.task_bytes)
    named = {k: v for k, v in schema.plain(c).items() if k not in publish.PLACES}
    read = [c.quality.good, c.quality.bad, c.contamination.files]
    contents = [survey.digest, digest, _model(c.quality.model), *map(_contents, read)]
    identity = storage.digest([VERSION, metadata.version("datatrove"), named, contents])
    before = storage.read_json(out / "curation.json", {})
    if before.get("identity") == identity:
        _log.info("%s: finished already", out)
        return before
    work = Path(c.work or f"{out}.work") / identity[:16]
    with alone(work), _writing(work):
        for rank, parts in enumerate(survey.tasks):
            storage.write_json(work / "tasks" / f"{rank:05d}.json", parts)
        phases = pipeline.phases(c, work, len(survey.tasks), survey, identity)
        size, tasks = survey.size / 1e6, len(survey.tasks)
        how = (survey.files, size, tasks, work)
        _log.info("%d files, %.1f MB, in %d tasks; working in %s", *how)
        if not engine.run(phases, work, executor, workers):
            _log.info("handed to Slurm; %s appears when its last job is done", out)
            return None
    result = storage.read_json(out / "curation.json")
    shutil.rmtree(work, ignore_errors=True)
    if not c.work and not any(work.parent.iterdir()):
        work.parent.rmdir()
    took = time.monotonic() - began
    count = result["steps"][0]["documents"]
    speed = f"{count} documents in {took:.1f} s ({count / took / workers:.0f} a second"
    _log.info("%s and worker), %d kept: %s", speed, result["documents"], out)
    return result


def _needs_datatrove():
    try:
        import datatrove.pipeline.dedup  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"curate: needs the package {error.name or 'datatrove'}: "
            f"{install('curate')}"
        ) from None
    from loguru import logger

    logger.remove()  # it reports every step


def _contents(spec):
    """Returns a digest of the files a config names; "" for none."""
    return inputs.survey(spec, "", 0, 0).digest if spec else ""


def _model(path):
    """Returns a digest of a classifier, once it could be read; "" for none."""
    if not path:
        return ""
    classifier.Classifier(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _check_out(out):
    used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if used and not (out / "curation.json").is_file():
        raise UserError(
            f"out={out}: exists and is no result of stagecraft curate; remove it or "
            "name another"
        )


@contextlib.contextmanager
def alone(work):
    """Keeps other processes out of a folder; the lock ends with the process."""
    import fcntl  # on Linux and macOS alone

    try:
        work.mkdir(parents=True, exist_ok=True)
        file = (work / "lock").open("a")
    except OSError as error:
        raise UserError(
            f"{work}: cannot write here ({error.strerror}); choose another out or work "
            "folder"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{work}: another stagecraft curate is at work here; wait for it or "
                "stop it"
            ) from None
        yield


@contextlib.contextmanager
def _writing(work):
    """Turns what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or work}: {error.strerror or error}; put it right, and "
            "the same command goes on"
        ) from error
