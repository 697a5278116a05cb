"""Every experiment accepts `tiny` and trains; what it refuses, it refuses in a line."""

import json
import shutil

import numpy as np
import pytest

from stagecraft import exchange, experiment, losses, run, schema
from stagecraft.curate import curation
from stagecraft.errors import UserError
from stagecraft.lineage import StageRecord
from stagecraft.preview import plan
from stagecraft.stages import kinds
from tests.conftest import ROOT, load_experiment, single_device

NAMES = sorted(
    p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem != "common"
)
RECIPES = sorted(p.stem for p in (ROOT / "experiments" / "recipes").glob("*.py"))


def test_all_are_covered():
    # Each is run two steps, here or by the fixture of the tiny run.
    shipped = "constitutional curate curated_text objectives quickstart rlaif rlhf "
    shipped += "safety_rounds verifiable your_text"
    assert shipped.split() == NAMES


# Those that `test_recipes_follow_on_from_each_other` trains on files.
FOLLOWED = ("sft_from_hf", "dpo_from_hf", "grpo_verifier")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run_by_themselves(name, tmp_path):
    """`tiny` alone puts the embedded world in the place of model and data."""
    config = single_device(load_experiment(f"recipes/{name}").get_config("tiny"))
    if name in FOLLOWED:
        assert {line["stage"] for line in plan.show(config)} == {*config.stages}
        return
    run.run(config, tmp_path / "run")
    for stage in config.stages:
        assert StageRecord.read_finished(tmp_path / "run" / stage)


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    """A Hugging Face folder."""
    to = tmp_path_factory.mktemp("folder") / "model"
    exchange.export(tiny_run, "sft", to)
    return to


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(name, root, *arguments):
    """Runs a recipe from a folder on files; its work directory."""
    config = load_experiment(f"recipes/{name}").get_config(",".join(arguments))
    run.run(single_device(config), root)
    return root


def test_recipes_follow_on_from_each_other(folder, tmp_path):
    """A folder, then SFT, DPO and GRPO, each from the last one's stage, then export."""
    chats = [
        {"prompt": f"How is {i}?", "completion": f"It was {i}."} for i in range(60)
    ]
    pairs = [
        {"prompt": f"How is {i}?", "chosen": f"It was {i}.", "rejected": "No."}
        for i in range(60)
    ]
    asked = [
        {"prompt": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(60)
    ]
    short = ("tiny", "length=64", "heldout=0.1")
    arguments = (
        f"model={folder},data={write(tmp_path / 'a.jsonl', chats)},lora=2",
        *short,
    )
    sft = recipe("sft_from_hf", tmp_path / "sft", *arguments)
    config = load_experiment("recipes/sft_from_hf").get_config(",".join(arguments))
    [line] = plan.show(single_device(config))
    assert line["frozen_bytes"] == 4 * (line["parameters"] - line["trained"])
    figures = json.loads((sft / "summary.json").read_text())
    assert line["flops"] == figures["cost"]["sft"]["flops"]
    dpo = recipe(
        "dpo_from_hf",
        tmp_path / "dpo",
        f"model={sft}/sft,data={write(tmp_path / 'p.jsonl', pairs)},objective=ipo",
        *short,
    )
    grpo = recipe(
        "grpo_verifier",
        tmp_path / "grpo",
        f"model={dpo}/dpo,data={write(tmp_path / 'q.jsonl', asked)},tiny,group=2",
    )
    rows = (grpo / "grpo" / "metrics.jsonl").read_text().splitlines()
    assert "rewards/number/mean" in json.loads(rows[-1])
    exchange.export(grpo, "grpo", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_recipes_say_what_is_missing():
    for name in RECIPES:
        module = load_experiment(f"recipes/{name}")
        missing = "data=FILES" if name == "pretrain_own_text" else "model= is missing"
        with pytest.raises(UserError, match=missing):
            module.get_config("")
    module = load_experiment("recipes/dpo_from_hf")
    with pytest.raises(UserError, match="data=FILES is missing"):
        module.get_config("model=here")


def test_the_quickstart_resolves_as_it_is():
    config = experiment.resolve(load_experiment("quickstart").get_config())
    order = experiment.order(config)
    assert order.index("pretrain") < order.index("sft") < order.index("comparisons")
    assert order.index("reward") < order.index("ppo")


def test_your_text_runs_on_files(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    text = tmp_path / "book.txt"
    text.write_text(
        "\n\n".join(f"Chapter {i}. " + "It was so. " * 30 for i in range(90))
    )
    answers = [
        {"question": f"How is {i}?", "answer": f"It was {i}."} for i in range(60)
    ]
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"How is {i}?"}],
            "chosen": f"It was {i}.",
            "rejected": "No.",
        }
        for i in range(60)
    ]
    arg = ",".join(
        [
            "tiny",
            "vocab=300",
            "length=64",
            f"text={text}",
            f"demonstrations={write('a.jsonl', answers)}",
            "demonstrations_fields=prompt=question+completion=answer",
            f"comparisons={write('c.jsonl', pairs)}",
            f"prompts={write('p.jsonl', [{'prompt': r['question']} for r in answers])}",
        ]
    )
    config = load_experiment("your_text").get_config(arg)
    found = run.run(single_device(config), tmp_path / "run")
    assert found["sft"]["eval_loss"] > 0
    assert 0 <= found["reward"]["eval_accuracy"] <= 1
    assert 0 <= found["dpo"]["eval_rewards/accuracies"] <= 1
    assert (tmp_path / "run" / "ppo" / "stage.json").exists()

    # What came of it goes in again as a folder, now with adapters.
    mine = tmp_path / "mine"
    exchange.export(tmp_path / "run", "dpo", mine)
    given = [f"model={mine}", "lora=2"]
    given += [a for a in arg.split(",") if a != f"text={text}"]
    config = load_experiment("your_text").get_config(",".join(given))
    assert {*config.stages} == {"sft", "reward", "dpo", "ppo"}
    again = run.run(single_device(config), tmp_path / "again", ("sft", "reward", "ppo"))
    assert again["sft"]["eval_loss"] > 0
    assert StageRecord.read_finished(tmp_path / "again" / "ppo").lora


