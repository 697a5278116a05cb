"""Runs side by side: arms and their seeds, and what is noise."""

import json
import math

import pytest

from stagecraft import defaults
from stagecraft.errors import UserError
from stagecraft.report import arms, compare, compare_page, terminal
from tests.report.page_text import text_of
from tests.report.runs_to_compare import gold, graph, make, tuned, write


def by_label(found):
    return {arm["arm"]: arm for arm in found["arms"]}


# -- arms ------------------------------------------------------------------------------


def test_seeds_are_one_arm_and_settings_tell_arms_apart(ablation):
    found = compare.compare(ablation)
    told = by_label(found)
    assert list(told) == ["sft", "dpo objective=dpo", "dpo objective=ipo"]
    assert found["baseline"] == "dpo objective=dpo"
    assert [s["seed"] for s in told["dpo objective=ipo"]["samples"]] == [0, 1, 2]
    figure = told["dpo objective=ipo"]["figures"]["gold_mean"]
    assert figure["values"] == [2.5, 2.6, 2.7] and figure["n"] == 3
    assert figure["half"] == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    against = told["dpo objective=ipo"]["against"]
    assert against["gold_mean"]["difference"] == pytest.approx(1.0)
    assert against["gold_mean"]["verdict"] == "higher"
    assert against["gold_win_rate"]["verdict"] == "within noise"
    assert against["kl"]["verdict"] == "no spread over seeds"
    # Three runs of ipo repeat the SFT stages of dpo's: they are no new seeds.
    assert len(told["sft"]["samples"]) == 3
    [note, older] = found["notes"]
    assert note.startswith("sft of ") and "ipo2: settings and seed" in note
    assert "measured by an older version on one answer a prompt" in older


def test_what_does_not_decide_a_number_makes_no_arm(tmp_path):
    one = graph(gold(1.0), mesh=dict(data=2), every=dict(log=1))
    two = graph(gold(2.0), mesh=dict(data=4), every=dict(log=5))
    found = compare.compare(
        [
            make(tmp_path / "a", one, 0, mesh=dict(data=8)),
            make(tmp_path / "b", two, 1, measure=dict(split="test", prompt="Hi")),
        ]
    )
    assert list(by_label(found)) == ["sft", "dpo"]


@pytest.mark.parametrize("key", defaults.KEYS_WITHOUT_EFFECT)
def test_keys_without_effect_make_no_arm(tmp_path, key):
    runs = []
    for seed, value in enumerate(("one", "two")):
        stages = graph(gold(1.0 + seed), data={"files": "a", key: value})
        runs.append(make(tmp_path / value, stages, seed, **{key: value}))
    assert list(by_label(compare.compare(runs))) == ["sft", "dpo"]


def test_a_difference_further_up_sets_an_arm_apart(tmp_path):
    one, two = graph(gold(1.0)), graph(gold(2.0))
    two["sft"][0]["optimizer"] = dict(lr=0.5)
    found = compare.compare([make(tmp_path / "a", one), make(tmp_path / "b", two)])
    labels = list(by_label(found))
    assert labels[1] == "sft optimizer.lr=0.5"
    assert labels[3] == "dpo sft.optimizer.lr=0.5"


def test_an_older_config_lacks_keys_and_is_the_same_arm(tmp_path):
    one, two = graph(gold(1.0)), graph(gold(2.0))
    two["dpo"][0]["reference_from"] = ""  # what the default says
    runs = [make(tmp_path / "a", one), make(tmp_path / "b", two, seed=1)]
    assert len(compare.compare(runs)["arms"]) == 2


def test_numbered_stages_of_one_run_are_seeds(tmp_path):
    stages = graph(gold(1.0))
    for name, level in (("simpo", 1.2), ("hinge", 1.9)):
        for seed in range(3):
            figures = gold(level + 0.01 * seed)
            stages[f"{name}_seed{seed}"] = (tuned(name), figures)
    found = compare.compare([make(tmp_path / "zoo", stages)], baseline="simpo")
    told = by_label(found)
    assert set(told) == {"sft", "dpo", "simpo", "hinge"}
    assert [s["number"] for s in told["hinge"]["samples"]] == [0, 1, 2]
    assert told["hinge"]["against"]["gold_mean"]["verdict"] == "higher"
    assert told["dpo"]["against"]["gold_mean"]["verdict"] == "one seed: no interval"
    assert any("the chance of the last stage alone" in n for n in found["notes"])


