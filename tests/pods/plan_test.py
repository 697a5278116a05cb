"""Plans of small runs, against the compiler's memory and the ledger's FLOPs."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import pytest

from stagecraft import chips, defaults, experiment, sharding
from stagecraft.anatomy import cost
from stagecraft.errors import UserError
from stagecraft.models import huggingface
from stagecraft.models.transformer import Transformer
from stagecraft.pods import formulas, page, plan, shapes, suggest
from stagecraft.preview import assumed
from tests import tiny
from tests.command_line import stagecraft
from tests.conftest import ROOT, load_experiment

MODELS = sorted(
    path.stem
    for path in (ROOT / "experiments" / "recipes" / "pods").glob("*.py")
    if path.stem != "graph"
)
H200 = chips.parse("h200:8")


def small(**changes):
    """Pretraining, SFT and PPO of a model that compiles in a moment."""
    c = defaults.experiment()
    c.tokenizer.files, c.tokenizer.vocab_size = "text.txt", 256
    size = dict(width=64, layers=3, heads=4, kv_heads=2, head_dim=16, ff_width=128)
    c.model.update(size | dict(max_length=64, qk_norm=False, tied=False) | changes)
    c.mesh.update(dict(data=2, fsdp=2, tensor=2))
    data = dict(files="text.txt", length=64)
    c.stages.pretrain = defaults.stage("language_model", data=data, batch_size=16)
    c.stages.sft = defaults.stage(
        "language_model", start_from="pretrain", data=data, batch_size=16
    )
    c.stages.ppo = defaults.stage(
        "policy",
        start_from="sft",
        verifiers="number",
        data=dict(files="prompts.jsonl", prompt_length=32),
        batch_size=16,
        sampling=dict(max_new_tokens=32),
    )
    return c


def test_arguments_are_the_compilers_to_the_byte():
    [stage] = shapes.stages(small(), jax.devices(), ["pretrain"])
    program = stage.programs["update"]
    with jax.set_mesh(stage.mesh):
        memory = program.lower().compile().memory_analysis()
    assert shapes.device_bytes(program.arguments) == memory.argument_size_in_bytes
    state, batch, _ = program.arguments
    assert shapes.resident(state) and not shapes.resident(batch)
    # AdamW: weights and two moments in float32, over fsdp and tensor; norms are whole.
    count = cost.parameters(stage.model)
    norms = count["by_kind"]["norm"]
    split = 12 * (count["total"] - norms) / 4
    assert shapes.device_bytes(state) == pytest.approx(split + 12 * norms / 2, abs=64)


def test_shapes_do_not_need_the_devices():
    """An abstract mesh gives the same shapes and bytes as one of real devices."""
    real = list(shapes.stages(small(), jax.devices()))
    counted = list(shapes.stages(small(), 8))
    assert [one.name for one in counted] == ["pretrain", "sft", "ppo"]
    for a, b in zip(real, counted, strict=True):
        assert set(a.programs) == set(b.programs) and a.work == b.work
        assert shapes.device_bytes(a.state) == shapes.device_bytes(b.state)
        assert a.model == b.model


def test_fewer_layers_are_the_first_ones_of_every_model(tmp_path):
    """Those of models from elsewhere too, whose parents keep all else."""
    config = small(layers=5)
    whole = {one.name: one for one in shapes.stages(config, 8)}
    for one in shapes.stages(config, 8, layers=2):
        assert one.model == whole[one.name].model | {"layers": 2}
        assert set(one.programs) == set(whole[one.name].programs)
    folder = tmp_path / "folder"
    shape = tiny.config(layers=5, heads=4, kv_heads=2, max_length=64, vocab_size=256)
    model = Transformer(shape, jax.random.key(0))
    huggingface.save(model, folder, ids={"eos_token_id": 1})
    config.stages = {"ppo": config.stages.ppo}
    config.stages.ppo.start_from = f"hf:{folder}"
    [one] = shapes.stages(config, 8, layers=2)
    [whole] = shapes.stages(config, 8)
    assert (one.model["layers"], whole.model["layers"]) == (2, 5)
    assert one.work == whole.work


def test_batches_that_are_not_there_have_the_shapes_of_a_run():
    config = experiment.resolve(small(), devices=8)
    batch = assumed.batch(config.stages.ppo, config)
    assert batch["prompt_ids"].shape == (16, 32)
    config.stages.ppo.data.prompt_length = 0  # as long as there is room for
    assert assumed.batch(config.stages.ppo, config)["prompt_ids"].shape == (16, 32)
    assert assumed.batch(config.stages.sft, config)["ids"].shape == (16, 64)


def test_a_plan_adds_up():
    stages = list(plan.plan(small(dtype="bfloat16"), H200))
    by_name = {stage.name: stage for stage in stages}
    ppo = by_name["ppo"]
    assert [p.name for p in ppo.programs] == ["sample", "scores", "update"]
    for stage in stages:
        assert stage.fits and not stage.advice
        assert stage.seconds == sum(max(p.bounds) for p in stage.programs)
        rate = 8 * 9.89e14
        assert stage.mfu == pytest.approx(stage.flops / stage.seconds / rate)
        assert stage.mfu < 1
        assert stage.chip_hours == stage.steps * stage.seconds * 8 / 3600
    # The parent lies beside what is trained from it.
    assert by_name["pretrain"].frozen_bytes == 0
    weights = by_name["sft"].state_bytes / 3
    assert by_name["sft"].frozen_bytes == pytest.approx(weights, abs=8)
    totals = plan.total(stages, H200, price=2.0)
    assert totals["dollars"] == 2 * sum(stage.chip_hours for stage in stages)


def test_the_page_holds_the_plan(tmp_path):
    stages = list(plan.plan(small(), H200, ["sft"]))
    path = page.write(tmp_path / "to", plan.as_json(stages, H200, 1.5))
    stored = json.loads((tmp_path / "to" / "plan.json").read_text())
    assert stored["stages"][0]["programs"][0]["bounds"]["name"] in path.read_text()
    assert "from formulas" in path.read_text() and not stored["compiled"]


def large(name="llama31_8b", arg=""):
    return load_experiment(f"recipes/pods/{name}").get_config(arg)


def test_what_does_not_fit_says_what_would_help():
    [stage] = plan.plan(large(arg="fsdp=8"), H200, ["sft"])
    assert not stage.fits
    line = stage.advice
    assert "\n" not in line and "activations" in line
    helps = line.partition("what would help most: ")[2].split(", ")
    assert len(helps) == 3 and helps[0].startswith("micro_batches=4 (about -")
    # What it names is what the formula then gives.
    [more] = plan.plan(large(arg="fsdp=8,micro_batches=4"), H200, ["sft"])
    saved = float(helps[0].partition("about -")[2].split()[0])
    # Accumulated gradients come on top, once, which the estimate has counted.
    assert stage.peak - more.peak == pytest.approx(saved * chips.GIB, rel=0.02)


def test_formulas_follow_the_shapes():
    """Twice the tokens, layers or shards change what they should, and nothing else."""
    [one] = shapes.stages(large(), 256, ["pretrain"])
    now = plan.layout_of(one)
    v5e = chips.parse("v5e:16x16")

    def step(layout=now, rows=512, **model):
        return formulas.step(one.model | model, layout, v5e, rows=rows, length=8192)

    base, double = step(), step(rows=1024)
    assert double.bounds.compute == pytest.approx(2 * base.bounds.compute)
    assert double.memory["activations"] == 2 * base.memory["activations"]
    assert double.memory["state"] == base.memory["state"]
    split = step(now._replace(data=8, fsdp=32))
    assert split.memory["state"] == base.memory["state"] / 2
    parts = step(now._replace(micro_batches=2))
    assert parts.memory["activations"] == base.memory["activations"] / 2
    assert parts.bounds.ici > base.bounds.ici  # weights are gathered once more
    free = step(now._replace(remat="none"))
    assert free.bounds.compute == pytest.approx(base.bounds.compute * 3 / 4)
    assert free.memory["activations"] > 3 * base.memory["activations"]


def test_decoding_reads_weights_and_cache():
    [one] = shapes.stages(large(arg="fsdp=8"), 8, ["grpo"])
    layout = plan.layout_of(one)
    bound = formulas.decode(one.model, layout, H200, rows=8, prompt=512, new=512)
    # Of one row: 32 layers, 8 heads of 128, keys and values, two bytes, 1024 slots.
    assert bound["cache_bytes"] == 2 * 2 * 32 * 8 * 128 * 1024
    weights = 2 * (cost.parameters(one.model)["total"] - 128256 * 4096)
    assert bound["seconds"] == pytest.approx(512 * weights / 4.8e12, rel=0.02)


def test_suggestions_fit_and_are_the_fastest(capsys):
    best = suggest.suggest(large(), H200, ["sft"])
    assert best["peak"] < 0.9 * H200.memory and best["compiled"] == 0
    [one] = shapes.stages(large(arg="fsdp=8"), 8, ["sft"])
    ranked = suggest.candidates(one, H200)
    assert all(c.peak < 0.9 * H200.memory for c in ranked)
    fastest = min(c.seconds for c in ranked)
    assert best["seconds"] < fastest * math.exp(1.5 * suggest.NEAR)
    sizes = {(x.data * x.fsdp * x.tensor) for x, *_ in ranked}
    assert sizes == {8}
    # Pasted, they are read.
    flags = ["plan", "--config=recipes/pods/llama31_8b", "--topology=h200:8"]
    status, out, error = stagecraft(*flags, "--stage=sft", *best["flags"])
    assert status == 0, error
    assert "sft (language_model): 8.03B parameters trained" in out


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--topology=v5:16x16"], "did you mean 'v5e:16x16'"),
        ([], "--topology is missing"),
        (["--topology=h200:8", "--config.mesh.data=3"], "needs 48 devices, but 8 are"),
        (["--topology=h200:64", "--stage=sfx"], "did you mean 'sft'"),
        (["--topology=h200:64", "--price=-1", "--stage=sft"], "--price=-1.0"),
        (
            ["--topology=h200:64", "--config.stages.grpo.rollout_mesh.devices=32"],
            "stages.grpo.rollout_mesh.devices=32: a stage on two meshes",
        ),
    ],
)
def test_bad_input_is_one_line(flags, says):
    status, out, error = stagecraft("plan", "--config=recipes/pods/qwen3_8b", *flags)
    assert status == 2 and says in error and error.count("\n") == 1


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_resolves_on_its_topologies(name):
    sizes = {
        "llama31_8b": 8.03,
        "llama31_70b": 70.6,
        "qwen3_8b": 8.19,
        "gemma3_12b": 11.8,
        "qwen3_30b_a3b": 30.5,
    }
    config = experiment.resolve(large(name), devices=512)
    model = config.model.to_dict() | {"vocab_size": config.tokenizer.vocab_size}
    assert cost.parameters(model)["total"] / 1e9 == pytest.approx(sizes[name], abs=0.06)
    for devices in (256, 512):
        experiment.resolve(large(name), devices=devices)
    experiment.resolve(large(name, "fsdp=8"), devices=8)


def test_meshes_over_slices_keep_replicas_whole():
    with pytest.raises(UserError, match="needs 6 devices, but 4"):
        sharding.make_mesh(3, 2, 1, devices=4)
    mesh = sharding.make_mesh(-1, 2, 1, devices=4)
    assert (mesh.shape["data"], mesh.shape["fsdp"], mesh.size) == (2, 2, 4)


# -- with the compiler of TPUs ---------------------------------------------------------

compiles = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra plan (libtpu)"
)
_AHEAD = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from stagecraft import chips
from stagecraft.pods import plan
from tests.pods import plan_test

topology = chips.parse(sys.argv[1])
config = plan_test.on_tpu(int(sys.argv[2]))
stages = list(plan.plan(config, topology, sys.argv[3].split(","), ["update", "sample"]))
print(json.dumps(plan.as_json(stages, topology, 0.0)))
"""