def test_verifiable_learns_from_sums_and_counts_attempts(tmp_path):
    module = load_experiment("verifiable")
    config = module.get_config("tiny,arms=grpo")
    figures = run.run(single_device(config), tmp_path / "run")
    names = {f"{name}@{k}" for name in ("pass", "guess") for k in (1, 2)}
    names |= {"cover@10", "cover@50", "cover@90"}
    for stage in ("sft", "grpo"):
        assert names <= figures[stage].keys()
        assert figures[stage]["verifier_number"] == figures[stage]["pass@1"]
    assert "heldout_accuracy" not in figures["sft"]  # the world's own are not asked
    arms = module.get_config("tiny").stages
    assert {*arms} == {"sft", "grpo", "rloo", "ppo"}
    with pytest.raises(UserError, match="arms='gpro': unknown; did you mean 'grpo'"):
        module.get_config("tiny,arms=gpro")
    assert module.get_config("model=hub,data=a.jsonl").stages.sft.start_from == "hf:hub"


def test_curated_text_trains_on_what_curation_leaves(tmp_path):
    module = load_experiment("curated_text")
    config = module.get_config("tiny")
    found = run.run(single_device(config), tmp_path / "run")
    assert {"raw", "curated", "clean"} <= found.keys()
    assert all(found[arm]["eval_loss"] > 0 for arm in ("raw", "curated", "clean"))
    root = tmp_path / "run"
    told = json.loads((root / "curation" / "curation.json").read_text())
    clean = len((root / "world" / "clean.jsonl").read_text().splitlines())
    # Every planted fault is gone, and hardly anything else.
    assert 0.85 * clean < told["documents"] <= 1.02 * clean
    assert told["steps"][0]["documents"] == 2 * clean
    assert (root / "curation" / "report.html").exists()
    # The same command again changes nothing, and a run of before these keys resumes.
    stored = json.loads((root / "config.json").read_text())
    assert stored["curation"]["minhash"]["n_grams"] == 3
    del stored["trackers"]
    (root / "config.json").write_text(json.dumps(stored))
    assert run.run(single_device(module.get_config("tiny")), root) == found


