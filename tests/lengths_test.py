"""Rows fit into every model a stage is made of, or are refused before anything runs."""

import json
import math

import jax
import pytest

from stagecraft import defaults, experiment
from stagecraft.errors import UserError
from stagecraft.models import scores
from stagecraft.models.transformer import ScalarModel, Transformer
from tests import tiny

PAIRS = dict(files="none.jsonl")


def folder(root, name, length, *, module="transformer", positions="learned"):
    """A finished stage of another run, whose model holds so many tokens."""
    model = vars(tiny.config(max_length=length, positions=positions))
    path = root / "other" / name
    path.mkdir(parents=True)
    record = {"kind": "reward" if module == "scalar" else "language_model"}
    record |= {"start_from": "", "finished": True, "module": module, "model": model}
    (path / "stage.json").write_text(json.dumps(record))
    return str(path)


@pytest.fixture
def long(tmp_path):
    return folder(tmp_path, "long", 64)


@pytest.fixture(params=["learned", "rope"])
def short(tmp_path, request):
    return folder(tmp_path, "short", 40, positions=request.param)


def graph(**stages):
    c = defaults.experiment()
    c.mesh = dict(data=1, fsdp=1, tensor=1)
    c.world.name = "countries"  # a rater of comparisons
    for name, (kind, changes) in stages.items():
        data = {"data": PAIRS | changes.get("data", {})}
        c.stages[name] = defaults.stage(kind, **(changes | data))
    return c


def rows(parent, length, kind="preference", **changes):
    return kind, dict(start_from=parent, data=dict(length=length), **changes)


def sampled(parent, kind, prompt, new, **changes):
    if kind in ("policy", "group_policy", "online_preference", "selection"):
        changes = dict(verifiers="json:loads") | changes
    changes |= dict(sampling=dict(max_new_tokens=new), data=dict(prompt_length=prompt))
    return kind, dict(start_from=parent, **changes)


def refused(c, *words):
    with pytest.raises(UserError) as error:
        experiment.resolve(c)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


LEARNING = ("language_model", "preference", "unpaired_preference", "reward")
SAMPLING = ("policy", "group_policy", "online_preference", "comparisons", "selection")


@pytest.mark.parametrize("kind", LEARNING)
def test_rows_of_two_parents(long, short, kind):
    fits = dict(one=rows(long, 64, kind), two=rows(short, 40, kind))
    assert experiment.resolve(graph(**fits)).model.max_length == 64
    # Whichever comes first.
    fits = dict(two=rows(short, 40, kind), one=rows(long, 64, kind))
    assert experiment.resolve(graph(**fits)).model.max_length == 64
    beyond = graph(one=rows(long, 64, kind), two=rows(short, 41, kind))
    refused(
        beyond, "stages.two.data.length=41", "max_length=40", f"start_from='{short}'"
    )


@pytest.mark.parametrize("kind", SAMPLING)
def test_prompts_and_answers_of_two_parents(long, short, kind):
    def both(prompt, new):
        first = sampled(long, kind, 32, 32)
        return graph(one=first, two=sampled(short, kind, prompt, new))

    experiment.resolve(both(8, 32))
    experiment.resolve(both(0, 39))  # what is left is the prompt's
    words = "max_length=40", f"start_from='{short}'", "stages.two.data.prompt_length="
    refused(both(9, 32), "sampling.max_new_tokens=32: 41 tokens", *words)
    refused(both(0, 40), "sampling.max_new_tokens=40: 41 tokens", *words)


def test_a_parent_through_stages_of_the_run(long, short):
    """Also where another stage of the graph starts from nothing."""
    between = dict(sft=rows(short, 40, "language_model"))
    refused(
        graph(**between, dpo=rows("sft", 41)),
        "stages.dpo.data.length=41",
        "max_length=40 of start_from='sft'",
    )
    fresh = {"fresh": ("language_model", dict(data=dict(length=200)))}
    refused(graph(**fresh, **between, dpo=rows("sft", 41)), "data.length=41", "=40")
    experiment.resolve(graph(**fresh, other=rows("fresh", 200)))
    refused(graph(**fresh, other=rows("fresh", 300)), "=300", "model.max_length=256")


def test_every_role_counts(tmp_path, long, short):
    refused(
        graph(dpo=rows(long, 64, reference_from=short)),
        "data.length=64",
        f"max_length=40 of reference_from='{short}'",
    )
    judge = folder(tmp_path, "judge", 40, module="scalar")
    for role, kind in [
        ("reward_from", "group_policy"),
        ("reward_from", "online_preference"),
        ("reward_from", "selection"),
        ("value_from", "policy"),
    ]:
        refused(
            graph(it=sampled(long, kind, 32, 32, **{role: judge})),
            f"max_length=40 of {role}='{judge}'",
        )
    with_text = sampled(short, "policy", 8, 32)
    with_text[1]["data"] |= dict(ptx="none.txt", ptx_rows=64, ptx_length=41)
    refused(graph(it=with_text), "data.ptx_length=41", "max_length=40")


def test_a_shorter_run_and_a_circle(long):
    c = graph(dpo=rows(long, 33))
    c.model.max_length = 32
    refused(c, "stages.dpo.data.length=33", "model.max_length=32")
    refused(graph(a=rows("b", 8), b=rows("a", 8)), "in a circle")


def test_an_answer_too_long_for_the_reward_model_has_no_score():
    """Its positions would be clipped: it counts as one that could not be scored."""
    config = tiny.config(max_length=20, positions="learned")
    with jax.set_mesh(tiny.single()):
        body = Transformer(config, jax.random.key(0))
        model = ScalarModel(body, jax.random.key(1))
        rows = [[3] * 20, [3] * 21, [5] * 4]
        found = scores.of_rows(model, rows, batch_size=2)
        alone = scores.of_rows(model, [rows[0], rows[2]], batch_size=2)
    assert math.isnan(found[1])
    assert [found[0], found[2]] == pytest.approx(alone, rel=1e-5)


def test_rows_divide_over_context(long):
    apart = dict(mesh=dict(data=2, context=4), batch_size=8)
    refused(
        graph(it=rows(long, 62, **apart)),
        "stages.it.data.length=62: rows of 62 tokens do not divide over "
        "mesh.context=4; use a multiple of 4",
    )
    experiment.resolve(graph(it=rows(long, 60, **apart)))
    refused(
        graph(it=sampled(long, "group_policy", 0, 32, **apart)),
        "stages.it.data.prompt_length: is not set, so that rows have the length of",
    )
    refused(
        graph(it=sampled(long, "group_policy", 30, 32, **apart)),
        "data.prompt_length=30 and sampling.max_new_tokens=32: rows of 62 tokens",
    )
    experiment.resolve(graph(it=sampled(long, "group_policy", 28, 32, **apart)))
    # What samples and trains on nothing has no rows to split.
    experiment.resolve(graph(it=sampled(long, "selection", 0, 31, **apart)))
