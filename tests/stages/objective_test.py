"""From a config's names to one loss: what is passed, what adds up, what is refused."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import defaults, losses, masked
from stagecraft.errors import UserError
from stagecraft.stages import kinds, objective, preference, reward


def config(kind="preference", **changes):
    return defaults.stage(kind, **changes)


def pairs(rows=5, tokens=3, seed=0):
    rng = np.random.default_rng(seed)
    found = {
        "policy_logps": rng.normal(-9, 3, (rows, 2)),
        "ref_logps": rng.normal(-9, 3, (rows, 2)),
        "lengths": rng.integers(1, 9, (rows, 2)),
        "chosen_logps": rng.normal(-2, 1, (rows, tokens)),
        "document_logps": rng.normal(-2, 1, (rows, tokens)),
    }
    found = {k: jnp.asarray(v, jnp.float32) for k, v in found.items()}
    return found | {"rows": jnp.ones(rows, bool)}


def combined(**changes):
    return objective.combine(config(**changes), preference.KIND)


def test_one_name_is_that_loss_with_its_arguments():
    found = combined(objective="dpo", objective_args=dict(beta=0.3))
    arrays = pairs()
    loss, metrics = found.apply(arrays)
    want, told = losses.dpo(arrays["policy_logps"], arrays["ref_logps"], beta=0.3)
    assert list(loss) == ["rows"]
    np.testing.assert_array_equal(loss["rows"], want)
    assert metrics.keys() == told.keys()
    assert found.needs == {"policy_logps", "ref_logps", "scores", "preference"}
    assert found.across_rows == ()


def test_losses_at_one_place_add_up_with_their_weights():
    arrays = pairs()
    loss, _ = combined(
        objective="sigmoid, hinge,bco_pair",
        objective_weights=(1.0, 0.5, -2.0),
        objective_args=dict(beta=0.2),
    ).apply(arrays)
    each = [
        function(arrays["policy_logps"], arrays["ref_logps"], beta=0.2)[0]
        for function in (losses.dpo, losses.hinge, losses.bco_pair)
    ]
    want = each[0] + 0.5 * each[1] - 2.0 * each[2]
    np.testing.assert_allclose(loss["rows"], want, rtol=1e-6)


def test_without_weights_each_counts_once():
    arrays = pairs()
    loss, _ = combined(objective="hinge,hinge").apply(arrays)
    one, _ = combined(objective="hinge").apply(arrays)
    np.testing.assert_allclose(loss["rows"], 2 * one["rows"], rtol=1e-6)


def test_losses_at_several_places_stay_apart():
    arrays = pairs()
    loss, _ = combined(objective="dpo,sft", objective_weights=(1.0, 0.25)).apply(arrays)
    assert loss.keys() == {"rows", "chosen"}
    np.testing.assert_allclose(loss["chosen"], -0.25 * arrays["chosen_logps"])
    both, _ = combined(objective="cpo,sft").apply(arrays)
    np.testing.assert_allclose(both["chosen"], -2 * arrays["chosen_logps"])


def test_arguments_go_to_those_that_take_them():
    """`gamma` is SimPO's alone, `beta` goes to both."""
    arrays = pairs()
    loss, _ = combined(
        objective="simpo,dpo", objective_args=dict(gamma=0.7, beta=1.5)
    ).apply(arrays)
    want = losses.simpo(arrays["policy_logps"], arrays["lengths"], beta=1.5, gamma=0.7)
    want = (
        want[0] + losses.dpo(arrays["policy_logps"], arrays["ref_logps"], beta=1.5)[0]
    )
    np.testing.assert_allclose(loss["rows"], want, rtol=1e-6)


def test_the_first_loss_names_the_metrics_that_two_share():
    arrays = pairs()
    _, metrics = combined(objective="simpo,dpo").apply(arrays)
    per_token = arrays["policy_logps"][:, 0] / arrays["lengths"][:, 0]
    np.testing.assert_allclose(metrics["logps/chosen"], per_token, rtol=1e-6)


def test_an_optional_array_is_passed_when_the_batch_has_it():
    found, arrays = combined(objective="dpo"), pairs()
    soft = jnp.array([1.0, 0.0, 0.5, 0.8, 0.2])
    hard, _ = found.apply(arrays)
    loss, _ = found.apply(arrays | {"preference": soft})
    other, _ = losses.dpo(arrays["policy_logps"][:, ::-1], arrays["ref_logps"][:, ::-1])
    want = soft * hard["rows"] + (1 - soft) * other
    np.testing.assert_allclose(loss["rows"], want, rtol=1e-5)


