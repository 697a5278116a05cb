"""Runs an experiment: its stages in order, or on from where a run stopped."""

import dataclasses
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict
from rich.console import Console

from stagecraft import (
    bounds,
    experiment,
    groundwork,
    process,
    processes,
    runs,
    schema,
    storage,
    stores,
    trackers,
    train,
)
from stagecraft.anatomy import behaviour, heldout_figures, readings, summary
from stagecraft.data import stage_data
from stagecraft.errors import UserError
from stagecraft.lineage import LineageEntry, StageRecord
from stagecraft.models import saved
from stagecraft.models.config import ModelConfig
from stagecraft.models.language import Language
from stagecraft.report import page, terminal
from stagecraft.report.notebook import Summary
from stagecraft.runs import Run
from stagecraft.signals import judge, verifiers
from stagecraft.signals.reward import RewardModel
from stagecraft.stages import kinds, records
from stagecraft.stages.stage import Context, place_parents


def open_run(root: str | Path) -> Run:
    """Returns the run of an existing work directory."""
    process.reuse_programs()
    root = stores.local(root)
    stored = runs.read_config(root)
    if stored is None:
        raise UserError(
            f"{root}: no run here (no config.json); start one with: "
            "stagecraft run --config=quickstart "
            f"--workdir={root}"
        )
    folder = root / runs.TOKENIZER
    if not folder.exists():
        raise UserError(
            f"{folder}: no tokenizer here: the run was stopped before it had one; the "
            "same command goes on"
        )
    config = experiment.resolve(stored, check=False)
    stages = experiment.order(config)
    return Run(root, config, groundwork.own_tokenizer(root), stages)


def run(config: ConfigDict, root: str | Path, only: Sequence[str] = ()) -> Summary:
    """Runs the stages of an experiment, or goes on where an earlier run stopped.

    Args:
        config: what an experiment's `get_config` returns.
        root: the work directory.
        only: names of stages to run; () for all. Their parents must be finished.

    Returns:
        the summary, nested dicts of floats; also in WORKDIR/summary.json. A notebook
        shows it as a table.
    """
    started = time.perf_counter()
    if jax.default_backend() == "cpu":
        process.keep_memory()
    config = experiment.resolve(config)
    names = experiment.chosen(config, "--only", only)
    root = stores.local(root, writing=True)
    this = Run(root, config, stages=experiment.order(config))
    processes.check_same("version", process.code())
    processes.check_same("command", {"--only": list(only)})
    processes.check_same("config", schema.plain(config))
    processes.check_shared(root)
    check_same(this)
    processes.barrier("config")
    runs.write_config(root, schema.plain(config))
    process.reuse_programs()
    unfinished = [name for name in names if not this.finished(name)]
    check_parents(this, names)
    # Nothing is written before all have seen what there is.
    processes.barrier("begin")
    if unfinished:
        with jax.set_mesh(this.mesh()):
            groundwork.read(this)
            early = _early_data(this, unfinished)
            for name in unfinished:
                _run_stage(this, name, early)
                processes.barrier(f"end of {name}")
                this.ran.append(name)
    else:
        this.tokenizer = groundwork.own_tokenizer(root)
    with jax.set_mesh(this.mesh()):
        return _conclude(this, changed=bool(unfinished), started=started)


def check_same(run: Run) -> None:
    """Refuses a work directory that holds a run of another config."""
    new, old = schema.plain(run.config), runs.read_config(run.root)
    if old is not None:
        # A key that is newer than the run has its default there.
        old = schema.plain(experiment.resolve(old, check=False))
        changed = schema.difference(experiment.identity(old), experiment.identity(new))
        if changed:
            raise UserError(
                f"{run.root}: holds a run of another config ({changed}); choose "
                "another --workdir, or give the same config to resume"
            )


def check_parents(run: Run, names: Sequence[str]) -> None:
    """Refuses --only without a parent that is not finished."""
    for name in names:
        stage = run.config.stages[name]
        needs = [*experiment.parents(run.config, name).values()]
        needs += stage_data.stages_named(stage.data)
        for parent in needs:
            here = parent in run.config.stages and parent not in names
            if here and not run.finished(parent):
                raise UserError(
                    f"--only: {name} needs {parent}, which is not finished in "
                    f"{run.root}; add it: --only={parent},{name}"
                )


def _early_data(run, names):
    """Reads and checks the data of the stages whose files are there already."""
    data = {}
    for name in names:
        if not awaited(run, name):
            data[name] = data_of(run, name)
    return data


def awaited(run: Run, name: str) -> list[str]:
    """Returns what a stage reads that is not there: stages, labels of people."""
    data = run.config.stages[name].data
    files_of = stage_data.stages_named(data)
    stages = [p for p in files_of if p in run.config.stages and not run.finished(p)]
    return stages + stage_data.unlabelled(data, run.root)


