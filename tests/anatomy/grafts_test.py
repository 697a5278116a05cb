"""Grafts, Shapley values and lenses against cases whose answer is known."""

import jax
import numpy as np
import pytest

from stagecraft import tree
from stagecraft.anatomy import grafts, lens
from stagecraft.anatomy.grafts import Part
from stagecraft.errors import UserError
from stagecraft.models.transformer import Transformer
from tests import tiny

PLAYERS = {f"layer {i}": [Part("w", (i,))] for i in range(4)}
A = {"w": np.zeros((4, 3), np.float32)}


def after(*layers):
    w = A["w"].copy()
    w[list(layers)] = 1.0
    return {"w": w}


def on(model):
    """Which layers are those of the model after."""
    return [bool(row.any()) for row in np.asarray(model["w"])]


def attributed(value, b):
    return grafts.attribute(lambda t: (float(value(on(t))), 0.0), A, b, PLAYERS)


def column(found, key):
    return [row[key] for row in found["players"].values()]


def test_the_only_layer_that_changed_did_it():
    found = attributed(lambda x: 2 + 3 * x[2], after(2))
    for key in ("sufficiency", "necessity", "shapley", "norm_share"):
        assert column(found, key) == pytest.approx([0, 0, 1, 0])
    assert column(found, "density") == [None, None, pytest.approx(1), None]
    assert (found["before"], found["after"]) == (2, 5)


def test_either_of_two_layers_suffices():
    found = attributed(lambda x: x[0] or x[3], after(0, 3))
    assert column(found, "sufficiency") == pytest.approx([1, 0, 0, 1])
    assert column(found, "necessity") == pytest.approx([0, 0, 0, 0])
    assert column(found, "shapley") == pytest.approx([0.5, 0, 0, 0.5])


def test_both_of_two_layers_are_needed():
    found = attributed(lambda x: x[1] and x[2], after(1, 2))
    assert column(found, "sufficiency") == pytest.approx([0, 0, 0, 0])
    assert column(found, "necessity") == pytest.approx([0, 1, 1, 0])
    assert column(found, "shapley") == pytest.approx([0, 0.5, 0.5, 0])


def test_shapley_values_are_means_over_orders_and_add_up():
    import itertools

    random, names = np.random.default_rng(0), "abcd"
    table = {
        frozenset(s): random.normal()
        for n in range(5)
        for s in itertools.combinations(names, n)
    }
    found = grafts.shapley(table.__getitem__, names)
    orders = list(itertools.permutations(names))
    for player in names:
        gains = []
        for order in orders:
            ahead = frozenset(order[: order.index(player)])
            gains.append(table[ahead | {player}] - table[ahead])
        assert found[player] == pytest.approx(np.mean(gains))
    total = table[frozenset(names)] - table[frozenset()]
    assert sum(found.values()) == pytest.approx(total, abs=1e-9)


def test_a_change_within_its_error_is_not_attributed():
    with pytest.raises(UserError, match="less than three standard errors"):
        grafts.attribute(lambda t: (sum(on(t)), 0.3), A, after(0), PLAYERS)


def test_a_graft_that_broke_the_model_shows_in_its_loss():
    def loss(model):
        x = on(model)
        # The two only work together; the chord rises by .2 for half of the change.
        return 2.0 + 0.4 * x[1] + (x[0] != x[1])

    b = after(0, 1)
    found = grafts.attribute(
        lambda t: (float(sum(on(t))), 0.0), A, b, PLAYERS, loss=loss
    )
    assert column(found, "loss_excess") == pytest.approx([0.8, 1.2, 0, 0])


@pytest.fixture(scope="module")
def models():
    config = tiny.config(layers=2, tied=False)
    make = jax.jit(lambda key: Transformer(config, key))
    return config, make(jax.random.key(0)), make(jax.random.key(1))


def test_players_divide_all_weights(models):
    config, a, b = models
    names = list(tree.named(a))
    for divide in (grafts.layer_players, grafts.kind_players):
        for new in ((), (3, 5)):
            players = divide(names, config, new)
            parts = [part for own in players.values() for part in own]
            whole, none = grafts.graft(a, b, parts), grafts.graft(a, b, [])
            for name in names:
                ours = [tree.named(t)[name] for t in (whole, b, none, a)]
                np.testing.assert_array_equal(*ours[:2])
                np.testing.assert_array_equal(*ours[2:])
            assert sum(grafts.norms(a, b, players).values()) == pytest.approx(1)
            for player, own in players.items():  # and none is in two of them
                others = [p for k, v in players.items() if k != player for p in v]
                back = grafts.graft(grafts.graft(a, b, others), a, others)
                one = grafts.graft(a, b, own)
                assert grafts.norms(one, b, players)[player] == 0
                assert tree.digest(back) == tree.digest(a)
    assert "layer 1" in grafts.layer_players(names, config)
    assert len(grafts.layer_players(names, tiny.config(layers=20))) == 6 + 2


