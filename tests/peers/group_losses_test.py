"""Critic-free advantages, losses and aggregations, against TRL's own code.

TRL's trainers compute them in methods; these run here as they are, on an object that
has only what they read. Log-probabilities are given, not modelled.
"""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses, masked
from stagecraft.losses import group, kl
from stagecraft.losses.aggregate import AGGREGATIONS, aggregate, overlong_filter

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("float64")]

PROMPTS, G, WIDTH, LIMIT = 6, 4, 7, 9
ROWS = PROMPTS * G
PAD, EOS = 0, 1


class Stub:
    """Stands in for a trainer or its arguments: what was not given is None, so off."""

    def __init__(self, **given):
        self.__dict__.update(given)

    def __getattr__(self, name):
        return None


@pytest.fixture(scope="module")
def trainers():
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    return {"grpo": GRPOTrainer, "rloo": RLOOTrainer}


@pytest.fixture(scope="module")
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def close(got, want, **tolerance):
    np.testing.assert_allclose(got, want, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


def draw_rewards(rng):
    """f64[PROMPTS, G]: unscored samples (NaN), a lone scored one, none, all alike."""
    rewards = rng.normal(size=(PROMPTS, G))
    scored = rng.random((PROMPTS, G)) < 0.8
    rewards[1] = rng.integers(-3, 4)  # whose mean does not round, in TRL either
    scored[:2] = True
    scored[2] = np.arange(G) == rng.integers(G)
    scored[3] = False
    return np.where(scored, rewards, np.nan), scored


def rollout(trainer, accelerator, rewards, lengths, ended, model_logps=None, **given):
    """What TRL's trainer makes of a generation batch, and the metrics it logged.

    Two reward functions of which the second scores nothing: their sum is `rewards`.
    """
    per_function = torch.tensor(
        np.stack([rewards.reshape(-1), np.full(rewards.size, np.nan)], axis=1)
    )
    completions = [
        [5] * (n - 1) + [EOS if e else 5] for n, e in zip(lengths, ended, strict=True)
    ]
    prompts = [[3, 4]] * len(lengths)
    generated = {
        "GRPOTrainer": (prompts, completions, None, completions, None, {}, None, None),
        "RLOOTrainer": (prompts, completions, completions),
    }[trainer.__name__]
    model, reference = (
        Stub(training=True, is_gradient_checkpointing=False) for _ in "ab"
    )
    own, ref = (None, None) if model_logps is None else map(torch.tensor, model_logps)
    stub = Stub(
        accelerator=accelerator,
        model=model,
        ref_model=reference,
        args=Stub(
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            per_device_train_batch_size=len(lengths),
            report_to=[],
        ),
        num_iterations=1,
        num_generations=G,
        beta=0.0,
        _tokenizer=Stub(pad_token_id=PAD),
        eos_token_ids=[EOS],
        reward_func_names=["a", "b"],
        reward_weights=torch.ones(2),
        multi_objective_aggregation="sum_then_normalize",
        _metrics={"train": defaultdict(list)},
        _logs={"rewards": defaultdict(list), "extra": defaultdict(list)}
        | {name: [] for name in ("prompt", "completion", "advantages", "images")},
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda _: generated,
        _calculate_rewards=lambda *_: per_function,
        _get_per_token_logps_and_entropies=lambda model, *_, **__: (
            ref if model is reference else own,
            None,
            None,
        ),
    )
    stub.__dict__.update(given)
    inputs = [{"prompt": "x"} for _ in lengths]
    with torch.no_grad():
        out = trainer._generate_and_score_completions(stub, inputs)
    return out, stub._metrics["train"]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(trainers, accelerator, parity_rng, scale):
    rewards, scored = draw_rewards(parity_rng)
    out, told = rollout(
        trainers["grpo"],
        accelerator,
        rewards,
        [3] * ROWS,
        [True] * ROWS,
        scale_rewards=scale,
    )
    got = group.group_advantages(jnp.asarray(rewards), jnp.asarray(scored), scale=scale)
    close(got.reshape(-1), out["advantages"])
    assert not np.asarray(got)[~scored].any() and np.asarray(got).any()
    if scale != "batch":
        # TRL does not count groups with fewer than two scored samples as flat.
        judged = scored.sum(axis=1) > 1
        flat = group.frac_reward_zero_std(jnp.asarray(rewards), jnp.asarray(scored))
        want = told["frac_reward_zero_std"][0]
        np.testing.assert_allclose((np.float64(flat) * judged).mean(), want)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_leave_one_out(trainers, accelerator, parity_rng, normalize, beta):
    rewards, scored = draw_rewards(parity_rng)
    lengths = parity_rng.integers(1, WIDTH + 1, ROWS)
    lengths[0] = WIDTH
    own, ref = -parity_rng.random((2, ROWS, WIDTH))
    out, _ = rollout(
        trainers["rloo"],
        accelerator,
        rewards,
        lengths,
        [True] * ROWS,
        (own, ref),
        beta=beta,
        normalize_advantages=normalize,
    )
    mask = jnp.arange(WIDTH) < lengths[:, None]
    penalty = masked.sum(kl.k1(jnp.asarray(own), jnp.asarray(ref)), mask, axis=1)
    paid = jnp.asarray(rewards) - beta * penalty.reshape(PROMPTS, G)
    got = group.leave_one_out(paid, jnp.asarray(scored), normalize=normalize)
    close(got.reshape(-1), out["advantages"])
    assert np.asarray(got).any()


def test_overlong_filter(trainers, accelerator, parity_rng):
    lengths = parity_rng.integers(1, WIDTH + 1, ROWS)
    lengths[0] = WIDTH
    ended = parity_rng.random(ROWS) < 0.5
    out, _ = rollout(
        trainers["grpo"],
        accelerator,
        parity_rng.normal(size=(PROMPTS, G)),
        lengths,
        ended,
        scale_rewards="group",
        mask_truncated_completions=True,
    )
    mask = jnp.arange(WIDTH) < lengths[:, None]
    got = overlong_filter(mask, jnp.asarray(ended))
    np.testing.assert_array_equal(got, out["completion_mask"].bool())


def draw_batch(rng, spread=0.4):
    """logps, old, ref f64[B, T], advantages f64[B], mask; one row is empty."""
    logps = -rng.exponential(size=(ROWS, WIDTH))
    old, ref = logps + spread * rng.normal(size=(2, ROWS, WIDTH))
    advantages = rng.normal(size=ROWS)
    mask = np.arange(WIDTH) < rng.integers(1, WIDTH + 1, ROWS)[:, None]
    mask[0], mask[1] = True, False
    return logps, old, ref, advantages, mask


def their_loss(trainer, accelerator, batch, *, tokens=None, windows=1, **given):
    """TRL's loss, its gradient in the log-probs, and its metrics."""
    logps, old, ref, advantages, mask = batch
    logps = torch.tensor(logps, requires_grad=True)
    entropy = torch.ones_like(logps)
    stub = Stub(
        accelerator=accelerator,
        model=Stub(training=True),
        args=Stub(steps_per_generation=windows),
        current_gradient_accumulation_steps=windows,
        top_entropy_quantile=1.0,
        importance_sampling_level="token",
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        max_completion_length=LIMIT,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
    )
    # Some settings are read off the trainer, some off its arguments.
    stub.__dict__.update(given)
    stub.args.__dict__.update(given)
    ids = torch.full(mask.shape, 5)
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": ids[:, :2],
        "completion_ids": ids,
        "completion_mask": torch.tensor(mask).int(),
        "advantages": torch.tensor(advantages),
        "ref_per_token_logps": torch.tensor(ref),
        "num_items_in_batch": torch.tensor(
            float(mask.sum() if tokens is None else tokens)
        ),
    }
    if old is not None:
        inputs["old_per_token_logps"] = torch.tensor(old)
        inputs["old_logps"] = (inputs["old_per_token_logps"] * torch.tensor(mask)).sum(
            1
        )
    loss = trainer._compute_loss(stub, None, inputs)
    loss.backward()
    told = {k: v[0] for k, v in stub._metrics["train"].items()}
    return loss.item(), logps.grad.numpy(), told


