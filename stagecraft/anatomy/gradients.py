"""Whether objectives pull the same weights the same way: cosines of their gradients.

All are taken at one model on the same pairs of answers. A gradient is an estimate: that
of another half of the pairs differs, and no cosine between two objectives can be
expected to exceed what each has with itself. So the cosine is divided by those.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from stagecraft import losses, masked
from stagecraft.models.transformer import Transformer

BETA = 0.1  # of DPO; the direction at the reference does not depend on it


def _logps(model, batch):
    """Log-probabilities of next tokens and the mask of answers: [B, T] each."""
    rows = batch["ids"], batch["mask"], batch["segments"]
    targets, mask = losses.shift(*rows)
    hidden = model.hidden(batch["ids"], batch["positions"], batch["segments"])
    return model.token_logps(hidden, targets).logps, mask


def _text(model, batch):
    """Pretraining's: every token, of prompts as of answers."""
    everything = batch | {"mask": batch["segments"] > 0}
    logps, mask = _logps(model, everything)
    return masked.mean(losses.next_token(logps)[0], mask)


def _demonstrations(model, batch):
    """SFT's, on the chosen answers."""
    chosen = {k: v[0::2] for k, v in batch.items()}
    logps, mask = _logps(model, chosen)
    return masked.mean(losses.next_token(logps)[0], mask)


def _preferences(model, batch):
    """DPO's, with the model itself as the reference."""
    logps, mask = _logps(model, batch)
    both = jnp.sum(logps * mask, axis=1).reshape(-1, 2)
    return jnp.mean(losses.dpo(both, jax.lax.stop_gradient(both), beta=BETA)[0])


def _policy(model, batch):
    """PPO's first minibatch: both answers, each with its advantage."""
    logps, mask = _logps(model, batch)
    advantages = jnp.broadcast_to(batch["advantages"][:, None], logps.shape)
    old = jax.lax.stop_gradient(logps)
    return masked.mean(losses.ppo_policy(logps, old, advantages)[0], mask)


OBJECTIVES: dict[str, Callable[[Transformer, Mapping[str, Array]], Array]] = {
    "text": _text,
    "sft": _demonstrations,
    "dpo": _preferences,
    "ppo": _policy,
}


def gradients(model: Transformer, batch: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Returns each objective's gradient as one vector.

    Args:
        model: where they are taken.
        batch: of pairs, the chosen answer in even rows, the rejected one behind it:
            ids, positions, segments i32[B, T]; mask bool[B, T], True at tokens of an
            answer; advantages f32[B], of each answer.

    Returns:
        {objective: f32[parameters]}.
    """
    return {
        name: np.concatenate(
            [
                np.ravel(leaf)
                for leaf in jax.tree.leaves(
                    jax.jit(jax.grad(objective))(model, dict(batch))
                )
            ]
        )
        for name, objective in OBJECTIVES.items()
    }


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the cosine of two vectors, summed in float64; 0 where one is 0."""
    one, other = (np.asarray(x, np.float64) for x in (one, other))
    size = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / size if size else 0.0


def agreement(halves: tuple[Mapping, Mapping], one: str, other: str) -> dict:
    """Compares two objectives, beside how far each agrees with itself.

    Args:
        halves: `gradients` on each half of the pairs.
        one, other: objectives.

    Returns:
        cosine: mean of both that pair different halves, so that no noise is shared.
        reliability: of the less reliable of the two, its cosine between the halves.
        corrected: the cosine over the root of both reliabilities (Spearman 1904); None
            where a reliability is not above 0.
    """
    a, b = halves
    value = (cosine(a[one], b[other]) + cosine(b[one], a[other])) / 2
    own = [cosine(a[name], b[name]) for name in (one, other)]
    corrected = value / math.sqrt(own[0] * own[1]) if min(own) > 0 else None
    return {"cosine": value, "reliability": min(own), "corrected": corrected}
