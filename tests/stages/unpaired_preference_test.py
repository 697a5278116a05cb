"""KTO and BCO: rotated prompts, the reference point, the running mean, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses, masked, train, tree
from stagecraft.data.dataset import Dataset
from stagecraft.stages import unpaired_preference
from tests.stages import cases

BETA = 0.1


def rotated_by_hand(batch):
    """Each real row's prompt before the completion of the next one, as lists."""
    real = [row for row in range(len(batch["ids"])) if batch["mask"][row].any()]
    length = batch["ids"].shape[1]
    found = {}
    for place, row in enumerate(real):
        other = real[(place - 1) % len(real)]
        where = np.flatnonzero(batch["mask"][row])
        prompt = batch["ids"][row][: where[0]].tolist()
        completion = batch["ids"][other][batch["mask"][other]].tolist()
        found[row] = (prompt + completion)[:length], len(prompt)
    return found


def padded(batch, rows):
    """The batch with empty rows at its end."""
    return {
        k: np.concatenate([v, np.zeros((rows, *v.shape[1:]), v.dtype)])
        for k, v in batch.items()
    }


@pytest.mark.parametrize("empty", [0, 3])
def test_rotated_rows_are_the_loop(empty):
    batch = padded(cases.judged(rows=9, seed=2), empty)
    assert len({int(m.argmax()) for m in batch["mask"][:9]}) > 2  # prompt lengths
    # A long prompt before a long completion: it does not fit, and is cut.
    batch["mask"][4], batch["mask"][3] = np.arange(16) >= 12, np.arange(16) >= 2
    batch["segments"][3:5] = 1
    got = cases.host(jax.jit(unpaired_preference.rotated)(batch))
    expected = rotated_by_hand(batch)
    assert len(expected[4][0]) == 16 < expected[4][1] + batch["mask"][3].sum()
    for row in range(9 + empty):
        ids, prompt = expected.get(row, ([], 0))
        size = len(ids)
        assert got["ids"][row, :size].tolist() == ids
        mask = [prompt <= t < size for t in range(16)]
        assert got["mask"][row].tolist() == mask
        assert got["segments"][row].tolist() == [int(t < size) for t in range(16)]
    assert (got["positions"] == np.arange(16)).all()


def test_one_row_alone_meets_itself():
    batch = padded(cases.judged(rows=1), 2)
    got = cases.host(unpaired_preference.rotated(batch))
    np.testing.assert_array_equal(got["mask"], batch["mask"])
    np.testing.assert_array_equal(got["ids"][0], batch["ids"][0])


def z_by_hand(policy, reference, raw):
    """The mean log-ratio of the rotated completions, before the clamp."""
    rows = rotated_by_hand(raw)
    ids = np.zeros(raw["ids"].shape, np.int32)
    mask, seen = np.zeros(ids.shape, bool), np.zeros(ids.shape, np.int32)
    for row, (tokens, prompt) in rows.items():
        ids[row, : len(tokens)] = tokens
        mask[row, prompt : len(tokens)] = True
        seen[row, : len(tokens)] = 1
    batch = dict(ids=ids, segments=seen, positions=raw["positions"])
    ratio = cases.token_logps(policy, batch) - cases.token_logps(reference, batch)
    return (ratio * mask).sum(1)[list(rows)].mean()


@pytest.fixture(scope="module")
def kto():
    """A stage, its batch with rows of padding at the end, its models, one update."""
    with jax.set_mesh(cases.single()):
        made, raw, config = cases.stage("unpaired_preference", cases.single())
        raw = padded(cases.judged(rows=14, seed=1), 2)
        state = made.init(jax.random.key(0))
        batch = made.prepare(state, raw, None)
        held = cases.host(batch)
        before = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
        state, metrics = made.update(state, batch)
        after = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
        models = cases.models(cases.single())
    step = {k: (before[k] - after[k]) / config.optimizer.lr for k in before}
    return made, raw, held, models, cases.told(metrics), step


def sums(model, raw):
    return (cases.token_logps(model, raw) * raw["mask"]).sum(1)


