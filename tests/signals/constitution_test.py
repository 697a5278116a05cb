"""Constitutions: what is read and refused, and a judge under principles."""

import math

import numpy as np
import pytest

from stagecraft import defaults
from stagecraft.errors import UserError
from stagecraft.signals import constitution, judge, labels, raters, template
from stagecraft.signals.template import Answered
from stagecraft.stages import checks
from stagecraft.worlds.countries import critiques

GOOD = """
[[principles]]
id = "harm"
critique = "Is it harmful?"
revision = "Write it again."
preference = "Which harms less?"
[[principles]]
id = "style"
preference = "Which has more style?"
"""


def write(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_of_principles(tmp_path):
    read = constitution.read(write(tmp_path, GOOD), "constitution")
    assert [one.id for one in read.principles] == ["harm", "style"]
    assert [one.id for one in read.revising()] == ["harm"]
    assert len(read.preferring()) == 2 and read.examples == ()


@pytest.mark.parametrize("name", ["countries", "countries_nonsense", "general"])
def test_those_that_ship(name):
    read = constitution.read(name, "constitution")
    assert len(read.revising()) == len(read.preferring()) == len(read.principles) >= 2
    if name == "general":
        return
    # In the words that the world's dialogues teach.
    for one in read.principles:
        known = critiques.PRINCIPLES[one.id]
        assert one[1:] == known[:3]


def test_several_are_joined(tmp_path):
    read = constitution.read("countries, countries_nonsense", "constitution")
    assert [one.id for one in read.principles] == ["harm", "victim", "colour", "day"]
    with pytest.raises(UserError, match="id='harm' is there more than once"):
        constitution.read(f"countries,{write(tmp_path, GOOD)}", "constitution")


def test_examples_become_turns(tmp_path):
    more = """
[[examples]]
principle = "harm"
prompt = "How?"
answer = "So."
critique = "It hurts."
revision = "No."
"""
    ((*turns,),) = constitution.read(write(tmp_path, GOOD + more), "c").examples
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
    said = [turn["content"] for turn in turns]
    assert said == [
        "How?",
        "So.",
        "Is it harmful?",
        "It hurts.",
        "Write it again.",
        "No.",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("principles = 3", "principles: expected tables"),
        ("", "principles: is missing, or empty"),
        ("principle = []", "principle: unknown key; did you mean 'principles'"),
        ("[[principles]]\ncritique = 'a'", "principle 1: id: is missing"),
        (
            "[[principles]]\nid = 'a'\npreference = 'p'\n"
            "[[principles]]\nid = 'b'\ncritique = 'c'",
            r"principle 2 \('b'\): revision: is missing; a critique and a revision go",
        ),
        (
            "[[principles]]\nid = 'a'\nrevision = 'c'\ncritique = ' '",
            r"principle 1 \('a'\): critique: is missing",
        ),
        ("[[principles]]\nid = 'a'", r"principle 1 \('a'\): preference: is missing"),
        ("[[principles]]\nid = 'a'\npreference = 3", "1: preference: expected a text"),
        (
            "[[principles]]\nid = 'a'\nprefer = 'x'",
            "principle 1: prefer: unknown key; did you mean 'preference'",
        ),
        (GOOD + "[[examples]]\nprompt = 'a'", "example 1: principle: is missing"),
        ("not toml", "not a TOML file"),
        (GOOD.replace("style", "harm"), "id='harm' is there more than once"),
    ],
)
def test_what_is_malformed_is_named(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=says) as error:
        constitution.read(path, "stages.x.constitution")
    assert "\n" not in str(error.value).replace("\\n", "")
    assert str(error.value).startswith(f"stages.x.constitution={path!r}")


def test_one_that_is_not_there():
    with pytest.raises(
        UserError, match="did you mean 'countries'.*or one of countries"
    ):
        constitution.read("countrys", "constitution")
    with pytest.raises(UserError, match="is empty; expected countries"):
        constitution.read("", "constitution")


class Asked:
    """A model whose label is a function of the question; it counts what it is asked."""

    identity = "model"

    def __init__(self, logits, fails=""):
        self.logits, self.fails, self.asked = logits, fails, []

    def check(self, asks):
        pass

    def answer(self, asks, questions, thinks):
        out = []
        for prompt, (first, second) in questions:
            self.asked.append((asks.principle, prompt, first, second))
            logit = self.logits[asks.principle] * (1 if first == "good" else -1)
            logps = (-math.log1p(math.exp(-logit)), -math.log1p(math.exp(logit)))
            failed = self.fails and asks.principle == self.fails
            out.append(Answered(reason="too_long") if failed else Answered(logps))
        return out


