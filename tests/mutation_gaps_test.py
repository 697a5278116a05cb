"""What only a mutant showed to be untested; see `tests/mutations.py`."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import defaults, run
from stagecraft.stages import kinds, rollout


@pytest.mark.parametrize("kind", ["policy", "group_policy", "online_preference"])
def test_a_completion_ends_with_its_turn_and_not_with_a_document(kind, monkeypatch):
    given = {}
    monkeypatch.setitem(kinds.MAKE, kind, lambda *_, **extra: given.update(extra))
    tokenizer = types.SimpleNamespace(end=7, eos=3, vocab_size=512)
    config = defaults.experiment()
    config.stages.sampled = defaults.stage(kind)
    current = run.Run(None, config, tokenizer)
    data = types.SimpleNamespace(
        samples=[], records=[], dataset=None, heldout=None, reference=None
    )
    run._make(current, config.stages.sampled, current.mesh(), {}, data)
    assert given["stop_id"] == tokenizer.end


def test_a_row_that_one_source_could_not_score_is_not_scored():
    rewards = jnp.array([[1.0, 2.0], [jnp.nan, 2.0], [1.0, jnp.inf]])
    found, scored = jax.jit(lambda r: rollout.total(r, (1.0, 10.0)))(rewards)
    assert scored.tolist() == [True, False, False]
    np.testing.assert_array_equal(found, [21.0, 0.0, 0.0])
