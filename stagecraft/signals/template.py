"""What a judge is asked, with places for a prompt and its answers, and what it says.

A template is a TOML file, or the name of one that is shipped:

    question = "... {prompt} ... {first} ... {second} ..."   # {first} alone: a score;
                                   # perhaps {principle}, of a constitution
    answer = "Better answer:"      # how the judge's reply begins; its label follows
    labels = [" A", " B"]          # what it may say, one for each place; or scores
    rationale = "Rationale:"       # begins the reply that reasons first; optional
    render = "chat"                # or "text"; by default as the judge was trained
    [[examples]]                   # shown before the question; any number
    prompt = "..."
    first = "..."
    second = "..."
    label = " A"
    rationale = "..."              # optional

What fills a place is text and stays text: a brace in it is no place, and a control
token spelled in it is letters (`text.tokenizer`).
"""

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

from stagecraft import schema
from stagecraft.errors import UserError

FOLDER = Path(__file__).parent / "templates"
PLACES = ("first", "second")
_PLACE = re.compile(r"\{(\w+)\}")
_KEYS = {
    "question": str,
    "answer": str,
    "labels": list,
    "rationale": str,
    "render": str,
    "examples": list,
}


class Turn(NamedTuple):
    """An example: what was asked, and the whole reply."""

    question: str
    reply: str


class Question(NamedTuple):
    """One question to a judge.

    Attributes:
        examples: the `Turn`s before it.
        text: what is asked.
        lead: how the reply begins, before the label.
    """

    examples: tuple[Turn, ...]
    text: str
    lead: str

    def messages(self) -> list[dict]:
        """Returns the turns of a chat up to the reply, which `lead` begins."""
        turns = []
        for example in self.examples:
            turns += [_message("user", example.question)]
            turns += [_message("assistant", example.reply)]
        return [*turns, _message("user", self.text)]

    def bare(self) -> str:
        """Returns the whole as one text that ends in `lead`."""
        turns = [f"{one.question}\n\n{one.reply}" for one in self.examples]
        return "\n\n".join([*turns, f"{self.text}\n\n{self.lead}"])


class Answered(NamedTuple):
    """What a judge answered to one question.

    Attributes:
        logps: log-probability of each label in nats; () where there is none.
        reason: why there is none; "" where there is.
        bounded: numbers of the labels whose log-probability is only an upper bound,
            since an endpoint reports no more than the likeliest tokens.
        rationale: what the judge reasoned before.
        tokens: read and written.
    """

    logps: tuple[float, ...] = ()
    reason: str = ""
    bounded: tuple[int, ...] = ()
    rationale: str = ""
    tokens: int = 0


class Template(NamedTuple):
    """A template as read; see this file's docstring.

    Attributes:
        name: of the file, for messages.
        question, answer, rationale, render: as in the file, "" where there is none.
        labels: what the judge may say.
        examples: as `Question` has them.
        places: how many answers one question holds.
        principle: what fills the place {principle}; None without that place.
    """

    name: str
    question: str
    answer: str
    rationale: str
    render: str
    labels: tuple[str, ...]
    examples: tuple[Turn, ...]
    places: int
    principle: str | None = None

    def ask(self, prompt, answers, *, reasoned: bool = False) -> Question:
        """Returns the question about the answers to a prompt.

        Args:
            prompt: a text or messages.
            answers: texts, in the order of their places.
            reasoned: whether the reply begins with a rationale rather than the label.
        """
        text = _filled(self.question, prompt, answers, self.principle)
        return Question(
            self.examples, text, self.rationale if reasoned else self.answer
        )


def read(spec: str, key: str = "judge.template") -> Template:
    """Reads a template: the name of a shipped one, or a TOML file.

    Args:
        spec: the name or path.
        key: of the config, for messages.
    """
    where = f"{key}={spec!r}"
    return _template(where, read_toml(spec, FOLDER, where))


