"""PPO from Hugging Face folders to one: a whole run of ours beside TRL's PPOTrainer.

Policy, reward model and critic are folders; prompts go through the policy's own chat
template on both sides. TRL samples, and our run is given what it sampled, since two
random generators cannot agree; all that follows is each side's own: rewards,
reference, critic, advantages and twenty SGD steps (five rollouts, four epochs each) of
all weights, or of the same fresh adapters. Under adapters the reference is the policy
without its own, on either side.
"""

import json
import os
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
import transformers

from stagecraft import defaults, metrics, run, train, tree
from stagecraft.models import huggingface, lora
from stagecraft.models import peft as folders
from stagecraft.stages import rollout
from tests.peers import bridge, from_folder_test
from tests.peers.ppo_peer import EPOCHS, NEW, ROWS, SETTINGS, C
from tests.peers.ppo_training_test import BESIDE, METRICS, ROOT, drawn

pytestmark = pytest.mark.peers

ITERATIONS = 5
PROMPT = 12
LORA = dict(rank=4, alpha=8.0, targets="all")
# Of all weights, of adapters. At ten times as much a policy of such large random
# weights moves so far that each update magnifies the rounding errors of the last one.
LR = {False: 0.01, True: 0.03}


def tokenizer():
    made = bridge.tokenizer(
        bridge.ModelConfig(**vars(C) | {"vocab_size": C.vocab_size - 2})
    )
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    made.chat_template = from_folder_test.TEMPLATE
    return made


def write_folders(folder, seed):
    """policy, reward, value: three different models, each with the tokenizer."""
    made = {
        "policy": bridge.make_peer(C, seed, pads=False),
        "reward": bridge.make_peer(C, seed + 2, scalar=True),
        "value": bridge.make_peer(C, seed + 3, scalar=True),
    }
    for name, peer in made.items():
        peer.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)


def write_prompts(folder, rng):
    """As records for ours, and as ids, written by the template, for TRL."""
    texts = [
        " ".join(f"w{i}" for i in rng.integers(3, C.vocab_size - 2, rng.integers(2, 9)))
        for _ in range(ROWS)
    ]
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    (folder / "prompts.jsonl").write_text(lines)
    ids = [
        tokenizer().apply_chat_template(
            [{"role": "user", "content": text}],
            **dict(add_generation_prompt=True, return_dict=True),
        )["input_ids"]
        for text in texts
    ]
    (folder / "prompts.json").write_text(json.dumps(ids))
    return ids


def configured(folder, adapter):
    c = defaults.experiment()
    c.mesh.data = 1
    c.stages.child = defaults.stage(
        "policy",
        **dict(start_from=f"hf:{folder / 'policy'}", steps=ITERATIONS, batch_size=ROWS),
        **dict(reward_from=f"hf:{folder / 'reward'}"),
        **dict(value_from=f"hf:{folder / 'value'}"),
        **dict(data=dict(files=str(folder / "prompts.jsonl"), prompt_length=PROMPT)),
        **dict(epochs=EPOCHS, minibatches=1, every=dict(log=1)),
        **dict(discount=SETTINGS["gamma"], lambda_=SETTINGS["lam"]),
        **dict(kl_coef=SETTINGS["kl_coef"], value_coef=SETTINGS["vf_coef"]),
        value_clip=SETTINGS["cliprange_value"],
        objective_args=dict(clip=SETTINGS["cliprange"]),
        missing_eos_penalty=SETTINGS["missing_eos_penalty"],
        **dict(score_placement="B", unbiased_whitening=True),
        sampling=dict(max_new_tokens=NEW, temperature=SETTINGS["temperature"]),
        lora=LORA if adapter else {},
        optimizer=dict(
            **dict(bridge.SGD, lr=LR[adapter]),
            **dict(schedule="constant", warmup_steps=0, clip_norm=0.0),
        ),
    )
    return c


def write_adapters(c, folder):
    """The adapters that our run starts from, as PEFT folders."""
    shared, stage = bridge.single(), c.stages.child
    key = jax.random.fold_in(jax.random.key(c.seed), zlib.crc32(b"child"))
    keys = jax.random.split(jax.random.split(key)[0])
    for name, own_key in zip(("policy", "value"), keys, strict=True):
        with jax.set_mesh(shared):
            base = huggingface.load(folder / name, shared)
            settings = lora.Settings(**stage.lora)
            scalar = name == "value"
            adapter = lora.init_fn(settings, base, shared, scalar=scalar)(own_key)
            config = getattr(base, "body", base).config
            target = folder / f"{name}_adapter"
            folders.save(adapter, config, target, shared, base=folder / name)