def test_kto_against_numpy(kto):
    _, raw, held, models, metrics, _ = kto
    policy, reference = sums(models["policy"], raw), sums(models["reference"], raw)
    real, label = raw["mask"].any(1), raw["label"]
    np.testing.assert_allclose(held["ref_logps"], reference, atol=1e-4)
    z = max(z_by_hand(models["policy"], models["reference"], raw), 0.0)
    assert float(held["kl"]) == pytest.approx(z, abs=1e-4)
    gain = BETA * (policy - reference - z)
    loss = 1 / (1 + np.exp(np.where(label, gain, -gain)))
    assert metrics["loss"] == pytest.approx(loss[real].mean(), rel=1e-4)
    assert metrics["kl"] == pytest.approx(z, abs=1e-4)
    rewards = BETA * (policy - reference)
    for name, who in (("chosen", label & real), ("rejected", ~label & real)):
        assert 0 < who.sum() < real.sum()
        expected = rewards[who].mean()
        assert metrics[f"rewards/{name}"] == pytest.approx(expected, abs=1e-4)
        assert metrics[f"logps/{name}"] == pytest.approx(policy[who].mean(), rel=1e-4)
    margin = rewards[label & real].mean() - rewards[~label & real].mean()
    assert metrics["rewards/margins"] == pytest.approx(margin, abs=1e-4)


def test_the_reference_point_is_clamped_and_counts_only_real_rows(kto):
    """Swapping the models turns the sign of z: one of the two is 0."""
    made, raw, _, models, _, _ = kto
    del made
    raw = {k: v for k, v in raw.items() if k != "label"}
    distance = jax.jit(unpaired_preference.reference_distance)
    pair = models["policy"], models["reference"]
    with jax.set_mesh(cases.single()):
        there, back = (float(distance(*m, raw)) for m in (pair, pair[::-1]))
    z = z_by_hand(*pair, raw)
    assert abs(z) > 0.1
    assert there == pytest.approx(max(z, 0), abs=1e-4)
    assert back == pytest.approx(max(-z, 0), abs=1e-4)
    assert min(there, back) == 0


def test_no_gradient_flows_through_the_reference_point(kto):
    """The step is the gradient of the loss with z as a number, over the real rows."""
    _, raw, held, models, _, step = kto
    real, label = jnp.asarray(raw["mask"].any(1)), jnp.asarray(raw["label"])

    def loss(model):
        logits = model.logits(raw["ids"], raw["positions"], raw["segments"])
        logps = jax.nn.log_softmax(logits)[:, :-1]
        picked = jnp.take_along_axis(logps, raw["ids"][:, 1:, None], -1)[..., 0]
        policy = (picked * raw["mask"][:, 1:]).sum(1)
        gain = BETA * (policy - held["ref_logps"] - held["kl"])
        value = jax.nn.sigmoid(jnp.where(label, -gain, gain))
        return jnp.where(real, value, 0).sum() / real.sum()

    grads = tree.named(jax.jit(jax.grad(loss))(models["policy"]))
    for name, grad in grads.items():
        scale = np.abs(grad).max() + 1e-6
        assert np.abs(step[name] - np.asarray(grad)).max() < 1e-4 * scale + 1e-5, name


def test_the_running_mean_is_that_of_all_rewards_so_far():
    """BCO over three batches of different sizes, with padding and a changing policy."""
    shared = cases.single()
    with jax.set_mesh(shared):
        made, _, config = cases.stage(
            "unpaired_preference",
            shared,
            objective="bco",
            objective_args=dict(beta=0.5),
        )
        state = made.init(jax.random.key(0))
        reference = cases.models(shared)["reference"]
        rewards = []
        for number, rows in enumerate((16, 9, 13)):
            raw = padded(cases.judged(rows=rows, seed=number), 16 - rows)
            ratio = sums(state.model, raw) - sums(reference, raw)
            rewards += (0.5 * ratio[:rows]).tolist()
            batch = made.prepare(state, raw, None)
            assert float(batch["delta"]) == pytest.approx(np.mean(rewards), abs=1e-4)
            label, border = raw["label"][:rows], np.mean(rewards)
            logit = 0.5 * ratio[:rows] - border
            loss = np.log1p(np.exp(np.where(label, -logit, logit))).mean()
            state, metrics = made.update(state, batch)
            assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)
            assert float(metrics["delta"]) == pytest.approx(border, abs=1e-4)
            assert float(state.extra["delta"]) == pytest.approx(border, abs=1e-4)
            assert float(state.extra["seen"]) == len(rewards)
    assert config.objective == "bco"