def on_tpu(layers):
    """A model small enough to compile for TPUs in seconds, its layers in a loop."""
    c = small(
        dtype="bfloat16",
        layers=layers,
        width=256,
        heads=4,
        kv_heads=4,
        head_dim=128,
        ff_width=512,
        max_length=256,
        remat="full",
    )
    c.stages.pretrain.data.length = c.stages.sft.data.length = 256
    c.mesh.update(dict(data=-1, fsdp=4, tensor=2))
    for stage in c.stages.values():
        stage.batch_size = 16
    return c


def ahead(topology, layers, stages):
    """A plan of `on_tpu`, in a process of its own: libtpu is there once a process."""
    return json.loads(in_process(_AHEAD, topology, str(layers), stages))


def in_process(program, *arguments):
    """The last line that a Python program prints."""
    where = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=where,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@compiles
def test_a_tpu_program_is_counted_as_the_ledger_does():
    few, many = (
        ahead("v5e:4x4", layers, "pretrain")["stages"][0] for layers in (10, 20)
    )
    [a], [b] = few["programs"], many["programs"]
    assert a["xla_flops"]["corrected"] == pytest.approx(a["ledger_flops"], rel=0.4)
    # Between two depths: forward, backward and the forward that remat repeats.
    ledger = b["ledger_flops"] - a["ledger_flops"]
    assert b["flops"] - a["flops"] == pytest.approx(4 / 3 * ledger, rel=0.1)
    assert b["xla_flops"]["once"] == pytest.approx(a["xla_flops"]["once"], rel=0.02)
    # A loop over layers: compiling does not grow with depth.
    assert b["seconds_to_compile"] < 2 * a["seconds_to_compile"] + 5
    assert few["kernels"] == ["attention: splash (auto: this TPU's own)"]
    axes = {tuple(e["axes"]) for e in a["exchanges"]}
    assert ("fsdp",) in axes and ("tensor",) in axes
    assert all(e["over"] == "ICI" for e in a["exchanges"])


