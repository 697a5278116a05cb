"""A constitution: principles by which a model revises its answers, and judges pairs.

A constitution is a TOML file, or the name of one that ships:

    [[principles]]
    id = "harm"
    critique = "..."        # asks the model to find fault with its last answer
    revision = "..."        # and to write it again; the two go together
    preference = "..."      # which of two answers is better by this principle
    [[examples]]            # turns shown before a revision; any number
    prompt = "..."
    answer = "..."
    critique = "..."        # what the model said when it was asked by `principle`
    revision = "..."
    principle = "harm"

A principle has the two requests, the preference, or all three (Bai et al. 2022,
arxiv.org/abs/2212.08073). rater="constitution" asks a judge (`signals.judge`) about
each pair under principles that are drawn for it, and averages over them.
"""

from pathlib import Path
from typing import NamedTuple

from stagecraft import schema
from stagecraft.errors import UserError
from stagecraft.signals import endpoint, judge, labels, protocol, template
from stagecraft.signals.protocol import Verdict

READS = ("judge", "constitution", "principles")
FOLDER = Path(__file__).parent / "constitutions"
TEMPLATE = "principle"  # of judge.template, where the config names none
_TEXTS = ("critique", "revision", "preference")
_EXAMPLE = ("principle", "prompt", "answer", "critique", "revision")


class Principle(NamedTuple):
    """One principle; texts are "" where the file has none.

    Attributes:
        id: its name in records.
        critique, revision: requests; both are there or neither is.
        preference: what a judge is asked about two answers.
    """

    id: str
    critique: str
    revision: str
    preference: str


class Constitution(NamedTuple):
    """A constitution as read.

    Attributes:
        principles: `Principle`s, in the file's order.
        examples: lists of messages, each a revision from prompt to revised answer.
    """

    principles: tuple[Principle, ...]
    examples: tuple[tuple[dict, ...], ...] = ()

    def revising(self):
        """Returns the principles that revise."""
        return tuple(one for one in self.principles if one.revision)

    def preferring(self):
        """Returns the principles that judge pairs."""
        return tuple(one for one in self.principles if one.preference)


def read(specs: str, key: str) -> Constitution:
    """Reads constitutions: names of shipped ones or TOML files, separated by commas.

    Args:
        specs: of several the principles are joined.
        key: of the config, for messages.
    """
    principles, examples = [], []
    for spec in schema.listed(specs):
        one = _read(spec, f"{key}={spec!r}")
        principles += one.principles
        examples += one.examples
    ids = [one.id for one in principles]
    for name in ids:
        if ids.count(name) > 1:
            raise UserError(f"{key}={specs!r}: id={name!r} is there more than once")
    if not principles:
        raise UserError(f"{key}: is empty; expected {_shipped()}, or a TOML file")
    return Constitution(tuple(principles), tuple(examples))


def _shipped():
    return ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))


def _read(spec, where):
    values = template.read_toml(spec, FOLDER, where)
    for name, value in values.items():
        if name not in ("principles", "examples"):
            known = ("principles", "examples")
            raise UserError(f"{where}: {schema.unknown(name, name, known)}")
        if not isinstance(value, list):
            raise UserError(f"{where}: {name}: expected tables, as in [[{name}]]")
    if not values.get("principles"):
        raise UserError(f"{where}: principles: is missing, or empty")
    principles = [
        _principle(f"{where}: principle {n}", value)
        for n, value in enumerate(values["principles"], 1)
    ]
    by_id = {one.id: one for one in principles}
    examples = [
        _example(f"{where}: example {n}", value, by_id)
        for n, value in enumerate(values.get("examples", ()), 1)
    ]
    return Constitution(tuple(principles), tuple(examples))


def _principle(where, value):
    _strings(where, value, ("id", *_TEXTS))
    if not value.get("id", "").strip():
        raise UserError(f"{where}: id: is missing; expected a short name")
    where = f"{where} ({value['id']!r})"
    texts = {key: value.get(key, "").strip() for key in _TEXTS}
    for key, other in (("critique", "revision"), ("revision", "critique")):
        if texts[other] and not texts[key]:
            raise UserError(
                f"{where}: {key}: is missing; a critique and a revision go together"
            )
    if not any(texts.values()):
        raise UserError(
            f"{where}: preference: is missing, and so are critique and revision; "
            "expected the one or the other two"
        )
    return Principle(value["id"].strip(), **texts)


