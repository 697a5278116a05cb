"""A model as a judge: whole labels, both orders, and failures that are no numbers."""

import json
import math

import jax
import numpy as np
import pytest

from stagecraft import defaults, experiment
from stagecraft.errors import UserError
from stagecraft.models.language import Language
from stagecraft.models.transformer import Transformer
from stagecraft.signals import judge, labels, protocol
from stagecraft.signals.judge import Judge, LocalModel, Scorer
from stagecraft.signals.template import Answered
from stagecraft.text import tokenizer as tokenizers
from tests import tiny
from tests.graphs import graph
from tests.models import numpy_decoder
from tests.text import families

PAIR = (("Paris.", True), ("It is Rome, I think <|end|>", False))
SHORT = """
question = "{prompt}? one {first} two {second}"
answer = "so"
labels = [" (1)", " (two)"]
rationale = "hm"
[[examples]]
prompt = "p"
first = "f"
second = "s {prompt}"
label = " (1)"
rationale = "because"
"""


@pytest.fixture(scope="module")
def language():
    tokenizer = tokenizers.load("bytes")
    config = tiny.config(vocab_size=tokenizer.vocab_size, max_length=160, layers=2)
    return Language(Transformer(config, jax.random.key(1)), tokenizer, batch_size=4)


def config(tmp_path=None, text=SHORT, **changes):
    """The group `judge`, with a template of a test's own."""
    own = defaults.judge()
    own.min_mass = 0.0
    if tmp_path is not None:
        own.template = str(tmp_path / "asks.toml")
        (tmp_path / "asks.toml").write_text(text)
    own.update(changes)
    return own


def logp(language, ids, label):
    """The log-probability of a label behind ids, by the decoder in numpy."""
    given = language.tokenizer.encode(label)
    table = numpy_decoder.logits(language.model, [*ids, *given]).astype(np.float64)
    table -= np.logaddexp.reduce(table, axis=-1, keepdims=True)
    steps = range(len(ids) - 1, len(ids) + len(given) - 1)
    return sum(table[step, token] for step, token in zip(steps, given, strict=True))


@pytest.mark.parametrize("chat", [False, True])
def test_labels_of_several_tokens_in_both_orders(language, tmp_path, chat):
    asked, encode = LocalModel(language, chat, "id"), language.tokenizer.encode
    rater = Judge(asked, config(tmp_path))
    verdicts = rater.rate(["Capital", "Other"], [PAIR, (("b", True), ("a", True))])
    shown = ("p? one f two s {prompt}", "hm because\nso (1)")
    for prompt, pair, verdict in zip(
        ["Capital", "Other"], [PAIR, (("b", True), ("a", True))], verdicts, strict=True
    ):
        expected = []
        for (one, _), (two, _) in (pair, pair[::-1]):
            text, t = f"{prompt}? one {one} two {two}", language.tokenizer
            ids = [t.bos, *encode("\n\n".join([*shown, text, "so"]))]
            if chat:
                ids = [t.bos, t.user, *encode(shown[0]), t.assistant]
                ids += [*encode(shown[1]), t.end, t.user, *encode(text), t.assistant]
                ids += encode("so")
            expected.append([logp(language, ids, x) for x in (" (1)", " (two)")])
        got = verdict.evidence
        np.testing.assert_allclose(got["logps"], expected, atol=1e-4)
        np.testing.assert_allclose(got["mass"], np.exp(expected).sum(1), rtol=1e-3)
        (a, b), (c, d) = expected
        q = ((a - b) - (c - d)) / 2
        assert verdict.probability == pytest.approx(1 / (1 + np.exp(-q)), abs=1e-4)
        assert json.loads(json.dumps(got)) == got and got["tokens"] > 0
    assert protocol.checked(verdicts, 2, "judge") == verdicts


def test_the_papers_mean_is_of_probabilities(language, tmp_path):
    asked = LocalModel(language, False, "id")
    logit, mean = (
        Judge(asked, config(tmp_path, combine=how)).rate(["p"], [PAIR])[0]
        for how in labels.COMBINE
    )
    sides = [1 / (1 + np.exp(b - a)) for a, b in mean.evidence["logps"]]
    assert mean.probability == pytest.approx((sides[0] + 1 - sides[1]) / 2, abs=1e-12)
    assert mean.evidence == logit.evidence and mean.probability != logit.probability


