"""Folders of finished runs that nobody trained, to be compared."""

import json


def make(folder, stages, seed=0, finished=True, **config):
    """A run's folder. stages: {name: (settings, figures)}, in the graph's order."""
    plan = {
        "seed": seed,
        "world": {"name": "countries", "size": "full"},
        "measure": {"split": "test"},
        "stages": {name: settings for name, (settings, _) in stages.items()},
    }
    write(folder / "config.json", plan | config)
    summary = {name: figures for name, (_, figures) in stages.items()}
    summary["seconds"] = {name: 10.0 + seed for name in stages}
    write(folder / "summary.json", summary)
    for name, (settings, _) in stages.items():
        info = {k: settings.get(k, "") for k in ("kind", "start_from")}
        write(folder / name / "stage.json", info | {"finished": finished})
    return folder


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def tuned(objective="dpo", **more):
    return dict(kind="preference", start_from="sft", objective=objective) | more


def graph(figures, objective="dpo", **more):
    """pretrain -> sft -> dpo; `figures` are those of the last."""
    text = dict(kind="language_model", data=dict(format="text"))
    answers = dict(
        kind="language_model", start_from="pretrain", data=dict(format="demonstrations")
    )
    return {
        "pretrain": (text, {"cloze_accuracy": 1.0}),
        "sft": (answers, {"gold_mean": 1.0, "heldout_accuracy": 0.9}),
        "dpo": (tuned(objective, **more), figures),
    }


def gold(value, rate=0.6, **more):
    return {"gold_mean": value, "gold_win_rate": rate, "kl": 2.0} | more