@compiles
def test_a_sampler_of_a_deep_model_is_compiled_at_two_depths():
    [stage] = ahead("v5e:4x4", 12, "ppo")["stages"]
    sample = next(p for p in stage["programs"] if p["name"] == "sample")
    assert sample["depths"] == [2, 4]
    [stage] = ahead("v5e:4x4", 4, "ppo")["stages"]
    whole = next(p for p in stage["programs"] if p["name"] == "sample")
    assert whole["depths"] == []
    assert sample["flops"] - whole["flops"] == pytest.approx(
        sample["ledger_flops"] - whole["ledger_flops"], rel=0.15
    )


@compiles
def test_slices_exchange_over_the_data_center():
    [stage] = ahead("2xv5e:4x4", 10, "sft")["stages"]
    assert stage["mesh"]["data"] == 4
    over = {e["over"] for e in stage["programs"][0]["exchanges"]}
    assert over == {"ICI", "DCN"}


@compiles
def test_suggestions_are_compiled():
    program = """
import json
import jax
jax.config.update("jax_platforms", "cpu")
from stagecraft import chips
from stagecraft.pods import suggest
from tests.pods import plan_test

config = plan_test.on_tpu(10)
best = suggest.suggest(config, chips.parse("v5e:4x4"), ["sft"], compiles=1)
print(json.dumps(best))
"""
    best = json.loads(in_process(program))
    sizes = best["layout"]
    assert best["compiled"] == 1 and best["peak"] < 16 * chips.GIB
    assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == 16


@compiles
@pytest.mark.parametrize("name", MODELS)
def test_recipes_compile_at_reduced_depth(name):
    """At full width, with one period of their layers: what depth repeats is a loop."""
    layers = 6 if name == "gemma3_12b" else 2
    arg = f"layers={layers},batch=16,length=1024,chat_length=512,pair_length=512"
    arg += ",prompt=128,answer=128,fsdp=16"
    program = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from stagecraft import chips
from stagecraft.pods import plan
from tests.pods import plan_test

topology = chips.parse("v6e:4x4")
config = plan_test.large(*sys.argv[1:])
[stage] = plan.plan(config, topology, ["pretrain"], ["update"])
print(json.dumps(plan.as_json([stage], topology, 0.0)))
"""
    [stage] = json.loads(in_process(program, name, arg))["stages"]
    [update] = stage["programs"]
    assert stage["fits"] and not update["error"]
    assert stage["kernels"][0].startswith("attention: splash")
    assert 0.5 * update["flops"] < update["xla_flops"]["corrected"] <= update["flops"]
