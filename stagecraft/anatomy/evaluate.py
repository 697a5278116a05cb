"""Finished stages on the tasks of lm-evaluation-harness, side by side.

Results are kept in WORKDIR/evaluations.json, one record for a stage, a task and the way
it was asked; a later call adds to them, or replaces the records of its own kind.
"""

import difflib
import importlib.util
import logging
import os
from pathlib import Path

import jax

from stagecraft import schema, storage
from stagecraft.anatomy import behaviour, roles
from stagecraft.anatomy.harness import Answers
from stagecraft.errors import UserError, install
from stagecraft.metrics import is_number

FILE = "evaluations.json"
# What tells records apart.
KEY = ("stage", "task", "limit", "shots", "chat")
# Resamplings for the standard error of metrics that have no formula for it.
BOOTSTRAP = 1000


def evaluate(
    run,
    stages,
    tasks,
    *,
    limit=0,
    batch_size=32,
    apply_chat_template=False,
    num_fewshot=None,
    seed=0,
    out=None,
):
    """Evaluates stages on tasks.

    Args:
        run: a `runs.Run`.
        stages: names of finished stages that write text, or ("all",).
        tasks: bundled names, YAML files, folders of YAML files.
        limit: documents of each task; 0 for all.
        batch_size: rows worked on at once.
        apply_chat_template: through the model's own, for stages that answer in turns.
        num_fewshot: examples before each question; None for what the task says.
        seed: of generations that are sampled.
        out: the file of results; None for WORKDIR/evaluations.json.

    Returns:
        all records in that file: [{"stage", "task", "limit", "shots", "chat",
        "documents", "metrics": {name: {"value", "stderr"}}}].
    """
    names = _stages(run, stages)
    _quiet()
    specs, manager = _tasks(tasks)
    path = Path(out or run.root / FILE)
    with jax.set_mesh(run.mesh()):
        for name in names:
            language = run.language(name, batch_size)
            # A base model knows no turns.
            chat = apply_chat_template and run.chat_format(name)
            asked = dict(limit=limit, shots=num_fewshot, chat=chat)
            results = _ask(language, specs, manager, seed=seed, **asked)
            # By what was asked for, so that stages are columns of one table.
            asked["chat"] = apply_chat_template
            _keep(path, [{"stage": name, **asked, **one} for one in results])
    return read(path)


def read(path):
    """Reads the records of an evaluations.json; [] where there is none."""
    records = storage.read_json(path, [])
    whole = {*KEY, "metrics"}
    return [one for one in records if isinstance(one, dict) and whole <= one.keys()]


def _keep(path, records):
    """Adds records; those of the same stage, task and way of asking are replaced."""
    by_key = {tuple(one[k] for k in KEY): one for one in [*read(path), *records]}
    storage.write_json(path, list(by_key.values()))


def _stages(run, stages):
    speaking = behaviour.speaking_stages(run)
    if tuple(stages) == ("all",):
        if not speaking:
            raise UserError(f"{run.root}: no finished stage that writes text yet")
        return speaking
    for name in stages:
        if name not in run.config.stages:
            raise UserError(schema.unknown("--stage", name, run.config.stages.keys()))
        if name not in speaking:
            kind = run.config.stages[name].kind
            why = "is not finished"
            if not roles.of(kind).speaks:
                why = f"is of kind {kind} and writes no text"
            raise UserError(
                f"--stage={name}: {why}; expected some of: "
                f"{', '.join(speaking) or 'none'}"
            )
    return list(dict.fromkeys(stages))


# -- the harness -----------------------------------------------------------------------


