"""Reward models: rankings, margins, soft labels, and how honest their verdicts are."""

import jax
import numpy as np
import pytest

from stagecraft import defaults, masked
from stagecraft.data.dataset import Dataset
from stagecraft.errors import UserError
from stagecraft.stages import reward, update
from tests.losses import calibration
from tests.stages import cases


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(cases.single()):
        return cases.models(cases.single())["reward"]


def rewards_of(model, raw):
    """f64[B, K], read at the last masked token; NaN where there is no completion."""
    values = cases.scalars(model, raw).reshape(raw["ids"].shape)
    out = np.full(raw["ids"].shape[:2], np.nan)
    for row, side in np.ndindex(*out.shape):
        where = np.flatnonzero(raw["mask"][row, side])
        if len(where):
            out[row, side] = values[row, side, where[-1]]
    return out


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def evaluate(model, *batches, **changes):
    """The merged metrics of several batches, as a held-out set is measured."""
    goal = reward.make_objective(defaults.stage("reward", **changes))
    run, total = jax.jit(update.make_evaluate(goal)), None
    for batch in batches:
        found = run(model, batch)
        total = found if total is None else masked.merge(total, found)
    return cases.told(masked.compute(total))


def padded(raw, rows):
    return {
        k: np.concatenate([v, np.zeros((rows, *v.shape[1:]), v.dtype)])
        for k, v in raw.items()
    }


def test_margins_soft_labels_and_centering(model):
    raw, rng = padded(cases.pairs(rows=14), 2), np.random.default_rng(0)
    raw["margin"] = rng.uniform(0, 2, 16).astype(np.float32)
    raw["preference"] = rng.random(16).astype(np.float32)
    got = evaluate(model, raw, objective_args=dict(centering=0.05))
    pair = rewards_of(model, raw)[:14]
    difference, margin = pair[:, 0] - pair[:, 1], raw["margin"][:14]
    right = raw["preference"][:14]
    loss = -right * log_sigmoid(difference - margin)
    loss -= (1 - right) * log_sigmoid(-difference - margin)
    loss += 0.05 * pair.sum(1) ** 2
    assert got["loss"] == pytest.approx(loss.mean(), rel=1e-4)
    assert got["accuracy"] == pytest.approx((difference > 0).mean(), abs=1e-6)
    assert got["margin"] == pytest.approx(difference.mean(), abs=1e-4)
    assert got["mean_reward"] == pytest.approx(pair.mean(), abs=1e-4)
    assert got["max_reward"] == pytest.approx(pair.max(), abs=1e-4)
    assert got["min_reward"] == pytest.approx(pair.min(), abs=1e-4)


def ranked(rows=14):
    """Up to three completions a row, best first; some rows have two, one has one."""
    two, third = cases.pairs(rows=rows, seed=1), cases.pairs(rows=rows, seed=2)
    raw = {k: np.concatenate([v, third[k][:, :1]], 1) for k, v in two.items()}
    for row in range(0, rows, 3):
        raw["mask"][row, 2] = False
        raw["segments"][row, 2] = 0
    raw["mask"][4, 1:] = False
    return padded(raw, 2)


def test_a_ranking_is_one_row_of_weight_one(model):
    raw = ranked()
    got = evaluate(model, raw, objective="bradley_terry_ranked")
    found, losses, hits = rewards_of(model, raw), [], []
    for row in range(14):
        own = [r for r in found[row] if np.isfinite(r)]
        pairs = [(a, b) for i, a in enumerate(own) for b in own[i + 1 :]]
        if pairs:
            losses.append(np.mean([-log_sigmoid(a - b) for a, b in pairs]))
            hits.append(np.mean([a > b for a, b in pairs]))
    assert len(losses) == 13
    assert got["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert got["accuracy"] == pytest.approx(np.mean(hits), abs=1e-6)
    counted = found[[row for row in range(14) if row != 4]]
    assert got["mean_reward"] == pytest.approx(np.nanmean(counted), abs=1e-4)


def test_a_loss_of_pairs_refuses_rankings(model):
    with pytest.raises(UserError, match="rank up to 3 .* bradley_terry_ranked"):
        evaluate(model, ranked())
    raw = ranked() | {"margin": np.ones(16, np.float32)}
    with pytest.raises(UserError, match="carry 'margin', which it does not take"):
        evaluate(model, raw, objective="bradley_terry_ranked")


def test_calibration_merges_over_batches_to_that_of_the_whole_set(model):
    batches = [
        padded(cases.pairs(rows=n, seed=s), 16 - n) for n, s in ((16, 5), (9, 6))
    ]
    got = evaluate(model, *batches)
    difference, lengths = [], []
    for raw, rows in zip(batches, (16, 9), strict=True):
        pair = rewards_of(model, raw)[:rows]
        difference += (pair[:, 0] - pair[:, 1]).tolist()
        lengths += raw["mask"][:rows].sum(-1).tolist()
    whole = calibration.by_confidence(difference, buckets=reward.BUCKETS)
    assert (whole.counts > 0).sum() >= 3
    for number, accuracy in enumerate(np.nan_to_num(whole.accuracy)):
        low, high = whole.edges[number : number + 2]
        name = f"accuracy/{low:.1f}-{high:.1f}"
        assert got[name] == pytest.approx(accuracy, abs=1e-6)
    error = calibration.expected_calibration_error(difference, buckets=reward.BUCKETS)
    assert got["calibration_error"] == pytest.approx(error, abs=1e-5)
    longer = got["length_accuracy"]
    baseline = calibration.length_baseline(lengths)
    assert max(longer, 1 - longer) == pytest.approx(baseline, abs=1e-6)
    wins = [(a > b) + 0.5 * (a == b) for a, b in lengths]
    assert longer == pytest.approx(np.mean(wins), abs=1e-6)


def test_certain_verdicts_stay_in_the_last_bucket():
    difference = np.array([0.0, 200.0, -200.0, 1e-3], np.float32)
    got = reward.calibration(difference, np.array([True, True, True, False]))
    got = cases.told(masked.compute(got))
    assert got["accuracy/0.5-0.6"] == 0  # a tie counts as wrong
    assert got["accuracy/0.9-1.0"] == 0.5
    assert got["calibration_error"] == pytest.approx((0.5 + 1) / 3, abs=1e-6)


def test_demonstrations_are_given_reward_zero_on_average():
    shared = cases.single()
    with jax.set_mesh(shared):
        made, _, _ = cases.stage("reward", shared, ema_decay=0.5)
        state = made.init(jax.random.key(0))
        rows = {k: v for k, v in cases.judged(rows=10).items() if k != "label"}
        before = rewards_of(state.model, {k: v[:, None] for k, v in rows.items()})
        data = Dataset([(rows, 8)], seed=0)
        state, told = reward.normalize(state, data, 8)
        for part in (state.model, state.extra["ema"]):
            after = rewards_of(part, {k: v[:, None] for k, v in rows.items()})
            np.testing.assert_allclose(after, before - before.mean(), atol=1e-4)
            assert abs(after.mean()) < 1e-4
    assert told == {"reference_reward": pytest.approx(before.mean(), abs=1e-4)}
