"""What only a mutant showed to be untested; see `tests/mutations.py`."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stagecraft import defaults, run
from stagecraft.data import feed
from stagecraft.stages import kinds, rollout
from stagecraft.text.tokenizer import Tokenizer


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


@pytest.mark.parametrize(
    ("kind", "rows"), [("group_policy", 6), ("policy", 2), ("online_preference", 2)]
)
def test_only_groups_are_sampled_in_excess(kind, rows, tmp_path):
    words = ["What is the capital of France? Paris."] * 20
    tokenizer = Tokenizer.train(words, 300, tmp_path / "tokenizer.model")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(9))
    )
    config = defaults.experiment()
    stage = defaults.stage(kind, batch_size=2)
    stage.data.files = str(tmp_path / "prompts.jsonl")
    if kind == "group_policy":
        stage.oversample = 3
    made = feed.build(stage, tokenizer, tmp_path, config)
    assert made.dataset.batch_at(0)["prompt_ids"].shape[0] == rows
