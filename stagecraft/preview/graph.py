"""The graph of stages on the terminal."""

from ml_collections import ConfigDict
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from stagecraft import experiment, schema
from stagecraft.data import stage_data


def show(config: ConfigDict, file=None) -> None:
    """Prints the stages as a tree by start_from, each with what else it takes."""
    config = experiment.resolve(config)
    trees, top = {}, Tree("", hide_root=True)
    for name in experiment.order(config):
        stage = config.stages[name]
        start = stage.get("start_from", "")
        if start and start not in trees:  # a model from outside
            trees[start] = top.add(Text(start, style="italic"))
        label = Text.assemble((name, "bold"), f"  {stage.kind}")
        for line in edges(config, name):
            label.append(f"\n  {line}", style="dim")
        trees[name] = trees.get(start, top).add(label)
    Console(file=file, highlight=False).print(top, soft_wrap=True)


def edges(config: ConfigDict, name: str) -> list[str]:
    """Returns what a stage takes from others besides the weights it starts from."""
    stage = config.stages[name]
    named = stage_data.stages_named(stage.data)
    lines = [f"records of {parent}" for parent in named]
    for role, parent in experiment.parents(config, name).items():
        if role != "start_from":
            lines.append(f"{role.removesuffix('_from')}: {parent}")
    # The signal: who compares, and by which principles.
    for key in ("rater", "constitution"):
        if stage.get(key):
            lines.append(f"{key}: {schema.plain(stage[key])}")
    files = [stage.data[k] for k in stage_data.SPECS if stage.data.get(k)]
    parts = [part for spec in files for part in schema.listed(spec)]
    files = [part for part in parts if not part.startswith("stage:")]
    return lines + ([f"data: {', '.join(files)}"] if files else [])
