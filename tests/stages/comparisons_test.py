"""Pairs as records: which answer is chosen, what is dropped, and why."""

import json

import jax
import numpy as np
import pytest

from stagecraft import defaults
from stagecraft.errors import UserError
from stagecraft.signals import labels
from stagecraft.signals.protocol import Verdict
from stagecraft.signals.reward import RewardModel
from stagecraft.signals.template import Answered
from stagecraft.stages import comparisons, records, selection
from tests.stages.answers import PROMPTS, Seeded, noisy, recording

KEY = jax.random.key(0)


def write(folder, language, reward=None, **changes):
    config = defaults.stage(
        "comparisons", **dict(prompts=6, batch_size=4, rater="reward") | changes
    )
    whole = recording(folder, language, "pairs", reward=reward)
    report = comparisons.write(config, whole)
    lines = (folder / records.RECORDS).read_bytes().decode().removesuffix("\n")
    return report, [json.loads(line) for line in lines.split("\n")]


class Counting:
    """Answers n = 0, 1, 2 ... to one prompt after the other; some do not end."""

    def __init__(self):
        self.count = 0

    def complete(self, prompts, *, seed, **sampling):
        numbers = range(self.count, self.count + len(prompts))
        self.count += len(prompts)
        return [(f"{p} {n}", n % 5 != 4) for p, n in zip(prompts, numbers, strict=True)]


class Scorer(RewardModel):
    """A reward model whose scores are the last number of an answer modulo 7."""

    identity = "scorer"

    def __init__(self):
        pass

    def scores(self, prompts, answers):
        return [float(text.split()[-1]) % 7 for text, _ in answers]


@pytest.mark.parametrize("soft", [False, True])
def test_a_reward_model_compares_and_may_say_how_sure_it_is(tmp_path, soft):
    report, pairs = write(tmp_path, Counting(), Scorer(), soft_labels=soft)
    assert report["pairs"] == len(pairs) == 6 and report["dropped"] == 0
    assert report["dropped_by_reason"] == {}
    assert report["tokens"] == {"sampled": 12 * 32}
    for number, record in enumerate(pairs):
        rewards = [float(n % 7) for n in (2 * number, 2 * number + 1)]
        best = int(rewards[1] > rewards[0])
        assert record["chosen"].endswith(f" {2 * number + best}")
        assert record["rejected"].endswith(f" {2 * number + 1 - best}")
        probability = 1 / (1 + np.exp(-abs(rewards[1] - rewards[0])))
        if soft:
            assert record["preference"] == pytest.approx(probability, rel=1e-15)
        else:
            assert "preference" not in record
        for side, n in (("chosen", best), ("rejected", 1 - best)):
            cut = (2 * number + n) % 5 == 4
            assert (f"{side}_ended" in record) == cut


def test_a_rater_draws_on_where_the_order_of_prompts_left_off(tmp_path):
    """The stream of one generator, whose state the journal hands on."""
    language = Seeded()
    report, pairs = write(
        tmp_path,
        language,
        rater="tests.stages.answers:noisy",
        prompts=40,
    )
    seed = int(jax.random.randint(KEY, (), 0, 2**31 - 1))
    rng = np.random.default_rng(seed)
    asked = [PROMPTS[i] for _ in range(10) for i in rng.permutation(4)]
    expected, reasons, other = [], [], Seeded()
    for number in range(20):
        prompts = [a["prompt"] for a in asked[2 * number : 2 * number + 2]]
        twice = [p for p in prompts for _ in range(2)]
        answers = other.complete(twice, seed=seed + number)
        for i, prompt in enumerate(prompts):
            two = tuple(answers[2 * i : 2 * i + 2])
            better = noisy(prompt, two, rng)
            if better is None or two[0][0] == two[1][0]:
                same = two[0][0] == two[1][0]
                reasons.append("identical" if same else "unscored")
                continue
            (chosen, whole), (rejected, ended) = two[better], two[1 - better]
            record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            record |= {"probability": 1.0, "first": ("chosen", "rejected")[better]}
            record |= {"signal": "tests.stages.answers:noisy", "generator": "s"}
            record |= {"judge": pairs[0]["judge"]}
            record |= {} if whole else {"chosen_ended": False}
            expected.append(record | ({} if ended else {"rejected_ended": False}))
    assert pairs == expected and len(pairs[0]["judge"]) == 64
    assert language.seeds == other.seeds
    assert report["dropped"] == len(reasons) == 40 - report["pairs"]
    counts = {reason: reasons.count(reason) for reason in set(reasons)}
    assert report["dropped_by_reason"] == counts and len(counts) == 2


def first(prompt, pair, rng):
    return 0


def failing(prompts, pairs):
    """A batched rater that fails in some way on all but one pair of a batch."""
    return [Verdict(0.25), *[Verdict(reason="timed_out")] * (len(pairs) - 1)]


def test_failures_are_counted_by_reason_and_are_no_pairs(tmp_path):
    report, pairs = write(
        tmp_path,
        Counting(),
        rater="tests.stages.comparisons_test:failing",
        batch_size=6,
        soft_labels=True,
    )
    assert (report["pairs"], report["dropped"]) == (2, 4)
    assert report["dropped_by_reason"] == {"timed_out": 4}
    assert [r["chosen"].split()[-1] for r in pairs] == ["1", "7"]
    assert [r["preference"] for r in pairs] == [0.75, 0.75]


class Same:
    def complete(self, prompts, *, seed, **sampling):
        return [("yes", i % 2 == 0) for i, _ in enumerate(prompts)]


