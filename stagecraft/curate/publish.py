"""The result put together from what the tasks wrote.

Everything here depends on the data and the config alone: not on the time, the machine
or the number of workers.
"""

import gzip
import itertools
import shutil
from pathlib import Path

import numpy as np
from datatrove.pipeline.base import PipelineStep

from stagecraft import storage
from stagecraft.curate import ledger, steps
from stagecraft.data import shards
from stagecraft.errors import UserError
from stagecraft.text import tokenizer

# Keys that say where, not what.
PLACES = ("out", "work")


class Publish(PipelineStep):
    """Writes OUT, whole or not at all.

    Args:
        work: the work folder.
        out: where the result appears; an older result there is replaced.
        tasks: how many there were.
        steps: the names of the steps with tallies, in order.
        config: the plain config.
        about: what else to tell: the classifier's figures, the evaluation index, the
            inputs.
        model: the classifier's file, or "".
        identity: what names this work.
    """

    type, name = "stagecraft", "publish"

    def __init__(self, work, out, tasks, steps, config, about, model, identity):
        super().__init__()
        self.work, self.out, self.tasks, self.steps = work, out, tasks, steps
        self.config, self.about = config, about
        self.model, self.identity = model, identity

    def run(self, data=None, rank=0, world_size=1):
        limit = self.config["examples"]
        tallies = {
            name: ledger.merged(self.work / "tallies" / name, self.tasks, limit)
            for name in self.steps
        }
        summary = self._summary(tallies)
        if not summary["documents"]:
            raise UserError(f"curate: no document is left: {_blame(summary['steps'])}")
        with storage.new_folder(self.out, replace=True) as temporary:
            (temporary / "text").mkdir()
            self._copy_text(temporary / "text")
            if self.config["tokenizer"]:
                self._write_shards(temporary / "shards")
            if self.model:
                shutil.copyfile(self.model, temporary / Path(self.model).name)
            self._copy_quarantine(temporary / "quarantine.jsonl")
            storage.write_json(temporary / "examples.json", self._examples(tallies))
            storage.write_json(temporary / "curation.json", summary)

    def _summary(self, tallies):
        rows = []
        for name, tally in tallies.items():
            read, read_characters, written, written_characters = tally.total()
            removed = {r: _sum(s)[0] for r, s in sorted(tally.removed.items())}
            changed = {w: _sum(s) for w, s in sorted(tally.changed.items())}
            changed.pop("tokens", None)
            rows.append(
                {
                    "name": name,
                    "documents": read,
                    "characters": read_characters,
                    "kept": written,
                    "kept_characters": written_characters,
                    "removed": removed,
                    "changed": {w: c[1] for w, c in changed.items()},
                    "changed_documents": {w: c[0] for w, c in changed.items()},
                }
            )
        first, last = tallies["read"], tallies["write"]
        sources = {}
        for source in sorted(first.flow.keys() | first.removed_from()):
            tokens = last.changed.get("tokens", {}).get(source, [0, 0])[1]
            came = first.flow.get(source, [0] * 4)
            went = last.flow.get(source, [0] * 4)
            sources[source] = {
                "unreadable": first.removed_from().get(source, 0),
                "documents": came[0],
                "characters": came[1],
                "kept": went[2],
                "kept_characters": went[3],
                "tokens": tokens,
                "removed": {
                    name: t.removed_from().get(source, 0)
                    for name, t in tallies.items()
                    if name != "read" and t.removed_from().get(source)
                },
            }
        return {
            "identity": self.identity,
            "documents": last.total()[2],
            "characters": last.total()[3],
            "tokens": sum(s["tokens"] for s in sources.values()),
            "tasks": self.tasks,
            "steps": rows,
            "sources": sources,
            **self.about,
            "config": {k: v for k, v in self.config.items() if k not in PLACES},
        }

    def _copy_text(self, folder):
        for rank in range(self.tasks):
            path = self.work / "text" / f"{rank:05d}.jsonl.gz"
            with gzip.open(path, "rb") as file:
                if not file.read(1):
                    continue  # the task kept nothing
            shutil.copyfile(path, folder / path.name)

    def _write_shards(self, folder):
        model = tokenizer.load(self.config["tokenizer"])
        scored = bool(self.model)
        shards.write(
            folder,
            self._documents(scored),
            tokenizer_digest=model.digest,
            vocab_size=model.vocab_size,
            columns=("source", "score") if scored else ("source",),
            settings={"curation": self.identity},
        )

    def _documents(self, scored):
        for rank in range(self.tasks):
            path = self.work / "ids" / f"{rank:05d}.npy"
            flat = np.load(path, mmap_mode="r")
            about = storage.read_json(path.with_suffix(".json"))
            ends = itertools.accumulate(about["lengths"])
            for end, length, source, score in zip(
                ends, about["lengths"], about["sources"], about["scores"], strict=True
            ):
                values = {"source": source} | ({"score": score} if scored else {})
                yield flat[end - length : end], values

    def _copy_quarantine(self, path):
        with path.open("wb") as out:
            for rank in range(self.tasks):
                part = self.work / "quarantine" / f"{rank:05d}.jsonl"
                out.write(part.read_bytes())

    def _examples(self, tallies):
        """Returns {step: [(reason, [example])]}.

        Beside a duplicate is the document that stays.
        """
        by_step = {}
        for name, tally in tallies.items():
            reasons = []
            for reason, examples in sorted(tally.examples.items()):
                for example in examples:
                    if example.get("twin") and name != "quality":
                        task, number = example["twin"]
                        rows = steps.kept(self.work, task)
                        row = next(itertools.islice(rows, number, None))
                        example["stays"] = row["id"]
                        example["other"] = ledger.shown(row["text"])
                reasons.append((reason, examples))
            by_step[name] = reasons
        return by_step


def _sum(sources):
    return [sum(column) for column in zip(*sources.values(), strict=True)]


def _blame(rows):
    """Returns "language removed 400 of 400", of the step that removed most."""
    if not rows[0]["documents"]:
        bad = sum(rows[0]["removed"].values())
        return f"none could be read, {bad} bad lines" if bad else "the files are empty"
    worst = max(rows, key=lambda r: sum(r["removed"].values()) / max(r["documents"], 1))
    reason = max(worst["removed"], key=worst["removed"].get)
    return (
        f"{worst['name']} removed {sum(worst['removed'].values())} of "
        f"{worst['documents']} (most: {reason}); loosen it or take it out of rules"
    )
