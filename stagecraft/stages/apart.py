"""Rollouts apart from training: sampled on other devices, perhaps by older weights.

Where a rollout may be old, training goes on while a later one is sampled, and what the
weights have learned since is corrected for: each token's policy loss counts by the
ratio of its probability now to that at which it was sampled, up to a cap. That is
truncated importance sampling (Ionides 2008, doi:10.1198/106186008X320456), as IMPALA
(Espeholt et al. 2018, arxiv.org/abs/1802.01561) truncates it.
"""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from stagecraft import masked, sharding
from stagecraft.losses.policy import probability_ratio


class Begun(NamedTuple):
    """A rollout whose sampling was started; its arrays may still be computed.

    Attributes:
        rollout: as `rollout.Rollouts.sample` returns, not cut, on the rollout mesh.
        step: i32[], the updates that the weights had seen.
    """

    rollout: dict[str, jax.Array]
    step: jax.Array


class Between:
    """What goes from the devices that train to those that sample, and back.

    Args:
        training: the stage's mesh.
        rollout: the mesh that samples; None where that is the stage's, and nothing
            moves.
    """

    def __init__(self, training: Mesh, rollout: Mesh | None = None):
        self.training, self.rollout = training, rollout
        self.sampling = rollout or training
        self._before = []  # (leaf, the same where it samples) of the last weights

    def sampler(self):
        """Returns a context in which functions run where rollouts are sampled."""
        return jax.set_mesh(self.rollout) if self.rollout else contextlib.nullcontext()

    def weights(self, policy: Any) -> Any:
        """Returns the policy on the devices that sample.

        Arrays that are those of the last call, such as the ones that an adapter sits
        on, are not moved again.
        """
        if self.rollout is None:
            return policy
        places = jax.tree.leaves(sharding.shardings(policy, self.rollout))
        leaves, form = jax.tree.flatten(policy)
        there = [moved for leaf, moved in self._unchanged(leaves)]
        # The weights of before make room for the others.
        self._before = []
        moved = [
            jax.device_put(leaf, place) if same is None else same
            for leaf, place, same in zip(leaves, places, there, strict=True)
        ]
        self._before = list(zip(leaves, moved, strict=True))
        return jax.tree.unflatten(form, moved)

    def _unchanged(self, leaves):
        before = self._before or [(None, None)] * len(leaves)
        for leaf, (last, moved) in zip(leaves, before, strict=True):
            yield leaf, moved if leaf is last else None

    def rows(self, raw: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        """Returns a raw batch and a random key on the devices that sample."""
        if self.rollout is None:
            return raw, key
        placement = sharding.batch_sharding(self.rollout)
        return jax.device_put(raw, placement), sharding.replicate(key, self.rollout)

    def back(self, rows: Any) -> Any:
        """Returns rows of a rollout, split over the devices that train."""
        if self.rollout is None:
            return rows
        return jax.device_put(rows, sharding.batch_sharding(self.training))

    def abstract_weights(self, policy: Any) -> Any:
        """Returns the shapes of the policy with their shardings where it samples."""
        if self.rollout is None:
            return policy
        placement = sharding.shardings(policy, self.rollout)
        return sharding.with_shardings(policy, placement)


def gathered(policy: Any) -> Any:
    """Makes weights whole over `fsdp`, once for all tokens of a rollout.

    Split, they are gathered for every token anew. Matrices take the dtype of their
    products first, so that no more is sent than these would ask for.

    Args:
        policy: a model with a `config`, inside of a program.
    """
    if sharding.current_mesh() is None:
        return policy

    def whole(node):
        axes = isinstance(node, nnx.Variable) and node.get_metadata().get("axes")
        if not axes or not any(sharding.RULES[axis] == "fsdp" for axis in axes):
            return node
        rest = [None if sharding.RULES[axis] == "fsdp" else axis for axis in axes]

        def leaf(array):
            if len(axes) > 1:
                array = array.astype(policy.config.dtype)
            return sharding.constrain(array, *(None,) * (array.ndim - len(axes)), *rest)

        return jax.tree.map(leaf, node)

    return jax.tree.map(
        whole, policy, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def importance(samples, old_logps, mask, cap):
    """Computes what the tokens of a rollout of older weights count.

    Args:
        samples: a rollout: behaviour_logps f32[R, N], nats; age i32[R], updates since
            the weights that sampled it.
        old_logps: f32[R, N], of the weights before this update.
        mask: bool[R, N], the tokens that count.
        cap: the largest weight.

    Returns:
        f32[R, N], min(exp(old - behaviour), cap), 1 where the mask is false; and
        {"sampling/staleness", of the ratios before the cap "sampling/importance_mean"
        and "sampling/importance_max", and "sampling/truncated", the share above it}.
    """
    behaviour = masked.clear(samples["behaviour_logps"], mask)
    ratio = probability_ratio(masked.clear(old_logps, mask) - behaviour)
    return jnp.minimum(ratio, cap), {
        "sampling/staleness": masked.Mean.of(samples["age"].astype(jnp.float32)),
        "sampling/importance_mean": masked.Mean.of(ratio, mask),
        "sampling/importance_max": masked.Max.of(ratio, mask),
        "sampling/truncated": masked.Mean.of((ratio > cap).astype(jnp.float32), mask),
    }


def corrected(loss, batch):
    """Returns a policy loss f32[B, N] times what its tokens count, where they are old.

    Args:
        loss: of each token.
        batch: a minibatch; "importance" f32[B, N] where its rollout may be old.
    """
    return loss * batch["importance"] if "importance" in batch else loss
