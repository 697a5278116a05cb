"""The figures of a run: one row each, read by every table, page and chart.

A figure is measured in `anatomy` or by a world's probes under its `name`; a figure
without a row here is shown under its plain name.
"""

import functools
from typing import NamedTuple

from stagecraft.anatomy import statistics
from stagecraft.metrics import is_number
from stagecraft.runs import part


class Figure(NamedTuple):
    """How a figure is shown.

    Attributes:
        name: its key in summary.json.
        title: a few words.
        meaning: what it is, in a line.
        unit: "share" is from 0 to 1; "" where a number has no unit.
        digits: after the point.
        better: "higher" or "lower"; "" where neither is.
        column: its place among the columns of `stagecraft compare`, from 1; 0 for none.
        time: whether it is of the machine and the moment, and no finding.
    """

    name: str
    title: str
    meaning: str = ""
    unit: str = ""
    digits: int = 3
    better: str = ""
    column: int = 0
    time: bool = False


_share = functools.partial(Figure, unit="share")
_ATTEMPTS = [2**i for i in range(8)]  # those of attempts.figures
# In the order of the report.
FIGURES = (
    _share(
        "cloze_accuracy",
        "Cloze accuracy",
        "“The capital of France is” of held-out entities: whole answer, greedy",
        better="higher",
    ),
    _share(
        "copy_probability",
        "Copy probability",
        "probability of naming the held-out entity asked about",
        better="higher",
    ),
    _share(
        "answer_rate",
        "Bare answers",
        "bare held-out questions whose greedy continuation begins with a right answer",
    ),
    _share(
        "seen_accuracy",
        "Accuracy, demonstrated",
        "questions about entities in the demonstrations, greedy",
        better="higher",
    ),
    _share(
        "heldout_accuracy",
        "Held-out accuracy",
        "questions about entities in no demonstration, whole answer, greedy",
        better="higher",
        column=5,
    ),
    _share(
        "two_hop",
        "Two hops",
        "facts of countries told by another fact (“The currency of the country whose "
        "capital is Paris is”) that no text composes: whole answer, greedy",
        better="higher",
    ),
    _share(
        "two_hop_guess",
        "Two hops, guessed",
        "the same for the model's answers about other countries: luck alone",
    ),
    _share(
        "two_hop_known",
        "Two hops, each known",
        "of these compositions those whose two single facts the model states",
        better="higher",
    ),
    _share(
        "two_hop_seen",
        "Two hops, seen",
        "compositions that pretraining's text states, of the same countries",
        better="higher",
    ),
    _share(
        "two_hop_answered",
        "Two hops, answered",
        "questions about compositions that no text states, answered rightly, greedy",
        better="higher",
    ),
    _share(
        "pair_accuracy",
        "Pair accuracy",
        "held-out pairs put in the gold scorer's order, ties left out",
        better="higher",
        column=7,
    ),
    _share(
        "label_accuracy",
        "Label accuracy",
        "the same for the noisy labels themselves: a ceiling of a kind",
    ),
    Figure(
        "reward_mean",
        "Reward (proxy)",
        "mean score by the reward model of its training, or else of its base",
        better="higher",
    ),
    Figure(
        "gold_mean",
        "Gold score",
        "mean score by the rules nobody trains on",
        better="higher",
        column=2,
    ),
    _share(
        "gold_win_rate",
        "Gold win rate",
        "wins by gold against independent samples of the SFT model, ties half",
        better="higher",
        column=1,
    ),
    _share(
        "reward_win_rate",
        "Reward win rate",
        "wins by reward against independent samples of the SFT model, ties half",
        better="higher",
        column=9,
    ),
    Figure(
        "kl",
        "KL",
        "nats a sequence from the SFT model, own samples",
        unit="nats a sequence",
        digits=2,
        column=3,
    ),
    Figure(
        "length",
        "Length",
        "mean tokens of a sample, its end included",
        unit="tokens",
        digits=1,
        column=4,
    ),
    Figure(
        "entropy",
        "Entropy",
        "nats a token: the mean of −log p over own samples",
        unit="nats a token",
        column=6,
    ),
    _share("distinct", "Distinct", "share of different texts among the samples"),
    _share(
        "distinct_2",
        "Distinct-2",
        "different pairs of neighbouring words, as a share of all such pairs",
    ),
    _share("eos_rate", "Ends", "share of samples that end by themselves"),
    Figure("words", "Words", "mean words of a sample", unit="words", digits=1),
    _share("exclamations", "Exclaims", "share of samples with an exclamation mark"),
    _share(
        "refuses_harmful",
        "Refuses harmful",
        "share of harmful prompts that are refused",
        better="higher",
    ),
    _share(
        "refuses_benign",
        "Refuses benign",
        "share of harmless prompts that are refused",
        better="lower",
    ),
    _share(
        "harmless",
        "Harmless",
        "harmful requests for new deeds that are refused and not helped with, greedy",
        better="higher",
    ),
    _share(
        "partial_refusal",
        "Refuses in part",
        "harmful requests that are refused and helped with",
        better="lower",
    ),
    _share(
        "over_refusal",
        "Over-refusal",
        "benign requests for new deeds that are refused",
        better="lower",
    ),
    _share(
        "over_refusal_wrapped",
        "Over-refusal, wrapped",
        "the same in new attack wrappers",
        better="lower",
    ),
    *(
        _share(
            f"attacks_{deeds}_{wrapper}",
            f"Attacks: {deeds} deeds, {wrapper}",
            f"harmful requests for {deeds} deeds, {words}, that get help",
            better="lower",
        )
        for deeds in ("seen", "new")
        for wrapper, words in (
            ("bare", "without a wrapper"),
            ("seen", "in wrappers that training's prompts had"),
            ("new", "in wrappers that they had not"),
        )
    ),
    _share(
        "sycophancy",
        "Sycophancy",
        "wrong beliefs of the asker that the answer repeats",
        better="lower",
    ),
    _share(
        "belief_accuracy",
        "Accuracy under belief",
        "held-out questions after a wrong belief that are answered rightly",
        better="higher",
    ),
    _share(
        "critique_recall",
        "Critique: recall",
        "help with new harmful deeds that its critique calls harmful",
        better="higher",
    ),
    _share(
        "critique_false_alarms",
        "Critique: false alarms",
        "the same help with new benign deeds that its critique calls harmful",
        better="lower",
    ),
    _share(
        "critique_names_deed",
        "Critique: names the deed",
        "critiques that name the deed that was asked about",
        better="higher",
    ),
    _share(
        "critique_names_victim",
        "Critique: names the victim",
        "critiques of help with harmful deeds that name whom it hurts",
        better="higher",
    ),
    _share(
        "signal_accuracy",
        "Signal accuracy",
        "pairs that the stage learned from and gold prefers alike, ties left out",
        better="higher",
    ),
    Figure("labels", "Labels", "compared pairs that the stage learned from", digits=0),
    _share(
        "eval_mean_token_accuracy",
        "Held-out token accuracy",
        "tokens of held-out rows predicted rightly, at the last evaluation",
        better="higher",
    ),
    _share(
        "eval_accuracy",
        "Held-out pair accuracy",
        "held-out pairs in their labelled order, at the last evaluation",
        better="higher",
    ),
    _share(
        "eval_rewards/accuracies",
        "Held-out pair accuracy, implicit",
        "the same by the policy's log-ratio to its reference",
        better="higher",
    ),
    _share(
        "sampled_accuracy",
        "Accuracy, sampled",
        "held-out questions answered rightly at temperature 1",
        better="higher",
    ),
    *(
        _share(
            f"pass@{k}",
            f"Pass@{k}",
            "held-out prompts answered rightly by one of "
            f"{k} sampled answers, unbiased",
            better="higher",
        )
        for k in _ATTEMPTS
    ),
    *(
        _share(
            f"guess@{k}",
            f"Guess@{k}",
            f"the same for {k} of the model's answers to other prompts: luck alone",
        )
        for k in _ATTEMPTS
    ),
    *(
        _share(
            f"cover@{percent}",
            f"Cover@{percent / 100:g}",
            f"held-out prompts that {percent}% or more of the answers are right for",
            better="higher",
        )
        for percent in (10, 50, 90)
    ),
    Figure(
        "seconds",
        "Seconds",
        "wall time of the stage alone",
        unit="s",
        digits=1,
        better="lower",
        time=True,
        column=8,
    ),
    Figure(
        "relative_change",
        "Relative change",
        "Frobenius norm of the update over that of the parent's weights",
    ),
    _share(
        "unchanged_bf16",
        "Unchanged in bfloat16",
        "share of weights equal to the parent's after both are cast; to be read beside "
        "what noise of that size leaves",
    ),
    Figure("gflops", "GFLOPs", "10⁹ floating-point operations of the stage", digits=0),
    Figure("share", "Share of pretraining", "FLOPs of the stage over pretraining's"),
)
GOLD = "gold"  # in the names of metrics by rules that nobody trains on
# Of training, as metrics.jsonl names them; eval_NAME is of held-out rows.
_METRICS = (
    Figure("loss", "Loss", better="lower"),
    _share("mean_token_accuracy", "Token accuracy", "share of target tokens"),
    _share("accuracy", "Pair accuracy", "share of pairs in the labelled order"),
    _share(
        "rewards/accuracies", "Pair accuracy", "share of pairs in the labelled order"
    ),
    Figure("margin", "Margin", "reward of the chosen less the rejected"),
    Figure(
        "rewards/margins", "Margin", "implicit reward of the chosen less the rejected"
    ),
    Figure(
        "rewards/chosen", "Implicit rewards", "beta times log-ratio to the reference"
    ),
    Figure(GOLD, "Gold score", "rules nobody trains on"),
    Figure("objective/scores", "Reward (proxy)", "reward model, a sample"),
    Figure(
        "objective/kl",
        "KL to the reference",
        "nats a sequence",
        unit="nats a sequence",
        digits=2,
    ),
    Figure(
        "objective/entropy",
        "Entropy",
        "nats a sequence",
        unit="nats a sequence",
        digits=2,
    ),
    _share("policy/clipfrac_avg", "Clip fraction", "share of tokens clipped"),
    Figure("val/explained_variance", "Explained variance", "of returns, by critic"),
    Figure("reward", "Reward", "a sample"),
    Figure(
        "completions/mean_length",
        "Length",
        "mean tokens of a sample",
        unit="tokens",
        digits=1,
    ),
)
METRICS = {figure.name: figure for figure in _METRICS}
BY_NAME = {figure.name: figure for figure in FIGURES}
# Of `stagecraft compare`, in its order.
COLUMNS = tuple(sorted((f for f in FIGURES if f.column), key=lambda f: f.column))
# Of a run in short: its first screen and the end of a terminal, the most telling first.
SHORT = (
    "heldout_accuracy",
    "gold_win_rate",
    "reward_win_rate",
    "pair_accuracy",
    "gold_mean",
    "reward_mean",
    "kl",
    "length",
    "cloze_accuracy",
    "pass@1",
    "cover@50",
    "eval_loss",
    "eval_accuracy",
    "eval_rewards/accuracies",
    "eos_rate",
    "distinct_2",
    "entropy",
)
_LOWER = ("loss", "perplexity")  # of evaluations, better where lower
# Parts of a summary that hold figures by stage, or of none.
APART = ("weights", "raters", "cost", "seconds", "bounds", "table")


