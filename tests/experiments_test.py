"""Every experiment accepts `tiny` and trains; what it refuses, it refuses in a line."""

import json

import pytest

from stagecraft import experiment, run
from stagecraft.errors import UserError
from tests.conftest import ROOT, load_experiment, single_device

NAMES = sorted(
    p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem != "common"
)


def test_all_are_covered():
    assert NAMES == ["quickstart", "your_text"]  # each is run two steps somewhere


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
        (lambda c: c.stages.sft.optimizer.update(name="adam"), "optimizer.name"),
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