def test_labels_of_one_token_and_of_any_batch(language, tmp_path):
    text = SHORT.replace("(1)", "a").replace("(two)", "b").replace('" ', '"')
    asked = LocalModel(language, False, "id")
    rater = Judge(asked, config(tmp_path, text))
    pairs = [((f"{i}" * (1 + 5 * i), True), ("x", True)) for i in range(5)]
    together = rater.rate(["p"] * 5, pairs)
    for pair, verdict in zip(pairs, together, strict=True):
        (alone,) = rater.rate(["p"], [pair])
        assert alone.probability == pytest.approx(verdict.probability, abs=1e-5)
        ids = language.encode(
            rater.template.ask("p", [t for t, _ in pair]).bare(), chat_format=False
        )
        expected = [logp(language, ids, label) for label in rater.template.labels]
        np.testing.assert_allclose(verdict.evidence["logps"][0], expected, atol=1e-4)


def test_failures_are_no_numbers(language, tmp_path):
    asked = LocalModel(language, False, "id")
    same = (("a", True), ("a", False))
    long = (("a" * 200, True), ("b", True))
    rater = Judge(asked, config(tmp_path))
    said = rater.rate(["p"] * 3, [same, long, PAIR])
    assert [v.reason for v in said] == ["identical", "too_long", ""]
    assert [v.probability is None for v in said] == [True, True, False]
    strict = Judge(asked, config(tmp_path, min_mass=0.9))
    (low,) = strict.rate(["p"], [PAIR])
    assert (low.probability, low.reason) == (None, "low_mass")
    assert low.evidence["logps"] == said[2].evidence["logps"]


class Slots:
    """A judge with a gap in quality and a bias towards the first slot, exactly."""

    identity = "slots"

    def __init__(self, bias=0.0, failing=()):
        self.bias, self.failing, self.asked = bias, failing, []

    def check(self, asks):
        pass

    def answer(self, asks, questions, thinks):
        self.asked += questions
        return [self._answer(*question) for question in questions]

    def _answer(self, prompt, answers):
        if prompt in self.failing:
            return Answered(reason="timed_out")
        values = np.array([float(text) for text in answers])
        values[0] += self.bias
        if len(answers) == 1:  # a score of ten labels around it
            values = -((np.arange(1, 11) - values) ** 2)
        return Answered(tuple(values - np.logaddexp.reduce(values)))


@pytest.mark.parametrize("bias", [0.0, 1.0, -3.0])
def test_a_bias_towards_a_slot_falls_out_of_the_mean_of_logits(bias):
    rater = Judge(Slots(bias), config())
    (verdict,) = rater.rate(["p"], [(("1.5", True), ("1.0", True))])
    assert verdict.probability == pytest.approx(1 / (1 + np.exp(-0.5)), abs=1e-12)
    assert labels.slot_bias(verdict.evidence["logps"]) == pytest.approx(bias)
    # signals.md's table: the mean of probabilities shrinks what the logits keep.
    shrunk = {0.0: 0.6225, 1.0: 0.5987, -3.0: 0.5233}
    paper = Judge(Slots(bias), config(combine="probability"))
    (verdict,) = paper.rate(["p"], [(("1.5", True), ("1.0", True))])
    assert verdict.probability == pytest.approx(shrunk[bias], abs=2e-2)


def test_one_order_asks_half_and_keeps_the_bias():
    asked = Slots(1.0)
    rater = Judge(asked, config(orders=1))
    pairs = [(("1.5", True), ("1.0", True)), (("0", True), ("2", True))]
    verdicts = rater.rate(["p", "q"], pairs)
    assert [question for _, question in asked.asked] == [("1.5", "1.0"), ("0", "2")]
    said = [1 / (1 + np.exp(-x)) for x in (1.5, -1.0)]
    assert [verdict.probability for verdict in verdicts] == pytest.approx(said)
    assert [len(verdict.evidence["logps"]) for verdict in verdicts] == [1, 1]