def test_numbers_that_change_nothing_are_no_seeds(tmp_path):
    stages = graph(gold(1.0))
    for seed in range(3):
        stages[f"simpo_seed{seed}"] = (tuned("simpo"), gold(1.5))
    found = compare.compare([make(tmp_path / "zoo", stages)])
    simpo = by_label(found)["simpo"]
    assert len(simpo["samples"]) == 1
    assert simpo["figures"]["gold_mean"]["half"] is None
    note = found["notes"][0]
    assert "simpo_seed1, simpo_seed2 of" in note and "left to chance" in note
    # Equal figures of runs with seeds of their own are what they are.
    runs = [make(tmp_path / f"r{s}", graph(gold(1.0)), s) for s in range(2)]
    assert len(by_label(compare.compare(runs))["dpo"]["samples"]) == 2


def drawn(value, error, count=4, **more):
    """Figures that are means over draws, `error` that of the gold."""
    draws = {"count": count, "standard_error": {"gold_mean": error}}
    return gold(value, draws=draws, **more)


def test_an_interval_is_not_tighter_than_the_evaluation_draw(tmp_path):
    """Three seeds that agree to .001 while four draws of each know it to .05."""
    runs = []
    for objective, level in (("dpo", 1.5), ("ipo", 1.53)):
        for seed in range(3):
            stages = graph(drawn(level + 0.001 * seed, 0.05), objective)
            stages["sft"][1].update(drawn(1.0, 0.05))
            runs.append(make(tmp_path / f"{objective}{seed}", stages, seed))
    comparison = compare.compare(runs)
    ipo = by_label(comparison)["dpo objective=ipo"]
    error = 0.05 / math.sqrt(3)
    assert ipo["figures"]["gold_mean"]["error"] == pytest.approx(error)
    assert ipo["figures"]["gold_mean"]["half"] == pytest.approx(2.262 * error, rel=1e-3)
    # .03 apart: a hundred times what seeds spread, and nothing.
    assert ipo["against"]["gold_mean"]["verdict"] == "within noise"
    # What has no draw has no such error.
    assert ipo["figures"]["kl"]["error"] is None
    [sentence] = compare.contents(comparison)
    assert "chance of training and of the evaluation draw" in sentence
    assert not any("older version" in note for note in comparison["notes"])


def test_the_interval_of_one_seed_is_of_the_draw_and_says_so(tmp_path, capsys):
    runs = [make(tmp_path / "a", graph(drawn(1.5, 0.05)))]
    runs += [make(tmp_path / "b", graph(drawn(2.5, 0.05), "ipo"))]
    comparison = compare.compare(runs)
    ipo = by_label(comparison)["dpo objective=ipo"]
    half = 3.182 * 0.05
    assert ipo["figures"]["gold_mean"]["half"] == pytest.approx(half, rel=1e-3)
    # Far apart, but another seed was never tried: no verdict.
    against = ipo["against"]["gold_mean"]
    assert against["half"] == pytest.approx(2.447 * 0.05 * math.sqrt(2), rel=1e-3)
    assert against["verdict"] == compare.DRAWS
    terminal.show_comparison(comparison)
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "2.500 ±0.159" in shown
        and "† one seed on a side: ± is of the evaluation draw" in shown
    )
    assert "± of one seed is of the evaluation draw alone" in shown
    page = text_of(compare_page.write(comparison, tmp_path / "c.html"))
    assert "± of one seed is of the evaluation draw alone" in page


def test_seeds_on_one_base_say_that_its_chance_is_left_out(tmp_path):
    base = make(tmp_path / "base", graph(drawn(1.0, 0.05)))
    apart, shared = [], []
    for seed in range(2):
        stages = graph(drawn(1.2 + seed / 10, 0.05))
        apart.append(make(tmp_path / f"own{seed}", stages, seed))
        settings = tuned(start_from=str(base / "sft"))
        figures = drawn(1.4 + seed / 10, 0.05)
        stages = {"late": (settings, figures)}
        shared.append(make(tmp_path / f"late{seed}", stages, seed))
    notes = compare.compare(apart)["notes"]
    assert not any("share one base" in note for note in notes)
    [note] = compare.compare(shared)["notes"]
    assert note.startswith("late: the seeds share one base")
    assert "the base's chance is not in it" in note


def test_runs_of_other_numbers_of_draws_are_named(tmp_path):
    one = graph(drawn(1.0, 0.05, count=2))
    runs = [make(tmp_path / "a", one), make(tmp_path / "b", graph(drawn(1, 0.05)), 1)]
    notes = compare.compare(runs, stages=["dpo"])["notes"]
    assert notes == [
        "the runs differ in measure.draws (2, 4): fewer draws are more noise"
    ]


def test_rounds_name_their_seeds_and_are_one_arm(tmp_path):
    stages = graph(gold(1.0))
    for seed in range(2):
        pairs = dict(kind="comparisons", start_from=f"first_seed{seed}")
        data = dict(files=f"stage:pairs_seed{seed}")
        stages[f"first_seed{seed}"] = (tuned(), gold(1.1 + seed / 10))
        stages[f"pairs_seed{seed}"] = (pairs, {})
        second = tuned(start_from=f"first_seed{seed}", data=data)
        stages[f"second_seed{seed}"] = (second, gold(1.2 + seed / 10))
    told = by_label(compare.compare([make(tmp_path / "a", stages)]))
    assert len(told["second"]["samples"]) == 2