@pytest.mark.parametrize("name", ["hinge", "simpo", "dpo,hinge"])
def test_soft_labels_are_refused_where_a_loss_would_forget_them(name):
    found = combined(objective=name)
    offered = pairs() | {"preference": jnp.ones(5)}
    if name == "dpo,hinge":  # one that takes them is enough
        found.apply(offered)
        return
    with pytest.raises(UserError, match=f"{name}.*carry 'preference'.*choose an"):
        found.apply(offered)


def test_margins_are_refused_where_a_loss_would_forget_them():
    made = objective.combine(
        config("reward", objective="bradley_terry_ranked"), reward.KIND
    )
    arrays = {"rewards": jnp.zeros((2, 3)), "present": jnp.ones((2, 3), bool)}
    made.apply(arrays)
    with pytest.raises(UserError, match="carry 'margin'"):
        made.apply(arrays | {"margin": jnp.ones(2)})


def test_a_callable_and_its_keywords():
    def mine(policy_logps, rows=None, *, strength, shift=0.0):
        loss = strength * policy_logps[:, 0] + shift
        return (loss if rows is None else jnp.where(rows, loss, 0)), {}

    settings = dict(objective_args=dict(strength=2.0))
    found = combined(objective=mine, **settings)
    assert found.needs == {"policy_logps", "rows"}
    arrays = pairs() | {"rows": jnp.array([True, False, True, True, True])}
    loss, _ = found.apply(arrays)
    want = np.where(arrays["rows"], 2 * arrays["policy_logps"][:, 0], 0)
    np.testing.assert_allclose(loss["rows"], want, rtol=1e-6)
    with pytest.raises(UserError, match="mine: asks for strength"):
        combined(objective=mine)


def test_a_function_with_free_keywords_gets_all_of_them():
    def mine(policy_logps, **settings):
        return policy_logps[:, 0] * settings["a"] + settings["b"], {}

    loss, _ = combined(objective=mine, objective_args=dict(a=2.0, b=1.0)).apply(pairs())
    np.testing.assert_allclose(
        loss["rows"], 2 * pairs()["policy_logps"][:, 0] + 1, rtol=1e-6
    )


@pytest.fixture
def package(monkeypatch):
    """A package of the user's own, with a loss in it."""
    module = types.ModuleType("my_pkg_of_losses")
    module.mine = lambda policy_logps, *, beta=1.0: (beta * policy_logps[:, 1], {})
    monkeypatch.setitem(sys.modules, "my_pkg_of_losses", module)
    return "my_pkg_of_losses"