def _strings(where, value, known):
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a table of texts")
    for key, text in value.items():
        if key not in known:
            raise UserError(
                f"{where}: {schema.unknown(key, key, dict.fromkeys(known))}"
            )
        if not isinstance(text, str):
            raise UserError(f"{where}: {key}: expected a text")


def _example(where, value, by_id):
    _strings(where, value, _EXAMPLE)
    for key in _EXAMPLE:
        if not value.get(key):
            raise UserError(f"{where}: {key}: is missing")
    principle = by_id.get(value["principle"])
    if principle is None or not principle.revision:
        raise UserError(
            f"{where}: principle={value['principle']!r}: expected the id of one that "
            "revises"
        )
    turns = (value["prompt"], value["answer"], principle.critique)
    turns += (value["critique"], principle.revision, value["revision"])
    return tuple(
        {"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(turns)
    )


class Panel:
    """A rater of pairs by a judge under principles, some drawn for each pair.

    Args:
        judge: a `signals.judge.Judge` whose template has a place {principle}.
        principles: `Principle`s with a preference.
        each: how many of them are asked about each pair.
        rng: a numpy Generator that draws them.
    """

    def __init__(self, judge, principles, each, rng):
        self.judge, self.principles = judge, principles
        self.each, self.rng = each, rng
        self.identity = protocol.identity(
            rater="constitution",
            judge=judge.identity,
            principles=[list(one) for one in principles],
            each=each,
        )

    def rate(self, prompts, pairs):
        """Returns verdicts with a judge's evidence and the `principle` of it.

        Where several were asked about, theirs is `by_principle`.
        """
        count = len(self.principles)
        asked_of = [
            sorted(self.rng.permutation(count)[: self.each].tolist()) for _ in pairs
        ]
        said = [{} for _ in pairs]
        for number, principle in enumerate(self.principles):
            rows = [i for i, chosen in enumerate(asked_of) if number in chosen]
            verdicts = self.judge.under(principle.preference).rate(
                [prompts[i] for i in rows], [pairs[i] for i in rows]
            )
            for i, verdict in zip(rows, verdicts, strict=True):
                said[i][principle.id] = verdict
        return [self._verdict(one) for one in said]

    def _verdict(self, said):
        reason = next((one.reason for one in said.values() if one.reason), "")
        evidence = _evidence(said)
        if reason:
            return Verdict(reason=reason, evidence=evidence)
        config = self.judge.config
        logps = [one.evidence["logps"] for one in said.values()]
        whole = labels.of_principles(logps, config.combine)
        return Verdict(labels.clamped(whole, config.clamp), evidence=evidence)


def _evidence(said):
    by_principle = {name: one.evidence for name, one in said.items()}
    if None in by_principle.values():  # the same text twice: nothing was asked
        return None
    if len(by_principle) == 1:
        ((name, evidence),) = by_principle.items()
        return {"principle": name} | evidence
    tokens = sum(one["tokens"] for one in by_principle.values())
    return {"by_principle": by_principle, "tokens": tokens}


def check(where, config, world):
    """Refuses a judge that is nowhere, and a constitution without preferences."""
    judge.check_settings(where, config, (2,), default=TEMPLATE, principle=True)
    if not (config.judge_from or config.judge.url):
        raise UserError(
            f"{where}.rater='constitution': needs judge_from (a stage, a finished "
            "one's folder or hf:FOLDER), or judge.url (an endpoint)"
        )
    key = f"{where}.constitution"
    principles = read(config.constitution, key).preferring()
    if not principles:
        raise UserError(f"{key}={config.constitution!r}: no principle has a preference")
    if not 1 <= config.principles <= len(principles):
        raise UserError(
            f"{where}.principles={config.principles}: expected from 1 to "
            f"{len(principles)}, the principles with a preference"
        )


def make(config, sources, rng):
    """Returns the rater that the stage's config describes."""
    asked = sources.judge or endpoint.Endpoint(config.judge, sources.folder)
    principles = read(config.constitution, "constitution").preferring()
    own = judge.Judge(asked, config.judge, TEMPLATE)
    return Panel(own, principles, config.principles, rng)
