"""Every stage with an adapter: what it trains, and leaves, and keeps on disk."""

import dataclasses

import jax
import numpy as np
import pytest

from stagecraft import (
    checkpoint,
    defaults,
    exchange,
    metrics,
    run,
    sharding,
    storage,
    tree,
)
from stagecraft.errors import UserError
from stagecraft.models import locate, lora
from stagecraft.stages import preference, update
from stagecraft.stages.stage import Context, State
from tests.stages import cases
from tests.stages.update_test import assert_same, once

LORA = dict(rank=2, alpha=8.0)
ADAM = dict(warmup_steps=0)


def by_size(pytree):
    return sum(x.size for x in jax.tree.leaves(pytree) if x.ndim)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_two_steps_move_the_adapter_alone(kind):
    shared = cases.single()
    with jax.set_mesh(shared):
        drops = 0.1 if kind in ("group_policy", "online_preference") else 0.0
        changes = dict(lora=LORA | dict(dropout=drops), optimizer=ADAM, ema_decay=0.5)
        made, raw, _ = cases.stage(kind, shared, **changes)
        # The reference is what the policy starts from: the base with its adapter off.
        state = made.init(jax.random.key(0))
        frozen = cases.host(made.frozen)
        before = cases.host(state.model)
        trained, kept = by_size(state.model), by_size(made.frozen)
        assert trained < kept / 2
        # Two moments, an average, and nothing of the base.
        assert by_size(state.opt_state) == 2 * trained
        assert by_size(state.extra["ema"]) == trained
        for step in range(2):
            batch = made.prepare(state, raw, jax.random.key(step))
            state, told = made.update(state, batch)
            assert np.isfinite(float(told["loss"]))
            if kind == "policy" and step == 0:
                assert float(told["val/ratio_first"]) == pytest.approx(1, abs=1e-5)
        after = cases.host(state.model)
    assert tree.digest(frozen) == tree.digest(cases.host(made.frozen))
    for name, old in tree.named(before).items():
        # The head's constant cancels in a pair.
        if not (kind == "reward" and name == "bias"):
            assert not np.array_equal(old, tree.named(after)[name]), name
    parts = state.model.values() if kind == "policy" else [state.model]
    assert all(isinstance(part, lora.Adapter) for part in parts)


def test_dpo_begins_at_log_2_with_one_copy_of_its_base():
    shared = cases.single()
    with jax.set_mesh(shared):
        start = cases.models(shared)["policy"]
        config = defaults.stage("preference", lora=LORA, optimizer=cases.OPTIMIZER)
        roles = {"start": start, "reference": start}
        made = preference.make(config, Context(shared, cases.CONFIG, roles))
        assert made.frozen is start
        state = made.init(jax.random.key(0))
        raw = cases.pairs()
        state, told = made.update(state, made.prepare(state, raw, None))
        assert float(told["loss"]) == pytest.approx(np.log(2), abs=1e-6)
        assert float(told["rewards/margins"]) == pytest.approx(0, abs=1e-5)
        state, told = made.update(state, made.prepare(state, raw, None))
        assert float(told["loss"]) < np.log(2)


def test_the_base_is_an_argument_and_no_gradient_is_made_of_it(monkeypatch):
    # The width of no other array: the head's gradient is dropped by the compiler alone.
    config = dataclasses.replace(cases.CONFIG, ff_width=48)
    monkeypatch.setattr(cases, "CONFIG", config)
    monkeypatch.setattr(cases, "_models", cases._models.__wrapped__)  # not cached
    shared = cases.single()
    found = {}
    for rank in (0, 2):
        with jax.set_mesh(shared):
            changes = dict(lora=dict(rank=rank, dropout=0.1))
            made, raw, _ = cases.stage("language_model", shared, **changes)
            state = made.init(jax.random.key(0))
            batch = made.prepare(state, raw, None)
            update_program = made.programs(raw)["update"].function
            program = jax.make_jaxpr(update_program)(state, batch, made.frozen)
        assert not [x for x in program.consts if np.size(x) > 64]
        # Products in the shape of up and gate, which nothing but a gradient has.
        found[rank] = [
            line
            for line in str(program).splitlines()
            if "= dot_general" in line and "f32[32,48]" in line.split("=")[0]
        ]
        assert ("random_bits" in str(program)) == (rank > 0)  # dropout is there
    assert found[0] and not found[2]


def test_sharded_and_split_equal_single():
    one = once("reward", cases.single(), lora=LORA)
    assert_same(
        one, once("reward", sharding.make_mesh(2, 2, 2), lora=LORA, micro_batches=2)
    )
    assert_same(one, once("reward", cases.single(), lora=LORA, micro_batches=4))


def test_a_restored_state_goes_on_bit_for_bit_dropout_too(tmp_path):
    shared = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    with jax.set_mesh(shared):
        changes = dict(lora=LORA | dict(dropout=0.3), optimizer=ADAM)
        made, raw, _ = cases.stage("preference", shared, **changes)
        state = made.init(jax.random.key(0))
        state, _ = made.update(state, made.prepare(state, raw, jax.random.key(1)))
        saver = checkpoint.Checkpoints(tmp_path)
        rest = [state.opt_state, state.extra, state.step]
        saver.save(1, state.model, rest, {"x": 1})
        saver.wait()
        fresh = made.init(jax.random.key(9))
        rest = [fresh.opt_state, fresh.extra, fresh.step]
        model, rest, _ = saver.restore(1, fresh.model, rest)
        saver.close()
        restored = State(rest[2], model, rest[0], rest[1])
        assert tree.digest(restored) == tree.digest(state)
        batches = [made.prepare(s, raw, jax.random.key(2)) for s in (state, restored)]
        first = cases.host(state.model)
        state, one = made.update(state, batches[0])
        restored, other = made.update(restored, batches[1])
        assert float(one["loss"]) == float(other["loss"])
        assert tree.digest(restored) == tree.digest(state)
        # Another step drops other inputs: the key is folded with the step.
        keys = [update.dropout_key(state._replace(step=i)) for i in (1, 2)]
        assert not np.array_equal(*map(jax.random.key_data, keys))
        assert tree.digest(first) != tree.digest(cases.host(state.model))