def test_a_function_of_ones_own_package_also_in_a_list(package):
    arrays = pairs()
    loss, _ = combined(
        objective=f"{package}:mine,hinge",
        objective_weights=(3.0, 1.0),
        objective_args=dict(beta=0.5),
    ).apply(arrays)
    hinge = losses.hinge(arrays["policy_logps"], arrays["ref_logps"], beta=0.5)[0]
    want = 3 * 0.5 * arrays["policy_logps"][:, 1] + hinge
    np.testing.assert_allclose(loss["rows"], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(objective="dop"), r"'dop': no such loss; did you mean 'dpo'\? "),
        (dict(objective="simpoo"), "did you mean 'simpo'"),
        (dict(objective="dpo,hinj"), "'hinj': no such loss; did you mean 'hinge'"),
        (dict(objective="xyzxyz"), "no such loss; this kind .* apo_zero"),
        (dict(objective="kto"), "'kto': is a loss of single judged completions"),
        (
            dict(objective="gspo"),
            "is a loss of sampled tokens; this kind of stage has dpo",
        ),
        (dict(objective=" , "), "objective: is empty"),
        (dict(objective="nowhere_at_all:mine"), "cannot import it"),
        (dict(objective="json:nothing"), "cannot import it"),
        (
            dict(objective="dpo,sft", objective_weights=(1.0,)),
            r"objective_weights=\(1.0,\): 1 weights for the 2 losses",
        ),
        (
            dict(objective="dpo", objective_weights=(1.0, 2.0)),
            "2 weights for the 1 losses",
        ),
        (
            dict(objective="dpo", objective_args=dict(bta=0.1)),
            "objective_args.bta: unknown key; did you mean 'beta'",
        ),
        (
            dict(objective="sft,hinge", objective_args=dict(gamma=0.1)),
            "objective_args.gamma: unknown key",
        ),
        (
            dict(objective=lambda rewards: (rewards, {})),
            "asks for rewards; this stage offers policy_logps, ref_logps",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, says):
    with pytest.raises(UserError, match=says) as error:
        combined(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            dict(objective="dpo", objective_args=dict(beta=0.0)),
            "args.beta=0.0: must be",
        ),
        (dict(objective="dpo", objective_args=dict(beta=-1)), "args.beta=-1: must be"),
        (
            dict(objective="sft,robust", objective_args=dict(label_smoothing=0.5)),
            "objective_args.label_smoothing=0.5: must be .* below 0.5",
        ),
        (
            dict(objective="hinge", objective_args=dict(f_divergence="js")),
            "args.f_divergence: is a key of the stage itself, .* set f_divergence= be",
        ),
        (
            dict(objective=lambda policy_logps: (policy_logps.mean(), {})),
            r"its loss has 0 axes at rows; expected f32\[B\], not reduced",
        ),
        (
            dict(objective=lambda chosen_logps: ({"chosen": chosen_logps[0]}, {})),
            r"its loss has 1 axes at chosen; expected f32\[B, T\], not reduced",
        ),
        (
            dict(objective=lambda policy_logps: ({"row": policy_logps[:, 0]}, {})),
            "has a loss at 'row'; this kind of stage has rows, chosen, document",
        ),
        (
            dict(objective=lambda policy_logps: policy_logps[:, 0]),
            r"expected it to return \(loss, metrics\)",
        ),
        (
            dict(objective=lambda policy_logps, rows: (policy_logps @ rows, {})),
            r"fails on policy_logps f32\[B, 2\], rows bool\[B\] \(",
        ),
    ],
)
def test_what_a_loss_refuses_is_known_before_anything_is_compiled(changes, says):
    with pytest.raises(UserError, match=says) as error:
        combined(**changes)
    assert "\n" not in str(error.value)


def test_metrics_that_are_reduced_are_refused():
    with pytest.raises(UserError, match="'mine': has 0 axes; expected 1, not reduced"):
        objective.measured({"mine": jnp.zeros(())}, {1: jnp.ones(2, bool)})


def test_arrays_are_no_hyper_parameters():
    with pytest.raises(UserError, match="objective_args.preference: unknown key"):
        combined(objective="dpo", objective_args=dict(preference=0.5))


@pytest.mark.parametrize("name", ["aot", "dpo,aot_unpaired"])
def test_losses_over_the_whole_batch_are_known(name):
    assert combined(objective=name).across_rows == (name.split(",")[-1],)


def test_each_kind_offers_what_its_losses_ask_for():
    """Every name of every table can be built, and asks for nothing it cannot get."""
    for kind in kinds.KINDS.values():
        for name in kind.losses:
            stage = config(kind.name, objective=name)
            loss = objective.combine(stage, kind)
            assert loss.needs and loss.needs <= set(kind.offers), name
            assert loss.places and loss.places <= set(kind.places), name


def test_metrics_are_counted_under_the_mask_of_their_rank():
    rows = jnp.array([True, False])
    tokens = jnp.array([[True, True], [False, True]])
    nan = jnp.nan
    found = objective.measured(
        {
            "row": jnp.array([3.0, nan]),
            "token": jnp.array([[1.0, 2.0], [nan, 6.0]]),
            "ratio_max": jnp.array([[1.0, 4.0], [9.0, 2.0]]),
            "own": (jnp.array([nan, 5.0]), jnp.array([False, True])),
        },
        {1: rows, 2: tokens},
    )
    assert isinstance(found["ratio_max"], masked.Max)
    got = {k: float(v) for k, v in masked.compute(found).items()}
    assert got == {"row": 3.0, "token": 3.0, "ratio_max": 4.0, "own": 5.0}


def test_weights_reach_the_gradient():
    arrays = pairs()
    found = combined(objective="dpo,hinge", objective_weights=(0.0, 2.0))

    def total(logps):
        return found.apply(arrays | {"policy_logps": logps})[0]["rows"].sum()

    def hinge(logps):
        return 2 * losses.hinge(logps, arrays["ref_logps"])[0].sum()

    np.testing.assert_allclose(
        jax.grad(total)(arrays["policy_logps"]),
        jax.grad(hinge)(arrays["policy_logps"]),
        rtol=1e-6,
    )
