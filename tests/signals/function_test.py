"""A rater of the user's own: of one pair, or of a batch."""

import importlib
import sys

import numpy as np
import pytest

from stagecraft import defaults
from stagecraft.errors import UserError
from stagecraft.signals import function
from stagecraft.signals.protocol import Sources, Verdict

PAIRS = [
    (("one", True), ("two", False)),
    (("a", True), ("a", False)),
    (("c", True), ("d", True)),
]
PROMPTS = ["p", "q", [{"role": "user", "content": "r"}]]
HERE = "tests.signals.function_test"


def make(spec, rng=None, **changes):
    config = defaults.stage("comparisons", rater=spec, **changes)
    function.check("s.it", config, "")
    return function.make(config, Sources(), rng)


def drawn(prompt, pair, rng):
    (one, ended), (two, _) = pair
    assert isinstance(one, str) and ended is True
    return None if one == "c" else int(rng.integers(2))


def test_a_function_of_one_pair_draws_from_the_generator_in_turn():
    rater = make(f"{HERE}:drawn", np.random.default_rng(1))
    verdicts = rater.rate(PROMPTS, PAIRS) + rater.rate(PROMPTS[:1], PAIRS[:1])
    rng = np.random.default_rng(1)
    draws = [int(rng.integers(2)) for _ in range(3)]
    assert len(set(draws)) == 2
    one, two, three = (Verdict(1.0 - draw) for draw in draws)
    assert verdicts == [one, two, Verdict(reason="unscored"), three]


@pytest.mark.parametrize(
    ("choice", "verdict"),
    [
        (0, Verdict(1.0)),
        (1, Verdict(0.0)),
        (True, Verdict(0.0)),
        (np.int64(1), Verdict(0.0)),
        (None, Verdict(reason="identical")),
    ],
)
def test_the_first_answer_is_number_0(choice, verdict):
    rater = make(lambda prompt, pair, rng: choice)
    assert rater.rate(PROMPTS[:1], PAIRS[1:2]) == [verdict]


@pytest.mark.parametrize("choice", [2, -1, 0.3, "first"])
def test_another_choice_is_refused(choice):
    rater = make(lambda prompt, pair, rng: choice)
    with pytest.raises(UserError, match="expected 0 or 1, the better answer, or None"):
        rater.rate(PROMPTS[:1], PAIRS[:1])


def batched(prompts, pairs):
    assert prompts == PROMPTS and pairs == PAIRS
    return [Verdict(0.75, strength=2.0), Verdict(0.5, both_bad=True), Verdict(0.0)]


class Judge:
    identity = "mine"

    def rate(self, prompts, pairs):
        return batched(prompts, pairs)


INSTANCE = Judge()


@pytest.mark.parametrize("name", ["batched", "Judge", "INSTANCE"])
def test_a_batched_rater_may_give_probabilities(name):
    rater = make(f"{HERE}:{name}", soft_labels=True)
    assert rater.rate(PROMPTS, PAIRS) == batched(PROMPTS, PAIRS)
    assert (rater.identity == "mine") == (name != "batched")


def test_a_function_that_chooses_gives_no_probability():
    for spec in (f"{HERE}:drawn", lambda *args: 0, lambda prompt, *rest: 0, max):
        with pytest.raises(UserError, match="s.it.soft_labels=True: needs rater='rew"):
            make(spec, soft_labels=True)


def test_the_identity_is_of_the_name_and_the_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path, ids = tmp_path / "my_rater_of_pairs.py", []
    for code in ("return 0", "return 0", "return 1"):
        path.write_text(f"def rate(prompt, pair, rng):\n    {code}\n\nother = rate\n")
        sys.modules.pop("my_rater_of_pairs", None)
        importlib.invalidate_caches()
        ids.append(make("my_rater_of_pairs:rate").identity)
    assert ids[0] == ids[1] != ids[2]
    assert make("my_rater_of_pairs:other").identity not in ids