def test_curate_reads_its_arguments(tmp_path):
    arg = f"tiny,in={tmp_path}/a.txt,{tmp_path}/b.txt,out={tmp_path}/out,language=all"
    config = load_experiment("curate").get_config(arg)
    assert config.files == f"{tmp_path}/a.txt,{tmp_path}/b.txt"
    for name, text in (("a", "one two"), ("b", "ONE  two")):
        (tmp_path / f"{name}.txt").write_text(text)
    config.rules = ()
    told = curation.curate(config, workers=1)
    assert (told["documents"], told["tasks"]) == (1, 1)


def test_every_objective_has_an_arm():
    """Every loss that ships can be launched, and every arm resolves."""
    module = load_experiment("objectives")
    config = single_device(
        module.get_config("tiny,name=all+demonstrations+reward_models")
    )
    resolved = experiment.resolve(config)
    assert {*module.NAMES} <= {*resolved.stages}
    used = {
        (kinds.of(stage).losses[name], stage.kind)
        for stage in resolved.stages.values()
        if "objective" in stage
        for name in stage.objective.split(",")
    }
    sampled = {f for f, kind in used if kinds.KINDS[kind].samples}
    others = {f for f, kind in used if not kinds.KINDS[kind].samples}
    for table in losses.TABLES.values():
        assert {*table.values()} <= (sampled if table is losses.POLICY else others)


def test_what_pushing_too_hard_means_is_told_apart():
    """ppo_hard differs from ppo in its KL penalty and its steps; each has an arm."""
    recipe = load_experiment("quickstart").get_config().stages
    module = load_experiment("objectives")
    names = ("ppo", "ppo_no_kl", "ppo_fast", "ppo_long")
    arms = module.get_config(f"base=none,name={'+'.join(names)}").stages

    def differs(one, two=recipe.ppo):
        one, two = (dict(schema.flat(x.to_dict())) for x in (one, two))
        return {k: v for k, v in one.items() if v != two[k]}

    assert differs(recipe.ppo_hard) == {"kl_coef": 0.0, "steps": 60}
    assert differs(arms.ppo) == {}
    assert differs(arms.ppo_no_kl) == {"kl_coef": 0.0}
    assert differs(arms.ppo_fast) == {"optimizer.lr": 4e-4}
    assert differs(arms.ppo_long) == {"steps": 60}
    sft = module.get_config("base=none,name=sft_no_replay").stages.sft_no_replay
    want = {"data.replay": "", "data.replay_share": 0.0}
    assert differs(sft, recipe.sft) == want


def test_arms_of_every_kind_run(tiny_run, tmp_path):
    """On eight devices, from a run on one."""
    arms = "tr_dpo+bco+ppo_ptx+dapo+online_dpo+iterative_dpo+best_of_n"
    arms += "+dpo_soft_labels"
    arg = f"tiny,name={arms},base={tiny_run}"
    config = load_experiment("objectives").get_config(arg)
    found = run.run(single_device(config), tmp_path / "run")
    for name in arms.split("+"):
        assert np.isfinite(found[name]["gold_mean"])
        assert found[name]["gold_win_rate"] == pytest.approx(0.5, abs=0.3)


def test_judges_of_known_bias_label_pairs_and_models_learn_from_them(
    tiny_run, tmp_path
):
    module = load_experiment("rlaif")
    config = single_device(module.get_config(f"tiny,base={tiny_run}"))
    arms = ["unbiased", *module.BIASES]
    assert set(config.stages) == {*arms, *(f"{a}_pairs" for a in arms), "length_ld"}
    for name in ("first", "noise", "style", "length_ld"):  # four arms are enough here
        for stage in {name, f"{name}_pairs"} & set(config.stages):
            del config.stages[stage]
    found = run.run(config, tmp_path / "run")
    assert {"words", "exclamations", "kl"} <= {*found["length"]}
    path = tmp_path / "run" / "length_pairs" / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert {row["signal"] for row in rows} == {"planted"}
    assert {len(row["logps"]) for row in rows} == {1}
    doses = module.get_config("doses=0.25+1").stages
    assert doses.length_25.start_from == "sft"
    assert doses.length_25_pairs.planted.length == module.BIASES["length"] / 4
    assert doses.length_ld.data.files == "stage:length_pairs"
    believed = module.get_config("beliefs").stages
    assert believed.agreement_pairs.planted.agreement == module.AGREEMENT["agreement"]
    assert believed.agreement_pairs.data.files == "world:other_prompts.jsonl"
    # Of all judges, so that arms differ in the bias alone.
    assert believed.unbiased_pairs.data == believed.agreement_pairs.data
    with pytest.raises(UserError, match="doses=2: expected numbers above 0"):
        module.get_config("doses=2")


