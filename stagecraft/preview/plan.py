"""What each stage of a run would hold, compute and take, without training it."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stagecraft import experiment, process, run, runs, train, tree
from stagecraft.anatomy import cost
from stagecraft.bench import timing
from stagecraft.data import stage_data
from stagecraft.models import saved
from stagecraft.models.language import Language
from stagecraft.models.translation import HOW
from stagecraft.preview import assumed
from stagecraft.preview.temporary import temporary
from stagecraft.sharding import HOST
from stagecraft.stages import kinds, records
from stagecraft.stages.stage import place_parents

# Share of the rate of large matrix products that training is assumed to reach: on two
# CPU cores the quickstart's stages reach from a quarter to a half of it.
SHARE = 1 / 3


def show(
    config: ConfigDict,
    root: Path | None = None,
    only: Sequence[str] = (),
    file=None,
) -> list[dict]:
    """Prints what each stage of a run would hold, compute and take.

    Args:
        config, root, file: as of `data.show`.
        only: names of stages to run; () for all.

    Returns:
        for each stage {"stage", "parameters", "trained", "state_bytes",
        "frozen_bytes", "steps", "step_tokens", "flops", "seconds"}; None where a stage
        that trains nothing has none, or cannot be counted yet.
    """
    if jax.default_backend() == "cpu":
        process.keep_memory()
    console = Console(file=file, highlight=False)
    with temporary(config, root) as this:
        names = experiment.chosen(this.config, "--only", only)
        if root:
            run.check_parents(runs.Run(root, this.config), names)
        described, lines = {}, []
        for name in this.stages:  # also those that the chosen ones start from
            if this.finished(name):
                if name in names:
                    console.print(f"{name}: finished", markup=False)
                continue
            lines.append({"stage": name} | _planned(this, name, described))
        lines = [line for line in lines if line["stage"] in names]
        dtype = jnp.dtype(this.config.model.dtype)
        rate = timing.matmul_rate(this.mesh(), dtype) if lines else 0.0
    for line in lines:
        counted = line["flops"] is not None
        line["seconds"] = line["flops"] / (rate * SHARE * 1e9) if counted else None
    if lines:
        console.print(_table(lines))
        total = sum(line["seconds"] or 0.0 for line in lines)
        console.print(
            f"About {_duration(total)} in all, if it reaches {SHARE:.0%} of the rate "
            f"at which this machine multiplies matrices ({rate:,.0f} GFLOP/s, measured "
            "now); compiling, evaluations and saves come on top.\n"
            "state: parameters and optimizer; frozen: the models beside them; memory "
            "for activations is in neither. Nothing was written.",
            markup=False,
        )
    return lines


def _planned(this, name, described):
    """Returns what a stage would hold and compute; notes what its model is."""
    config, stage, mesh = this.config, this.config.stages[name], this.mesh(name)
    kind = kinds.of(stage)
    roles = experiment.parents(config, name)
    how = {key: config.model[key] for key in HOW}
    infos = {}
    for parent in set(roles.values()):
        info = described.get(parent) or this.source(parent).info()
        outward = this.source(parent).outward
        model = info["model"] | how if outward else info["model"]
        infos[parent] = info | {"model": model}
    with jax.set_mesh(mesh):
        models = {p: saved.abstract(info, mesh) for p, info in infos.items()}
        parents = place_parents(stage, roles, models)
        data = None if run.awaited(this, name) else run.data_of(this, name)
        scalar = infos.get(stage.get("reward_from", ""), {}).get("model")
        frozen = sum(map(_bytes, {id(m): m for m in parents.values()}.values()))
        line = dict.fromkeys(("parameters", "trained", "state_bytes", "step_tokens"))
        line |= {"frozen_bytes": frozen, "steps": None, "flops": None}
        if not kind.trains:
            line["parameters"] = tree.count(models[stage.start_from])
            if data:
                work = _asked(this, name, data, parents)
                model = infos[stage.start_from]["model"]
                line["flops"] = cost.stage_flops(work, model, scalar=scalar)
            return line
        empty = stage_data.StageData()
        context = run.context(this, stage, mesh, parents, data or empty)
        functions = kind.make(stage, context)
        raw = data.dataset.batch_at(0) if data else assumed.batch(stage, this.config)
        state, *_ = functions.programs(raw)["update"].arguments
        model = train.deployable(state, functions.frozen)
        described[name] = saved.describe(model)
        work = dict(functions.work(raw))
    context_length = (work.pop("length") + 1) / 2
    total = {use: count * stage.steps for use, count in work.items()}
    flops = cost.stage_flops(
        total | {"context": context_length},
        described[name]["model"],
        scalar=scalar,
        adapter=bool(stage.lora.rank),
    )
    uses = ("sampled", "trained", "scalar_trained")
    return line | {
        "parameters": tree.count(model),
        "trained": tree.count(state.model),
        "state_bytes": _bytes(state),
        "steps": stage.steps,
        "step_tokens": next((work[use] for use in uses if work.get(use)), 0),
        "flops": flops,
    }


def _asked(this, name, data, parents):
    """Returns the work of a stage that samples answers and writes records of them."""
    stage = this.config.stages[name]
    recording = records.Recording(
        folder=this.root / name,
        name=name,
        language=Language(None, this.tokenizer, batch_size=stage.batch_size),
        asked=data.records,
        key=run.key_of(this.config, name),
        lineage=None,
        reward=parents.get("reward"),
        target=parents.get("target"),
    )
    return records.work(stage, recording, stage.get("samples", 2))


def _bytes(module):
    """Returns the bytes of what lies on the devices."""
    leaves = [x for x in jax.tree.leaves(module) if x.sharding.memory_kind != HOST]
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def _table(lines):
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("stage", overflow="fold")
    heads = ("params", "trained", "state", "frozen", "steps", "tokens\na step")
    for head in (*heads, "FLOPs", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    for line in lines:
        cells = [line["stage"], *(_large(line[k]) for k in ("parameters", "trained"))]
        cells += [_large(line[k], "B") for k in ("state_bytes", "frozen_bytes")]
        cells += [_large(line[k]) for k in ("steps", "step_tokens", "flops")]
        cells.append("–" if line["seconds"] is None else _duration(line["seconds"]))
        table.add_row(*map(Text, cells))
    return table


def _large(number, unit=""):
    """Returns a number in three digits: 134M, 1.08GB; below 10,000 as it is."""
    if not number:
        return "–"
    if number < 10_000 and not unit:
        return f"{number:,}"
    for letter in ("", "k", "M", "G", "T", "P", "E"):
        if number < 999.5 or letter == "E":
            return f"{number:.3g}{letter}{unit}"
        number /= 1000
    return ""


def _duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
