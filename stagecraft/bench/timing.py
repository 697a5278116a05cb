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
import itertools
import json
import platform
import shlex
import statistics
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stagecraft import chips, defaults, metrics, process, schema, sharding, train
from stagecraft.anatomy import cost
from stagecraft.bench import peer as peer_program
from stagecraft.bench import presets, table
from stagecraft.errors import UserError
from stagecraft.models import kernels, sampling
from stagecraft.models.config import ModelConfig
from stagecraft.models.saved import describe
from stagecraft.models.transformer import ScalarModel, Transformer
from stagecraft.stages.kinds import KINDS
from stagecraft.stages.stage import Context


class Peer:
    """The other side of a figure: a process that does one step when asked.

    Args:
        environment: folder of a virtual environment with torch, transformers and TRL.
        name: of `presets.CASES`, or "sample_ROWS".
        model: sizes of the model.
    """

    def __init__(self, environment: str, name: str, model: dict):
        self.name, self.steps = name, []
        self.process = subprocess.Popen(
            [python_of(environment), peer_program.__file__, name, json.dumps(model)],
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


def bench(
    what=(),
    *,
    preset="laptop",
    length=0,
    growth=False,
    steps=8,
    dtype="",
    peers="",
    page="",
):
    """Measures and prints; see the module's docstring.

    Args:
        what: names of `presets.NAMES`; () for those of the preset.
        preset: name of one of `presets.PRESETS`.
        length: tokens of a row, other lengths in proportion; 0 for the preset's.
        growth: also at twice and four times the length, the rows and the width.
        steps: timed steps of each, after one that compiles.
        dtype: of the computation; "" for the preset's.
        peers: folder of the peers' environment; "" for our side alone.
        page: a Markdown file for the table; "" for none.

    Returns:
        list of dicts, the lines printed.
    """
    schema.choice("--preset", preset, presets.PRESETS)
    setting = presets.PRESETS[preset]
    if peers and (length or growth or preset != "laptop"):
        raise UserError(
            f"--peers={peers}: the other side knows --preset=laptop alone; "
            "leave out --preset, --length and --growth, or --peers"
        )
    what = what or setting.cases
    for name in what:
        schema.choice("--what", name, presets.NAMES)
    if length:
        setting = presets.of_length(setting, length)
    setting = setting._replace(dtype=dtype or setting.dtype)
    if steps < 1:
        raise UserError(f"--steps={steps}: expected 1 or more")
    if peers:
        python_of(peers)
    which = "peers" if preset == "laptop" else "accelerator"
    mark = table.MARKS["growth" if growth else which]
    if page:
        table.check(page, mark)
    if jax.default_backend() == "cpu":
        process.keep_memory()
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    lines, limit = [], matmul_rate(mesh, jnp.dtype(setting.dtype))
    shared = {"preset": preset, "dtype": setting.dtype} | _machine()
    shared["matmul_gflops_per_s"] = round(limit, 1)
    if growth:  # of one number of samples
        setting = setting._replace(samples=setting.samples[1:2])
    sizes = [("", 1, setting)]
    if growth:
        for axis, factor in itertools.product(presets.AXES, (2, 4)):
            sizes.append((axis, factor, presets.grown(setting, axis, factor)))
    with jax.set_mesh(mesh):
        for name, (axis, factor, size) in itertools.product(what, sizes):
            measure = _samples if name == "sample" else _stage
            for line in measure(name, size, mesh, steps, peers):
                line["share_of_matmul"] = round(line["gflops_per_s"] / limit, 3)
                line |= ({"grown": [axis, factor]} if growth else {}) | shared
                print(json.dumps(line), flush=True)
                lines.append(line)
    if page:
        table.write(page, lines, mark)
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


def build(name, preset, mesh, place=sharding.init_sharded):
    """Builds the stage of a case, its parents random.

    Args:
        name: of `presets.CASES`.
        preset: a `presets.Preset`.
        mesh: the mesh.
        place: (function, mesh) -> the same function, its results on the mesh.

    Returns:
        (stage, raw batch).
    """
    case = presets.CASES[name]
    kind = KINDS[case.kind]
    rows = _divisible(preset.rows[name], mesh)
    changes = case.changes(preset) | {"batch_size": rows}
    if preset.lora:
        changes["lora"] = dict(rank=preset.lora)
    config = defaults.stage(case.kind, steps=1000, **changes)
    model_config = ModelConfig(**preset.model, dtype=preset.dtype)
    make = _parents(kind, model_config, adapter=bool(preset.lora))
    parents = place(make, mesh)(jax.random.key(0))
    alike = {"reference": "start", "value": "reward"}
    parents |= {
        role: parents[other]
        for role, other in alike.items()
        if role in kind.roles and other in parents
    }
    stage = kind.make(config, Context(mesh, model_config, parents))
    return stage, case.raw(preset, rows, np.random.default_rng(0))


def _stage(name, preset, mesh, steps, peers):
    stage, raw = build(name, preset, mesh)
    started = time.perf_counter()
    state = stage.init(jax.random.key(0))

    def step(state, number):
        with metrics.section("prepare"):
            batch = stage.prepare(state, raw, jax.random.key(number))
        with metrics.section("update"):
            state, numbers = stage.update(state, batch)
            jax.block_until_ready((state, numbers))
        return state

    state = step(state, 0)
    first = time.perf_counter() - started
    clock = metrics.Clock()

    def one(number):
        nonlocal state
        with clock("other"):
            state = step(state, number)

    seconds, peer = _in_turns(one, steps, name, preset.model, peers)
    work = dict(stage.work(raw))
    length = work.pop("length")
    flops = cost.stage_flops(
        work | {"context": (length + 1) / 2}, preset.model, adapter=bool(preset.lora)
    )
    shape = list(raw["ids" if "ids" in raw else "prompt_ids"].shape)
    tokens = work.get("sampled", 0) or work.get("trained", 0)
    tokens = tokens or work.get("scalar_trained", 0)
    line = _line(name, seconds, tokens, flops, first, peer, preset.dtype)
    yield line | {
        "shape": shape,
        "sections": _shares(clock.seconds),
        "attention": _kernel(preset, length),
        "programs": program_costs(stage, raw),
    }


def _shares(seconds):
    """Returns {section: its share of the steps' time}, those of under 1% left out."""
    total = sum(seconds.values())
    shares = {name: round(part / total, 3) for name, part in seconds.items()}
    return {name: share for name, share in shares.items() if share >= 0.01}


def _kernel(preset, length):
    """Returns which kernel of attention the passes over whole rows take."""
    config = ModelConfig(**preset.model, dtype=preset.dtype)
    request = kernels.Request(length, config.head_dim, config.dtype, 0.0)
    return kernels.choose(config.attention, request).kernel


def _in_turns(step, steps, name, model, peers):
    """Times steps, each followed by one of the other side where there is one.

    Returns:
        [(seconds, CPU seconds)] of ours; a `Peer` that has done its steps, or None.
    """
    peer, seconds = None, []
    known = name in peer_program.NAMES or name.startswith("sample_")
    with contextlib.ExitStack() as stack:
        if peers and known:
            peer = Peer(peers, name, model)
            stack.callback(peer.close)
        for number in range(1, steps + 1):
            started, cpu = time.perf_counter(), time.process_time()
            step(number)
            wall = time.perf_counter() - started
            seconds.append((wall, time.process_time() - cpu))
            if peer is not None:
                peer.step()
    return seconds, peer


def _parents(kind, model_config, *, adapter):
    """Returns (key) -> random models in the roles that a kind has.

    A stage that may begin from scratch does, unless an adapter is trained: it needs a
    model.
    """

    def make(key):
        if not kind.roles["start"].required and not adapter:
            return {}
        models = {"start": Transformer(model_config, key)}
        if "reward" in kind.roles:
            models["reward"] = ScalarModel(Transformer(model_config, key), key)
        return models

    return make


def _samples(name, preset, mesh, steps, peers):
    model_config = ModelConfig(**preset.model, dtype=preset.dtype)
    model = sharding.init_sharded(lambda key: Transformer(model_config, key), mesh)(
        jax.random.key(0)
    )
    info = describe(model)["model"]
    prompt, new = preset.sampled
    for rows in sorted({_divisible(rows, mesh) for rows in preset.samples}):
        raw = presets.prompts(preset, rows, np.random.default_rng(0), prompt)
        raw = sharding.shard_batch(raw, mesh)

        def one(number, raw=raw):
            samples = sampling.generate(
                model,
                raw["prompt_ids"],
                raw["prompt_mask"],
                jax.random.key(number),
                max_new_tokens=new,
                stop_ids=(),
            )
            jax.block_until_ready(samples)

        started = time.perf_counter()
        one(0)
        first = time.perf_counter() - started
        turns = f"{name}_{rows}", preset.model, peers
        seconds, peer = _in_turns(one, steps, *turns)
        flops = cost.forward_flops(info, rows * (prompt + new), (prompt + new) / 2)
        figures = seconds, rows * new, flops, first, peer, preset.dtype
        line = _line(f"{name}_{rows}", *figures)
        line["shape"] = [rows, prompt, new]
        if chip := chips.of_device(jax.devices()[0]):
            width = jnp.dtype(preset.dtype).itemsize
            split = rows / sharding.row_shards(mesh), prompt, new
            moved = cost.decode_bytes(preset.model, *split, width)
            share = moved / (chip.bandwidth / chip.cores) / line["step_s"]
            line["share_of_bandwidth"] = round(share, 3)
        yield line


def _line(name, seconds, tokens, flops, first, peer, dtype):
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
    if chip := chips.of_device(jax.devices()[0]):
        peak = jax.device_count() * chip.peaks[dtype] / chip.cores
        line["mfu"] = round(flops / median / peak, 3)
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
