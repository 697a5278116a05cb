"""No random key serves twice: not in two steps, two batches, two calls or two parts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import defaults, run, train
from stagecraft.anatomy import harness
from stagecraft.data.dataset import Dataset
from stagecraft.models import language, lora, sampling
from stagecraft.stages import comparisons, rollout, selection, update
from stagecraft.stages.stage import State
from tests.stages import answers, cases

LORA = dict(rank=2, alpha=8.0)


def numbers(key):
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


# -- training --------------------------------------------------------------------------


def trained(folder, steps, key):
    """Trains to a step; returns the key of the beginning, and those of the steps."""
    begun, asked = [], {}
    shared = cases.single()
    with jax.set_mesh(shared):
        made, raw, config = cases.stage("reward", shared, steps=steps)
        config.every.save = 2

        def init(key):
            begun.append(key)
            return made.init(key)

        def prepare(state, raw, key):
            asked[int(state.step)] = numbers(key)
            return made.prepare(state, raw, key)

        watched = made._replace(init=init, prepare=prepare)
        rows = [(raw | {"index": np.arange(16, dtype=np.int32)}, 16)]
        data = Dataset(rows, seed=0)
        train.train(watched, config, data, folder, name="child", key=key)
    return begun[0], asked


def test_each_step_has_a_key_of_its_own_and_a_resumed_one_the_same(tmp_path):
    key = jax.random.key(3)
    begun, asked = trained(tmp_path / "whole", 5, key)
    assert [*asked] == [0, 1, 2, 3, 4] and len({*asked.values()}) == 5
    # What the beginning makes of its key is no step's: adapters and dropout fold it.
    folded = {numbers(jax.random.fold_in(begun, i)) for i in range(8)}
    assert not folded & {*asked.values()} and numbers(begun) not in asked.values()
    assert numbers(key) not in {numbers(begun), *asked.values()}

    begun, first = trained(tmp_path / "parts", 2, key)
    again, second = trained(tmp_path / "parts", 5, key)
    assert numbers(again) == numbers(begun) and [*second] == [2, 3, 4]
    assert first | second == asked
    _, other = trained(tmp_path / "other", 2, jax.random.key(4))
    assert not {*other.values()} & {*asked.values()}


@pytest.mark.parametrize("kind", ["policy", "group_policy", "online_preference"])
def test_a_rollout_samples_with_its_key_and_is_judged_with_another(kind, monkeypatch):
    asked, made = [], rollout.make

    def make(*args, **kwargs):
        rollouts = made(*args, **kwargs)

        def sample(policy, raw, key):
            asked.append(key)
            return rollouts.sample(policy, raw, key)

        return rollouts._replace(sample=sample)

    monkeypatch.setattr(rollout, "make", make)
    shared = cases.single()
    with jax.set_mesh(shared):
        stage, raw, config = cases.stage(kind, shared)
        state = stage.init(jax.random.key(0))
        batches = [stage.prepare(state, raw, jax.random.key(i)) for i in (1, 2, 1)]
        raw |= {"index": np.arange(16, dtype=np.int32)}
        for i in (3, 5):
            stage.evaluate(state, raw, jax.random.key(i))
    one, other, same, *evaluated = map(numbers, asked)
    assert one == same != other and numbers(jax.random.key(5)) == evaluated[1]
    assert len({one, other, *evaluated}) == 4
    said = [np.asarray(batch.get("rollout", batch)["ids"]) for batch in batches]
    assert np.array_equal(said[0], said[2]) and not np.array_equal(said[0], said[1])
    if "order" in batches[0]:
        orders = [np.asarray(batch["order"]) for batch in batches]
        assert not np.array_equal(orders[0], orders[1])
        for used, order in zip(asked, orders, strict=False):
            shuffled = update.shuffled_minibatches(config, order.size // 2, used)
            assert not np.array_equal(order, shuffled)


# -- adapters --------------------------------------------------------------------------


def test_the_adapters_of_policy_and_critic_start_from_different_numbers():
    shared = cases.single()
    with jax.set_mesh(shared):
        made, _, _ = cases.stage("policy", shared, lora=LORA)
        model = made.init(jax.random.key(0)).model
    first = [
        {x.shape: np.asarray(x) for x in jax.tree.leaves(model[part]) if x.any()}
        for part in ("policy", "value")
    ]
    shapes = first[0].keys() & first[1].keys()
    assert shapes
    for shape in shapes:
        assert not np.intersect1d(first[0][shape], first[1][shape]).size, shape


def dropped(kind, monkeypatch, **changes):
    """The keys with which two updates drop inputs of a stage's adapters."""
    keys, join = [], lora.join

    def watched(base, adapter, key=None):
        if key is not None and not isinstance(adapter, dict):
            jax.debug.callback(lambda x: keys.append(x), jax.random.key_data(key))
        return join(base, adapter, key)

    monkeypatch.setattr(lora, "join", watched)
    shared = cases.single()
    with jax.set_mesh(shared):
        changes |= dict(lora=LORA | dict(dropout=0.3))
        made, raw, _ = cases.stage(kind, shared, **changes)
        state = made.init(jax.random.key(0))
        for step in range(2):
            batch = made.prepare(state, raw, jax.random.key(step))
            state, _ = made.update(state, batch)
        jax.block_until_ready(state)
        jax.effects_barrier()
    return [tuple(np.asarray(key).ravel().tolist()) for key in keys]


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_each_micro_batch_of_each_step_drops_anew(micro_batches, monkeypatch):
    keys = dropped("preference", monkeypatch, micro_batches=micro_batches)
    assert len({*keys}) == 2 * micro_batches