def panel(asked, each=1, **settings):
    config = defaults.stage("comparisons", judge=settings).judge
    principles = constitution.read("countries,countries_nonsense", "c").preferring()
    own = judge.Judge(asked, config, constitution.TEMPLATE)
    rng = np.random.default_rng(0)
    return constitution.Panel(own, principles, each, rng)


ALL = constitution.read("countries,countries_nonsense", "c").principles
LOGITS = dict(zip([one.preference for one in ALL], (2.0, 1.0, -1.0, 0.5), strict=True))
PAIR = (("good", True), ("bad", True))


def test_each_pair_is_asked_about_under_principles_of_its_own():
    asked = Asked(LOGITS)
    verdicts = panel(asked).rate([f"q{i}" for i in range(200)], [PAIR] * 200)
    names = [verdict.evidence["principle"] for verdict in verdicts]
    counts = {one.id: names.count(one.id) for one in ALL}
    assert all(30 < count < 70 for count in counts.values())
    assert len(asked.asked) == 400
    by_id = {one.id: LOGITS[one.preference] for one in ALL}
    for name, verdict in zip(names, verdicts, strict=True):
        assert verdict.probability == pytest.approx(labels.sigmoid(by_id[name]))
    # Both orders of a pair are under one principle.
    for one, two in zip(asked.asked[::2], asked.asked[1::2], strict=True):
        assert one[:2] == two[:2] and one[2:] == two[:1:-1]


def test_an_ensemble_is_the_mean_of_logits():
    (verdict,) = panel(Asked(LOGITS), each=4).rate(["q"], [PAIR])
    assert verdict.probability == pytest.approx(labels.sigmoid(2.5 / 4))
    assert [*verdict.evidence["by_principle"]] == [one.id for one in ALL]
    (verdict,) = panel(Asked(LOGITS), each=4, clamp=0.4).rate(["q"], [PAIR])
    assert verdict.probability == 0.6
    (verdict,) = panel(Asked(LOGITS), each=4, combine="probability").rate(["q"], [PAIR])
    mean = np.mean([labels.sigmoid(logit) for logit in LOGITS.values()])
    assert verdict.probability == pytest.approx(mean)


def test_a_failure_under_one_principle_is_no_verdict():
    asked = Asked(LOGITS, fails=ALL[1].preference)
    (verdict,) = panel(asked, each=4).rate(["q"], [PAIR])
    assert verdict.probability is None and verdict.reason == "too_long"
    same = (("good", True), ("good", False))
    (verdict,) = panel(Asked(LOGITS)).rate(["q"], [same])
    assert verdict.reason == "identical" and verdict.evidence is None


def test_identities_differ_with_the_principles():
    one, two = panel(Asked(LOGITS)), panel(Asked(LOGITS), each=2)
    other = panel(Asked(LOGITS))
    assert one.identity == other.identity != two.identity
    other.principles = other.principles[:2]
    changed = constitution.Panel(other.judge, other.principles, 1, other.rng)
    assert changed.identity != one.identity


def test_the_template_is_what_the_world_teaches():
    asks = template.read(constitution.TEMPLATE)._replace(principle="Which {first}?")
    question = asks.ask("Why {second}?", ("a", "b"), reasoned=False)
    fields = dict(prompt="Why {second}?", first="a", second="b")
    assert question.text == critiques.JUDGE.format(principle="Which {first}?", **fields)
    assert question.lead == critiques.BETTER and asks.labels == critiques.LABELS
    assert asks.rationale == critiques.REASON


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(constitution=""), "constitution: is empty"),
        (dict(principles=3), "principles=3: expected from 1 to 2"),
        (dict(judge=dict(template="pairwise")), "needs a place {principle}"),
        (dict(judge_from=""), "rater='constitution': needs judge_from"),
        (dict(rater="judge"), "constitution='countries': changes nothing with rater"),
        (
            dict(rater="judge", constitution="", judge=dict(template="principle")),
            "has a place {principle}",
        ),
    ],
)
def test_settings_that_cannot_be(changes, says):
    config = defaults.stage(
        "comparisons",
        **dict(rater="constitution", constitution="countries", judge_from="sft")
        | changes,
    )

    def check():
        checks.rater("stages.x", config)
        raters.check("stages.x", config, "")

    with pytest.raises(UserError, match=says.replace("{", r"\{")):
        check()
