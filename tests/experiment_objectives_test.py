"""What an experiment refuses of objectives, before anything is compiled or written."""

import pytest
from ml_collections import ConfigDict

from stagecraft import defaults, experiment
from stagecraft.errors import UserError
from tests.graphs import graph


@pytest.mark.parametrize("kind", defaults.KINDS)
def test_defaults_of_every_kind_resolve(kind):
    c = graph(kind, devices=8)
    found = experiment.resolve(c)
    assert isinstance(found, ConfigDict) and found.stages.it.kind == kind


def mean(policy_logps):
    return policy_logps.mean(), {}


OBJECTIVES = [
    ("preference", dict(objective="simpoo"), "objective='simpoo': no .* 'simpo'"),
    ("group_policy", dict(objective="grpoo"), "objective='grpoo': .* mean 'grpo'"),
    (
        "unpaired_preference",
        dict(objective="dpo"),
        "is a loss of pairs of completions; this",
    ),
    (
        "preference",
        dict(objective="sigmoid,sft", objective_weights=(1.0,)),
        r"objective_weights=\(1.0,\): 1 weights for the 2 losses .* give one each",
    ),
    ("preference", dict(objective_args=dict(bta=1.0)), "args.bta: .* mean 'beta'"),
    ("preference", dict(objective=mean), "0 axes at rows; expected .* not reduced"),
    ("reward", dict(objective_args=dict(centering=-1.0)), "centering=-1.0: must be at"),
    (
        "unpaired_preference",
        dict(objective_args=dict(beta=-0.1)),
        "objective_args.beta=-0.1: must be above 0",
    ),
    (
        "preference",
        dict(objective="exo_pair", objective_args=dict(label_smoothing=0.0)),
        "objective_args.label_smoothing=0.0: must be above 0",
    ),
    (
        "preference",
        dict(objective="robust", objective_args=dict(label_smoothing=0.5)),
        "objective_args.label_smoothing=0.5: must be at least 0 and below 0.5",
    ),
    *(
        (
            kind,
            dict(objective="cispo", objective_args=dict(clip_high=0.28)),
            "objective_args.clip_high=0.28: CISPO cuts the ratio at clip_high itself",
        )
        for kind in ("policy", "group_policy")
    ),
    (
        "policy",
        dict(objective_args=dict(dual_clip=1.0)),
        "objective_args.dual_clip=1.0: expected more than 1",
    ),
    (
        "preference",
        dict(objective="dpo,aot", micro_batches=2),
        "micro_batches=2: aot compares all rows .* cannot be split; expected 1",
    ),
    (
        "preference",
        dict(objective_args=dict(f_divergence="js")),
        "objective_args.f_divergence: is a key of the stage itself, not of its loss; "
        "set f_divergence= beside objective=",
    ),
    (
        "online_preference",
        dict(objective_args=dict(alpha=0.5)),
        "objective_args.alpha: is a key of the stage itself",
    ),
    (
        "preference",
        dict(f_divergence="kl"),
        "f_divergence='kl': expected one of 'reverse_kl', 'forward_kl', 'js', 'alpha'",
    ),
    *(
        (
            "preference",
            dict(objective=name, f_divergence="js"),
            f"f_divergence='js': changes the scores .* objective='{name}' takes none",
        )
        for name in ("aot", "simpo", "sft")
    ),
    (
        "online_preference",
        dict(objective="orpo", reference_free=True),
        "reference_free=True: .* objective='orpo' takes none; leave it at False",
    ),
    (
        "preference",
        dict(objective="sft", weighting="wpo"),
        "weighting='wpo': weighs pairs, but objective='sft' has no loss of pairs",
    ),
    *(
        (
            kind,
            dict(objective=f"entropy_bonus, {name}"),
            f"objective='entropy_bonus, {name}': {name} has one loss a completion, .*"
            "aggregation='grpo'",
        )
        for kind in ("policy", "group_policy")
        for name in ("gspo", "rloo_policy")
    ),
    (
        "unpaired_preference",
        dict(batch_size=1),
        "batch_size=1: kto measures each prompt with another row's completion",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "says"), OBJECTIVES)
def test_objectives(kind, changes, says):
    with pytest.raises(UserError, match=says) as error:
        experiment.resolve(graph(kind, **changes))
    line = str(error.value)
    assert line.startswith("stages.it.") and "\n" not in line


@pytest.mark.parametrize("beta", [0.0, -1, float("nan")])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("preference", n) for n in ("dpo", "ipo", "orpo", "cpo", "simpo", "sft")),
        ("online_preference", "hinge"),
        ("unpaired_preference", "bco"),
    ],
)
def test_beta_is_above_0(kind, name, beta):
    with pytest.raises(UserError, match=f"stages.it.objective_args.beta={beta}: must"):
        experiment.resolve(graph(kind, objective=name, objective_args=dict(beta=beta)))


def test_binary_classifier_optimization_may_have_one_row():
    experiment.resolve(graph("unpaired_preference", objective="bco", batch_size=1))