# A run on disk


SMALL = dict(
    width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff_width=96, max_length=48
)


def records(tmp_path):
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "tea", "sun", "red", "blue", "far", "near"]

    def say(n):
        return " ".join(rng.choice(words, n))

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(storage.json.dumps(r) + "\n" for r in rows))
        return str(path)

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(say(30) for _ in range(60)))
    pairs = [
        {"prompt": say(2), "chosen": say(3), "rejected": say(2)} for _ in range(24)
    ]
    shown = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs]
    return str(text), write("pairs.jsonl", pairs), write("shown.jsonl", shown)


def graph(tmp_path, steps=6):
    text, pairs, shown = records(tmp_path)
    c = defaults.experiment()
    c.mesh.data = 1
    c.tokenizer.path = "bytes"
    c.model.update(SMALL)
    shared = dict(batch_size=8, optimizer=dict(warmup_steps=1, lr=1e-2))
    c.stages.pretrain = defaults.stage(
        "language_model", steps=3, data=dict(files=text, length=32), **shared
    )
    c.stages.sft = defaults.stage(
        "language_model",
        **dict(start_from="pretrain", steps=steps, every=dict(log=1, save=3)),
        data=dict(files=shown, format="demonstrations", length=48),
        lora=dict(rank=2, embeddings=True, dropout=0.1),
        **shared,
    )
    c.stages.reward = defaults.stage(
        "reward",
        **dict(start_from="sft", steps=3, lora=dict(rank=2)),
        data=dict(files=pairs, length=48, demonstrations=shown),
        **shared,
    )
    return c


class Stopped(Exception):
    """As if the process had been killed."""


def test_a_run_resumes_bit_for_bit_and_reads_back_merged(tmp_path, monkeypatch):
    config = graph(tmp_path)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run.run(config, straight)
    save = checkpoint.Checkpoints.save

    def dies(self, step, *rest):
        save(self, step, *rest)
        if "sft" in str(self.folder):
            self.wait()
            raise Stopped

    monkeypatch.setattr(checkpoint.Checkpoints, "save", dies)
    with pytest.raises(Stopped):
        run.run(config, stopped, only=("pretrain", "sft"))
    monkeypatch.undo()
    run.run(config, stopped, only=("pretrain", "sft"))
    shared = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(shared):
        first, again = (
            locate.load_adapter(root / "sft", shared) for root in (straight, stopped)
        )
        assert tree.digest(first) == tree.digest(again)
        lines = [
            [r["loss"] for r in metrics.read(root / "sft/metrics.jsonl") if "loss" in r]
            for root in (straight, stopped)
        ]
        assert lines[0] == lines[1] and len(lines[0]) == 6
        # On disk lies the adapter, not what it sits on.
        base, adapter = first
        info = storage.read_json(straight / "sft/stage.json")
        assert info["lora"]["rank"] == 2 and info["base"]["name"] == "../pretrain"
        small = size(straight / "reward/checkpoints")
        assert small < size(straight / "pretrain/checkpoints") / 2
        # Whoever reads the stage gets a plain model.
        merged = locate.locate(straight / "sft").load(shared)
        assert tree.named(merged).keys() == tree.named(base).keys()
        assert tree.digest(merged) == tree.digest(lora.merge(base, adapter))
        current = run.open_run(straight)
        scalar = current.model("reward")
        assert tree.digest(scalar.body.embed[...]) == tree.digest(merged.embed[...])
        reward = storage.read_json(straight / "reward/stage.json")
        assert reward["module"] == "scalar" and float(scalar.bias[...]) != 0
        formats = [current.record(name).format for name in config.stages]
        assert formats == ["text", "chat", "chat"]
    told = storage.read_json(straight / "summary.json")
    changed = told["weights"]["reward"]["by_kind"]
    assert changed["up"]["effective_rank"] <= 2 < changed["up"]["full_rank"]
    assert changed["norm"]["relative_change"] == 0 < changed["up"]["relative_change"]
    # Out as PEFT's folder, on a folder of the base.
    with pytest.raises(UserError, match="sits on the stage pretrain; export that"):
        exchange.export(straight, "sft", tmp_path / "peft", adapter=True)
    lines = exchange.export(
        *(straight, "sft", tmp_path / "peft"), adapter=True, base="models/base"
    )
    assert (
        lines[0].endswith("models/base") and (tmp_path / "peft/tokenizer.json").exists()
    )
    told = storage.read_json(tmp_path / "peft/adapter_config.json")
    assert told["base_model_name_or_path"] == "models/base"
    with pytest.raises(UserError, match="pretrain trained all weights"):
        exchange.export(straight, "pretrain", tmp_path / "no", adapter=True)
    # Another base under it is noticed, and so is none.
    path = straight / "lineage.json"
    lineage = storage.read_json(path)
    lineage["stages"]["pretrain"]["id"] = "another"
    storage.write_json(path, lineage)
    with pytest.raises(UserError, match="is another model now"):
        current.model("sft")
    (straight / "pretrain").rename(straight / "gone")
    with pytest.raises(UserError, match="adapter .LoRA. on .*pretrain, which is not"):
        current.model("sft")


def size(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