def test_the_same_answer_twice_is_no_pair_whatever_a_rater_says(tmp_path):
    says = r"pairs: the rater dropped all 6 pairs \(6 identical\); .*temperature=0"
    with pytest.raises(UserError, match=says) as error:
        write(tmp_path, Same(), rater="tests.stages.comparisons_test:first")
    assert "\n" not in str(error.value)
    assert not (tmp_path / records.RECORDS).exists()


@pytest.mark.parametrize("kind", [comparisons, selection])
def test_answers_are_sampled_rated_and_written_with_the_tools(tmp_path, kind):
    tools = [{"type": "function", "function": {"name": "clock"}}]
    given = {"q0": tools, "q1": None}
    asked = [{"prompt": "q0", "tools": tools}, {"prompt": "q1"}]
    seen = []

    class Language(Counting):
        batch_size = 4

        def complete(self, prompts, *, tools, **settings):
            seen.append(dict(zip(prompts, tools, strict=True)))
            return super().complete(prompts, **settings)

    class Reads(Scorer):
        def scores(self, prompts, answers, tools):
            seen.append(dict(zip(prompts, tools, strict=True)))
            return super().scores(prompts, answers)

    name = kind.__name__.rpartition(".")[2]
    config = defaults.stage(name, prompts=4, batch_size=8)
    if kind is comparisons:
        config.rater = "reward"
    whole = recording(tmp_path, Language(), "pairs", reward=Reads())
    kind.write(config, whole._replace(asked=asked))
    assert len(seen) >= 2 and all(given | one == given for one in seen)
    lines = (tmp_path / records.RECORDS).read_text().splitlines()
    written = list(map(json.loads, lines))
    assert {record["prompt"] for record in written} == {"q0", "q1"}
    assert all(record.get("tools") == given[record["prompt"]] for record in written)


class Sided:
    """A judge that likes long answers and, by half as much, the first slot."""

    identity = "sided"

    def __init__(self, failing=0):
        self.failing, self.asked = failing, []

    def check(self, asks):
        pass

    def answer(self, asks, questions, thinks):
        self.asked += questions
        return [self._answer(*texts) for _, texts in questions]

    def _answer(self, one, two):
        if int(one.split()[-1]) < self.failing:
            return Answered(reason="too_long", tokens=3)
        logit = int(one.split()[-1]) - int(two.split()[-1]) + 0.5
        return Answered((-np.log1p(np.exp(-logit)), -np.log1p(np.exp(logit))), tokens=5)


def judged(folder, asked, **changes):
    config = defaults.stage(
        "comparisons",
        **dict(prompts=6, batch_size=4, rater="judge", judge_from="j") | changes,
    )
    whole = recording(folder, Counting(), "pairs", judge=asked)
    report = comparisons.write(config, whole)
    files = [folder / records.RECORDS, folder / comparisons.UNRATED]
    lines = [file.read_text().split("\n")[:-1] for file in files]
    return report, *[list(map(json.loads, one)) for one in lines]


def test_a_judges_records_say_what_it_was_asked_and_what_it_said(tmp_path):
    judge = Sided(failing=2)
    report, pairs, unrated = judged(tmp_path, judge, soft_labels=True)
    assert (report["pairs"], report["dropped_by_reason"]) == (5, {"too_long": 1})
    tokens = [row["tokens"] for row in pairs + unrated]
    # Two orders of the same length: half of the tokens each, of which one sees half.
    seen = sum(2 * sum(range(1, n // 2 + 1)) for n in tokens) / sum(tokens)
    assert report["tokens"]["judged"] == sum(tokens)
    assert report["tokens"]["judged_context"] == pytest.approx(seen)
    assert len(judge.asked) == 12
    for number, record in enumerate(pairs, 1):
        low, high = 2 * number, 2 * number + 1
        assert record["chosen"].endswith(f" {high}") and record["first"] == "rejected"
        assert record["rejected"].endswith(f" {low}")
        assert record["preference"] == record["probability"]
        assert record["probability"] == pytest.approx(1 / (1 + np.exp(-1)))
        (a, b), (c, d) = record["logps"]  # in the order they were sampled, then swapped
        assert (a - b, c - d) == pytest.approx((-0.5, 1.5))
        assert record["mass"] == pytest.approx([1, 1])
        assert record["signal"] == "judge" and record["generator"] == "s"
    (none,) = unrated
    assert none["reason"] == "too_long" and none["logps"] == [None, None]
    assert [text.split()[-1] for text in none["answers"]] == ["0", "1"]
    assert none["judge"] == pairs[0]["judge"] and "chosen" not in none


def test_a_judge_that_fails_too_often_ends_the_stage_and_asks_on_from_there(tmp_path):
    says = "rater='judge': .* of .* without a verdict"
    with pytest.raises(UserError, match=says):
        judged(tmp_path, Sided(failing=1000), prompts=60, batch_size=8)
    assert not (tmp_path / records.RECORDS).exists()
    tolerant = dict(judge=dict(max_failed=1.0))
    report, _, unrated = judged(
        tmp_path / "b", Sided(failing=20), prompts=60, batch_size=8, **tolerant
    )
    assert report["dropped_by_reason"] == {"too_long": len(unrated)}


def test_a_judge_asked_in_one_order_only_would_show(tmp_path):
    """Whatever is sampled first, the judge's own bias is not in the labels."""
    _, pairs, _ = judged(tmp_path, Sided())
    assert [labels.slot_bias(row["logps"]) for row in pairs] == pytest.approx([0.5] * 6)