def read_toml(spec: str, folder: Path, where: str) -> dict:
    """Returns what a TOML file holds: one that ships, by its name, or a path.

    Args:
        spec: the name or path.
        folder: where those that ship lie.
        where: the key of the config, for messages.
    """
    path = folder / f"{spec}.toml"
    if not path.exists():
        path = Path(spec)
    if not path.is_file():
        shipped = sorted(one.stem for one in folder.glob("*.toml"))
        raise UserError(
            f"{where}: no such file; {schema.hint(spec, shipped)}expected a TOML file, "
            f"or one of {', '.join(shipped)}"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not a TOML file ({error})") from error


def _template(where, values):
    for name, value in values.items():
        if name not in _KEYS:
            raise UserError(f"{where}: {schema.unknown(name, name, _KEYS)}")
        if not isinstance(value, _KEYS[name]):
            wanted = {str: "a text", list: "a list"}[_KEYS[name]]
            raise UserError(f"{where}: {name}: expected {wanted}")
    for name in ("question", "labels"):
        if not values.get(name):
            raise UserError(f"{where}: {name}: is missing")
    question, labels = values["question"].strip("\n"), values["labels"]
    held = set(_PLACE.findall(question))
    count = len(labels) if "second" in held or "answer_3" in held else 1
    places = _names(count)
    for name in ("prompt", *places):
        if name not in held:
            raise UserError(
                f"{where}: question: has no place {{{name}}}; expected {{prompt}} and "
                f"{', '.join(f'{{{p}}}' for p in places)} for {len(labels)} labels"
            )
    if unknown := sorted(held - {"prompt", "principle", *places}):
        raise UserError(f"{where}: question: {{{unknown[0]}}} is no place of an answer")
    strings = all(isinstance(label, str) and label.strip() for label in labels)
    if len(labels) < 2 or not strings or len({s.strip() for s in labels}) < len(labels):
        raise UserError(f"{where}: labels: expected two or more different texts")
    render = values.get("render", "")
    if render not in ("", "chat", "text"):
        raise UserError(f"{where}: render={render!r}: expected 'chat' or 'text'")
    template = Template(
        where,
        question,
        values.get("answer", ""),
        values.get("rationale", ""),
        render,
        tuple(labels),
        (),
        count,
        "" if "principle" in held else None,
    )
    shown = enumerate(values.get("examples", ()), 1)
    return template._replace(
        examples=tuple(
            _example(f"{where}: example {n}", one, template) for n, one in shown
        )
    )


def _names(count):
    """Returns the places of so many answers.

    >>> _names(3)
    ('first', 'second', 'answer_3')
    """
    return (*PLACES, *(f"answer_{i}" for i in range(3, count + 1)))[:count]


def _example(where, values, template):
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a table of texts")
    wanted = ("prompt", *_names(template.places), "label")
    if template.principle is not None:
        wanted = (*wanted, "principle")
    for name in (*wanted, *values):
        if name not in (*wanted, "rationale"):
            raise UserError(f"{where}: {schema.unknown(name, name, wanted)}")
        if not isinstance(values.get(name), str):
            raise UserError(f"{where}: {name}: is missing, or no text")
    if values["label"] not in template.labels:
        labels = ", ".join(map(repr, template.labels))
        raise UserError(f"{where}: label={values['label']!r}: expected one of {labels}")
    answers = [values[name] for name in _names(template.places)]
    reply = template.answer + values["label"]
    if "rationale" in values:
        reply = f"{template.rationale} {values['rationale']}\n{reply}"
    principle = values.get("principle")
    asked = _filled(template.question, values["prompt"], answers, principle)
    return Turn(asked, reply)


def _filled(question, prompt, answers, principle):
    values = dict(zip(_names(len(answers)), answers, strict=True))
    values |= {"prompt": as_text(prompt), "principle": principle}
    # One pass: places spelled in what fills them are words.
    return _PLACE.sub(lambda place: values[place[1]], question)


def as_text(prompt: str | list[dict]) -> str:
    """Returns a prompt as a judge reads it: a conversation with its speakers' names."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in prompt)


def _message(role, content):
    return {"role": role, "content": content}