def test_k_answers_are_each_in_each_place():
    asked = Slots(2.0)
    rater = Judge(asked, config(template="best_of_4"))
    ((shares, _),) = rater.best(["p"], [["0.0", "1.0", "0.5", "2.0"]])
    weights = np.exp([0.0, 1.0, 0.5, 2.0])
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=1e-12)
    for place in range(4):
        assert sorted(q[1][place] for q in asked.asked) == ["0.0", "0.5", "1.0", "2.0"]


def test_a_clamp_holds_probabilities_off_the_ends():
    pair = (("9", True), ("0", True))
    (far,) = Judge(Slots(), config(clamp=0.4)).rate(["p"], [pair])
    (near,) = Judge(Slots(), config(clamp=0.4)).rate(["p"], [pair[::-1]])
    assert (far.probability, near.probability) == (0.6, 0.4)


def test_a_score_is_an_expectation_and_a_failure_is_none():
    scorer = Scorer(lambda: Judge(Slots(failing=("bad",)), config(), "score"), 1.0)
    lists = {"prompts": ["a", "bad", "c"], "completions": ["7.2", "3", "1"]}
    values = scorer(lists, {})
    weights = np.exp(-((np.arange(1, 11) - 7.2) ** 2))
    expected = weights @ np.arange(1, 11) / weights.sum()
    assert values[0] == pytest.approx(2 * (expected - 1) / 9 - 1)
    assert values[1] == math.inf and -1 <= values[2] < values[0]
    messages = [[{"role": "assistant", "content": "7.2"}]]
    lists = {"prompts": [[{"role": "user", "content": "a"}]], "completions": messages}
    assert scorer(lists, {}) == values[:1]


def test_a_group_is_rewarded_by_who_is_best():
    scorer = Scorer(lambda: Judge(Slots(), config(template="best_of_4")), 1.0)
    texts = ["0", "1", "2", "3", "3", "0", "0", "0"]
    values = scorer({"prompts": ["a"] * 4 + ["b"] * 4, "completions": texts}, {})
    assert sum(values[:4]) == pytest.approx(1) and np.argmax(values[:4]) == 3
    assert sum(values[4:]) == pytest.approx(1) and np.argmax(values[4:]) == 0


def test_too_many_failures_end_the_run_in_one_line():
    scorer = Scorer(lambda: Judge(Slots(failing=("bad",)), config(), "score"), 0.2)
    scorer({"prompts": ["a"] * 60 + ["bad"] * 4, "completions": ["3"] * 64}, {})
    says = "rater='judge': 24 of 84 without a verdict .24 timed_out., more than"
    with pytest.raises(UserError, match=says) as error:
        scorer({"prompts": ["bad"] * 20, "completions": ["3"] * 20}, {})
    assert "\n" not in str(error.value)


def test_a_rationale_is_written_before_the_label(language, tmp_path):
    asked = LocalModel(language, False, "id")
    rater = Judge(asked, config(tmp_path, rationale_tokens=5))
    (verdict,) = rater.rate(["p"], [PAIR])
    texts = [text for text, _ in PAIR]
    for order in (0, 1):
        answers = texts[::-1] if order else texts
        question = rater.template.ask("p", answers, reasoned=True)
        ids = language.encode(question.bare(), chat_format=False)
        assert question.bare().endswith("\n\nhm")
        stops = language.stop_ids(chat_format=False)
        ((said, ended, _),) = language.sample_ids(
            [ids], max_new_tokens=5, temperature=0.0, stop_ids=stops
        )
        said = said[:-1] if ended else said
        whole = [*ids, *said, *language.tokenizer.encode("\nso")]
        expected = [logp(language, whole, x) for x in (" (1)", " (two)")]
        np.testing.assert_allclose(
            verdict.evidence["logps"][order], expected, atol=1e-4
        )
        assert verdict.evidence["rationales"][order] == language.tokenizer.decode(said)