def data_of(run: Run, name: str) -> stage_data.StageData:
    """Returns a stage's `StageData`, if it is as it was when the stage began."""
    stage = run.config.stages[name]
    builder = kinds.of(stage).data
    data = stage_data.build(stage, run.tokenizer, run.root, run.config, builder, name)
    entry = run.lineage().stages.get(name)
    if entry and entry.data != data.digests:
        changed = schema.difference(entry.data, data.digests)
        raise UserError(
            f"{name}: its data changed since the stage began ({changed}); restore the "
            "files, or start in another --workdir"
        )
    return data


def _run_stage(run, name, early):
    """Trains a stage, or writes its records, and says in stage.json what it did."""
    config, folder = run.config, run.root / name
    stage = config.stages[name]
    data = early.pop(name, None) or data_of(run, name)
    lineage = run.lineage()
    lineage.stages[name] = _lineage(run, name, data, lineage)
    lineage.write(run.root)
    processes.barrier(f"lineage of {name}")
    mesh = run.mesh(name)
    with jax.set_mesh(mesh):
        key = key_of(config, name)  # on the stage's devices, not on all of the run's
        names = experiment.parents(config, name)
        models = {p: run.model(p, mesh) for p in set(names.values())}
        parents = place_parents(stage, names, models)
        del models
        if not kinds.of(stage).trains:
            _write_records(run, name, parents, data, key)
            return
        functions, hooks = _make(run, stage, mesh, parents, data)
        if data.asked:
            heldout_figures.write(folder, data.asked)
        record = StageRecord(
            kind=stage.kind,
            start_from=stage.start_from,
            format=kinds.of(stage).format(stage),
            tokenizer=run.tokenizer.digest,
            data=data.dataset.report
            | {"reading": data.reading}
            | ({"heldout": data.heldout.rows} if data.heldout else {}),
            made_with=process.made_with(),
        )
        if functions.frozen is not None:
            parent = lineage.stages[name].parents["start_from"]
            base = run.source(parent["stage"]).seen_from(folder)
            record.lora = schema.plain(stage.lora)
            record.base = {"name": base, "id": parent["id"]}
        record.write(folder)
        settings = schema.plain(config) | {"stage": name}
        where = f"{run.root.resolve().name}/{name}"
        with trackers.watching(
            config.trackers, folder, name=where, config=settings
        ) as watch:
            state, result = train.train(
                functions,
                stage,
                data.dataset,
                folder,
                name=name,
                key=key,
                hooks=hooks._replace(watch=watch),
            )
    trained = saved.describe(train.deployable(state, functions.frozen))
    record = dataclasses.replace(record, finished=True, **trained, **result)
    record.write(folder)


def key_of(config: ConfigDict, name: str) -> jax.Array:
    """Returns the random key of a stage."""
    key = jax.random.key(config.seed)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    stage = config.stages[name]
    if stage.get("seed"):
        key = jax.random.fold_in(key, stage.seed)
    return key


def _make(run, stage, mesh, parents, data):
    """Builds a stage's functions, and what it does besides training."""
    kind = kinds.of(stage)
    # Only bare text leaves the chat pieces unseen.
    bare = stage.start_from and not run.chat_format(stage.start_from)
    chat = kind.format(stage) == "chat"
    unseen = run.tokenizer.control_ids if bare and chat else ()
    functions = kind.make(stage, context(run, stage, mesh, parents, data, unseen))
    sample = _sampler(run, stage, mesh, data.samples) if kind.speaks else None
    finish = kind.finish and kind.finish(stage, data, functions.frozen)
    return functions, train.Hooks(data.heldout, sample, finish)


def context(run, stage, mesh, parents, data, unseen=()) -> Context:
    """Returns what a stage is built from.

    Args:
        run: a `Run` with its tokenizer.
        stage: the stage's config.
        mesh: its mesh.
        parents: {role: model}; shapes will do for everything but training.
        data: its `StageData`.
        unseen: ids of pieces that its parent never saw.
    """
    kind, tokenizer = kinds.of(stage), run.tokenizer
    judging, every = _judging(run, stage, mesh, parents), list(parents.values())
    parents = {role: model for role, model in parents.items() if role != "judge"}
    sole = [r for r, m in parents.items() if sum(m is other for other in every) == 1]
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, **run.config.model)
    if parents:
        shape = getattr(parents["start"], "config", shape)
    groundwork.check_vocabulary(parents, tokenizer)
    scorers = None
    if kind.samples:
        judged = judge.scorer(stage, judging, run.root)
        functions = [judged] if judged else []
        functions += verifiers.find(stage.verifiers, stage.verifier_args)
        if functions:
            scorers = verifiers.Verifiers(functions, data.records, tokenizer)
    return Context(
        mesh=mesh,
        model_config=shape,
        parents=parents,
        stop_ids=tokenizer.stops,
        verifiers=scorers or None,
        dataset=data.dataset,
        unseen_ids=unseen,
        rollout_mesh=run.rollout_mesh(stage),
        sole_roles=tuple(sole),
    )