def theirs(folder, seed, adapter):
    """TRL's iterations, from a process of its own.

    Returns:
        a list of {name: array}; the loss of each update; the critic's final weights.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.peers.ppo_peer", str(seed), "sgd", folder),
            *(f"--iterations={ITERATIONS}", f"--lr={LR[adapter]}"),
            *(["--adapter"] if adapter else []),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(BESIDE), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = dict(np.load(folder / "out.npz"))
    losses = found.pop("losses")
    names = [name for name in found if name.startswith("critic/")]
    critic = {name.removeprefix("critic/"): found.pop(name) for name in names}
    told = [{} for _ in range(ITERATIONS)]
    for key, value in found.items():
        number, _, name = key.partition("/")
        told[int(number)][name] = value
    return told, losses, critic


def unpadded(ids, seen):
    return sorted(
        tuple(row[keep].tolist()) for row, keep in zip(ids, seen, strict=True)
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_twenty_steps(adapter, parity_seed, parity_rng, tmp_path, monkeypatch):
    assert (BESIDE / "trl").is_dir(), f"run `make test-peers`: TRL is not in {BESIDE}"
    for attempt in range(6):
        # Of some random policies all completions end, or none: then the next is taken.
        seed, folder = parity_seed + 1000 * attempt, tmp_path / str(attempt)
        write_folders(folder, seed)
        prompts = write_prompts(folder, parity_rng)
        c = configured(folder, adapter)
        if adapter:
            write_adapters(c, folder)
        told, losses, critic = theirs(folder, seed, adapter)
        ended = np.array([one["contain_eos_token"] for one in told])
        if ended.any() and not ended.all():
            break
    assert ended.any() and not ended.all()

    made, rollouts = rollout.make, iter(told)

    def fed(*args, **kwargs):
        def sample(policy, raw, key):
            ids, seen = np.asarray(raw["prompt_ids"]), np.asarray(raw["prompt_mask"])
            # What our run would have asked is what TRL did ask.
            assert unpadded(ids, seen) == sorted(map(tuple, prompts))
            one = next(rollouts)
            assert unpadded(one["queries"], one["queries"] != bridge.PAD) == sorted(
                map(tuple, prompts)
            )
            return drawn(one, ids.shape[1])

        return made(*args, **kwargs)._replace(sample=sample)

    monkeypatch.setattr(rollout, "make", fed)
    trained, kept = train.train, {}

    def watched(made, *args, **kwargs):
        state, result = trained(made, *args, **kwargs)
        parts = state.model["value"], made.frozen and made.frozen["value"]
        kept["value"] = lora.merge(*parts[::-1]) if adapter else parts[0]
        return state, result

    monkeypatch.setattr(train, "train", watched)
    root = folder / "run"
    run.run(c, root)
    rows = metrics.read(root / "child" / "metrics.jsonl")
    rows = [row for row in rows if "objective/kl" in row]
    assert len(rows) == ITERATIONS and len(losses) == EPOCHS * ITERATIONS
    expected = losses.reshape(ITERATIONS, EPOCHS).mean(1)
    np.testing.assert_allclose([row["loss"] for row in rows], expected, atol=1e-4)
    assert np.ptp(losses) > 1e-2
    for name in METRICS:
        found = [row[name] for row in rows]
        wanted = [float(one[f"metrics/{name}"]) for one in told]
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=name)
    # What the policy says of its tokens when it is asked again is what it sampled them
    # by, after each of its updates.
    assert max(row["val/rollout_logp_gap"] for row in rows) < 1e-4
    # The reference stays, the policy not; sampled, the last one may be 0 by chance.
    first, *later = [abs(row["objective/kl"]) for row in rows]
    assert first < 1e-4 < 1e-2 < max(later)

    found, moved = tree.named(kept["value"]), 0.0
    start = from_folder_test.opened("reward", folder / "value")
    for name, before in bridge.weights(start, C).items():
        np.testing.assert_allclose(found[name], critic[name], atol=1e-4, err_msg=name)
        moved = max(moved, np.abs(critic[name] - before).max())
    assert found.keys() == critic.keys() and moved > 3e-3

    final = from_folder_test.opened("policy", folder / "out" / "policy")
    base = folder / "policy"
    from_folder_test.leaves(root, final, "policy", base, adapter, parity_rng)
    back = transformers.AutoTokenizer.from_pretrained(root / "out")
    assert back.chat_template == from_folder_test.TEMPLATE
