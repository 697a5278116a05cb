"""The files of small runs that nobody trained, for the pages."""

import base64
import hashlib
import json
import re

import numpy as np

from stagecraft.anatomy import changes
from stagecraft.anatomy.stored import Matrix, Weights
from tests import tiny

EVIL = "<script>alert(1)</script>"


def write(tmp_path):
    """Writes a run of four stages, its texts hostile; returns its folder."""
    stages = {"base": ("", {}), "tuned": ("base", {}), "judge": ("tuned", {})}
    stages["policy"] = ("tuned", {"judge": {"digest": "ab" * 32}})
    json_file(tmp_path / "config.json", {"seed": 7, "stages": {n: {} for n in stages}})
    lineage = {
        name: {
            "kind": "policy" if parents else "language_model",
            "start_from": start,
            "config_digest": "c0ffee" * 10,
            "data_digest": {"train": "da7a" * 16},
            "parents": parents,
        }
        for name, (start, parents) in stages.items()
    }
    json_file(tmp_path / "lineage.json", {"stages": lineage})
    for name, (start, _) in stages.items():
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            {"step": i, "seconds": 0.1 * i, "loss": 3.0 / i, EVIL: i, "flat": 1.0}
            for i in range(1, 5)
        ]
        rows += [{"step": 4, "seconds": 1.0, "eval_loss": 0.9}]
        rows += [{"step": 5, "seconds": 1.0, "loss": None}]
        lines_file(folder / "metrics.jsonl", rows)
        lines_file(
            folder / "samples.jsonl",
            [{"step": 4, "prompt": "Q & A?", "completion": f"{EVIL}\n  two"}],
        )
        json_file(
            folder / "stage.json",
            {
                "kind": lineage[name]["kind"],
                "start_from": start,
                "steps": 4,
                "seconds": {"compile": 1.0, "update": 2.0, "total": 4.0},
                "tokens": {"trained": 1234, "scored": 0, "sampled": 0},
                "peak_memory_bytes": 2**30,
            },
        )
    change = {"relative_change": 0.1, "unchanged_bf16": 0.2}
    json_file(
        tmp_path / "summary.json",
        {
            "seconds": {"total": 61.0},
            "tuned": {"heldout_accuracy": 0.9, "own_figure": 5},
            "policy": {"gold_mean": -0.5, "reward_mean": 1.5, "kl": 2.0},
            "weights": {
                "policy": {
                    **change,
                    "by_kind": {"query": change},
                    "by_layer": {"query": [0.1, 0.02]},
                }
            },
            "cost": {"policy": {"share": 0.25, "flops": 1e12}},
            "bounds": {
                "tuned.heldout_accuracy": {"must": "≥ 0.85", "holds": True},
                "policy.kl": {"must": "≤ 1", "holds": False},
            },
        },
    )
    answers = {"tuned": [{"temperature": 0, "text": f"Paris {EVIL}"}]}
    json_file(
        tmp_path / "prompt.json", {"prompt": f"Capital? {EVIL}", "answers": answers}
    )
    return tmp_path


def reading(ranks, texts):
    """Returns what a model reads of an answer; the last token is a control token."""
    return [
        {
            "token": text,
            "control": number == len(texts) - 1,
            "rank": rank,
            "probability": 0.5 / rank,
            "divergence": rank / 4 if rank < 9 else None,  # JSON has no NaN
            "alternatives": [[EVIL, 0.25], [" a", 0.125], ["\n", 0.0625]],
        }
        for number, (rank, text) in enumerate(zip(ranks, texts, strict=True))
    ]


def write_readings(folder):
    """Adds to prompt.json an answer that two models read token by token."""
    value = json.loads((folder / "prompt.json").read_text())
    texts = ["Paris", " is", "\n", EVIL, "<|end|>"]
    readings = {
        "tuned": reading([1, 3, 4, 12, 1], texts),
        "hf:models/base-1B": reading([2, 1, 1, 1, 7], texts),
    }
    answer = dict(temperature=0.0, text="".join(texts[:-1]), ended=True)
    value["answers"]["policy"] = [answer | {"readings": readings}]
    json_file(folder / "prompt.json", value)


def json_file(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def lines_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


NAMES = ("query", "output")


def model(seed, name, start=None):
    """Returns weights at random, or a small step away from others."""
    random = np.random.default_rng(seed)
    matrices = {}
    for layer in range(2):
        for kind in NAMES:
            path = f"layers/{layer}/attention/{kind}"
            array = random.normal(size=(24, 16)).astype(np.float32)
            if start:
                array = start.matrices[path].read() + np.float32(0.01) * array
            one = Matrix(path, kind, layer, array.shape, "F32", lambda a=array: a)
            matrices[path] = one
    return Weights(name, tiny.config(layers=2), matrices, name)


def write_anatomy(folder):
    """Writes anatomy.json of two stages of the run."""
    base = model(0, "base")
    tuned = model(1, "tuned", base)
    policy = model(2, "policy", tuned)
    pairs = [
        changes.Pair("tuned", "base", changes.PARENT, base, tuned, {}),
        changes.Pair("policy", "tuned", changes.PARENT, tuned, policy, {}),
        changes.Pair("policy", "base", changes.PRETRAINING, base, policy, {}),
    ]
    return changes.write(pairs, folder / changes.FOLDER)


def check_scripts(text):
    """Asserts that a page's policy names what may run, and nothing in it evaluates."""
    policy = re.search(r'-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ") and "eval" not in policy
    assert "script-src 'sha256-" in policy and "http" not in policy
    named = set(re.findall(r"'sha256-([^']+)'", policy))
    texts = re.findall(r"<script(?: [^>]*plain[^>]*)?>(.*?)</script>", text, re.DOTALL)
    hashes = [hashlib.sha256(one.encode()).digest() for one in texts]
    assert {base64.b64encode(one).decode() for one in hashes} == named
    assert len(re.findall("<script", text)) - text.count("application/json") == len(
        texts
    )
