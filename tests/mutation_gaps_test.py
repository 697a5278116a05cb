"""What only a mutant showed to be untested; see `tests/mutations.py`."""

import json
import types

import jax
import numpy as np
import pytest

from stagecraft import defaults, run, runs, tree
from stagecraft.data import stage_data
from stagecraft.stages import group_policy, kinds, rollout
from stagecraft.text.tokenizer import SentencePiece
from tests.stages import cases


@pytest.mark.parametrize("kind", ["policy", "group_policy", "online_preference"])
def test_a_completion_ends_with_its_turn_and_not_with_a_document(kind, monkeypatch):
    contexts = []

    def make(config, context):
        contexts.append(context)
        return types.SimpleNamespace(frozen=None)

    monkeypatch.setitem(kinds.KINDS, kind, kinds.KINDS[kind]._replace(make=make))
    tokenizer = types.SimpleNamespace(
        stops=(7, 5), eos=3, vocab_size=512, control_ids=()
    )
    config = defaults.experiment()
    config.stages.sampled = defaults.stage(kind)
    current = runs.Run(None, config, tokenizer)
    data = types.SimpleNamespace(
        samples=[], records=[], dataset=None, heldout=None, reference=None
    )
    run._make(current, config.stages.sampled, current.mesh(), {}, data)
    assert contexts[0].stop_ids == tokenizer.stops


@pytest.mark.parametrize(
    ("kind", "rows"), [("group_policy", 6), ("policy", 2), ("online_preference", 2)]
)
def test_only_groups_are_sampled_in_excess(kind, rows, tmp_path):
    words = ["What is the capital of France? Paris."] * 20
    tokenizer = SentencePiece.train(words, 300, tmp_path / "tokenizer.model")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(9))
    )
    config = defaults.experiment()
    stage = defaults.stage(kind, batch_size=2)
    stage.data.files = str(tmp_path / "prompts.jsonl")
    if kind == "group_policy":
        stage.oversample = 3
    made = stage_data.build(stage, tokenizer, tmp_path, config, kinds.of(stage).data)
    assert made.dataset.batch_at(0)["prompt_ids"].shape[0] == rows


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("objective", ["next_token", "dft", "z_loss"])
def test_losses_of_tokens_see_the_whole_logits(objective, weighed):
    shared, batch = cases.single(), cases.documents(rows=4)
    rng = np.random.default_rng(1)
    weight = np.ones(batch["ids"].shape, np.float32)
    if weighed:  # another one for each token, so that a shift of them shows
        weight = rng.uniform(0.5, 2.0, weight.shape).astype(np.float32)
        batch["weight"] = weight
    with jax.set_mesh(shared):
        made, _, _ = cases.stage("language_model", shared, objective=objective)
        state = made.init(jax.random.key(0))
        logits = np.asarray(cases.logits(state.model, *cases.arrays(batch)), np.float64)
        _, metrics = made.update(state, made.prepare(state, batch, None))
    total = count = 0.0
    for row, t in np.argwhere(batch["mask"]):
        if batch["positions"][row, t] == 0:
            continue  # nothing of its own document comes before it
        seen = logits[row, t - 1]
        log_z = np.log(np.exp(seen).sum())
        log_p = seen[batch["ids"][row, t]] - log_z
        losses = {"next_token": -log_p, "dft": -np.exp(log_p) * log_p}
        losses["z_loss"] = log_z**2
        total += weight[row, t] * losses[objective]
        count += weight[row, t]
    assert float(metrics["loss"]) == pytest.approx(total / count, rel=1e-4)


def test_a_policy_without_old_log_probabilities_has_their_gradient():
    """One step and no reference: what was sampled is compared with itself."""
    shared = cases.single()
    changes = dict(epochs=1, minibatches=1, kl_coef=0.0, batch_size=16)
    with jax.set_mesh(shared):
        made, raw, config = cases.stage("group_policy", shared, **changes)
        model = made.init(jax.random.key(0)).model
        state = made.init(jax.random.key(0))
        kept = made.prepare(state, raw, jax.random.key(1))["rollout"]
        assert "old_logps" not in kept
        old = rollout.response_logps(model, kept, config.sampling.temperature).logps
        goal, _ = group_policy.make_objective(config)

        @jax.jit
        @jax.grad
        def gradient(model, batch):
            found = goal.reductions(batch)["policy"]
            return found.sum(goal.terms(model, batch)[0]["policy"]) / found.total()

        without = tree.named(gradient(model, kept))
        given = tree.named(gradient(model, kept | {"old_logps": old}))
    assert max(np.abs(v).max() for v in given.values()) > 1e-3
    for name, value in given.items():
        np.testing.assert_allclose(without[name], value, atol=1e-5)


def test_the_critic_may_learn_faster_than_the_policy():
    shared, moved = cases.single(), []
    for scale in (1.0, 3.0):
        changes = dict(epochs=1, minibatches=1, value_lr_scale=scale)
        with jax.set_mesh(shared):
            made, raw, _ = cases.stage("policy", shared, **changes)
            state = made.init(jax.random.key(0))
            before = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
            batch = made.prepare(state, raw, jax.random.key(1))
            state, _ = made.update(state, batch)
        after = tree.named(state.model)
        moved.append({k: np.asarray(after[k]) - v for k, v in before.items()})
    for name, change in moved[0].items():
        factor = 3.0 if name.startswith("value") else 1.0
        atol = 1e-5 + 1e-3 * np.abs(change).max()
        np.testing.assert_allclose(moved[1][name], factor * change, atol=atol)
    assert max(np.abs(v).max() for k, v in moved[0].items() if k[0] == "v") > 1e-3