def _judging(run, stage, mesh, parents):
    """Returns a function that makes the judge of a stage; None where it names none."""
    if "judge" not in parents:
        return None
    rows = runs.whole_rows(stage.judge.batch_size, mesh)
    lineage = run.lineage().id_of(stage.judge_from)
    source = run.source(stage.judge_from)
    return lambda: judge.of_source(source, parents["judge"], rows, lineage)


def _sampler(run, stage, mesh, prompts):
    """Returns (model, step) -> samples of a few prompts."""
    in_turns = kinds.of(stage).format(stage) == "chat"
    longest = run.config.model.max_length
    rows = runs.whole_rows(max(len(prompts), 1), mesh)

    def sample(model, step):
        language = Language(model, run.tokenizer, batch_size=rows)
        room = min(longest, model.config.max_length) // 2
        fit = [
            p for p in prompts if len(language.encode(p, chat_format=in_turns)) < room
        ]
        texts = language.complete(
            fit, chat=in_turns, temperature=1.0, max_new_tokens=min(room, 48), seed=step
        )
        return [
            {"prompt": p, "completion": text, "ended": ended}
            for p, (text, ended) in zip(fit, texts, strict=True)
        ]

    return sample


def _write_records(run, name, parents, data, key):
    """Runs a stage that trains nothing: it samples, rates and writes records.jsonl."""
    stage, folder = run.config.stages[name], run.root / name
    entry, reward = run.lineage().stages[name], None
    if "reward" in parents:
        source = entry.parents["reward_from"]["id"]
        reward = RewardModel(parents["reward"], run.tokenizer, source)
    judging = _judging(run, stage, run.mesh(name), parents)
    target, rows = parents.get("target"), stage.batch_size
    recording = records.Recording(
        folder=folder,
        name=name,
        language=Language(parents["start"], run.tokenizer, batch_size=rows),
        asked=data.records,
        key=key,
        lineage=entry,
        reward=reward,
        judge=judging() if judging else None,
        world=run.config.world.name,
        target=target and Language(target, run.tokenizer, batch_size=rows),
        known=data.known,
    )
    result = kinds.of(stage).write(stage, recording)
    # By itself the stage counts what it wrote; the ledger also counts what it read.
    limit = stage.sampling.max_new_tokens
    samples = result["tokens"]["sampled"] // (stage.prompts * limit)
    result["tokens"] |= records.work(stage, recording, samples)
    record = {"kind": stage.kind, "start_from": stage.start_from, "format": "records"}
    record["data"] = {"reading": data.reading}
    record["made_with"] = process.made_with()
    record = StageRecord.from_json(record | result | {"finished": True})
    record.write(folder)


def _lineage(run, name, data, lineage):
    """Returns what a stage comes from: digests of its config, its data, its parents."""
    config, stage = run.config, run.config.stages[name]
    shared = {"seed": config.seed, "model": schema.plain(config.model)}
    settings = experiment.identity(schema.plain(stage)) | shared
    parents = {}
    for role, parent in experiment.parents(config, name).items():
        id_ = lineage.id_of(parent) or run.source(parent).id()
        parents[role] = {"stage": parent, "id": id_}
    return LineageEntry(
        kind=stage.kind,
        start_from=stage.start_from,
        config=storage.digest(settings),
        tokenizer=run.tokenizer.digest,
        data=data.digests,
        parents=parents,
    )


def _conclude(run, *, changed, started):
    """Measures what is finished, checks the bounds, writes the report, shows both.

    Args:
        run: a `Run`, inside its mesh.
        changed: whether any stage ran; if none did and the files are there, they are
            left alone.
        started: time.perf_counter() when the run began.
    """
    path = run.root / "summary.json"
    before = storage.read_json(path)
    processes.barrier("summary")
    if before and not changed:
        terminal.show_summary(before)
        return Summary(before, run.root)
    asked = [] if groundwork.asks_world(run.config) else heldout_figures.prompts(run)
    prompt = groundwork.single_prompt(run.config) or (
        asked and asked[0].record["prompt"]
    )
    if prompt and behaviour.speaking_stages(run):
        answers = readings.through_stages(run, prompt)
        answers = {"prompt": behaviour.as_text(prompt), "answers": answers}
        storage.write_json(run.root / "prompt.json", answers)
    if asked:
        print(
            f"{len(asked)} held-out prompts, answered {run.config.measure.draws} times "
            "by every stage of chat turns (measure.prompts, measure.draws)"
        )
    figures = summary.measure(run, started, asked)
    figures["table"] = list(run.config.measure.table)
    figures["bounds"] = bounds.check(figures, run.config.measure.bounds)
    storage.write_json(path, figures)
    if process.is_first():
        page.write(run.root)
        terminal.show_summary(figures)
        Console().print(
            f"report: {stores.named(run.root / 'report.html')}", highlight=False
        )
    return Summary(figures, run.root)
