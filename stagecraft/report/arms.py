"""Groups the finished stages of several runs into arms: alike but for the seed.

An arm is a stage with everything that decides its numbers: its settings, those of the
stages it comes from, the model, the tokenizer, the world; not the seed, the mesh or
how often it logs. Stages of one run named NAME_seed0, NAME_seed1, ... are one arm too.
"""

import dataclasses
import itertools
import math
import re
from pathlib import Path

from stagecraft import defaults, runs, schema, storage, stores
from stagecraft.anatomy import roles
from stagecraft.errors import UserError
from stagecraft.metrics import is_number
from stagecraft.models import locate

_SEEDED = re.compile(r"(.+)_seed(\d+)")
# What decides no number, and what the samples of one arm differ in.
_LEFT_OUT = (*defaults.KEYS_WITHOUT_EFFECT, "seed")
_SHOWN = 3  # differences named in an arm's label
_DEFAULT = "default"  # an argument that the config leaves out
# Of the objective and of verifiers; shown without the name of their group.
_ARGUMENTS = ("objective_args.", "verifier_args.")


@dataclasses.dataclass
class Sample:
    """One finished stage of one run.

    Attributes:
        run, stage: its folder, and its name there.
        seed: the run's, and the number in NAME_seedN or None.
        figures: {figure: number}.
        errors: {figure: (standard error, its degrees of freedom)} of those that are
            means over draws of sampled answers; see `anatomy.statistics`.
        draws: sampled answers to each prompt; None in a run measured before there was
            more than one.
        ancestors: folders of the stages that it comes from.
    """

    run: Path
    stage: str
    seed: tuple
    figures: dict
    errors: dict
    draws: int | None
    ancestors: frozenset


@dataclasses.dataclass
class Arm:
    """Samples that differ in nothing but their seeds.

    Attributes:
        label: unique among the arms: the stage, and what sets it apart where the runs
            hold several versions of that stage.
        stage, kind: the stage's name without _seedN, and its kind.
        settings: dotted key -> value of all that decides its numbers.
        differs: the part of `settings` in which the versions of this stage differ.
        samples: one a seed.
    """

    label: str
    stage: str
    kind: str
    settings: dict
    differs: dict
    samples: list

    def values(self, figure):
        """Returns the figure of each sample; None where it was not measured."""
        return [sample.figures.get(figure) for sample in self.samples]

    def errors(self, figure):
        """Returns the errors of the figure where it was measured; () unless of all."""
        measured = [one for one in self.samples if figure in one.figures]
        errors = [sample.errors.get(figure) for sample in measured]
        return () if None in errors else errors


def read(folders: list, stages: tuple[str, ...] = ()) -> tuple[list, list, list]:
    """Reads the arms of several runs.

    Args:
        folders: work directories of finished runs.
        stages: names of the stages to compare, with or without _seedN; () for all that
            answer in turns.

    Returns:
        (runs, arms, notes): the `RunFiles`, the arms in the order of the folders and of
        the graph, and what a reader must know, one line each.

    Raises:
        UserError: no run, an unfinished one, one given twice, an unknown stage, or
            runs whose figures were measured on different things.
    """
    if not folders:
        raise UserError("give the folders of runs: stagecraft compare runs/a runs/b")
    runs, seen = [], {}
    for folder in (Path(stores.local(one)) for one in folders):
        first = seen.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise UserError(f"{folder}: given twice (as {first}); name each run once")
        runs.append(_run(folder))
    _same_measure(runs)
    chosen = _chosen(runs, stages)
    arms, repeats = {}, []
    for run in runs:
        _check_finished(run, chosen, named=bool(stages))
        for stage in run.stages:
            if stage.name in chosen:
                _add(arms, repeats, run, stage)
    order = list(dict.fromkeys(arm.stage for arm in arms.values()))
    arms = sorted(arms.values(), key=lambda arm: order.index(arm.stage))
    _name(arms)
    notes = [
        f"{', '.join(names)} of {', '.join(where)}: {why}, so counted once"
        for why, names, where in _gathered(repeats)
    ]
    return runs, arms, notes + _warnings(runs, arms)


