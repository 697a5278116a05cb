"""What a step reports of its tokens: those seen without padding, and the work."""

import jax
import pytest

from stagecraft.anatomy import cost
from stagecraft.stages import records
from tests.stages import cases
from tests.stages.answers import recording

PROMPT, NEW = 8, 10  # tokens of `cases.prompts` and of `cases.config`


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        *((kind, 1) for kind in cases.KINDS),
        *((kind, 2) for kind in ("language_model", "preference", "policy")),
    ],
)
def test_num_tokens_are_the_tokens_that_are_no_padding(kind, sizes):
    """TRL: the sum of the attention mask; of samples, their prompts and their own."""
    mesh = cases.single() if sizes == 1 else cases.sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh), cases.watched() as seen:
        made, raw, _ = cases.stage(kind, mesh)
        state = made.init(jax.random.key(0))
        _, metrics = made.update(state, made.prepare(state, raw, jax.random.key(1)))
    if "segments" in raw:
        expected = (raw["segments"] > 0).sum()
    else:  # all that were sampled, also where only some groups are learned from
        lengths = seen["drawn"]["mask"].sum(1)
        samples = len(lengths) // len(raw["prompt_mask"])
        expected = samples * raw["prompt_mask"].sum() + lengths.sum()
    assert float(metrics["num_tokens"]) == expected


def test_pretraining_rows_beside_a_rollout_are_tokens_too():
    mesh, text = cases.single(), cases.documents(rows=4)
    with jax.set_mesh(mesh), cases.watched() as seen:
        made, raw, _ = cases.stage("policy", mesh)
        raw = raw | {f"ptx_{k}": v for k, v in text.items()}
        state = made.init(jax.random.key(0))
        _, metrics = made.update(state, made.prepare(state, raw, jax.random.key(1)))
    expected = raw["prompt_mask"].sum() + seen["drawn"]["mask"].sum()
    assert float(metrics["num_tokens"]) == expected + (text["segments"] > 0).sum()


def work(kind, without=(), **changes):
    mesh = cases.single()
    with jax.set_mesh(mesh):
        made, raw, _ = cases.stage(kind, mesh, without=without, **changes)
        return made.work(raw)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        # One step on a fresh rollout: no log-probs before it are needed.
        (dict(epochs=1, minibatches=1, kl_coef=0.0), 0),
        # The policy that sampled, and the reference.
        (dict(epochs=1, minibatches=1, kl_coef=0.1), 2),
        (dict(epochs=2, minibatches=1, kl_coef=0.0), 1),
        (dict(epochs=2, minibatches=2, kl_coef=0.1), 2),
    ],
)
def test_groups_by_hand(changes, passes):
    """16 prompts, 3 completions of each, half of the groups learned from."""
    done = work("group_policy", group_size=3, batch_size=8, oversample=2, **changes)
    rows, row = 8 * 3, PROMPT + NEW
    assert done == {
        "trained": changes["epochs"] * rows * row,
        "scored": passes * rows * row,
        "scalar_scored": 16 * 3 * row,
        "sampled": 16 * PROMPT + 16 * 3 * NEW,  # the prefill is shared
        "length": row,
    }


def test_the_passes_of_groups_are_those_that_run(monkeypatch):
    """The forward passes that `judge` makes, by what it calls."""
    from stagecraft.stages import group_policy

    calls = []
    real = group_policy.response_logps

    def watched(model, batch, *arguments, **settings):
        calls.append(batch["ids"].size)
        return real(model, batch, *arguments, **settings)

    monkeypatch.setattr(group_policy, "response_logps", watched)
    mesh = cases.single()
    with jax.set_mesh(mesh):
        made, raw, _ = cases.stage("group_policy", mesh)
        state = made.init(jax.random.key(0))
        made.prepare(state, raw, jax.random.key(1))
        assert sum(calls) == made.work(raw)["scored"]


def test_two_completions_share_their_prompt():
    done = work("online_preference")
    tokens = 2 * 16 * (PROMPT + NEW)
    assert done["sampled"] == 16 * PROMPT + 2 * 16 * NEW
    assert (done["trained"], done["scored"], done["scalar_scored"]) == (tokens,) * 3


class Reader:
    """A prompt has as many tokens as characters; 8 rows at once."""

    batch_size = 8

    def encode(self, prompt, *, chat_format):
        assert chat_format
        return list(prompt)


@pytest.mark.parametrize("reward", [None, "a reward model"])
def test_records_by_hand(tmp_path, reward):
    """Every answer reads its prompt; rows are filled up to whole batches."""
    asked = [{"prompt": "x" * 20}] * 4
    config = cases.defaults.stage(
        "comparisons", prompts=7, batch_size=6, sampling=dict(max_new_tokens=10)
    )
    whole = recording(tmp_path, Reader(), "pairs", asked=asked, reward=reward)
    done = records.work(config, whole, samples=2)
    # Three parts of 3, 3 and 1 prompts, each one batch of 8 rows; 20 is padded to 32.
    tokens = 3 * 8 * (32 + 10)
    assert done["sampled"] == tokens and done["context"] == (42 + 1) / 2
    # A reward model reads 128 rows at once, 30 tokens padded to 32.
    assert done["scalar_scored"] == (3 * 128 * 32 if reward else 0)


def test_a_reward_model_of_another_size_is_counted_by_its_own():
    small = vars(cases.CONFIG)
    large = small | {"width": 2 * small["width"], "ff_width": 2 * small["ff_width"]}
    counters = {"sampled": 10, "scalar_scored": 20, "context": 4.0}
    expected = cost.forward_flops(small, 10, 4.0)
    expected += cost.forward_flops(large, 20, 4.0, scalar=True)
    assert cost.stage_flops(counters, small, scalar=large) == pytest.approx(expected)