def test_a_parent_in_another_run_is_traced_there(tmp_path):
    runs = []
    for seed in range(2):
        base = make(tmp_path / f"base{seed}", graph(gold(1.0)), seed)
        write(base / "dpo" / "records.jsonl", [])
        settings = tuned(
            start_from=str(base / "sft"),
            data=dict(files=f"{base}/dpo/records.jsonl", heldout=f"{base}/world/x"),
        )
        own = {"ipo": (settings, gold(2.0 + seed))}
        tokenizer = dict(path=str(base / "tokenizer"))
        runs.append(make(tmp_path / f"own{seed}", own, seed, tokenizer=tokenizer))
    [arm] = compare.compare(runs)["arms"]
    assert len(arm["samples"]) == 2
    _, [arm], _ = arms.read(runs)
    assert arm.settings["start_from"] == "sft"
    assert arm.settings["data.files"] == "stage:dpo"
    assert arm.settings["data.heldout"] == "world:x"
    assert arm.settings["dpo.kind"] == "preference"


def test_many_differences_are_cut_and_labels_stay_apart(tmp_path):
    runs = []
    for i in range(2):
        args = {name: 1 for name in "abcd"} | {"last": i}
        made = graph(gold(1.0), objective_args=args if i else {})
        runs.append(make(tmp_path / f"r{i}", made))
    args = {name: 1 for name in "abcd"} | {"last": 7}
    runs.append(make(tmp_path / "r2", graph(gold(1.0), objective_args=args)))
    labels = list(by_label(compare.compare(runs, stages=["dpo"])))
    assert len(set(labels)) == 3
    assert labels[0] == "dpo"  # the arguments' defaults need no words
    assert labels[2] == "dpo a=1 b=1 c=1 (and 2 more) (2)"


# -- figures ---------------------------------------------------------------------------


def test_time_has_no_verdict(tmp_path):
    for seed in (0, 1):
        make(tmp_path / f"a{seed}", graph(dict(gold_mean=1.0 + seed)), seed=seed)
        slower = graph(dict(gold_mean=9.0 + seed), objective="ipo")
        make(tmp_path / f"b{seed}", slower, seed=seed)
    for path in tmp_path.glob("b*/summary.json"):
        summary = json.loads(path.read_text())
        summary["seconds"] = {name: 900.0 for name in summary["seconds"]}
        path.write_text(json.dumps(summary))
    found = compare.compare(sorted(tmp_path.iterdir()), stages=("dpo",))
    assert "seconds" in [column["key"] for column in found["columns"]]
    _, other = found["arms"]
    assert set(other["against"]) == {"gold_mean"}
    assert other["figures"]["seconds"]["mean"] == 900.0


def test_what_was_not_measured_is_a_dash(tmp_path, capsys):
    runs = [
        make(tmp_path / "a", graph(gold(1.0, length=12.0))),
        make(tmp_path / "b", graph(gold(1.5)), seed=1),
    ]
    found = compare.compare(runs)
    assert by_label(found)["dpo"]["figures"]["length"]["values"] == [12.0, None]
    assert "dpo: Length is of 1 of its 2 seeds" in found["notes"]
    terminal.show_comparison(found)
    sft = next(line for line in capsys.readouterr().out.splitlines() if "sft" in line)
    assert "–" in sft
    page = text_of(compare_page.write(found, tmp_path / "c.html"))
    assert "–" in page and "nan" not in page.lower()


def test_without_a_world_the_evaluations_are_shown(tmp_path):
    runs = []
    for seed in range(2):
        made = graph({"eval_accuracy": 0.5 + seed / 10, "eval_loss": 0.7 - seed / 10})
        made["sft"] = (made["sft"][0], {"eval_loss": 1.0})
        runs.append(make(tmp_path / f"r{seed}", made, seed, world=dict(name="")))
    found = compare.compare(runs)
    keys = [column["key"] for column in found["columns"]]
    assert keys == ["eval_loss", "eval_accuracy", "seconds"]
    lines = {"data": {"held.jsonl": "aa"}}
    for run, digest in zip(runs, ("aa", "bb"), strict=True):
        config = json.loads((run / "config.json").read_text())
        config["stages"]["dpo"]["data"] = dict(heldout="held.jsonl")
        write(run / "config.json", config)
        lines["data"]["held.jsonl"] = digest
        write(run / "lineage.json", {"stages": {"dpo": lines}})
    assert any("different held-out rows" in n for n in compare.compare(runs)["notes"])