def test_each_minibatch_of_each_step_drops_anew(monkeypatch):
    keys = []

    def make_step(*args, **kwargs):
        def step(state, rows, schedule_step, frozen, key):
            jax.debug.callback(lambda x: keys.append(x), jax.random.key_data(key))
            return state.model, state.opt_state, {}

        return step

    monkeypatch.setattr(update, "make_step", make_step)
    config = types.SimpleNamespace(micro_batches=1, ema_decay=0.0)
    change = jax.jit(update.make_minibatch_update(config, None, None))
    extra = {"dropout": jax.random.key_data(jax.random.key(7))}
    state = State(jnp.zeros((), jnp.int32), jnp.zeros(()), (), extra)
    rows = {"x": jnp.ones(6)}
    batch = {"rollout": rows, "order": jnp.arange(6).reshape(3, 2), "metrics": {}}
    for _ in range(2):
        state, _ = change(state, batch, None)
    jax.effects_barrier()
    assert len(keys) == len({tuple(np.asarray(key).ravel().tolist()) for key in keys})
    assert len(keys) == 6


# -- completions -----------------------------------------------------------------------


def test_each_batch_of_completions_has_a_key_of_its_own_under_each_seed(monkeypatch):
    """Neighbouring seeds too: stages ask with one seed after the other."""
    keys = []

    def generate(model, ids, mask, key, **settings):
        keys.append(numbers(key))
        tokens = np.full((len(ids), 1), 5)
        ones = np.ones((len(ids), 1))
        return tokens, ones.astype(bool), -ones, ones[:, 0].astype(bool)

    monkeypatch.setattr(sampling, "generate", generate)
    asked = language.Language(
        types.SimpleNamespace(config=cases.CONFIG), None, batch_size=2
    )
    settings = dict(max_new_tokens=1, temperature=1.0)
    for seed in (3, 4, 5, 3):
        asked.sample_ids([[9, 10]] * 6, seed=seed, **settings)
    assert len(keys) == 12 and len({*keys}) == 9
    assert keys[9:] == keys[:3]  # the same seed, the same completions


def written(folder, kind, **changes):
    """The seeds with which a stage that writes records asked its model."""
    changes = dict(prompts=14, batch_size=6) | changes
    said = answers.Seeded()
    if kind == "comparisons":
        config = defaults.stage(kind, rater="tests.stages.answers:noisy", **changes)
        write = comparisons.write
    else:
        verifiers = "tests.stages.answers:last"
        config = defaults.stage(kind, verifiers=verifiers, samples=3, **changes)
        write = selection.write
    write(config, answers.recording(folder, said, "child"))
    return said.seeds


@pytest.mark.parametrize("kind", ["comparisons", "selection"])
def test_each_part_of_the_prompts_is_asked_with_a_seed_of_its_own(kind, tmp_path):
    seeds = written(tmp_path / "one", kind)
    assert len(seeds) == len({*seeds}) >= 5
    assert seeds == written(tmp_path / "again", kind)


def test_each_batch_of_the_harness_has_a_key_of_its_own(monkeypatch):
    """Of one length, of another, and of other settings."""
    keys = []

    def generate(self, rows, length, key, settings, until):
        keys.append(numbers(key))
        return [""] * len(rows)

    monkeypatch.setattr(harness.Answers, "_generate", generate)
    monkeypatch.setattr(harness.Answers, "_context", lambda self, text: [9] * len(text))
    sampled = dict(do_sample=True, temperature=1.0, until=["."])
    requests = [
        types.SimpleNamespace(args=(context, sampled | dict(max_gen_toks=tokens)))
        for tokens in (4, 5)
        for context in ["one"] * 5 + ["three" * 5] * 3
    ]
    model = types.SimpleNamespace(config=cases.CONFIG)
    for seed in (0, 1):
        asked = language.Language(model, None, batch_size=2)
        harness.Answers(asked, seed=seed).generate_until(requests)
    assert len(keys) == len({*keys}) >= 2 * 2 * 4


# -- a run -----------------------------------------------------------------------------


def test_each_stage_has_a_key_of_its_own_by_its_name_and_seeds(tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(run, "data_of", lambda *_: None)
    monkeypatch.setattr(run, "_lineage", lambda *_: None)
    monkeypatch.setattr(run, "_write_records", lambda *x: keys.append(numbers(x[-1])))
    config = defaults.experiment()
    for name in ("pairs", "more", "others"):
        config.stages[name] = defaults.stage("comparisons", start_from="hf:x")
    config.stages.others.seed = 1
    lineage = types.SimpleNamespace(stages={}, write=lambda root: None)
    for seed in (0, 1, 0):
        config.seed = seed
        current = types.SimpleNamespace(
            config=config,
            root=tmp_path,
            lineage=lambda: lineage,
            mesh=lambda name: cases.single(),
            model=lambda path, mesh: None,
        )
        for name in config.stages:
            run._run_stage(current, name, {})
    config.stages.others.seed = 2
    run._run_stage(current, "others", {})
    assert len(keys) == 10 and len({*keys}) == 7 and keys[6:9] == keys[:3]