def _gathered(repeats):
    """Groups (why, stage, run) to [(why, stages, runs)], one entry a set of runs."""
    runs = {}
    for why, stage, run in repeats:
        runs.setdefault((why, stage), []).append(run)
    stages = {}
    for (why, stage), where in runs.items():
        stages.setdefault((why, *where), []).append(stage)
    return [(why, names, where) for (why, *where), names in stages.items()]


def _run(folder):
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder}: no run here (no config.json); give folders that `stagecraft "
            "run` made"
        )
    planned = runs.part(runs.read_config(folder), "stages")
    if not planned:
        raise UserError(f"{folder / 'config.json'}: not the config of a run")
    run = runs.read(folder)
    run.stages = [stage for stage in run.stages if stage.name in planned]
    return run


def _same_measure(runs):
    """Refuses runs whose figures were measured on different things."""
    for group, key in (("world", "name"), ("world", "size"), ("measure", "split")):
        first = runs[0].config.get(group, {}).get(key)
        for run in runs[1:]:
            value = run.config.get(group, {}).get(key)
            if value != first:
                raise UserError(
                    f"{run.folder}: {group}.{key}={value!r}, but {first!r} in "
                    f"{runs[0].folder}; their figures are of different things and "
                    "cannot be compared"
                )


def short(name: str) -> str:
    """Returns a stage's name without its seed.

    >>> short("simpo_seed2"), short("dpo")
    ('simpo', 'dpo')
    """
    seeded = _SEEDED.fullmatch(name)
    return seeded[1] if seeded else name


def _chosen(runs, wanted):
    """Returns the names of the stages to compare, over all runs."""
    everything = {s.name: (s, run) for run in runs for s in run.stages}
    if wanted:
        names = dict.fromkeys([*everything, *map(short, everything)])
        for name in wanted:
            if name not in names:
                raise UserError(schema.unknown(f"--stages={name}", name, names))
        chosen = {n for n in everything if {n, short(n)} & set(wanted)}
        for run in runs:
            names = [stage.name for stage in run.stages]
            if not chosen & set(names):
                raise UserError(
                    f"{run.folder}: has no stage {' or '.join(wanted)}; it has "
                    f"{', '.join(names)}"
                )
        return chosen
    trained = {
        n: run.config["stages"][n]
        for n, (_, run) in everything.items()
        if roles.of(run.config["stages"][n].get("kind")).trains
    }
    speaking = {n for n, c in trained.items() if roles.of(c.get("kind")).speaks}
    in_turns = {n for n in speaking if roles.answers_in_turns(trained[n])}
    return in_turns or speaking or set(trained)


def _check_finished(run, chosen, named):
    """Refuses an unfinished run; with stages named, only those must be finished."""
    finished = [s.name for s in run.stages if s.info.get("finished")]
    missing = [
        s.name
        for s in run.stages
        if s.name not in finished and (s.name in chosen or not named)
    ]
    if missing:
        hint = f"; or compare what is there: --stages={','.join(finished)}"
        raise UserError(
            f"{run.folder}: not finished, missing {', '.join(missing)}; give its run "
            f"command again{hint if finished and not named else ''}"
        )
    unmeasured = [
        s.name
        for s in run.stages
        if s.name in chosen and not isinstance(run.summary.get(s.name), dict)
    ]
    if unmeasured:
        raise UserError(
            f"{run.folder}: summary.json has no figures of {', '.join(unmeasured)}; "
            "give its run command again to measure them"
        )


def _add(arms, repeats, run, stage):
    """Puts a stage of a run into its arm, unless it is there already."""
    settings = _settings(run, stage.name)
    key = storage.digest([short(stage.name), settings])
    arm = arms.setdefault(key, Arm("", short(stage.name), stage.kind, settings, {}, []))
    numbered = _SEEDED.fullmatch(stage.name)
    seed = run.config.get("seed"), int(numbered[2]) if numbered else None
    figures = {k: v for k, v in run.summary[stage.name].items() if is_number(v)}
    seconds = run.summary.get("seconds", {}).get(stage.name)
    if is_number(seconds):
        figures["seconds"] = seconds
    for other in arm.samples:
        why = _repeated(seed, figures, other)
        if why:
            repeats.append((why, stage.name, str(run.folder)))
            return
    draws = runs.part(run.summary[stage.name], "draws")
    count, errors = draws.get("count"), runs.part(draws, "standard_error")
    errors = {k: (v, count - 1) for k, v in errors.items() if is_number(v)}
    ancestors = frozenset(_ancestors(run, stage.name))
    arm.samples.append(
        Sample(run.folder, stage.name, seed, figures, errors, count, ancestors)
    )


