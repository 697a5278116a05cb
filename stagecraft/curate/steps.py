"""The steps of a pipeline, in datatrove's shape: documents in, documents out.

Every step counts what it does in a tally, and writes it when its task is done. A task
that is run again writes the same files over.
"""

import contextlib
import gzip
import json
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.filters.base_filter import get_filter_result

from stagecraft import storage
from stagecraft.curate import classifier, duplicates, inputs, personal, reader
from stagecraft.curate.ledger import Tally
from stagecraft.text import chat, tokenizer

# What the rules raise on texts they were not written for; their own bugs included.
_FAILURES = (ArithmeticError, AssertionError, LookupError, TypeError, ValueError)


class Step(PipelineStep):
    """A step with a tally; each kind has `each(data, tally, rank)`: what goes on.

    Args:
        name: its name, and that of its folder of tallies.
        work: the work folder.
        examples: how many to keep of each reason.
    """

    type = "stagecraft"

    def __init__(self, name, work, examples):
        self.name = name
        super().__init__()
        self.work, self.examples = Path(work), examples

    def run(self, data, rank=0, world_size=1):
        tally = Tally(self.examples)
        yield from self.each(data, tally, rank)
        tally.save(self.work / "tallies" / self.name, rank)


class Read(Step):
    """Documents of the task's parts of files; bad lines go to the quarantine."""

    def __init__(self, work, examples, text_key, source_key, document):
        super().__init__("read", work, examples)
        self.keys, self.document = (text_key, source_key), document

    def each(self, data, tally, rank):
        parts = storage.read_json(self.work / "tasks" / f"{rank:05d}.json")
        bad = []
        for part in map(inputs.Part.from_json, parts):
            for item in reader.read(part, *self.keys, self.document):
                if isinstance(item, reader.Bad):
                    bad.append(item._asdict())
                    about = dict(where=item.where, note=item.detail)
                    tally.dropped(item.source, item.data, item.reason, **about)
                    continue
                tally.took(item.source, item.text)
                tally.passed(item.source, item.text)
                yield Document(
                    text=item.text,
                    id=item.where,
                    metadata={"source": item.source, "record": item.record},
                )
        write_lines(self.work / "quarantine" / f"{rank:05d}.jsonl", bad)


class Filter(Step):
    """A rule over documents: datatrove's filters, or anything with their `filter`.

    Args:
        rule: filter(document) says True, False, (False, reason), or (False, reason,
            note); it may change the document's text.
    """

    def __init__(self, name, work, examples, rule):
        super().__init__(name, work, examples)
        self.rule = rule

    def each(self, data, tally, rank):
        for document in data:
            source, before = document.metadata["source"], document.text
            tally.took(source, before)
            keep, reason, note = self._apply(document)
            if not keep:
                tally.dropped(source, before, reason, where=document.id, note=note)
                continue
            if document.text != before:
                lost = len(before) - len(document.text)
                tally.altered(source, "characters cut from documents kept", lost)
            tally.passed(source, document.text)
            yield document

    def _apply(self, document):
        if not document.text.strip():
            return False, "empty", ""
        try:
            result = self.rule.filter(document)
        except _FAILURES as error:
            return False, "the rule cannot judge it", type(error).__name__
        if isinstance(result, tuple) and len(result) == 3:
            return result
        keep, reason = get_filter_result(result)
        return keep, reason or self.name, ""


class Score(PipelineStep):
    """Writes the classifier's score beside each document."""

    type, name = "stagecraft", "score"

    def __init__(self, path):
        super().__init__()
        self.path, self.model = path, None

    def run(self, data, rank=0, world_size=1):
        self.model = self.model or classifier.Classifier(self.path)
        for document in data:
            document.metadata["score"] = self.model.score(document.text)
            yield document


class Keep(PipelineStep):
    """Writes the documents so far, and the keys that duplicates share."""

    type, name = "stagecraft", "keep"

    def __init__(self, work):
        super().__init__()
        self.work = Path(work)

    def run(self, data, rank=0, world_size=1):
        keys = []
        with lines(self.work / "kept" / f"{rank:05d}.jsonl.gz", level=1) as write:
            for document in data:
                about = document.metadata
                score = about.get("score", 0.0)
                keys.append(duplicates.key(document.text, score))
                write({"text": document.text, "id": document.id, "about": about})
                yield document
        duplicates.save_keys(self.work, rank, keys)