def test_a_rationale_ends_before_a_label_of_its_own(language, tmp_path, monkeypatch):
    """A judge trained on whole replies concludes by itself, and would do so twice."""
    encode = language.tokenizer.encode
    sampled = ([*encode(" why.\nso (two)"), language.tokenizer.eos], True, 0.0)
    monkeypatch.setattr(language, "sample_ids", lambda rows, **_: [sampled] * len(rows))
    rater = Judge(
        LocalModel(language, False, "id"), config(tmp_path, rationale_tokens=20)
    )
    (verdict,) = rater.rate(["p"], [PAIR])
    question = rater.template.ask("p", [text for text, _ in PAIR], reasoned=True)
    ids = language.encode(question.bare(), chat_format=False)
    whole = [*ids, *encode(" why."), *encode("\nso")]
    expected = [logp(language, whole, x) for x in (" (1)", " (two)")]
    np.testing.assert_allclose(verdict.evidence["logps"][0], expected, atol=1e-4)
    assert verdict.evidence["rationales"][0] == " why."


def test_control_tokens_spelled_in_an_answer_are_letters(language, tmp_path):
    asked = LocalModel(language, True, "id")
    rater = Judge(asked, config(tmp_path))
    tokenizer, name = language.tokenizer, "<|user|>"
    question = rater.template.ask(name, (name, f"{name}{{first}}"))
    assert f"one {name} two {name}{{first}}" in question.text
    ids = asked._ids(rater.template, question)
    # Those of the turns alone: bos, the example's two, and this question's.
    controls = [i for i in ids if i in (tokenizer.user, tokenizer.assistant)]
    assert len(controls) == 4 and tokenizer.decode(ids).count(name) == 3


def test_control_tokens_of_a_chat_template_are_letters_too(language, tmp_path):
    folder = families.folder(tmp_path / "t", "chatml", "bytes")
    tokenizer, mark = tokenizers.load(folder), "<|im_end|>"
    asked = LocalModel(Language(language.model, tokenizer), True, "id")
    asks = Judge(asked, config(tmp_path)).template
    controls = set(tokenizer.stops) | set(tokenizer.control_ids)

    def count(word):
        ids = asked._ids(asks, asks.ask("p", (word, "x")))
        assert word in tokenizer.decode(ids)
        return sum(i in controls for i in ids)

    assert tokenizer.spells(mark) and count(mark) == count("word") > 0


def test_one_label_may_not_begin_another(language, tmp_path):
    text = SHORT.replace(" (two)", " (1)b")
    says = r"labels: ' \(1\)' is the beginning of ' \(1\)b' .*end each with a mark"
    with pytest.raises(UserError, match=says):
        Judge(LocalModel(language, False, "id"), config(tmp_path, text))
    Judge(LocalModel(language, False, "id"), config(), "score")  # "1)" and "10)"


def test_an_identity_is_of_all_that_decides_verdicts(language, tmp_path):
    def identity(asked=None, **changes):
        asked = asked or LocalModel(language, False, "id")
        return Judge(asked, config(tmp_path, **changes)).identity

    changes = [
        dict(combine="probability"),
        dict(clamp=0.4),
        dict(orders=1),
        dict(min_mass=0.5),
        dict(rationale_tokens=3),
        dict(text=SHORT.replace("so", "thus")),
        dict(asked=LocalModel(language, True, "id")),
        dict(asked=LocalModel(language, False, "other")),
    ]
    others = [identity(**one) for one in changes]
    assert len({identity(), *others}) == 1 + len(others)
    assert identity(batch_size=3, max_failed=0.5) == identity()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(), "rater='judge': needs judge_from .*or judge.url"),
        (dict(judge_from="sft", judge=dict(combine="mean")), "judge.combine='mean'"),
        (dict(judge_from="sft", judge=dict(clamp=0.6)), "clamp=0.6: .* from 0 to 0.5"),
        (dict(judge_from="sft", judge=dict(template="pairwse")), "mean 'pairwise'"),
        (dict(judge_from="sft", judge=dict(template="score")), "for 1 answers; .* 2"),
        (dict(judge_from="a", judge=dict(url="http://h/v1")), "one judge or the other"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, says):
    with pytest.raises(UserError, match=says) as error:
        judge.check("s.it", defaults.stage("comparisons", rater="judge", **changes), "")
    assert "\n" not in str(error.value)


def test_a_judge_that_is_not_asked_is_refused():
    says = "stages.it.rater='world' with a judge .judge_from, judge.url.: set rater"
    with pytest.raises(UserError, match=says):
        experiment.resolve(graph("comparisons", judge_from="base"))
