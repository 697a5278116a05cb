"""Online preference optimization: which answer is chosen, and what it is scored by."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft.signals.verifiers import Verifier, Verifiers
from tests.stages import cases

TAU = 0.7
WORDS = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))


def short(prompts, completions):
    """Pays 1 for fewer than six words: many ties; some first words are not judged."""
    words = [c.split() for c in completions]
    return [float(len(w) < 6) if w and int(w[0]) < 56 else None for w in words]


@pytest.fixture(scope="module")
def ranked():
    shared = cases.single()
    records = [{"prompt": f"p{i}"} for i in range(16)]
    with jax.set_mesh(shared), cases.watched() as seen:
        made, raw, config = cases.stage(
            "online_preference",
            shared,
            without=("reward",),
            verifiers=Verifiers([Verifier("short", short)], records, WORDS),
            missing_eos_penalty=0.25,
        )
        state = made.init(jax.random.key(0))
        raw |= {"index": np.arange(16)}
        batch = made.prepare(state, raw, jax.random.key(5))
        held = cases.host(batch)
        _, metrics = made.update(state, batch)
        models = cases.models(shared)
    return held, seen["drawn"], seen["rewards"][:, 0], cases.told(metrics), models


def test_the_better_of_two_is_chosen_and_the_first_of_equals(ranked):
    held, drawn, rewards, metrics, _ = ranked
    scored = np.isfinite(rewards)
    paid = np.where(scored, rewards, 0) - 0.25 * ~drawn["ended"]
    ties = better = 0
    for row in range(16):
        two = (2 * row, 2 * row + 1)
        first = 0 if paid[two[0]] >= paid[two[1]] else 1
        ties += paid[two[0]] == paid[two[1]]
        better += first
        both = scored[two[0]] and scored[two[1]]
        for side, it in enumerate((two[first], two[1 - first])):
            for name in ("ids", "segments", "positions"):
                np.testing.assert_array_equal(held[name][row, side], drawn[name][it])
            mask = drawn["mask"][it] & both
            np.testing.assert_array_equal(held["mask"][row, side, 8:], mask)
            assert not held["mask"][row, side, :8].any()
    assert ties and better and not scored.all()  # all three happen
    pairs = scored.reshape(16, 2).all(1)
    margins = np.abs(np.diff(paid.reshape(16, 2))[:, 0])[pairs]
    found = metrics["objective/scores_margin"]
    assert found == pytest.approx(margins.mean(), abs=1e-6)
    found = metrics["objective/scores"]
    assert found == pytest.approx(paid[scored].mean(), abs=1e-6)
    assert metrics["rewards/unscored"] == pytest.approx(1 - scored.mean(), abs=1e-6)
    share = drawn["ended"].mean()
    assert metrics["val/contain_eos_token"] == pytest.approx(share)


def test_the_loss_is_dpo_of_the_rows_alone(ranked):
    """Log-probs of each answer from its own unpadded text, prompt and answer only."""
    held, _, _, metrics, models = ranked
    rows = [r for r in range(16) if held["mask"][r].any(-1).all()]
    log_ratio = np.zeros((len(rows), 2))
    for place, row in enumerate(rows[:4]):
        for side in range(2):
            real = held["segments"][row, side] > 0
            ids, mask = held["ids"][row, side][real], held["mask"][row, side][real]
            size = len(ids)
            alone = np.zeros((1, 18), np.int32)
            alone[0, :size] = ids
            batch = dict(
                ids=alone,
                positions=np.arange(18)[None],
                segments=(np.arange(18) < size).astype(np.int32)[None],
            )
            policy, ref = (
                cases.token_logps(models[k], batch)[0, :size][mask].sum()
                for k in ("policy", "reference")
            )
            assert held["ref_logps"][row, side] == pytest.approx(ref, abs=1e-4)
            log_ratio[place, side] = policy - ref
    policy = (cases.token_logps(models["policy"], held) * held["mask"]).sum(-1)
    whole = (policy - held["ref_logps"])[rows]
    np.testing.assert_allclose(whole[:4], log_ratio[:4], atol=2e-4)
    margin = 0.1 * (whole[:, 0] - whole[:, 1])
    expected = np.log1p(np.exp(-margin)).mean()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["rewards/margins"] == pytest.approx(margin.mean(), abs=1e-4)


def test_a_loss_without_a_reference_scores_none():
    shared = cases.single()
    with jax.set_mesh(shared):
        made, raw, _ = cases.stage("online_preference", shared, objective="simpo")
        state = made.init(jax.random.key(0))
        batch = made.prepare(state, raw, jax.random.key(1))
    assert "ref_logps" not in batch
    assert made.work(raw)["scored"] == 0
    assert jnp.isfinite(batch["metrics"]["objective/scores"].total)
