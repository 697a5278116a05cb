"""What finished stages learned from: how many labels, and how often gold agrees."""

import itertools

from stagecraft import worlds
from stagecraft.anatomy import behaviour, roles
from stagecraft.data import comparisons, readers, stage_data
from stagecraft.errors import UserError


def measure(run) -> dict[str, dict]:
    """Measures {stage: {"labels", "signal_accuracy", "n"}} of the finished stages.

    Of a stage that learned from comparisons they are of its own, of one that learned
    from a reward model of this run they are of that model's.

    Args:
        run: a `runs.Run` with a world.
    """
    gold = worlds.get(run.config.world.name).gold
    specs = {name: _spec(run, name) for name in run.stages if run.finished(name)}
    by_spec = {spec: _figures(spec, gold) for spec in {*specs.values()} if spec}
    return {name: by_spec[spec] for name, spec in specs.items() if spec}


def _spec(run, name):
    """Returns the files of comparisons that a stage's signal is from, or None."""
    stage = run.config.stages[name]
    if roles.of(stage.kind).data in (comparisons.pairs, comparisons.rankings):
        return stage_data.locate(stage.data.files, run.root)
    reward = stage.get("reward_from")
    return _spec(run, reward) if reward in run.config.stages else None


def _figures(spec, gold):
    """Counts the comparisons of files, and those whose better answer has more gold."""
    hits, count = [], 0
    try:
        rows = readers.comparisons(spec)
    except UserError:  # moved since it was trained on
        return {}
    for one in rows:
        prompt = behaviour.as_text(one.prompt)
        scores = [_score(gold, prompt, answer) for answer in one.answers]
        for better, worse in itertools.combinations(scores, 2):
            count += 1
            if better != worse and one.preference != 0.5:
                hits.append(better > worse)
    figures: dict = {"labels": count}
    if hits:
        figures["signal_accuracy"] = sum(hits) / len(hits)
        figures["n"] = {"signal_accuracy": len(hits)}
    return figures


def _score(gold, prompt, answer):
    last = answer[-1]
    return round(gold(prompt, last["content"], last.get("ended", True)), 9)