def test_reward_models_can_be_compared_too(tmp_path):
    made = graph(gold(1.0))
    made["reward"] = (dict(kind="reward", start_from="sft"), {"pair_accuracy": 0.7})
    run = make(tmp_path / "a", made)
    found = compare.compare([run], stages=["reward"])
    assert [c["key"] for c in found["columns"]] == ["pair_accuracy", "seconds"]


def test_new_kinds_speak(tmp_path):
    made = graph(gold(1.0))
    for kind in ("unpaired_preference", "group_policy", "online_preference"):
        made[kind[:5]] = (dict(kind=kind, start_from="sft"), gold(2.0))
    found = by_label(compare.compare([make(tmp_path / "a", made)]))
    assert {"unpai", "group", "onlin"} <= set(found)


# -- on the terminal and as a page -----------------------------------------------------


def refused(says, folders, **options):
    with pytest.raises(UserError) as caught:
        compare.compare(folders, **options)
    line = str(caught.value)
    assert says in line and "\n" not in line, line


def test_folders_that_are_no_runs(tmp_path):
    refused("give the folders of runs", [])
    refused("no run here", [tmp_path / "typo"])
    (tmp_path / "config.json").write_text("{}")
    refused("not the config of a run", [tmp_path])
    (tmp_path / "config.json").write_text("{")
    refused("config.json: not a JSON file", [tmp_path])


def test_the_same_folder_twice(tmp_path):
    run = make(tmp_path / "a", graph(gold(1.0)))
    refused("given twice", [run, tmp_path / "x" / ".." / "a"])


def test_unfinished_runs(tmp_path):
    run = make(tmp_path / "a", graph(gold(1.0)))
    (run / "dpo" / "stage.json").unlink()
    refused("missing dpo; give its run command again; or compare", [run])
    refused("--stages=pretrain,sft", [run])
    refused("missing dpo", [run], stages=["dpo"])
    assert compare.compare([run], stages=["sft"])["arms"][0]["arm"] == "sft"
    summary = json.loads((run / "summary.json").read_text())
    del summary["sft"]
    write(run / "summary.json", summary)
    refused("summary.json has no figures of sft", [run], stages=["sft"])


def test_runs_measured_on_different_things(tmp_path):
    run = make(tmp_path / "a", graph(gold(1.0)))
    made = graph(gold(1.0))
    small = make(tmp_path / "b", made, world=dict(name="countries", size="tiny"))
    refused("world.size='tiny', but 'full' in", [run, small])
    none = make(tmp_path / "c", made, world=dict(name="", size="full"))
    refused("world.name=''", [run, none])
    split = make(tmp_path / "d", made, measure=dict(split="dev"))
    refused("measure.split='dev'", [run, split])


def test_unknown_names(ablation):
    refused("did you mean 'dpo'", ablation, stages=["dpoo"])
    refused("did you mean 'dpo objective=ipo'", ablation, baseline="dpo objective=ipx")
    refused(
        "may be any of: dpo objective=dpo; dpo objective=ipo", ablation, baseline="d"
    )
    found = compare.compare(ablation, baseline="=ipo")
    assert found["baseline"] == "dpo objective=ipo"


def test_a_run_without_the_stages_asked_for(tmp_path):
    run = make(tmp_path / "a", graph(gold(1.0)))
    made = graph(gold(1.0))
    made["simpo"] = (tuned("simpo"), gold(1.0))
    other = make(tmp_path / "b", made)
    refused("has no stage simpo; it has pretrain", [run, other], stages=["simpo"])


def test_a_page_that_cannot_be_written(ablation, tmp_path):
    found = compare.compare(ablation)
    (tmp_path / "file").write_text("")
    for out in (tmp_path, "x.json", tmp_path / "file" / "c.html"):
        with pytest.raises(UserError, match="--out="):
            compare_page.write(found, out)


def test_the_figures_are_those_asked_for_or_those_all_runs_name(tmp_path):
    def shown(*folders, **options):
        columns = compare.compare(folders, **options)["columns"]
        return [column["key"] for column in columns]

    def named(name, *figures, seed=0):
        one = make(tmp_path / name, graph(gold(1.0 + seed, words=9.0)), seed)
        summary = json.loads((one / "summary.json").read_text())
        write(one / "summary.json", summary | {"table": figures})
        return one

    usual = shown(named("usual"))
    assert "gold_mean" in usual and "words" not in usual
    both = [named(f"both{seed}", "words", "kl", "other", seed=seed) for seed in (0, 1)]
    assert shown(*both) == ["words", "kl"]  # nobody has measured the third
    assert shown(*both, named("third", "kl", seed=2)) == usual
    assert shown(*both, names=("gold_mean",)) == ["gold_mean"]
    with pytest.raises(UserError, match="--figures='word'.* mean 'words'"):
        shown(*both, names=("word",))
