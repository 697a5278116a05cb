"""PPO's rewards, advantages and losses, against TRL 1.12, the last release that has it.

TRL pays the score one slot after the end token (placement "B") and whitens with the
unbiased variance; so do we where the two are compared.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import losses, masked
from stagecraft.losses import kl

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("float64")]

BESIDE = Path(sys.prefix) / "trl112"
SCRIPT = Path(__file__).parent / "ppo_by_trl.py"
ROWS, WIDTH, PAD, STOP = 12, 8, 0, 1
CLIP, VALUE_COEF = 0.2, 0.1

CASES = {
    "k1": {},
    "k3": {"kl_estimator": "k3"},
    "discounted": {"args_gamma": 0.9, "args_lam": 0.5},
    "whitened rewards": {"args_whiten_rewards": True},
    "missing end": {"args_missing_eos_penalty": 1.5},
    "narrow clips": {"args_cliprange": 0.05, "args_cliprange_value": 0.03},
}


def settings(case):
    return {
        "kl_estimator": "k1",
        "args_kl_coef": 0.3,
        "args_gamma": 1.0,
        "args_lam": 0.95,
        "args_whiten_rewards": False,
        "args_missing_eos_penalty": 0.0,
        "args_cliprange": CLIP,
        "args_cliprange_value": 0.2,
        "args_vf_coef": VALUE_COEF,
    } | CASES[case]


def draw_responses(rng):
    """Tokens i64[ROWS, WIDTH]: a stop token, none, at the end, at once, or twice."""
    raw = rng.integers(2, 9, (ROWS, WIDTH))
    for row in range(2, ROWS):  # two rows fill the window without an end
        raw[row, rng.integers(WIDTH)] = STOP
    raw[2, WIDTH - 1] = raw[3, 0] = raw[4, 2] = raw[4, 5] = STOP
    raw[2, : WIDTH - 1] = 7
    return raw


def draw(rng, case):
    """One rollout, and where policy and critic have moved to since."""
    raw = draw_responses(rng)
    real = np.cumsum(raw == STOP, axis=1) - (raw == STOP) == 0  # through the first stop
    logprobs = -rng.exponential(size=(ROWS, WIDTH))
    values, step = rng.normal(size=(2, ROWS, WIDTH))
    arrays = {
        "postprocessed_responses": np.where(real, raw, PAD),
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 0.3 * rng.normal(size=logprobs.shape),
        "values": values,
        "scores": rng.normal(size=ROWS),
        "new_logprobs": logprobs + 0.2 * rng.normal(size=logprobs.shape),
        "vpred": values + 0.3 * step,
    }
    return arrays | {"stop": STOP, "pad": PAD} | settings(case)


@pytest.fixture(scope="module")
def both(parity_seed, tmp_path_factory):
    """{case: (what was given, what TRL 1.12 makes of it)}."""
    if not (BESIDE / "trl").is_dir():
        pytest.fail(
            f"TRL 1.12 is not in {BESIDE}: run `make test-peers`, it puts it there"
        )
    rng = np.random.default_rng([parity_seed, 112])
    mask = rng.random((ROWS, WIDTH)) < 0.6
    mask[:, 0] = True
    given = {case: draw(rng, case) for case in CASES} | {
        "functions": {
            "x": rng.normal(2, 3, (ROWS, WIDTH)),
            "x_mask": mask,
            "raw": draw_responses(rng),
            "stop": STOP,
            "pad": PAD,
        }
    }
    folder = tmp_path_factory.mktemp("ppo")
    flat = {
        f"{case}/{k}": v for case, arrays in given.items() for k, v in arrays.items()
    }
    np.savez(folder / "in.npz", **flat)
    path = os.pathsep.join([str(BESIDE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder / "in.npz"), str(folder / "out.npz")],
        env=os.environ | {"PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = np.load(folder / "out.npz")
    assert str(out["version"]) == "1.12.0"

    def of(case):
        return {
            k.partition("/")[2]: out[k] for k in out.files if k.startswith(f"{case}/")
        }

    return {case: (arrays, of(case)) for case, arrays in given.items()}


def close(got, want, **more):
    np.testing.assert_allclose(got, want, **({"rtol": 1e-5, "atol": 1e-5} | more))


def response_mask(responses):
    """bool[B, T], through the end token; responses are padded after it."""
    return jnp.asarray(responses != PAD)


def ours(given):
    """The same rollout judged by our functions."""
    mask = response_mask(given["postprocessed_responses"])
    paid = kl.value_mask(mask, "B")
    ended = jnp.any(jnp.asarray(given["postprocessed_responses"] == STOP), axis=1)
    logps, ref_logps, values, scores = (
        jnp.asarray(given[k]) for k in ("logprobs", "ref_logprobs", "values", "scores")
    )
    scores = losses.missing_eos(
        scores, ended, penalty=given["args_missing_eos_penalty"]
    )
    rewards = losses.kl_reward(
        scores,
        logps,
        ref_logps,
        mask,
        kl_coef=given["args_kl_coef"],
        placement="B",
        estimator=given["kl_estimator"],
    )
    if given["args_whiten_rewards"]:
        rewards = losses.whiten(rewards, paid, shift_mean=False, unbiased=True)
    advantages, returns = losses.gae(
        rewards,
        values,
        paid,
        discount=given["args_gamma"],
        lambda_=given["args_lam"],
    )
    return {
        "mask": mask,
        "paid": paid,
        "scores": scores,
        "rewards": rewards,
        "advantages": losses.whiten(advantages, mask, unbiased=True),
        "returns": returns,
        "values": masked.clear(values, paid),
        "logps": masked.clear(logps, mask),
    }


def test_masked_functions(both):
    given, want = both["functions"]
    x, mask = jnp.asarray(given["x"]), jnp.asarray(given["x_mask"])
    close(masked.mean(x, mask), want["mean"])
    close(masked.mean(x, mask, axis=1), want["mean_rows"])
    close(masked.var(x, mask, unbiased=True), want["var"])
    close(masked.var(x, mask), want["var_biased"])
    for name, shift_mean in (("whiten", True), ("whiten_kept", False)):
        got = losses.whiten(x, mask, shift_mean=shift_mean, unbiased=True)
        close(got, np.where(given["x_mask"], want[name], 0))


def test_responses_end_at_the_first_stop_token(both):
    given, want = both["functions"]
    mask = response_mask(want["truncated"])
    lengths = np.minimum(want["first_stop"] + 1, WIDTH)
    np.testing.assert_array_equal(masked.count(mask, axis=1), lengths)
    np.testing.assert_array_equal(want["truncated"][mask], given["raw"][mask])
    stops = (given["raw"] == STOP) & np.asarray(mask)
    np.testing.assert_array_equal(stops.sum(1), want["first_stop"] < WIDTH)
    assert (lengths == WIDTH).sum() >= 3 and (lengths == 1).any()


@pytest.mark.parametrize("case", CASES)
def test_rewards_advantages_returns(both, case):
    given, want = both[case]
    got = ours(given)
    np.testing.assert_array_equal(got["mask"], ~want["padding_mask"])
    np.testing.assert_array_equal(got["paid"], ~want["padding_mask_p1"])
    close(got["scores"], want["scores"])
    close(got["values"], want["values"])
    close(got["rewards"], want["rewards"])
    close(got["advantages"], want["advantages"])
    # Past the slot of the score TRL's returns hold numbers that its loss masks.
    close(got["returns"], np.where(got["paid"], want["returns"], 0))
    names = ("logprobs", "ref_logprobs")
    rows = [masked.clear(jnp.asarray(given[k]), got["mask"]) for k in names]
    close(kl.ESTIMATORS[given["kl_estimator"]](*rows), want["kl"])


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(both, case):
    given, want = both[case]
    fixed = ours(given)
    mask, paid = fixed["mask"], fixed["paid"]

    def total(logps, values):
        policy, told = losses.ppo_policy(
            masked.clear(logps, mask),
            fixed["logps"],
            fixed["advantages"],
            clip=given["args_cliprange"],
        )
        value, value_told = losses.ppo_value(
            masked.clear(values, paid),
            fixed["values"],
            fixed["returns"],
            clip=given["args_cliprange_value"],
        )
        parts = masked.mean(policy, mask), masked.mean(value, paid)
        return parts[0] + VALUE_COEF * parts[1], (parts, told, value_told)

    moved = jnp.asarray(given["new_logprobs"]), jnp.asarray(given["vpred"])
    (loss, (parts, told, value_told)), gradients = jax.jit(
        jax.value_and_grad(total, (0, 1), has_aux=True)
    )(*moved)
    close(parts[0], want["pg_loss"])
    close(parts[1], want["vf_loss"])
    close(loss, want["loss"])
    close(gradients[0], want["d_logprobs"])
    close(gradients[1], want["d_values"])
    close(masked.mean(told["policy/clipfrac_avg"], mask), want["pg_clipfrac"])
    close(masked.mean(value_told["val/clipfrac_avg"], paid), want["vf_clipfrac"])
    close(masked.clear(told["val/ratio"], mask), np.where(mask, want["ratio"], 0))
    # TRL averages over padding too, where the difference is 0: ours shrinks to theirs.
    approxkl = masked.sum(told["policy/approxkl_avg"], mask) / mask.size
    close(approxkl, want["approxkl"])
    dead = np.asarray(mask) & (np.asarray(told["policy/clipfrac_avg"]) > 0)
    assert dead.any() and not np.asarray(gradients[0])[dead].any()


def test_score_at_the_end_token_differs_only_there(both):
    """Placement "A", ours by default, judged by a loop."""
    given, _ = both["k1"]
    mask = np.asarray(response_mask(given["postprocessed_responses"]))
    want = np.where(mask, -0.3 * (given["logprobs"] - given["ref_logprobs"]), 0)
    want[np.arange(ROWS), mask.sum(1) - 1] += given["scores"]
    names = ("scores", "logprobs", "ref_logprobs")
    arrays = [jnp.asarray(given[k]) for k in names]
    rewards = losses.kl_reward(*arrays, jnp.asarray(mask), kl_coef=0.3)
    close(rewards, want)
    advantages, returns = losses.gae(
        rewards, jnp.asarray(given["values"]), jnp.asarray(mask)
    )
    for b, length in enumerate(mask.sum(1)):
        later = 0.0
        for t in reversed(range(length)):
            ahead = given["values"][b, t + 1] if t + 1 < length else 0.0
            delta = want[b, t] + ahead - given["values"][b, t]
            later = delta + 0.95 * later
            close(advantages[b, t], later)
            close(returns[b, t], later + given["values"][b, t])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_unmoved_policy(parity_rng, temperature):
    """Ratio 1, nothing clipped, and torch's gradient of -A log p at one temperature."""
    from trl.trainer.utils import selective_log_softmax

    logits = 2 * parity_rng.normal(size=(3, WIDTH, 11))
    tokens = parity_rng.integers(0, 11, (3, WIDTH))
    advantages = parity_rng.normal(size=(3, WIDTH))
    mask = np.arange(WIDTH) < np.array([WIDTH, 3, 1])[:, None]
    leaf = torch.tensor(logits, requires_grad=True)
    scaled = leaf / (temperature + 1e-7)
    old = selective_log_softmax(scaled, torch.tensor(tokens))
    plain = -(torch.tensor(advantages) * old * torch.tensor(mask)).sum() / mask.sum()
    plain.backward()

    def total(logits, at):
        logps = jax.nn.log_softmax(logits / at)
        logps = jnp.take_along_axis(logps, jnp.asarray(tokens)[..., None], axis=2)
        before = jnp.asarray(old.detach().numpy())
        loss, told = losses.ppo_policy(logps[..., 0], before, jnp.asarray(advantages))
        return masked.mean(loss, jnp.asarray(mask)), told

    step = jax.value_and_grad(total, has_aux=True)
    (_, told), gradient = step(jnp.asarray(logits), temperature)
    close(told["val/ratio"], np.ones((3, WIDTH)))
    assert not told["policy/clipfrac_avg"].any()
    close(told["policy/approxkl_avg"], np.zeros((3, WIDTH)))
    close(gradient, leaf.grad)
    # The temperature forgotten on one side shows at once.
    (_, told), _ = step(jnp.asarray(logits), 1.4 * temperature)
    assert float(jnp.max(jnp.abs(told["val/ratio"] - 1))) > 0.01