class Sign(MinhashDedupSignature):
    """MinHash signatures of the documents, always from new files.

    A task that was cut off leaves signatures behind. datatrove would take them for a
    whole task's where their sizes agree; and a file it left open would be flushed over
    the new one.
    """

    def run(self, data, rank=0, world_size=1):
        for bucket in range(self.config.num_buckets):
            path = f"bucket_{bucket:03d}/{rank:05d}.minhash.sig"
            if self.output_folder.exists(path):
                self.output_folder.rm_file(path)
        super().run(data, rank, world_size)


class Verdict(Step):
    """Documents kept so far, less duplicates and those not chosen by their score."""

    def __init__(self, work, examples, name, code):
        super().__init__(name, work, examples)
        self.code = code

    def each(self, data, tally, rank):
        verdicts = duplicates.verdicts(self.work, rank)
        for document in data:
            source, text = document.metadata["source"], document.text
            tally.took(source, text)
            verdict = verdicts[document.metadata["number"]]
            if verdict["code"] == self.code:
                about = dict(where=document.id, note=_note(document, self.code))
                about["twin"] = [int(verdict["task"]), int(verdict["document"])]
                tally.dropped(source, text, self.name, **about)
                continue
            tally.passed(source, text)
            yield document


def _note(document, code):
    score = document.metadata.get("score")
    return f"score {score:.3f}" if code == duplicates.UNCHOSEN else ""


class Reread(PipelineStep):
    """The documents that `Keep` wrote, with their number in the task."""

    type, name = "stagecraft", "reread"

    def __init__(self, work):
        super().__init__()
        self.work = Path(work)

    def run(self, data=None, rank=0, world_size=1):
        for number, row in enumerate(kept(self.work, rank)):
            about = row["about"] | {"number": number}
            yield Document(text=row["text"], id=row["id"], metadata=about)


class Scrub(Step):
    """Replaces personal data, and counts it."""

    def __init__(self, work, examples, **kinds):
        super().__init__("personal data", work, examples)
        self.kinds = kinds

    def each(self, data, tally, rank):
        for document in data:
            source = document.metadata["source"]
            tally.took(source, document.text)
            document.text, counts = personal.scrub(document.text, **self.kinds)
            for kind, count in counts.items():
                tally.altered(source, f"{kind} replaced", count)
            tally.passed(source, document.text)
            yield document


class Write(Step):
    """Writes the curated text of a task, and its ids where there is a tokenizer.

    Args:
        tokenizer: its path, or "".
    """

    def __init__(self, work, examples, tokenizer):
        super().__init__("write", work, examples)
        self.tokenizer = tokenizer

    def each(self, data, tally, rank):
        model = tokenizer.load(self.tokenizer) if self.tokenizer else None
        ids, lengths, scores, sources = [], [], [], []
        with lines(self.work / "text" / f"{rank:05d}.jsonl.gz", level=6) as write:
            for document in data:
                about = document.metadata
                tally.took(about["source"], document.text)
                tally.passed(about["source"], document.text)
                row = about["record"] | {
                    "text": document.text,
                    "source": about["source"],
                    "where": document.id,
                }
                if "score" in about:
                    row["score"] = about["score"]
                write(row)
                sources.append(about["source"])
                scores.append(about.get("score", 0.0))
                if model:
                    tokens, _ = chat.document(document.text, model)
                    ids.append(np.array(tokens, np.uint32))
                    lengths.append(len(tokens))
                    tally.altered(about["source"], "tokens", len(tokens))
                yield document
        if model:
            folder = self.work / "ids"
            folder.mkdir(exist_ok=True)
            flat = np.concatenate(ids) if ids else np.zeros(0, np.uint32)
            np.save(folder / f"{rank:05d}.npy", flat)
            about = {"lengths": lengths, "scores": scores, "sources": sources}
            storage.write_json(folder / f"{rank:05d}.json", about)


@contextlib.contextmanager
def lines(path, level):
    """Opens a .jsonl.gz file whose bytes depend on what is written alone.

    Args:
        level: of the compression.

    Yields:
        (row) -> None, which appends a row as JSON.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", level, raw, mtime=0) as file:

        def write(row):
            data = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(data.encode("utf-8"))

        yield write


def kept(work, rank):
    """Rows that `Keep` wrote for a task."""
    with gzip.open(Path(work) / "kept" / f"{rank:05d}.jsonl.gz", "rb") as file:
        for line in file:
            yield json.loads(line)


def write_lines(path, rows):
    """Writes rows as JSON lines, whole."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    storage.write_text(path, text)
