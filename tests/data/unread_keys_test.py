"""Every key of a stage's data does something: it is read, or refused when it is set."""

import json

import pytest
from ml_collections import ConfigDict

from stagecraft import defaults, experiment
from stagecraft.data import stage_data
from stagecraft.errors import UserError
from stagecraft.stages.kinds import KINDS
from tests.graphs import graph
from tests.stages.unread_test import Watched, flat

# Keys that the building of rows need not read, and who does.
ELSEWHERE = {
    **dict.fromkeys(stage_data.SPECS, "the builders, which are given their paths"),
    "cache": "where tokenised data is kept, and not what",
    "format": "what the stage is: see CASES",
}
# Keys that other keys leave without an effect: another value than the default.
TEXT = {"share_by": "examples", "replay_share": 0.25}
NEVER = {
    ("language_model", "text"): TEXT
    | {"turns": "last", "too_long": "cut", "render": "text"},
    ("language_model", "demonstrations"): TEXT,
    ("policy", ""): {"ptx_length": 32},
}
PAIR = {"prompt": "a b", "chosen": "c d", "rejected": "e"}
RECORDS = {
    "text": {"text": "a b c d e f"},
    "demonstrations": {"prompt": "a b", "completion": "c d"},
    "pairs": PAIR,
    "judgements": {"prompt": "a b", "completion": "c d"},
    "prompts": {"prompt": "a b"},
}
CASES = {
    ("language_model", "text"): "text",
    ("language_model", "demonstrations"): "demonstrations",
    ("preference", ""): "pairs",
    ("unpaired_preference", ""): "judgements",
    ("online_preference", ""): "prompts",
    ("policy", ""): "prompts",
    ("group_policy", ""): "prompts",
    ("reward", ""): "pairs",
    ("comparisons", ""): "prompts",
    ("selection", ""): "prompts",
    ("attacks", ""): "prompts",
    ("revisions", ""): "prompts",
}


def write(path, form):
    """Eight records, no two alike."""
    rows = []
    for i in range(8):
        texts = {key: f"{text} {i}" for key, text in RECORDS[form].items()}
        rows.append(json.dumps(texts | {"label": bool(i % 2)}))
    path.write_text("\n".join(rows))
    return str(path)


def keys_read(kind, form, tokenizer, folder):
    """The keys of its data that building a stage's rows reads."""
    stage = defaults.stage(kind, batch_size=2)
    stage.data.files = write(folder / "records.jsonl", CASES[kind, form])
    if form:
        stage.data.format = form
    config = ConfigDict({"seed": 0, "model": {"max_length": 256}, "stages": {}})
    read = set()
    watched = Watched(stage, read)
    stage_data.build(watched, tokenizer, folder, config, KINDS[kind].data, "s")
    return {k.removeprefix("data.") for k in read if k.startswith("data.")}


def test_every_kind_is_here():
    assert {kind for kind, _ in CASES} == set(KINDS)


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_a_key_is_read_or_refused(kind, form, chatml, tmp_path):
    default, never = defaults.stage(kind).data, NEVER.get((kind, form), {})
    unread = set(flat(default)) - keys_read(kind, form, chatml, tmp_path)
    assert unread - set(ELSEWHERE) <= set(never)
    for key, value in never.items():
        data = {key: value} | ({"format": form} if form else {})
        says = f"stages.it.data.{key}={value!r}: changes nothing with .*leave data"
        with pytest.raises(UserError, match=says):
            experiment.resolve(graph(kind, data=data))
