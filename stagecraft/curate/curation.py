"""Raw text to curated text: the steps in order, the work folder, the result.

    OUT/text/*.jsonl.gz     {"text", "source", "where", "score", and what else it had}
    OUT/shards/             the same as ids, where there is a tokenizer
    OUT/quarantine.jsonl    lines that could not be read: where, why, how they begin
    OUT/quality-HASH.npy    the classifier, where one was used
    OUT/curation.json       the config and every count
    OUT/report.html         what each step removed, why, with examples

OUT appears whole or not at all. What is half done lies in OUT.work/HASH, named by the
config and the contents of all it reads: the same command goes on there, another starts
afresh.
"""

import contextlib
import hashlib
import shutil
import sys
import time
from pathlib import Path

from stagecraft import defaults, schema, storage
from stagecraft.curate import classifier, inputs, language_id
from stagecraft.errors import UserError
from stagecraft.text import tokenizer

# Work of another version of these steps is not gone on with.
VERSION = 2
RULES = ("language", "gopher_repetition", "gopher_quality", "c4", "fineweb")


def resolve(config):
    """The complete config, checked; raises UserError."""
    c = schema.merge(defaults.curate(), config)
    if not c.files:
        raise UserError("files: is empty; name the files to read, as in in=FILES")
    if not c.out:
        raise UserError("out: is empty; name the folder to write, as in out=DIR")
    for rule in c.rules:
        schema.choice("rules", rule, RULES)
    if len(set(c.rules)) < len(c.rules):
        raise UserError(f"rules={tuple(c.rules)}: names one twice")
    if c.language.keep:
        schema.choice("language.keep", c.language.keep, language_id.NAMES)
    for key in ("document", "task_bytes", "examples"):
        schema.positive(key, c[key], zero=True)
    for key in ("n_grams", "buckets", "hashes"):
        schema.positive(f"minhash.{key}", c.minhash[key])
    for key in ("n_grams", "common"):
        schema.positive(f"contamination.{key}", c.contamination[key])
    _check_quality(c.quality)
    return c


def _check_quality(q):
    if bool(q.good) != bool(q.bad):
        raise UserError(
            f"quality.good={q.good!r} with quality.bad={q.bad!r}: a classifier is "
            "trained on both; name both, or neither"
        )
    if q.good and q.model:
        raise UserError(
            f"quality.model={q.model!r}: with quality.good and quality.bad one is "
            "trained; name the model or the samples"
        )
    if not 0 <= q.threshold <= 1:
        raise UserError(f"quality.threshold={q.threshold}: expected from 0 to 1")
    if not 0 < q.share <= 1:
        raise UserError(f"quality.share={q.share}: expected above 0, up to 1 (all)")
    schema.positive("quality.temperature", q.temperature, zero=True)
    if (q.threshold > 0 or q.share < 1) and not (q.good or q.model):
        raise UserError(
            f"quality.threshold={q.threshold}, quality.share={q.share}: there is no "
            "score to choose by; name quality.good and quality.bad, or quality.model"
        )


def curate(config, *, executor="local", workers=2):
    """Curates text; done before, it does nothing.

    Args:
        config: a ConfigDict or dict with keys of `defaults.curate()`.
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
    # Before anything is read: a tokenizer that is none is refused at once.
    digest = tokenizer.load(c.tokenizer).digest if c.tokenizer else ""
    out = Path(c.out)
    _check_out(out)
    began = time.monotonic()
    found = inputs.survey(c.files, c.text_key, c.document, c.task_bytes)
    named = {k: v for k, v in schema.plain(c).items() if k not in publish.PLACES}
    read = [c.quality.good, c.quality.bad, c.contamination.files]
    contents = [found.digest, digest, _model(c.quality.model), *map(_contents, read)]
    identity = storage.digest([VERSION, _engine_version(), named, contents])
    before = storage.read_json(out / "curation.json", {})
    if before.get("identity") == identity:
        _say(f"{out}: finished already")
        return before
    work = Path(c.work or f"{out}.work") / identity[:16]
    with alone(work), _writing(work):
        for rank, parts in enumerate(found.tasks):
            storage.write_json(work / "tasks" / f"{rank:05d}.json", parts)
        phases = pipeline.phases(c, work, len(found.tasks), found, identity)
        _say(
            f"{found.files} files, {found.size / 1e6:.1f} MB, in {len(found.tasks)} "
            f"tasks; working in {work}"
        )
        if not engine.run(phases, work, executor, workers, _Progress()):
            _say(f"handed to Slurm; {out} appears when its last job is done")
            return None
    result = storage.read_json(out / "curation.json")
    shutil.rmtree(work, ignore_errors=True)
    if not c.work:
        _remove_if_empty(work.parent)
    took = time.monotonic() - began
    count = result["steps"][0]["documents"]
    _say(
        f"{count} documents in {took:.1f} s ({count / took / workers:.0f} a second and "
        f"worker), {result['documents']} kept: {out / 'report.html'}"
    )
    return result


def _needs_datatrove():
    try:
        import datatrove.pipeline.dedup  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"curate: needs the package {error.name or 'datatrove'}; install "
            "stagecraft[curate]"
        ) from None
    from loguru import logger

    logger.remove()  # it would speak of every step


def _engine_version():
    from importlib import metadata

    return metadata.version("datatrove")


def _contents(spec):
    """A digest of the files a config names; "" for none."""
    return inputs.survey(spec, "", 0, 0).digest if spec else ""


def _model(path):
    """A digest of a classifier, which is looked into first; "" for none."""
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


class _Progress:
    """One line a phase; on a terminal it counts."""

    def __init__(self):
        self.live = sys.stderr.isatty()

    def __call__(self, phase, done, seconds):
        line = f"{phase.name}: {done} of {phase.tasks} tasks, {seconds:.1f} s"
        if done == phase.tasks:
            print(f"\r{line}" if self.live else line, file=sys.stderr)
        elif self.live:
            print(f"\r{line}", end="", file=sys.stderr, flush=True)


def _say(text):
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def alone(work):
    """Only one process works in a folder; the lock ends with the process."""
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
    """What the disk refuses is told in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or work}: {error.strerror or error}; put it right, and "
            "the same command goes on"
        ) from error


def _remove_if_empty(folder):
    if not any(folder.iterdir()):
        folder.rmdir()