def test_rounds_of_attacks_learn_from_all_rounds_so_far(tmp_path):
    module = load_experiment("safety_rounds")
    config = single_device(module.get_config("tiny"))
    with_, without = (
        {n for n in config.stages if n.startswith(f"{arm}_")} for arm in module.ARMS
    )
    # The arms differ in the look-alikes alone.
    names = {name.removeprefix("with_") for name in with_}
    assert names == {name.removeprefix("without_") for name in without}
    for name in names:
        one, other = (
            json.dumps(schema.plain(config.stages[f"{arm}_{name}"])).replace(
                f"{arm}_", "_"
            )
            for arm in module.ARMS
        )
        assert one.replace(",world:benign_requests.jsonl", "") == other
        assert (one != other) == name.startswith("pairs")
    stages = config.stages
    both = "stage:with_pairs_1,stage:with_pairs_2"
    assert stages.with_round_2.data.files == both
    assert stages.with_round_2.start_from == "sft"
    assert stages.with_pairs_2.start_from == "with_round_1"
    assert stages.with_attacks_2.target_from == "with_round_1"
    assert stages.with_attacks_2.data.known.endswith("stage:with_attacks_1")

    config = single_device(module.get_config("tiny,rounds=1"))
    for name in [name for name in config.stages if name.startswith("without_")]:
        del config.stages[name]
    figures = run.run(config, tmp_path / "run")
    rows = (tmp_path / "run" / "with_pairs_1" / "records.jsonl").read_text()
    assert figures["with_round_1"]["labels"] == len(rows.splitlines())
    assert {*module.FIGURES} - {"gflops"} <= figures["with_round_1"].keys()
    attacks = json.loads((tmp_path / "run/with_attacks_1/stage.json").read_text())
    assert 0 < attacks["kept"] <= attacks["attacks"] == 64 * 4
    ppo = module.get_config("tiny,objective=ppo,rounds=1").stages
    assert ppo.with_round_1.reward_from == "with_round_1_reward"
    rpo = module.get_config("tiny,objective=rpo,rounds=1").stages
    assert rpo.with_round_1.objective == "sigmoid,sft"
    with pytest.raises(UserError, match="objective='pop': unknown; .*dpo, rpo, ppo"):
        module.get_config("objective=pop")