def test_only_new_tokens_are_taken(models):
    config, a, b = models
    players = grafts.layer_players(list(tree.named(a)), config, (3, 5))
    table = np.asarray(tree.named(grafts.graft(a, b, players[grafts.NEW]))["embed"])
    ones, others = (np.asarray(tree.named(t)["embed"]) for t in (a, b))
    for row in range(len(table)):
        expected = (others if row in (3, 5) else ones)[row]
        np.testing.assert_array_equal(table[row], expected)


def test_a_path_has_a_barrier_where_it_rises_above_its_chord():
    def hump(model):
        x = float(np.asarray(model["w"])[0, 0])
        return 1 + x + (0.75 if x == 0.5 else 0.0)

    found = grafts.path(hump, A, after(0), steps=(-0.5, 0.0, 0.5, 1.0, 2.0))
    assert found["values"] == pytest.approx([0.5, 1, 2.25, 2, 3])
    assert found["barrier"] == pytest.approx(0.75)
    assert grafts.path(lambda m: hump(m) ** 0, A, after(0))["barrier"] == 0
    assert grafts.STEPS[0] == -0.5 and 1.0 in grafts.STEPS and 0.0 in grafts.STEPS


def test_a_behaviour_that_reads_two_directions_needs_those(models):
    """Read through the first two of M: they suffice, and the others do nothing."""
    _, a, b = models
    names = list(tree.named(a))
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0]

    def read(model):
        down = np.asarray(tree.named(model)["layers/ff/down"], np.float64)
        return float(np.sum(down @ basis[:, :2]))

    def sufficiency(some):
        moved = read(grafts.project(a, b, some)) - read(a)
        return moved / (read(b) - read(a))

    assert sufficiency(basis[:, :2]) == pytest.approx(1, abs=1e-3)
    assert sufficiency(basis[:, 2:]) == pytest.approx(0, abs=1e-3)
    other = tree.named(grafts.project(a, b, basis))
    for name in names:
        writes = name in ("layers/attention/out", "layers/ff/down")
        expected = tree.named(b if writes else a)[name]
        np.testing.assert_allclose(other[name], expected, atol=1e-5)


# -- lenses ----------------------------------------------------------------------------


def test_the_gain_of_noise_is_one_and_of_what_logits_read_is_more():
    random = np.random.default_rng(0)
    unembed, p = random.normal(size=(512, 128)), random.random(512) ** 4
    scale = 1 + 0.1 * random.normal(size=128)
    metric = lens.logit_metric(unembed, scale, p)
    by_hand = np.zeros((128, 128))
    share = p / p.sum()
    mean = share @ unembed
    for one, row in zip(share, unembed, strict=True):
        by_hand += one * np.outer(scale * (row - mean), scale * (row - mean))
    np.testing.assert_allclose(metric, by_hand, rtol=1e-10)
    noise = random.normal(size=(256, 128))
    assert lens.logit_gain(noise, metric) == pytest.approx(1, abs=0.1)
    values, vectors = np.linalg.eigh(metric)
    best = np.outer(random.normal(size=256), vectors[:, -1])
    expected = values[-1] / values.mean()
    assert lens.logit_gain(best, metric) == pytest.approx(expected)
    assert lens.logit_gain(0 * noise, metric) is None
    # What all tokens share moves no probability.
    shifted = lens.logit_metric(unembed + random.normal(size=128), scale, p)
    np.testing.assert_allclose(shifted, metric, rtol=1e-9)


def test_a_linear_lens_finds_a_known_affine_map():
    random = np.random.default_rng(1)
    hidden = random.normal(size=(2000, 16))
    weights, offset = random.normal(size=(16, 16)), random.normal(size=16)
    final = hidden @ weights + offset
    found = lens.linear_lens(hidden, final, ridge=1e-12)
    np.testing.assert_allclose(found[0], weights, atol=1e-8)
    np.testing.assert_allclose(found[1], offset, atol=1e-8)
    unembed = random.normal(size=(40, 16))
    logits = final @ unembed.T
    by_lens = (hidden @ found[0] + found[1]) @ unembed.T
    assert lens.kl(logits, by_lens).max() < 1e-6
    assert lens.kl(logits, hidden @ unembed.T).mean() > 0.1


def test_kl_is_that_of_the_probabilities():
    p, q = np.array([0.5, 0.25, 0.25, 0.0]), np.array([0.25, 0.25, 0.5, 0.0])
    with np.errstate(divide="ignore"):
        tables = np.log(p), np.log(q)
    found = lens.kl(tables[0] + 3.0, tables[1] - 1.0)
    assert found == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(0.5))
    assert lens.kl(tables[0], tables[0]) == 0
