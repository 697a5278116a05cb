"""Times the stages on this machine: real steps on synthetic batches of one shape.

Each result is one line of JSON with the machine, the time of a step, and tokens and
FLOPs a second, beside the rate at which this machine multiplies matrices. A step is all
that training does per step: sampling, scoring and reference passes included; `programs`
says what the compiler counts in each program of the stage.

With `peers` each step is followed by one of torch's or TRL's on the same work
(`peer`), so that both sides meet the same machine. Compare figures of one run on
an idle machine; on a busy one the ratio of CPU seconds is the steadier.
"""

import contextlib
import json
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stagecraft import defaults, process, schema, sharding, train
from stagecraft.anatomy import cost
from stagecraft.bench import peer as peer_program
from stagecraft.bench import table
from stagecraft.errors import UserError
from stagecraft.models import sampling
from stagecraft.models.config import ModelConfig
from stagecraft.models.saved import describe
from stagecraft.models.transformer import ScalarModel, Transformer
from stagecraft.stages.kinds import KINDS
from stagecraft.stages.stage import Context

# The model, unless a flag says otherwise: 4M parameters, small enough for a laptop.
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


class Peer:
    """The other side of a figure: a process that does one step when asked.

    Args:
        environment: folder of a virtual environment with torch, transformers and TRL.
        name: of `CASES`, or "sample_ROWS".
    """

    def __init__(self, environment: str, name: str):
        self.name, self.steps = name, []
        self.process = subprocess.Popen(
            [python_of(environment), peer_program.__file__, name, json.dumps(MODEL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.versions = self._read()
        self.step()  # one that compiles, and warms up
        self.steps.clear()

    def step(self):
        """Has it do a step, which ends when it has said what it took."""
        with contextlib.suppress(BrokenPipeError):  # `_read` says that it has ended
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        self.steps.append(self._read())

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            ended = self.process.wait()
            raise UserError(
                f"--peers: the other side of {self.name} ended with {ended}; to see "
                f"why, run it alone: {shlex.join(self.process.args)}"
            )
        return json.loads(line)

    def close(self):
        """Asks for no further step, upon which the process ends."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def python_of(environment: str) -> str:
    """Returns the Python of a virtual environment; a UserError where there is none."""
    python = Path(environment, "bin", "python")
    if not python.is_file():
        raise UserError(
            f"--peers={environment}: {python} is not there; expected the folder of a "
            "virtual environment with torch, transformers, trl and datasets"
        )
    return str(python)


def bench(what, *, steps=8, dtype="float32", peers="", page=""):
    """Measures and prints; see the module's docstring.

    Args:
        what: names of `NAMES`.
        steps: timed steps of each, after one that compiles.
        dtype: of the computation.
        peers: folder of the peers' environment; "" for our side alone.
        page: a Markdown file for the table; "" for none.

    Returns:
        list of dicts, the lines printed.
    """
    for name in what:
        schema.choice("--what", name, NAMES)
    if steps < 1:
        raise UserError(f"--steps={steps}: expected 1 or more")
    if peers:
        python_of(peers)
    if page:
        table.check(page)
    if jax.default_backend() == "cpu":
        process.keep_memory()
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    lines, limit = [], matmul_rate(mesh, jnp.dtype(dtype))
    with jax.set_mesh(mesh):
        for name in what:
            measure = _samples if name == "sample" else _stage
            for line in measure(name, mesh, steps, dtype, peers):
                line["share_of_matmul"] = round(line["gflops_per_s"] / limit, 3)
                line |= _machine() | {"matmul_gflops_per_s": round(limit, 1)}
                print(json.dumps(line), flush=True)
                lines.append(line)
    if page:
        table.write(page, lines)
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


def _stage(name, mesh, steps, dtype, peers):
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

    def one(number):
        nonlocal state
        state = step(state, number)

    seconds, peer = _in_turns(one, steps, name, peers)
    work = dict(stage.work(raw))
    length = work.pop("length")
    flops = cost.stage_flops(work | {"context": (length + 1) / 2}, MODEL | {"tied": 1})
    shape = list(raw["ids" if "ids" in raw else "prompt_ids"].shape)
    programs = program_costs(stage, raw)
    tokens = work.get("sampled", 0) or work.get("trained", 0)
    tokens = tokens or work.get("scalar_trained", 0)
    line = _line(name, seconds, tokens, flops, first, peer)
    yield line | {"shape": shape, "programs": programs}


def _in_turns(step, steps, name, peers):
    """Times steps, each followed by one of the other side where there is one.

    Returns:
        [(seconds, CPU seconds)] of ours; a `Peer` that has done its steps, or None.
    """
    peer, seconds = None, []
    known = name in peer_program.NAMES or name.startswith("sample_")
    with contextlib.ExitStack() as stack:
        if peers and known:
            peer = Peer(peers, name)
            stack.callback(peer.close)
        for number in range(1, steps + 1):
            started, cpu = time.perf_counter(), time.process_time()
            step(number)
            wall = time.perf_counter() - started
            seconds.append((wall, time.process_time() - cpu))
            if peer is not None:
                peer.step()
    return seconds, peer


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


def _samples(name, mesh, steps, dtype, peers):
    model_config = ModelConfig(**MODEL, dtype=dtype)
    model = sharding.init_sharded(lambda key: Transformer(model_config, key), mesh)(
        jax.random.key(0)
    )
    info = describe(model)["model"]
    for rows in sorted({_divisible(rows, mesh) for rows in SAMPLES}):
        raw = _prompts(rows, np.random.default_rng(0), length=32)
        raw = sharding.shard_batch(raw, mesh)

        def one(number, raw=raw):
            samples = sampling.generate(
                model,
                raw["prompt_ids"],
                raw["prompt_mask"],
                jax.random.key(number),
                max_new_tokens=128,
                stop_ids=(),
            )
            jax.block_until_ready(samples)

        started = time.perf_counter()
        one(0)
        first = time.perf_counter() - started
        seconds, peer = _in_turns(one, steps, f"{name}_{rows}", peers)
        flops = cost.forward_flops(info, rows * 160, 80)
        line = _line(f"{name}_{rows}", seconds, rows * 128, flops, first, peer)
        yield line | {"shape": [rows, 32, 128]}


def _line(name, seconds, tokens, flops, first, peer):
    walls, cpus = zip(*seconds, strict=True)
    median = statistics.median(walls)
    line = {
        "what": name,
        "step_s": round(median, 5),
        "fastest_s": round(min(walls), 5),
        "slowest_s": round(max(walls), 5),
        "cpu_s": round(statistics.median(cpus), 5),
        "first_s": round(first, 2),  # compilation included
        "tokens_per_s": round(tokens / median, 1),
        "gflops_per_s": round(flops / median / 1e9, 2),
        "peak_memory_bytes": train.peak_memory(),
    }
    if peer is None:
        return line
    return line | {"peer": _beside(seconds, tokens, peer)}


def _beside(seconds, tokens, peer):
    """Describes the other side's steps, and by how much ours are faster, a token."""
    theirs = [step["seconds"] for step in peer.steps]
    ratios, cpu_ratios = [], []
    for (wall, cpu), step in zip(seconds, peer.steps, strict=True):
        ratios.append(step["seconds"] / step["tokens"] * tokens / wall)
        cpu_ratios.append(step["cpu_seconds"] / step["tokens"] * tokens / cpu)
    return {
        "with": ", ".join(f"{name} {v}" for name, v in peer.versions.items()),
        "step_s": round(statistics.median(theirs), 5),
        "fastest_s": round(min(theirs), 5),
        "slowest_s": round(max(theirs), 5),
        "tokens": peer.steps[0]["tokens"],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
    }


def _machine():
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else "cpu",
        "devices": jax.device_count(),
        "machine": platform.machine(),
        "jax": jax.__version__,
    }