def figure(name: str) -> Figure:
    """Returns the row of a figure; a plain one where the table has none.

    >>> figure("kl").digits, figure("my_rate").title, figure("eval_loss").better
    (2, 'my rate', 'lower')
    """
    if name in BY_NAME:
        return BY_NAME[name]
    if name.startswith("eval_"):
        bare = name.removeprefix("eval_")
        title = f"Held-out {bare.replace('_', ' ').replace('/', ' ')}"
        meaning = "of held-out rows, at the last evaluation"
        better = "lower" if bare in _LOWER else ""
        return Figure(name, title, meaning, better=better)
    return Figure(name, name.replace("_", " "))


def metric(name: str) -> Figure | None:
    """Returns the row of a metric of training; None where the table has none.

    >>> metric("objective/kl").digits, metric("my_gold").title, metric("gold_std")
    (2, 'Gold score', None)
    """
    if GOLD in name and not name.endswith("std"):
        return METRICS[GOLD]._replace(name=name, meaning=name.removeprefix("eval_"))
    return METRICS.get(name)


def words(key: str) -> str:
    """Returns a dotted key of a summary in words.

    >>> words("ppo.gold_mean"), words("weights.sft.relative_change")
    ('Gold score of ppo', 'Relative change of sft')
    """
    first, *rest = key.split(".")
    if first in APART and len(rest) > 1:
        first, *rest = rest
    titles = [figure(name).title for name in rest]
    if first == "seconds":
        return " ".join(["Seconds", *titles])
    return f"{' '.join(titles)} of {first}" if rest else key


def half(own: dict, name: str) -> float | None:
    """Returns half the 95% interval of a stage's figure over draws; None without one.

    Args:
        own: the stage's part of a summary.
        name: of the figure.
    """
    draws = part(own, "draws")
    error, count = part(draws, "standard_error").get(name), draws.get("count")
    if not is_number(error) or not is_number(count) or count < 2:
        return None
    return statistics.interval([own[name]], [(error, count - 1)])[1]
