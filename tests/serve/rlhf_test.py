"""A model learns from a person: 200 labels by the keyboard, then all of the graph."""

import json
import os
import select
import signal
import subprocess
import sys

import pytest

from stagecraft import run, schema, worlds
from stagecraft.errors import UserError
from tests.conftest import ROOT, load_experiment, single_device

LABELS = 200


def config(**more):
    arg = ",".join(["tiny", *(f"{key}={value}" for key, value in more.items())])
    return single_device(load_experiment("rlhf").get_config(arg))


def label(browser, root):
    """Labels by gold, as far as it can be read on the page; returns what was said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stagecraft", "label", f"--workdir={root}"]
        + ["--stage=sft", f"--count={LABELS + 30}", "--max_new_tokens=8"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        ready, _, _ = select.select([process.stdout], [], [], 120)
        page = browser.new_page()
        page.goto(process.stdout.readline().strip() if ready else "")
        page.wait_for_selector("#who:not([hidden])")
        page.keyboard.type("ann")
        page.keyboard.press("Enter")
        page.wait_for_selector("#pair:not([hidden])")
        keys = []
        while len(keys) < LABELS:
            key = _key(page, len(keys))
            page.keyboard.press(key)
            keys.append(key)
            page.wait_for_function("n => $('bar').value === n", arg=len(keys))
        page.close()
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
        process.communicate()
    return keys


def _key(page, number):
    if number % 20 == 19:
        return "s"
    prompt = page.inner_text("#prompt")
    gold = worlds.get("countries").gold
    one, two = (
        gold(prompt, page.inner_text(f"#answer-{i}"), not page.is_visible(f"#cut-{i}"))
        for i in (0, 1)
    )
    return " " if one == two else ("1" if one > two else "2")


def test_from_labels_to_a_trained_model(browser, tmp_path):
    root = tmp_path / "run"
    says = f"no labels yet; .* stagecraft label --workdir={root} --stage=sft and end"
    with pytest.raises(UserError, match=f"labels:sft: {says}"):
        run.run(config(), root)
    # A run that starts from this one says the same, before it trains anything.
    with pytest.raises(UserError, match=f"labels:{root}/sft: {says}"):
        run.run(config(base=root), tmp_path / "other")
    assert {p.name for p in root.iterdir()} >= {"pretrain", "sft"}
    assert not (root / "dpo").exists() and not (root / "reward").exists()
    keys = label(browser, root)
    rows = (root / "labels" / "sft" / "records.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in rows]
    assert keys.count("s") == LABELS // 20 and {"1", "2", " "} <= {*keys}
    assert len(rows) >= 0.85 * LABELS  # a few were skipped, or seen twice
    figures = run.run(config(), root)
    for arm in ("dpo", "ppo", "reward"):
        assert figures[arm]["labels"] == len(rows)
        # Who labels by gold agrees with it.
        assert figures[arm]["signal_accuracy"] == 1.0
    assert 0 <= figures["ppo"]["gold_win_rate"] <= 1
    assert figures["table"][0] == "gold_win_rate"


def test_the_graph_is_that_of_a_judge_but_for_who_labels():
    people = config().stages
    judged = load_experiment("rlaif").get_config("tiny,ppo,prompts=200").stages
    pairs = judged.unbiased_pairs
    assert pairs.kind == "comparisons" and pairs.start_from == "sft"
    names = {"unbiased_reward": "reward", "unbiased_ppo": "ppo", "unbiased": "dpo"}
    ours = json.dumps(schema.plain(people), sort_keys=True)
    theirs = {
        names.get(name, name): schema.plain(stage)
        for name, stage in judged.items()
        if name in ("pretrain", "sft", *names)
    }
    theirs["ppo"]["reward_from"] = names[theirs["ppo"]["reward_from"]]
    theirs = json.dumps(theirs, sort_keys=True)
    assert theirs.replace("stage:unbiased_pairs", "labels:sft") == ours
    assert ours.count("labels:sft") == 2  # the reward model and DPO