def _quiet():
    """Silences the harness's remarks, and its processes: a fork of JAX may hang."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"eval: lm-evaluation-harness is not installed: {install('eval')}"
        )
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # One for each length that texts are padded to: which attention runs.
    logging.getLogger("stagecraft").setLevel(logging.WARNING)


def _tasks(tasks):
    """Returns the tasks for the harness to load, and a `TaskManager` for them."""
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise UserError(
            "--tasks is missing: bundled names, YAML files or folders of them, as in "
            "--tasks=hellaswag,my_task.yaml"
        )
    folders = [part for part in tasks if Path(part).is_dir()]
    yamls = [part for part in tasks if part.endswith((".yaml", ".yml"))]
    for part in yamls:
        if not Path(part).is_file():
            raise UserError(f"--tasks={part}: no such file")
    bundled = [part for part in tasks if part not in folders + yamls]
    manager = TaskManager(include_path=folders or None, include_defaults=bool(bundled))
    specs = [*bundled, *yamls]
    for name in bundled:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.4)
            hint = f"the nearest: {', '.join(near)}" if near else "none is like it"
            raise UserError(f"--tasks={name}: no such task, file or folder; {hint}")
    for folder in folders:
        inside = Path(folder).resolve()
        entries = [manager.task_index[name] for name in manager.all_subtasks]
        names = [
            entry.name
            for entry in entries
            if entry.yaml_path and inside in Path(entry.yaml_path).resolve().parents
        ]
        if not names:
            raise UserError(f"--tasks={folder}: no task (.yaml) in this folder")
        specs += names
    specs = list(dict.fromkeys(specs))
    try:
        loaded = manager.load(specs)
    except Exception as error:  # YAML, templates, data sets: anything may be wrong
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        line = f"--tasks: cannot load {', '.join(specs)} ({reason})"
        raise UserError(line) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"--tasks={name}: runs what the model writes as code, which is never "
                "done here; leave it out"
            )
    return specs, manager


def model(language, *, seed=0):
    """Wraps a `Language` in the harness's own model type, for `simple_evaluate`."""
    from lm_eval.api.model import LM

    class Model(Answers, LM):
        pass

    return Model(language, seed=seed)


def _ask(language, specs, manager, *, limit, chat, shots, seed):
    """Returns [{"task", "documents", "metrics"}] of one stage's model."""
    import lm_eval

    answer = lm_eval.simple_evaluate(
        model=model(language, seed=seed),
        tasks=list(specs),
        task_manager=manager,
        num_fewshot=shots,
        limit=limit or None,
        apply_chat_template=chat,
        bootstrap_iters=BOOTSTRAP,
        log_samples=False,
    )
    counts = answer.get("n-samples", {})
    return [
        {
            "task": task,
            "documents": counts.get(task, {}).get("effective"),
            "metrics": metrics(values),
        }
        for task, values in answer["results"].items()
    ]


def metrics(values):
    """Returns {name: {"value", "stderr"}} of the harness's figures of one task.

    >>> metrics({"alias": "qa", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,x": 1})
    {'acc': {'value': 0.5, 'stderr': 0.1}, 'f1 (x)': {'value': 1, 'stderr': None}}
    """
    results = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not is_number(value):
            continue
        error = values.get(f"{name}_stderr,{filtered}")
        label = name if filtered == "none" else f"{name} ({filtered})"
        results[label] = {"value": value, "stderr": error if is_number(error) else None}
    return results


# -- side by side ----------------------------------------------------------------------


def side_by_side(records, order=()):
    """Arranges records as a table with one column a stage.

    Args:
        records: see `evaluate`.
        order: stages in the order of the graph; others come last.

    Returns:
        the stages; [{"task", "metric", "how", "cells": {stage: {"value", "stderr"}}}].
    """
    present = dict.fromkeys(one["stage"] for one in records)
    stages = [s for s in order if s in present]
    stages += [s for s in present if s not in stages]
    rows = {}
    for one in records:
        for metric, cell in one["metrics"].items():
            key = (one["task"], metric, _how(one))
            rows.setdefault(key, {})[one["stage"]] = cell
    table = [
        {"task": task, "metric": metric, "how": how, "cells": cells}
        for (task, metric, how), cells in sorted(rows.items(), key=lambda row: row[0])
    ]
    return stages, table


def _how(record):
    """Returns how a task was asked, in words: "5-shot, chat, first 100"."""
    words = []
    if record["shots"] is not None:
        words.append(f"{record['shots']}-shot")
    words += ["chat"] * bool(record["chat"])
    if record["limit"]:
        words.append(f"first {record['limit']}")
    return ", ".join(words)