def test_a_model_revises_its_answers_and_judges_pairs(tiny_run, tmp_path):
    module = load_experiment("constitutional")
    base = tmp_path / "base"
    shutil.copytree(tiny_run, base)
    (base / "sft").rename(base / "helpful")
    config = single_device(module.get_config(f"tiny,base={base}"))
    arms = {f"{kind}_{arm}" for arm in module.ARMS for kind in ("revisions", "sl")}
    assert arms < set(config.stages) and "helpful" not in config.stages
    # One control is enough here.
    for name in (*(arms - {"revisions_gold", "sl_gold"}), "dpo_revisions"):
        del config.stages[name]
    summary = run.run(config, tmp_path / "run")
    for name in ("sl", "sl_gold", "dpo", "ppo"):
        assert {"harmless", "over_refusal", "sycophancy"} <= {*summary[name]}
    pairs = (tmp_path / "run" / "pairs" / "records.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in pairs]
    assert {row["principle"] for row in rows} == {"harm", "victim"}
    assert {len(row["logps"]) for row in rows} == {2}
    report = StageRecord.read_finished(tmp_path / "run" / "revisions_gold")
    assert report.to_json()["revisions"][-1]["harmless"] == 1.0
    whole = module.get_config("").stages
    assert whole.helpful.start_from == "pretrain" and whole.sl.start_from == "helpful"
    assert whole.revisions_nonsense.constitution == "countries_nonsense"


def test_seeds_of_an_arm_differ_and_start_from_a_finished_run(tiny_run, tmp_path):
    arg = f"tiny,name=dpo,seeds=2,base={tiny_run}"
    config = single_device(load_experiment("objectives").get_config(arg))
    found = run.run(config, tmp_path / "run")
    one, two = (
        (tmp_path / "run" / f"dpo_seed{i}" / "metrics.jsonl").read_text().splitlines()
        for i in range(2)
    )
    assert json.loads(one[0])["logps/chosen"] != json.loads(two[0])["logps/chosen"]
    assert np.isfinite(found["dpo_seed0"]["kl"])  # against the other run's SFT model
    with pytest.raises(UserError, match="no run here"):
        load_experiment("objectives").get_config("name=dpo,base=nowhere")
    with pytest.raises(UserError, match="did you mean 'simpo'"):
        load_experiment("objectives").get_config("tiny,name=simp")


def test_chat_pieces_start_afresh_once(tiny_run, tmp_path):
    """After bare text they do; after demonstrations what was learned of them stays."""
    arg = f"tiny,name=sft+rejection_sampling,base={tiny_run}"
    config = single_device(load_experiment("objectives").get_config(arg))
    for name in ("sft", "rejection_sampling"):
        config.stages[name].optimizer.lr = 0.0
    run.run(config, tmp_path / "run")
    current, parents = run.open_run(tmp_path / "run"), run.open_run(tiny_run)

    def embedding(where, name):
        return np.asarray(where.model(name).embed[...])

    pieces = list(current.tokenizer.control_ids)
    before, after = embedding(parents, "pretrain"), embedding(current, "sft")
    assert (before != after).any(1).nonzero()[0].tolist() == sorted(pieces)
    before, after = embedding(parents, "sft"), embedding(current, "rejection_sampling")
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("arg", "says"),
    [
        ("", "needs text=FILES"),
        ("text=a.txt,tinny", "did you mean 'tiny'"),
        ("text=a.txt,steps=many", "expected int"),
        ("text=a.txt,size=huge", "expected one of small"),
    ],
)
def test_arguments_are_checked(arg, says):
    with pytest.raises(UserError, match=says):
        load_experiment("your_text").get_config(arg)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.stages.dpo.update(start_from="reward"), "is of kind reward"),
        (lambda c: c.stages.ppo.update(reward_from=""), "needs a stage of kind reward"),
        (lambda c: c.stages.ppo.update(minibatches=3), "not divisible by minibatches"),
        (lambda c: c.stages.sft.update(micro_batches=3), "does not divide"),
        (lambda c: c.stages.sft.data.update(length=999), "longer than the context"),
        (lambda c: c.stages.sft.update(start_from="sft"), "in a circle"),
        (lambda c: c.stages.ppo.sampling.update(temperature=0.0), "more than 0"),
        (lambda c: c.stages.dpo.update(objective="dop"), "no such loss"),
        (lambda c: c.world.update(name="planets"), "there are countries"),
        (lambda c: c.stages.sft.optimizer.update(name="adamm"), "optimizer.name"),
        (lambda c: c.stages.dpo.update(objective_args=dict(bta=1.0)), "did you mean"),
    ],
)
def test_impossible_combinations_are_refused(change, says):
    config = single_device(load_experiment("quickstart").get_config("tiny"))
    change(config)
    with pytest.raises(UserError, match=says):
        experiment.resolve(config)


def test_unknown_keys_name_the_nearest():
    plain = load_experiment("quickstart").get_config("tiny").to_dict()
    plain["stages"]["sft"]["optimizer"]["learning_rate"] = 1.0
    plain["stages"]["sft"]["batchsize"] = 1
    del plain["stages"]["sft"]["optimizer"]["learning_rate"]
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        experiment.resolve(plain)
