"""Times the stages on this machine: real steps on synthetic batches of one shape.

Each result is one line of JSON with the machine, the time of a step, and tokens and
FLOPs a second, beside the rate at which this machine multiplies matrices.
A step is all that training does per step: sampling, scoring and reference passes
included; `programs` says what the compiler counts in each program of the stage. Compare
figures of one run on an idle machine.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stagecraft import defaults, process, schema, sharding, train
from stagecraft.anatomy import cost
from stagecraft.errors import UserError
from stagecraft.models import sampling
from stagecraft.models.config import ModelConfig
from stagecraft.models.saved import describe
from stagecraft.models.transformer import ScalarModel, Transformer
from stagecraft.stages.kinds import KINDS
from stagecraft.stages.stage import Context

# The model, unless a flag says otherwise: 5.5M parameters, small enough for a laptop.
MODEL = dict(
    vocab_size=4096,
    width=256,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=32,
    ff_width=688,
    max_length=1024,
    qk_norm=False,
)


class Case(NamedTuple):
    """What one figure is measured on.

    Attributes:
        kind: a stage's kind.
        rows: of a batch; more where the devices are more.
        raw: (rows, rng) -> a raw batch.
        changes: of the stage's defaults.
    """

    kind: str
    rows: int
    raw: Callable
    changes: dict = {}


def _rows(rows, rng, length, prompt, sides=()):
    """Rows of one document each; what comes after `prompt` tokens is learned."""
    shape = (rows, *sides, length)
    column = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return dict(
        ids=rng.integers(5, MODEL["vocab_size"], shape).astype(np.int32),
        mask=column >= prompt,
        segments=np.ones(shape, np.int32),
        positions=column.copy(),
    )


def _packed(rows, rng, length, document):
    """Rows of several documents of `document` tokens, two thirds of each learned."""
    batch = _rows(rows, rng, length, 0)
    column = batch["positions"]
    return batch | dict(
        mask=column % document >= document // 3,
        segments=column // document + 1,
        positions=column % document,
    )


def _prompts(rows, rng, length):
    ids = rng.integers(5, MODEL["vocab_size"], (rows, length)).astype(np.int32)
    return dict(prompt_ids=ids, prompt_mask=np.ones((rows, length), bool))


def _pairs(rows, rng):
    return _rows(rows, rng, 225, 60, sides=(2,))


def _labelled(rows, rng):
    return _rows(rows, rng, 225, 60) | {"label": np.arange(rows) % 2 == 0}


_LONG = dict(max_new_tokens=64)
CASES = {
    "pretrain": Case("language_model", 16, partial(_rows, length=256, prompt=0)),
    "sft": Case("language_model", 16, partial(_packed, length=256, document=85)),
    "reward": Case("reward", 8, _pairs),
    "dpo": Case("preference", 8, _pairs),
    "kto": Case("unpaired_preference", 16, _labelled),
    "grpo": Case(
        "group_policy",
        4,
        partial(_prompts, length=32),
        dict(group_size=4, kl_coef=0.04, sampling=_LONG),
    ),
    "online": Case(
        "online_preference", 8, partial(_prompts, length=32), dict(sampling=_LONG)
    ),
    "ppo": Case(
        "policy",
        16,
        partial(_prompts, length=32),
        dict(epochs=4, minibatches=1, sampling=_LONG),
    ),
}
SAMPLES = (1, 16, 64)  # batch sizes of "sample": 32 tokens in, 128 out
NAMES = (*CASES, "sample")


def bench(what, *, steps=8, dtype="float32"):
    """Measures and prints; see the module's docstring.

    Args:
        what: names of `NAMES`.
        steps: timed steps of each, after one that compiles.
        dtype: of the computation.

    Returns:
        list of dicts, the lines printed.
    """
    for name in what:
        schema.choice("--what", name, NAMES)
    if steps < 1:
        raise UserError(f"--steps={steps}: expected 1 or more")
    if jax.default_backend() == "cpu":
        process.keep_memory()
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    lines, limit = [], matmul_rate(mesh, jnp.dtype(dtype))
    with jax.set_mesh(mesh):
        for name in what:
            measure = _samples if name == "sample" else _stage
            for line in measure(name, mesh, steps, dtype):
                line["share_of_matmul"] = round(line["gflops_per_s"] / limit, 3)
                line |= _machine() | {"matmul_gflops_per_s": round(limit, 1)}
                print(json.dumps(line), flush=True)
                lines.append(line)
    return lines


def matmul_rate(mesh, dtype, size=2048, rounds=5) -> float:
    """Measures how fast all devices together multiply matrices, in GFLOP/s.

    Args:
        mesh: the mesh; each device multiplies two square matrices.
        dtype: of the matrices.
        size: rows and columns of each.
        rounds: products timed one by one, of which the fastest counts.
    """
    matrix = np.random.default_rng(0).normal(size=(size, size)).astype(dtype)
    left = sharding.shard_batch(np.tile(matrix, (mesh.size, 1)), mesh)
    right = sharding.replicate(matrix, mesh)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(rounds + 1):  # the first one compiles
        started = time.perf_counter()
        jax.block_until_ready(product(left, right))
        seconds.append(time.perf_counter() - started)
    return mesh.size * 2 * size**3 / min(seconds[1:]) / 1e9


def _divisible(rows, mesh):
    """Returns the rows, or the next number that divides over the devices."""
    shards = sharding.row_shards(mesh)
    return -(-rows // shards) * shards


def program_costs(stage, raw) -> dict[str, dict[str, float]]:
    """Returns what the compiler counts in each program of a stage.

    Args:
        stage: a `Stage`.
        raw: a raw batch.

    Returns:
        {program: {"gflops", "gbytes", "temporary_bytes", "peak_bytes"}}, a device's:
        operations, bytes read and written, the memory of intermediate results, and all
        memory at its peak. The body of a loop is counted once, however often it runs.
    """
    costs = {}
    for name, program in stage.programs(raw).items():
        compiled = program.lower().compile()
        counts, memory = compiled.cost_analysis(), compiled.memory_analysis()
        costs[name] = {
            "gflops": round(counts["flops"] / 1e9, 3),
            "gbytes": round(counts["bytes accessed"] / 1e9, 3),
            "temporary_bytes": memory.temp_size_in_bytes,
            "peak_bytes": memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes,
        }
    return costs


def _stage(name, mesh, steps, dtype):
    case = CASES[name]
    kind = KINDS[case.kind]
    rows = _divisible(case.rows, mesh)
    changes = case.changes | {"batch_size": rows}
    config = defaults.stage(case.kind, steps=1000, **changes)
    model_config = ModelConfig(**MODEL, dtype=dtype)
    parents = _parents(kind, model_config, mesh)
    stage = kind.make(config, Context(mesh, model_config, parents))
    raw = case.raw(rows, np.random.default_rng(0))
    started = time.perf_counter()
    state = stage.init(jax.random.key(0))

    def step(state, number):
        batch = stage.prepare(state, raw, jax.random.key(number))
        state, metrics = stage.update(state, batch)
        jax.block_until_ready((state, metrics))
        return state

    state = step(state, 0)
    first = time.perf_counter() - started
    seconds = []
    for number in range(1, steps + 1):
        started = time.perf_counter()
        state = step(state, number)
        seconds.append(time.perf_counter() - started)
    work = dict(stage.work(raw))
    length = work.pop("length")
    flops = cost.stage_flops(work | {"context": (length + 1) / 2}, MODEL | {"tied": 1})
    shape = list(raw["ids" if "ids" in raw else "prompt_ids"].shape)
    programs = program_costs(stage, raw)
    tokens = work.get("sampled", 0) or work.get("trained", 0)
    tokens = tokens or work.get("scalar_trained", 0)
    line = _line(name, seconds, tokens, flops, first)
    yield line | {"shape": shape, "programs": programs}


def _parents(kind, model_config, mesh):
    """Makes random models in every required role; a reference is the start itself."""
    if not kind.roles["start"].required:
        return {}

    def make(key):
        return {
            "start": Transformer(model_config, key),
            "reward": ScalarModel(Transformer(model_config, key), key),
        }

    models = sharding.init_sharded(make, mesh)(jax.random.key(0))
    return models | {"reference": models["start"], "value": models["reward"]}


def _samples(name, mesh, steps, dtype):
    model_config = ModelConfig(**MODEL, dtype=dtype)
    model = sharding.init_sharded(lambda key: Transformer(model_config, key), mesh)(
        jax.random.key(0)
    )
    info = describe(model)["model"]
    for rows in sorted({_divisible(rows, mesh) for rows in SAMPLES}):
        raw = _prompts(rows, np.random.default_rng(0), length=32)
        raw = sharding.shard_batch(raw, mesh)
        seconds, first = [], None
        for number in range(steps + 1):
            started = time.perf_counter()
            samples = sampling.generate(
                model,
                raw["prompt_ids"],
                raw["prompt_mask"],
                jax.random.key(number),
                max_new_tokens=128,
                stop_ids=(),
            )
            jax.block_until_ready(samples)
            seconds.append(time.perf_counter() - started)
        first = seconds.pop(0)
        flops = cost.forward_flops(info, rows * 160, 80)
        line = _line(f"{name}_{rows}", seconds, rows * 128, flops, first)
        yield line | {"shape": [rows, 32, 128]}


def _line(name, seconds, tokens, flops, first):
    median = statistics.median(seconds)
    return {
        "what": name,
        "step_s": round(median, 5),
        "fastest_s": round(min(seconds), 5),
        "first_s": round(first, 2),  # compilation included
        "tokens_per_s": round(tokens / median, 1),
        "gflops_per_s": round(flops / median / 1e9, 2),
        "peak_memory_bytes": train.peak_memory(),
    }


def _machine():
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else "cpu",
        "devices": jax.device_count(),
        "machine": platform.machine(),
        "jax": jax.__version__,
    }