def _ancestors(run, name):
    """Yields the folders of the stages on the way up `start_from`."""
    config, folder = run.config, run.folder.resolve()
    parent = config["stages"][name].get("start_from")
    while parent:
        elsewhere = None if parent in config["stages"] else locate.run_of(parent)
        if elsewhere:
            root, parent = elsewhere
            config, folder = runs.read_config(root) or {}, Path(root).resolve()
        if parent not in runs.part(config, "stages"):
            yield parent if not elsewhere else str(folder / parent)
            return
        yield str(folder / parent)
        parent = config["stages"][parent].get("start_from")


def _repeated(seed, figures, other):
    """Returns why a sample is the same draw as `other`; "" where it is not."""
    measured = (figures.keys() & other.figures.keys()) - {"seconds"}
    alike = all(
        math.isclose(figures[k], other.figures[k], rel_tol=1e-4, abs_tol=1e-6)
        for k in measured
    )
    if seed == other.seed:
        why = "settings and seed are those of a run before it"
        return why if alike else f"{why}, though the figures differ"
    same = all(figures[k] == other.figures[k] for k in measured)
    if seed[0] == other.seed[0] and measured and same:
        # NAME_seed0 and NAME_seed1 of one run are equal where nothing is random.
        return f"every figure is that of {other.stage}: nothing here was left to chance"
    return ""


# -- what decides a stage's numbers ----------------------------------------------------


def _settings(run, name):
    """Returns {dotted key: value} of a stage, its parents, and what they share."""
    stages = {}
    _trace(run.config, name, stages)
    shared = {
        k: v
        for k, v in _completed(run.config).items()
        if k not in ("stages", "measure", *_LEFT_OUT)
    }
    elsewhere = _outside(shared.get("tokenizer", {}).get("path", ""))
    if elsewhere:
        shared["tokenizer"] = _completed(elsewhere[0])["tokenizer"]
    settings = {}
    for one in (stages.pop(short(name)), stages, shared):
        settings |= schema.flat(one, leave=_LEFT_OUT)
    return settings


def _trace(config, name, traced):
    """Adds the settings of a stage, and of the stages it names, to `traced`."""
    settings = dict(_completed_stage(config["stages"][name]))
    traced[short(name)] = settings
    for key in [k for k in settings if k.endswith("_from")]:
        settings[key] = _renamed(config, settings[key], traced, "")
    data = settings.get("data")
    if isinstance(data, dict):
        settings["data"] = {
            k: _renamed(config, v, traced, "stage:") for k, v in data.items()
        }


def _renamed(config, value, traced, prefix):
    """Returns a value, the stages it names traced and named without seeds."""
    if isinstance(value, list):
        return [_renamed(config, one, traced, prefix) for one in value]
    if not isinstance(value, str):
        return value
    parts = []
    for part in (p.strip() for p in value.split(",")):
        name, home = part.removeprefix(prefix), config
        is_stage = part.startswith(prefix) and name in config["stages"]
        elsewhere = None if is_stage else _outside(part)
        if elsewhere:
            # The same file of another run: that run's seed is no difference either.
            home, name = elsewhere
            is_stage = name in home["stages"]
            part = name
        if is_stage:
            part = prefix + short(name)
            if short(name) not in traced:
                _trace(home, name, traced)
        parts.append(part)
    return ",".join(parts)


def _outside(text):
    """Returns (config, name) of the run a path leads into: a stage, or a file."""
    place = locate.run_of(text)
    if place is None:
        return None
    root, name = place
    config = runs.read_config(root)
    return (config, name) if config.get("stages") else None


def _completed(config):
    """Returns a config with today's defaults: an older run may lack newer keys."""
    given = {k: v for k, v in config.items() if k != "stages"}
    try:
        return schema.plain(schema.merge(defaults.experiment(), given))
    except UserError:
        return given


def _completed_stage(stage):
    try:
        return schema.plain(schema.merge(defaults.KINDS[stage["kind"]](), stage))
    except (UserError, KeyError):
        return stage  # of another version: its keys are compared as they are