def test_labels_weigh_what_they_should():
    """Undesirable rows at weight 0 leave the desirable ones alone, over all rows."""
    raw = cases.judged(rows=16)
    zeros = jnp.zeros(16)
    loss, _ = losses.kto(
        *(zeros, zeros, jnp.asarray(raw["label"]), jnp.float32(0)),
        undesirable_weight=0.0,
    )
    np.testing.assert_allclose(loss, 0.5 * raw["label"])


@pytest.mark.parametrize("seed", [0, 1])
def test_running_mean_by_parts(seed):
    rng = np.random.default_rng(seed)
    mean, seen, every = 0.0, 0.0, []
    for size in (4, 4, 4):
        values = rng.normal(2, 5, size).astype(np.float32)
        mask = rng.random(size) < 0.6
        mask[0] = size > 0
        every += values[mask].tolist()
        mean, seen = unpaired_preference.running_mean(mean, seen, values, mask)
        assert float(mean) == pytest.approx(np.mean(every), rel=1e-5)
        assert float(seen) == len(every)
    nothing = unpaired_preference.running_mean(
        mean, seen, np.full(4, np.nan), np.zeros(4, bool)
    )
    assert [float(x) for x in nothing] == [float(mean), float(seen)]
    first = unpaired_preference.running_mean(0.0, 0.0, np.ones(4), np.zeros(4, bool))
    assert [float(x) for x in first] == [0.0, 0.0]


@pytest.mark.parametrize("seen", [False, True])
def test_a_held_out_loss_of_bco_depends_on_no_batch(seen):
    """Rewards are compared with the mean of training as it stands (TRL: do_train)."""
    shared = cases.single()
    with jax.set_mesh(shared):
        made, raw, config = cases.stage(
            "unpaired_preference", shared, objective="bco", ema_decay=0.5
        )
        state = made.init(jax.random.key(0))
        for _ in range(3 * seen):
            state, _ = made.update(state, made.prepare(state, raw, None))
        delta = float(state.extra["delta"])
        rows = cases.judged(rows=13, seed=9)
        found = [
            train.evaluate(made, state, Dataset([(rows, size)], seed=0), size)
            for size in (1, 3, 5, 13)
        ]
        policy = cases.token_logps(train.deployable(state), rows)
        reference = cases.token_logps(cases.models(shared)["reference"], rows)
        assert float(state.extra["delta"]) == delta
    target = rows["mask"].copy()
    target[:, 0] = False
    rewards = 0.1 * ((policy - reference) * target).sum(1)
    margins = np.where(rows["label"], 1, -1) * (rewards - delta)
    expected = np.log1p(np.exp(-margins)).mean()
    for told in found:
        assert told["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert (delta != 0) == seen


def test_padding_rows_change_nothing(kto):
    made, raw, held, models, metrics, _ = kto
    bare = {k: v[:14] for k, v in raw.items()}
    with jax.set_mesh(cases.single()):
        state = made.init(jax.random.key(0))
        found = masked.compute(made.evaluate(state, bare, None))
    assert float(found["loss"]) == pytest.approx(metrics["loss"], rel=1e-5)
    for name in ("rewards/chosen", "logits/rejected", "entropy", "kl"):
        assert float(found[name]) == pytest.approx(metrics[name], abs=1e-4)
    del held, models


def test_ones_own_loss_may_ask_for_the_running_mean_alone():
    def mine(policy_logps, labels, delta):
        return jnp.where(labels, -1.0, 1.0) * (policy_logps - delta), {}

    shared = cases.single()
    with jax.set_mesh(shared):
        made, raw, _ = cases.stage("unpaired_preference", shared, objective=mine)
        batch = made.prepare(made.init(jax.random.key(0)), raw, None)
        models = cases.models(shared)
    ratio = sums(models["policy"], raw) - sums(models["reference"], raw)
    assert float(batch["delta"]) == pytest.approx(0.1 * ratio.mean(), abs=1e-4)