def our_loss(function, batch, how, *, beta=0.0, correct=False, **options):
    """The same by our functions: loss, gradient, metrics as the stage reduces them."""
    logps, old, ref, advantages, mask = batch
    old = logps if old is None else old
    mask = jnp.asarray(mask)
    rewards = jnp.broadcast_to(jnp.asarray(advantages)[:, None], mask.shape)
    reduction = aggregate(how, mask, max_length=LIMIT)
    more = (mask,) if function in (group.gspo, group.rloo_policy) else ()

    def total(logps):
        clean = [masked.clear(x, mask) for x in (logps, jnp.asarray(old))]
        loss, told = function(*clean, rewards, *more, **options)
        if beta:
            penalty, more_told = kl.kl_in_loss(
                clean[0],
                masked.clear(jnp.asarray(ref), mask),
                clean[1],
                bias_correction=correct,
            )
            loss, told = loss + beta * penalty, told | more_told
        return reduction.sum(loss) / reduction.total(), told

    (loss, told), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
        jnp.asarray(logps)
    )
    everywhere = jnp.ones(mask.shape[0], bool)
    told = {
        k: masked.mean(v, mask if v.ndim == 2 else everywhere) for k, v in told.items()
    }
    return loss, gradient, told


def compare(ours, theirs, told=()):
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])
    for name in told:
        close(ours[2][name], theirs[2][name], err_msg=name)


