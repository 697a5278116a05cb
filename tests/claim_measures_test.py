"""What files of claims measure, of models whose every figure is planted."""

import types

import numpy as np
import pytest

from stagecraft import config_files, worlds
from stagecraft.worlds.countries import probes
from tests.conftest import ROOT

COUNTRIES = worlds.get("countries").split(0, "full").test
FACTS = len(probes.cloze(COUNTRIES)[0])


def module(name):
    return config_files.module(ROOT / "experiments" / "claims" / f"{name}.py")


def run(**attributes):
    world = types.SimpleNamespace(name="countries", size="full", entities=0)
    attributes = {"config": types.SimpleNamespace(seed=0, world=world)} | attributes
    return types.SimpleNamespace(**attributes)


# -- emergence -------------------------------------------------------------------------


class Planted:
    """A language whose facts are so likely, and decoded exactly from `bar` on."""

    def __init__(self, low, high, bar):
        self.likely, self.bar = (low, high), bar

    def probabilities(self, count):
        return np.linspace(*self.likely, count)

    def complete(self, stems, chat, max_new_tokens):
        known = dict(zip(*probes.cloze(COUNTRIES), strict=True))
        exact = self.probabilities(len(stems)) >= self.bar
        return [
            (known[s] if e else "no", True) for s, e in zip(stems, exact, strict=True)
        ]

    def logprob(self, stems, ends):
        assert all(end.startswith(" ") for end in ends)
        return np.log(self.probabilities(len(stems))).tolist()


@pytest.mark.parametrize(
    ("bar", "holds"),
    [(0.501, False), (0.05, True)],
    ids=["the metric cuts at a half", "exact long before it is likely"],
)
def test_a_step_of_the_metric_is_told_from_one_of_the_model(bar, holds):
    claim = module("emergence")
    tops = {100: 0.1, 200: 0.45, 400: 0.6, 800: 0.9}
    languages = {f"small_{s}": Planted(0.01, p, bar) for s, p in tops.items()}
    languages |= {f"small_400_seed{i}": Planted(0.01, 0.9, bar) for i in (1, 2)}
    languages["pretrain"] = Planted(0.7, 0.99, bar)
    own = run(language=lambda name, rows: languages[name])
    own.config.stages = [name for name in languages if name != "pretrain"]
    figures = claim.measure(own, own)
    sharp, cut = (figures["unexplained"][key] for key in ("sharp", "cut"))
    ladder = [*(f"small_{s}" for s in tops), "pretrain"]
    smooth = [np.mean(languages[n].probabilities(FACTS)) for n in ladder]
    exact = [np.mean(languages[n].probabilities(FACTS) >= bar) for n in ladder]
    left = np.sum(np.subtract(exact, smooth) ** 2) / np.var(exact) / len(ladder)
    assert [figures["smooth"][n] for n in ladder] == pytest.approx(smooth)
    assert sharp == pytest.approx(left, rel=1e-6)
    # Only where the step is not that of the cut could the claim hold.
    assert (sharp > cut + 0.1) == holds
    again = [figures["sharp"][name] for name in languages if "_400" in name]
    assert figures["seeds_400"]["sd"] == pytest.approx(np.std(again, ddof=1))
    assert len(again) == 3


def test_a_ladder_without_a_step_leaves_nothing():
    flat = np.zeros(5)
    assert module("emergence").unexplained(flat, flat + 0.1) == 0.0


# -- a judge's biases ------------------------------------------------------------------


def test_traits_are_compared_where_arms_are_as_far(monkeypatch):
    """Log-odds of 6 a dose at the common KL, of arms that end at other distances."""
    claim = module("judge_bias")
    names = [*claim.arms("style"), *claim.arms("first")[1:]]
    far = {name: 2 + number for number, name in enumerate(names)}
    doses = dict(zip(claim.arms("style"), claim.DOSES, strict=True))
    least = min(far.values())  # of √KL at the ends
    models = {
        name: np.array([end, 6 * doses.get(name, 0.0) * end / least])
        for name, end in far.items()
    }
    monkeypatch.setattr(claim, "Language", lambda model, *_, **__: model)

    def trait(model, reference, prompts, seed):
        distance, odds = model
        return distance**2, odds, 0.0

    monkeypatch.setattr(claim, "trait", trait)
    monkeypatch.setattr(claim.texts, "heldout", lambda run: [])
    start = types.SimpleNamespace(model=np.zeros(2), batch_size=1)
    base = run(model=lambda name: np.zeros(2), tokenizer=None)
    base.language = lambda name, rows: start
    own = run(model=models.__getitem__)
    figures = claim.measure(base, own)
    assert figures["matched"]["kl"] == least**2
    assert figures["slope"]["style"] == pytest.approx(6)
    assert figures["slope"]["first"] == pytest.approx(0)
    # Arms of higher dose went further here, which the ends mix with the bias.
    assert figures["slope"]["style_at_ends"] > 10


def test_the_log_odds_of_the_mark(monkeypatch):
    claim = module("judge_bias")
    said = {"answers": [("yes!", True), ("one two", True), ("no", True)]}
    monkeypatch.setattr(claim.sampled, "sample", lambda *_, **__: said)
    monkeypatch.setattr(claim.sampled, "kl", lambda *_: 0.5)
    kl, odds, words = claim.trait(None, None, [], 0)
    assert (kl, odds) == (0.5, pytest.approx(np.log(1.5 / 2.5)))
    assert words == pytest.approx(4 / 3)
