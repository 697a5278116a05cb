"""The reference of preference stages: its log-probabilities, and how it moves."""

import jax
import jax.numpy as jnp
import numpy as np

from stagecraft import sharding
from stagecraft.models import lora
from stagecraft.stages import stage
from stagecraft.stages.stage import Program


def begins_as_reference(context):
    """Returns whether a stage's policy is its reference before the first step."""
    return context.parents.get("reference") is context.parents["start"]


class Reference:
    """Scores batches under the reference, frozen or moving.

    Args:
        config: the stage's resolved config: sync_every, sync_alpha.
        context: the stage's `Context`; a frozen reference scores every row of its
            dataset once where training sees rows more than once.
        beginning: the stage's `stage.Beginning`; its state holds a moving reference.
        score: (model, batch) -> f32[B, ...], pure: log-probabilities of completions.
    """

    def __init__(self, config, context, beginning, score):
        self.config, self.beginning, self._score = config, beginning, score
        self.dataset, self.mesh = context.dataset, context.mesh
        self.moves = "reference" in beginning.abstract.extra
        self._frozen = context.parents.get("reference")
        self._placement = sharding.batch_sharding(self.mesh)
        self._jitted = stage.jit(score, self._placement)
        self._table = None
        rows = 0 if self.dataset is None or self.moves else self.dataset.rows
        self.once = 0 < rows < config.steps * config.batch_size

    def model(self, state):
        """Returns the model; that of a moving reference from the state."""
        if not self.moves:
            return self._frozen
        return lora.join(self.beginning.frozen, state.extra["reference"])

    def abstract_model(self):
        """Returns the model as shapes."""
        if not self.moves:
            return stage.abstract_frozen(self._frozen, self.mesh)
        return self.beginning.abstract_model(self.beginning.abstract.extra["reference"])

    def logps(self, state, batch, index):
        """Returns f32[B, ...] of a batch; index i32[B], or None, numbers its rows."""
        own = self.once and index is not None
        if own and index.min() >= 0 and index.max() < self.dataset.rows:
            rows = self._every_row()[np.asarray(index)]
            return sharding.shard_batch(rows, self.mesh)
        return self._jitted(self.model(state), batch)

    def program(self, batch):
        """Returns the `Program` of scoring a batch, given as shapes."""
        return Program(self._score, (self.abstract_model(), batch), self._placement)

    def work(self, raw):
        """Returns the tokens scored in a step on a raw batch."""
        if not self.once:
            return raw["ids"].size
        row = raw["ids"].size // len(
            raw["ids"]
        )  # every row once, spread over the steps
        return self.dataset.rows * row // self.config.steps

    def moved(self, state, model, batch=None):
        """Returns {"reference": it, mixed with the policy every sync_every steps}.

        TR-DPO (Gorbatovski et al. 2024, arxiv.org/abs/2404.09656), the soft update;
        with sync_alpha=1 the hard one. {} for a frozen reference.
        """
        del batch
        if not self.moves:
            return {}
        due = (state.step + 1) % self.config.sync_every == 0
        alpha = jnp.where(due, self.config.sync_alpha, 0.0)
        reference = jax.tree.map(
            lambda ref, new: (ref + alpha * (new - ref)).astype(ref.dtype),
            state.extra["reference"],
            model,
        )
        return {"reference": reference}

    def _every_row(self):
        # By the data's order and in whole batches: a resumed run has the same bits.
        if self._table is None:
            batches = [
                self._jitted(self._frozen, stage.split_index(raw, self.mesh)[0])
                for raw in self.dataset.epoch(self.config.batch_size)
            ]
            rows = np.concatenate(sharding.to_host(batches))
            self._table = rows[: self.dataset.rows]
        return self._table
