"""One whole iteration of PPO beside TRL's PPOTrainer, its rollout fed in.

TRL pays the score in the slot after the end token (placement B) and divides the
variance of the advantages by n - 1 (unbiased_whitening).
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stagecraft.stages import policy, rollout
from stagecraft.stages.stage import Context
from tests.peers import bridge, ppo_peer
from tests.peers.ppo_peer import NEW, PROMPT, ROWS, SETTINGS, C

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
# Where the Makefile puts the last TRL that has PPO.
BESIDE = Path(sys.prefix) / "trl112"

METRICS = [
    *("objective/kl", "objective/entropy", "objective/non_score_reward"),
    *("objective/scores", "objective/rlhf_reward"),
    *("policy/clipfrac_avg", "loss/policy_avg"),
    *("loss/value_avg", "val/clipfrac_avg", "val/num_eos_tokens"),
]


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def iteration(request, parity_seed, tmp_path_factory):
    """The optimizer, what TRL did, and what our stage made of the same rollout."""
    if not (BESIDE / "trl").is_dir():
        pytest.fail(
            f"TRL {ppo_peer.VERSION}, the last with PPO, is not in {BESIDE}: run "
            "`make test-peers`, which puts it there"
        )
    optimizer = bridge.SGD if request.param == "sgd" else bridge.ADAMW
    for attempt in range(6):
        # Of some random policies all completions end, or none: then the next is taken,
        # so that each case has both. Nothing that is compared decides this.
        seed = parity_seed + 1000 * attempt
        theirs = peer(seed, request.param, tmp_path_factory.mktemp("ppo"))
        if 0 < theirs["contain_eos_token"].sum() < ROWS:
            break
    return theirs, *ours(theirs, optimizer, seed)


def peer(seed, optimizer, folder):
    """What TRL did, from a process of its own, and the seed of its models."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.peers.ppo_peer", str(seed), optimizer, folder],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(BESIDE), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(np.load(folder / "out.npz")) | {"seed": seed}


def drawn(theirs, width=PROMPT):
    """A rollout of TRL's as our stage takes it, its prompts `width` wide."""
    mask = ~theirs["padding_mask"]
    tokens = np.where(mask, theirs["postprocessed_responses"], 0)
    queries = theirs["queries"]
    queries = np.pad(queries, ((0, 0), (width - queries.shape[1], 0)))
    seen = np.concatenate([queries != bridge.PAD, mask], 1)
    return {
        "ids": np.concatenate([queries, tokens], 1).astype(np.int32),
        "segments": seen.astype(np.int32),
        "positions": ((seen.cumsum(1) - 1) * seen).astype(np.int32),
        "tokens": tokens.astype(np.int32),
        "mask": mask,
        "behaviour_logps": np.where(mask, theirs["logprobs"], 0),
        "ended": theirs["contain_eos_token"],
    }


def ours(theirs, optimizer, seed):
    """The prepared batch, the metrics, and the final weights."""
    parents = {k: bridge.convert(v, C) for k, v in ppo_peer.models(seed).items()}
    parents["start"] = parents.pop("policy")
    config = bridge.config(
        "policy",
        optimizer,
        steps=1,
        batch_size=ROWS,
        epochs=ppo_peer.EPOCHS,
        minibatches=1,
        discount=SETTINGS["gamma"],
        lambda_=SETTINGS["lam"],
        kl_coef=SETTINGS["kl_coef"],
        value_clip=SETTINGS["cliprange_value"],
        value_coef=SETTINGS["vf_coef"],
        objective_args=dict(clip=SETTINGS["cliprange"]),
        missing_eos_penalty=SETTINGS["missing_eos_penalty"],
        score_placement="B",
        unbiased_whitening=True,
        sampling=dict(max_new_tokens=NEW, temperature=SETTINGS["temperature"]),
    )
    raw = {
        "prompt_ids": np.zeros((ROWS, PROMPT), np.int32),
        "prompt_mask": np.ones((ROWS, PROMPT), bool),
    }
    real, held = rollout.make, {}

    def fed(*args, **kwargs):
        sample = lambda policy, raw, key: drawn(theirs)  # noqa: E731
        return real(*args, **kwargs)._replace(sample=sample)

    def make(mesh):
        built = policy.make(config, Context(mesh, C, parents, stop_ids=(bridge.END,)))

        def prepare(state, raw, key):
            batch = built.prepare(state, raw, key)
            held.update(jax.tree.map(np.asarray, batch["rollout"]))
            return batch

        return built._replace(prepare=prepare)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "make", fed)
        losses, metrics, final = bridge.train(make, [raw])
    return held, losses, metrics[0], final


def test_the_rollout_holds_every_kind_of_ending(iteration):
    theirs, held, *_ = iteration
    ended = theirs["contain_eos_token"]
    assert 0 < ended.sum() < ROWS
    assert np.array_equal(held["mask"], ~theirs["padding_mask"])
    # The critic is trained one slot further, where the score of an ended row is paid.
    assert np.array_equal(held["value_mask"], ~theirs["padding_mask_p1"])
    assert held["value_mask"].sum() > held["mask"].sum()


@pytest.mark.parametrize(
    ("name", "theirs_name", "mask"),
    [
        ("old_logps", "logprobs", "mask"),
        ("ref_logps", "ref_logprobs", "mask"),
        ("old_values", "values", "value_mask"),
        ("returns", "returns", "value_mask"),
        ("advantages", "whitened", "mask"),
    ],
)
def test_what_was_prepared(iteration, name, theirs_name, mask):
    theirs, held, *_ = iteration
    mask = held[mask]
    np.testing.assert_allclose(held[name][mask], theirs[theirs_name][mask], atol=1e-4)
    assert theirs[theirs_name][mask].std() > 0.1


def test_the_losses_and_metrics_of_four_epochs(iteration):
    theirs, held, losses, metrics, _ = iteration
    assert theirs["losses"].shape == (ppo_peer.EPOCHS,)
    assert np.ptp(theirs["losses"]) > 1e-3
    assert losses[0] == pytest.approx(theirs["losses"].mean(), abs=1e-4)
    for name in METRICS:
        expected = float(theirs[f"metrics/{name}"])
        assert metrics[name] == pytest.approx(expected, abs=1e-4), name
    # These two they take over padding as well, where the policy has not moved.
    share = held["mask"].mean()
    kl = float(theirs["metrics/policy/approxkl_avg"])
    assert metrics["policy/approxkl_avg"] * share == pytest.approx(kl, abs=1e-4)
    ratio = float(theirs["metrics/val/ratio"])
    found = metrics["val/ratio"] * share + 1 - share
    assert found == pytest.approx(ratio, abs=1e-4)
    assert float(theirs["metrics/policy/clipfrac_avg"]) > 0  # the clip was at work


def test_the_weights_after_four_epochs(iteration):
    theirs, _, _, _, final = iteration
    start = ppo_peer.models(theirs["seed"])
    for name in ("policy", "value"):
        before = bridge.weights(start[name], C)
        moved = 0.0
        for key, value in before.items():
            expected = theirs[f"final/{name}/{key}"]
            np.testing.assert_allclose(
                final[f"{name}/{key}"], expected, atol=1e-4, err_msg=f"{name}/{key}"
            )
            moved = max(moved, np.abs(expected - value).max())
        assert moved > 3e-3, name
