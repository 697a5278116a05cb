"""Every objective's update is the same on a mesh of eight devices as on one.

All losses of a table go into one update, each with a weight of its own: programs are
what these tests spend their time on, and a loss that came out differently on a mesh
would show in the sum.
"""

import jax
import numpy as np
import pytest

from stagecraft import losses, sharding, tree
from stagecraft.stages import kinds as records
from tests.stages import cases

KINDS = (
    *("language_model", "reward", "preference", "unpaired_preference"),
    "group_policy",
)


# Bradley-Terry alone leaves the head's bias where it was.
ARGUMENTS = {"reward": dict(centering=0.01)}


def names(kind):
    """One name of each loss in the table."""
    return [*{f: name for name, f in records.KINDS[kind].losses.items()}.values()]


def update(kind, shared):
    """Loss, metrics and the change of every parameter, after one step of plain SGD."""
    every = names(kind)
    weights = np.random.default_rng(len(every)).uniform(0.5, 1.5, len(every))
    with jax.set_mesh(shared):
        made, raw, _ = cases.stage(
            kind,
            shared,
            objective=",".join(every),
            objective_weights=tuple(weights.tolist()),
            objective_args=ARGUMENTS.get(kind, {}),
        )
        state = made.init(jax.random.key(0))
        before = {k: np.asarray(v) for k, v in tree.named(state.model).items()}
        batch = made.prepare(state, raw, jax.random.key(1))
        state, metrics = made.update(state, batch)
        change = {
            k: np.asarray(v) - before[k] for k, v in tree.named(state.model).items()
        }
    return cases.told(metrics), change


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_single(kind):
    one, change = update(kind, cases.single())
    other, changed = update(kind, sharding.make_mesh(2, 2, 2))
    assert one.keys() == other.keys() and np.isfinite(list(one.values())).all()
    for name, value in one.items():
        assert other[name] == pytest.approx(value, rel=2e-4, abs=2e-4), name
    for name, value in change.items():
        scale = np.abs(value).max()
        assert scale > 0
        assert np.abs(value - changed[name]).max() <= 3e-5 * scale + 2e-7, name


def test_no_objective_is_left_out():
    covered = {
        f for kind in KINDS for f in map(records.KINDS[kind].losses.get, names(kind))
    }
    assert covered == {f for table in losses.TABLES.values() for f in table.values()}
