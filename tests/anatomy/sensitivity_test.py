"""Steps of one size along several directions."""

import jax
import numpy as np
import pytest

from stagecraft import tree
from stagecraft.anatomy import causes, sensitivity
from stagecraft.anatomy.texts import Texts
from stagecraft.models.transformer import Transformer
from tests import tiny


@pytest.fixture(scope="module")
def models():
    build = jax.jit(lambda key: Transformer(tiny.CONFIG, key))
    return [build(jax.random.key(n)) for n in (0, 1)]


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(0)
    return Texts.of(
        [
            (random.integers(1, 64, 3).tolist(), random.integers(1, 64, 6).tolist())
            for _ in range(8)
        ]
    )


def flat(model):
    return np.concatenate(
        [np.ravel(np.asarray(x, np.float64)) for x in tree.named(model).values()]
    )


def test_a_step_has_its_size_and_its_direction(models):
    a, b = models
    direction = sensitivity.change(a, b)
    moved = sensitivity.step(a, direction, 0.02)
    delta = flat(moved) - flat(a)
    assert np.linalg.norm(delta) / np.linalg.norm(flat(a)) == pytest.approx(
        0.02, rel=1e-4
    )
    along = delta @ (flat(b) - flat(a))
    size = np.linalg.norm(delta) * np.linalg.norm(flat(b) - flat(a))
    assert along / size == pytest.approx(1, abs=1e-5)


def test_noise_has_the_norm_of_each_array_and_another_direction(models):
    direction = sensitivity.change(*models)
    noise = sensitivity.noise(direction, seed=3)
    for name, array in tree.named(direction).items():
        own = np.linalg.norm(tree.named(noise)[name])
        assert own == pytest.approx(float(np.linalg.norm(array)), rel=1e-5), name
    cosine = flat(noise) @ flat(direction) / np.linalg.norm(flat(direction)) ** 2
    assert abs(cosine) < 0.1
    again = sensitivity.noise(direction, seed=4)
    assert not np.allclose(flat(again), flat(noise))


def test_no_step_changes_nothing_and_larger_ones_more(models, texts):
    a, b = models
    directions = {"b": sensitivity.change(a, b)}
    none, one, other = sensitivity.measure(a, directions, (0, 0.1, 0.3), texts, texts)
    assert none["divergence"] == pytest.approx(0, abs=1e-6)
    assert none["forgotten"] == pytest.approx(0, abs=1e-5)
    assert 1e-4 < one["divergence"] < other["divergence"]
    whole = sensitivity.norm(directions["b"]) / sensitivity.norm(a)
    (row,) = sensitivity.measure(a, directions, (whole,), texts, texts)
    expected = float(causes.divergence(b, a, texts.batch).mean())
    assert row["divergence"] == pytest.approx(expected, rel=1e-3)
    lost = [float(causes.answer_loss(m, texts.batch)) for m in (b, a)]
    assert row["forgotten"] == pytest.approx(lost[0] - lost[1], rel=1e-3)
