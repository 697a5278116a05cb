"""Tiny models and batches that the tests of all stages share."""

import contextlib
import functools
from unittest import mock

import jax
import numpy as np

from stagecraft import defaults, sharding
from stagecraft.models.transformer import ScalarModel, Transformer
from stagecraft.stages import rollout
from stagecraft.stages.kinds import KINDS as RECORDS
from stagecraft.stages.stage import Context
from tests import tiny

CONFIG = tiny.CONFIG
single = tiny.single
STOP = 5


def models(mesh):
    """{"policy", "reference", "reward"}: three different models on a mesh."""
    return dict(_models(mesh))


@functools.cache
def _models(mesh):
    def make(key):
        keys = jax.random.split(key, 3)
        return {
            "policy": Transformer(CONFIG, keys[0]),
            "reference": Transformer(CONFIG, keys[1]),
            "reward": ScalarModel(Transformer(CONFIG, keys[2]), keys[2]),
        }

    return sharding.init_sharded(make, mesh)(jax.random.key(7))


def documents(rows=16, length=24, seed=0):
    """A packed language-model batch: two documents a row, some padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(8, 64, (rows, length)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    for row in range(rows):
        cut, end = rng.integers(4, 10), rng.integers(16, length + 1)
        segments[row, cut:] = 2
        positions[row, cut:] -= cut
        segments[row, end:] = 0
    mask = (segments > 0) & (rng.random((rows, length)) < 0.7)
    return dict(ids=ids, mask=mask, segments=segments, positions=positions)


def pairs(rows=16, length=16, seed=0):
    """A batch of comparisons: prompts of 4 tokens, answers of different lengths."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(6, length + 1, (rows, 2, 1))
    column = np.arange(length)[None, None]
    return dict(
        ids=rng.integers(8, 64, (rows, 2, length)).astype(np.int32),
        mask=(column >= 4) & (column < ends),
        segments=(column < ends).astype(np.int32) * np.ones((rows, 2, 1), np.int32),
        positions=np.tile(column.astype(np.int32), (rows, 2, 1)),
    )


def prompts(rows=16, length=8, seed=0):
    """A batch of left-padded prompts."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 5, (rows, 1))
    return dict(
        prompt_ids=rng.integers(8, 64, (rows, length)).astype(np.int32),
        prompt_mask=np.arange(length)[None] >= starts,
    )


def judged(rows=16, length=16, seed=0):
    """A batch of single completions, some desirable, prompts of different lengths."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(2, 6, (rows, 1))
    ends = starts + rng.integers(1, length - 5, (rows, 1))
    column = np.arange(length)[None]
    ids = rng.integers(8, 64, (rows, length)) * (column < ends)
    return dict(
        ids=ids.astype(np.int32),
        mask=(column >= starts) & (column < ends),
        segments=(column < ends).astype(np.int32),
        positions=np.tile(column.astype(np.int32), (rows, 1)),
        label=rng.random(rows) < 0.5,
    )


OPTIMIZER = dict(name="sgd", lr=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=0.0)


BATCH = {
    "language_model": documents,
    "reward": pairs,
    "preference": pairs,
    "unpaired_preference": judged,
    "online_preference": prompts,
    "policy": prompts,
    "group_policy": prompts,
}
# Settings that make every part of a stage act.
SETTINGS = {
    "policy": dict(epochs=2, minibatches=2),
    "group_policy": dict(
        **dict(group_size=2, batch_size=8, oversample=2, overlong_cache=4),
        **dict(epochs=2, minibatches=2, kl_coef=0.1),
    ),
}
KINDS = tuple(BATCH)


def config(kind, **changes):
    """A stage's config, small, with plain SGD; `changes` to it."""
    changes = dict(optimizer=OPTIMIZER, steps=10, batch_size=16) | changes
    if RECORDS[kind].samples:
        changes = dict(sampling=dict(max_new_tokens=10, temperature=0.7)) | changes
    return defaults.stage(kind, **(SETTINGS.get(kind, {}) | changes))


def stage(
    kind,
    mesh,
    *,
    verifiers=None,
    without=(),
    start=None,
    rollout_mesh=None,
    **changes,
):
    """A stage of one kind, its raw batch, and its config.

    Args:
        kind: one of `KINDS`.
        mesh: the mesh.
        verifiers: for stages that sample.
        without: roles that nobody plays.
        start: a model to start from in place of the policy.
        rollout_mesh: that a stage samples on, where it is not `mesh`.
        **changes: to the config.
    """
    stage_config = config(kind, **changes)
    known = models(mesh)
    known |= {"start": start or known["policy"], "value": known["reward"]}
    known["judge"] = known["policy"]
    roles = {name: known[name] for name in RECORDS[kind].roles if name not in without}
    context = Context(mesh, CONFIG, roles, stop_ids=(STOP,), verifiers=verifiers)
    context = context._replace(rollout_mesh=rollout_mesh)
    return RECORDS[kind].make(stage_config, context), BATCH[kind](), stage_config


# -- the judge: plain numpy from whole logits ------------------------------------------

logits = jax.jit(lambda model, *arrays: model.logits(*arrays))
outputs = jax.jit(lambda model, *arrays: model(*arrays))  # of a scalar model


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def arrays(batch):
    """ids, positions, segments of a batch, its rows in one axis."""
    found = (np.asarray(batch[k]) for k in ("ids", "positions", "segments"))
    return [x.reshape(-1, x.shape[-1]) for x in found]


def distributions(model, batch):
    """f64[..., T, V]: log-probabilities of each token, seen from the one before."""
    found = log_softmax(np.asarray(logits(model, *arrays(batch)), np.float64))
    found = np.concatenate([np.zeros_like(found[:, :1]), found[:, :-1]], 1)
    return found.reshape(*batch["ids"].shape, -1)


def token_logps(model, batch, temperature=1.0):
    """f64[..., T]: log p of each token, seen from the one before; 0 in column 0."""
    ids = arrays(batch)[0]
    raw = np.asarray(logits(model, *arrays(batch)), np.float64)
    logps = log_softmax(raw / temperature)[:, :-1]
    found = np.take_along_axis(logps, ids[:, 1:, None], -1)[..., 0]
    found = np.concatenate([np.zeros((len(ids), 1)), found], 1)
    return found.reshape(batch["ids"].shape)


def scalars(model, batch):
    """f64[R, T]: a scalar model's output at every token."""
    return np.asarray(outputs(model, *arrays(batch)), np.float64)


def host(tree):
    return jax.tree.map(np.asarray, tree)


@contextlib.contextmanager
def watched():
    """What stages made inside sample and how it is scored, as a dict being filled."""
    seen, real = {}, rollout.make

    def make(*args, **settings):
        rollouts = real(*args, **settings)

        def sample(*args):
            samples = rollouts.sample(*args)
            seen["drawn"] = host(samples)
            return samples

        def score(*args):
            rewards = rollouts.score(*args)
            seen["rewards"] = np.asarray(rewards)
            return rewards

        return rollouts._replace(sample=sample, score=score)

    with mock.patch.object(rollout, "make", make):
        yield seen


def told(metrics):
    """{name: float} of an update's metrics."""
    return {k: float(v) for k, v in metrics.items()}