# -- names -----------------------------------------------------------------------------


def _name(arms):
    """Labels each arm: its stage, and how it differs from the stage's other arms."""
    labels = set()
    for arm in arms:
        rivals = [other for other in arms if other.stage == arm.stage]
        keys = dict.fromkeys(key for other in rivals for key in other.settings)
        differing = [
            key
            for key in keys
            if any(_value(one, key) != _value(arm, key) for one in rivals)
        ]
        # The objective first: it is what an ablation is most often about.
        differing.sort(key=lambda key: (not key.startswith("objective"), "." in key))
        arm.differs = {key: _value(arm, key) for key in differing}
        label = " ".join([arm.stage, *_in_words(arm.differs)])
        numbered = (f"{label} ({n})" for n in itertools.count(2))
        names = itertools.chain([label], numbered)
        arm.label = next(one for one in names if one not in labels)
        labels.add(arm.label)


def _value(arm, key):
    missing = _DEFAULT if key.startswith(_ARGUMENTS) else "absent"
    return arm.settings.get(key, missing)


def _in_words(differs):
    words = [
        f"{_short(key)}={_text(value)}"
        for key, value in differs.items()
        if value != _DEFAULT
    ]
    rest = len(words) - _SHOWN
    return words[:_SHOWN] + ([f"(and {rest} more)"] if rest > 0 else [])


def _short(key):
    group = next((g for g in _ARGUMENTS if key.startswith(g)), "")
    return key.removeprefix(group)


def _text(value):
    if isinstance(value, list):
        return "(" + ",".join(map(str, value)) + ")"
    return "none" if value == "" else str(value)


# -- what a reader must know -----------------------------------------------------------


def _warnings(runs, arms):
    notes = []
    if len({tuple(sorted(_tokenizer(run).items())) for run in runs}) > 1:
        notes.append(
            "the runs differ in tokenizer: lengths, entropies and losses are counted "
            "in different tokens"
        )
    if not runs[0].config.get("world", {}).get("name") and len(_heldout(runs)) > 1:
        notes.append(
            "the runs' data differ: their eval_ figures are of different held-out rows"
        )
    return [*notes, *_about_draws(arms), *_about_bases(arms)]


def _about_draws(arms):
    """Returns notes on samples whose answers were drawn differently."""
    sampled = [s for arm in arms for s in arm.samples if "gold_mean" in s.figures]
    counts = {sample.draws for sample in sampled}
    if None in counts:
        old = {str(s.run): None for s in sampled if s.draws is None}
        return [
            f"{', '.join(old)}: measured by an older version on one answer a prompt, "
            "its win rate with the random numbers of its base; delete summary.json and "
            "give the run command again to measure anew"
        ]
    if len(counts) > 1:
        return [
            "the runs differ in measure.draws "
            f"({', '.join(map(str, sorted(counts)))}): fewer draws are more noise"
        ]
    return []


def _about_bases(arms):
    """Returns a note on arms whose seeds come from one model, as far as they do."""
    shared = [
        arm.label
        for arm in arms
        if any(
            one.seed[0] == two.seed[0] or one.ancestors & two.ancestors
            for one, two in itertools.combinations(arm.samples, 2)
        )
    ]
    if not shared:
        return []
    return [
        f"{', '.join(shared)}: the seeds share one base (the data and the stages "
        "before), so their interval holds the chance of the last stage alone; the "
        "base's chance is not in it"
    ]


def _tokenizer(run):
    settings = _completed(run.config).get("tokenizer", {})
    return {k: str(settings.get(k)) for k in ("files", "vocab_size")}


def _heldout(runs):
    """Returns the digests of held-out data, as far as lineage.json has them."""
    digests_of = {}
    for run in runs:
        for stage in run.stages:
            data = run.config["stages"][stage.name].get("data", {})
            digests = stage.lineage.get("data")
            spec = data.get("heldout") or (
                data.get("files") if data.get("heldout_share") else ""
            )
            if spec and isinstance(digests, dict):
                seen = digests_of.setdefault(short(stage.name), set())
                seen.add((str(spec), str(digests.get(spec))))
    return max(digests_of.values(), key=len, default=set())