CLIPPED = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("beta, correct", [(0.0, False), (0.1, False), (0.1, True)])
def test_clipped_surrogate(trainers, accelerator, parity_rng, how, beta, correct):
    batch = draw_batch(parity_rng)
    theirs = their_loss(
        trainers["grpo"],
        accelerator,
        batch,
        loss_type=how,
        beta=beta,
        use_bias_correction_kl=correct,
    )
    ours = our_loss(losses.ppo_policy, batch, how, beta=beta, correct=correct)
    compare(ours, theirs, CLIPPED + (("kl",) if beta else ()))
    assert theirs[2]["clip_ratio/region_mean"] > 0


def test_without_old_log_probs_the_policy_is_its_own(trainers, accelerator, parity_rng):
    logps, _, *rest = draw_batch(parity_rng)
    batch = (logps, None, *rest)
    theirs = their_loss(trainers["grpo"], accelerator, batch, loss_type="dapo")
    compare(our_loss(losses.ppo_policy, batch, "dapo"), theirs, CLIPPED)
    # The value is a mean of advantages; the gradient is what matters.
    assert np.abs(theirs[1]).max() > 1e-3


def test_clip_higher(trainers, accelerator, parity_rng):
    batch = draw_batch(parity_rng)
    theirs = their_loss(
        trainers["grpo"], accelerator, batch, loss_type="dapo", epsilon_high=0.28
    )
    ours = our_loss(losses.ppo_policy, batch, "dapo", clip_high=0.28)
    compare(ours, theirs, CLIPPED)


@pytest.mark.parametrize("name", ["delta", "dual_clip"])
def test_two_sided_clip(trainers, accelerator, parity_rng, name):
    batch = draw_batch(parity_rng)
    theirs = their_loss(
        trainers["grpo"], accelerator, batch, loss_type="grpo", delta=1.5
    )
    ours = our_loss(losses.ppo_policy, batch, "grpo", **{name: 1.5})
    compare(ours, theirs, CLIPPED)
    free = our_loss(losses.ppo_policy, batch, "grpo")
    assert abs(float(ours[0]) - float(free[0])) > 1e-4


@pytest.mark.parametrize("low, high", [(3e-4, 4e-4), (0.1, 0.15)])
def test_gspo(trainers, accelerator, parity_rng, low, high):
    batch = draw_batch(parity_rng)
    theirs = their_loss(
        trainers["grpo"],
        accelerator,
        batch,
        loss_type="grpo",
        importance_sampling_level="sequence",
        epsilon_low=low,
        epsilon_high=high,
    )
    ours = our_loss(group.gspo, batch, "grpo", clip=low, clip_high=high)
    compare(ours, theirs, CLIPPED)


def test_cispo(trainers, accelerator, parity_rng):
    batch = draw_batch(parity_rng, spread=1.0)
    theirs = their_loss(
        trainers["grpo"], accelerator, batch, loss_type="cispo", epsilon_high=1.5
    )
    ours = our_loss(group.cispo, batch, "dapo", clip_high=1.5)
    compare(ours, theirs, ("cispo_clip_ratio",))
    assert theirs[2]["cispo_clip_ratio"] > 0


def test_sapo(trainers, accelerator, parity_rng):
    batch = draw_batch(parity_rng, spread=1.0)
    theirs = their_loss(
        trainers["grpo"],
        accelerator,
        batch,
        loss_type="sapo",
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
    )
    compare(our_loss(group.sapo, batch, "grpo"), theirs)


def test_rloo(trainers, accelerator, parity_rng):
    batch = draw_batch(parity_rng, spread=0.2)
    theirs = their_loss(trainers["rloo"], accelerator, batch)
    ours = our_loss(group.rloo_policy, batch, "grpo")
    # TRL's row without tokens counts as minus its advantage, a constant; ours as 0.
    empty = ~batch[4].any(axis=1)
    constant = -batch[3][empty].sum() / ROWS
    compare((ours[0] + constant, *ours[1:]), theirs, CLIPPED)
    assert theirs[2]["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_accumulation(trainers, accelerator, parity_rng, how):
    """Two micro-batches of one step: their sum is our whole, except by "bnpo"."""
    batch = draw_batch(parity_rng)
    halves = list(zip(*(np.split(x, 2) for x in batch), strict=True))
    theirs = [
        their_loss(
            trainers["grpo"],
            accelerator,
            half,
            loss_type=how,
            windows=2,
            tokens=batch[4].sum(),
        )
        for half in halves
    ]
    loss = sum(x[0] for x in theirs)
    gradient = np.concatenate([x[1] for x in theirs])
    ours = our_loss(losses.ppo_policy, batch, how)
    if how != "bnpo":
        compare(ours, (loss, gradient))
        return
    parts = [our_loss(losses.ppo_policy, half, how) for half in halves]
    means = sum(x[0] for x in parts) / 2, np.concatenate([x[1] for x in parts]) / 2
    compare(means, (loss, gradient))
    if batch[4][: ROWS // 2].sum() != batch[4].sum() / 2:
        assert np.abs(gradient - ours[1]).max() > 1e-6
