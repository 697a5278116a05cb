"""What losses over pairs of completions share: scores, logged rewards, checks.

And two ways to weigh pairs: by the length that both completions share, and by how
likely the policy itself is to write them.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft import masked, schema
from stagecraft.errors import UserError
from stagecraft.losses.types import Metrics, Result

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
_LARGEST = 40.0  # nats: the square of e^40 is still finite in float32
_STEEPEST = math.exp(20)  # of a score in a square: its gradient has a square too


def check_positive(**values: float) -> None:
    """Refuses hyper-parameters that are not above 0; traced ones are not checked.

    Args:
        **values: numbers by the name the message should give them.

    Raises:
        UserError: naming the first one that is 0, negative or NaN.
    """
    for name, value in values.items():
        if isinstance(value, numbers.Real) and not value > 0:
            raise UserError(f"{name}={value}: must be above 0")


def check_range(
    low: float, high: float, *, closed: bool = False, **values: float
) -> None:
    """Refuses hyper-parameters outside a range; traced ones are not checked.

    Args:
        low: smallest number allowed.
        high: the first number that is too large.
        closed: allow `high` itself.
        **values: numbers by the name the message should give them.

    Raises:
        UserError: naming the first one outside.
    """
    for name, value in values.items():
        if not isinstance(value, numbers.Real):
            continue
        if not (low <= value < high or (closed and value == high)):
            top = f" and {'at most' if closed else 'below'} {high}"
            limit = "" if high == math.inf else top
            raise UserError(f"{name}={value}: must be at least {low}{limit}")


def check_pairs(**arrays: Array) -> None:
    """Refuses arrays that are not all [B, 2].

    Args:
        **arrays: arrays by the name the message should give them.

    Raises:
        ValueError: naming every array, or the first with its shape.
    """
    masked.check_shapes(**arrays)
    name, array = next(iter(arrays.items()))
    if jnp.ndim(array) != 2 or jnp.shape(array)[1] != 2:
        raise ValueError(f"{name} must be [B, 2], got {jnp.shape(array)}")


def per_token(sums: Array, lengths: Array) -> Array:
    """Divides sums by the tokens of each completion; 0 for an empty completion.

    Args:
        sums: f32[...], nats: sums over the tokens of a completion.
        lengths: f32[...], tokens.

    Returns:
        f32[...], nats a token.
    """
    masked.check_shapes(logps=sums, lengths=lengths)
    return sums / jnp.maximum(lengths, 1.0).astype(sums.dtype)


def difference(pair: Array) -> Array:
    """Subtracts rejected from chosen: f32[B, 2] -> f32[B]."""
    return pair[:, 0] - pair[:, 1]


def bend(x: Array, power: float) -> Array:
    """Returns (e^(power x) - 1) / power, with x as its limit at power 0.

    Args:
        x: f32[...], nats.
        power: 0 for `x` itself.

    Returns:
        f32[...], e^40 in size at most; beyond that the gradient is 0.
    """
    if abs(power) < 1e-6:
        return x
    largest = _LARGEST + min(math.log(abs(power)), 0.0)
    return jnp.expm1(jnp.minimum(power * x, largest)) / power


def squared(x: Array) -> Array:
    """Returns the square of a distance of scores, f32[...].

    Distances end at e^20, where only scores that are exponentials come: beyond it the
    gradient is 0.
    """
    return jnp.square(jnp.clip(x, -_STEEPEST, _STEEPEST))


def logistic(margin: Array, label_smoothing: float | Array = 0.0) -> Array:
    """Returns -log sigmoid of a margin, labels flipped with a known probability.

    Args:
        margin: f32[B], how far the chosen completion is ahead.
        label_smoothing: the probability of a flip, a number or f32[B].

    Returns:
        f32[B].
    """
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def divergence_scores(
    policy_logps: Array,
    ref_logps: Array,
    *,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    reference_free: bool = False,
) -> Array:
    """Returns f'(p/q), which DPO compares when its penalty is an f-divergence from q.

    Wang et al. 2023, arxiv.org/abs/2309.16240, table 1, up to factors. The usual
    reverse KL has f'(u) = log u: the log-ratio itself. All are 0 where p = q.

    Args:
        policy_logps: f32[...], nats: log p of a completion.
        ref_logps: f32[...], log q, the same under the frozen reference policy.
        f_divergence: "reverse_kl" (log u), "forward_kl" (1 - 1/u), "js"
            (log(2u/(u + 1))) or "alpha" ((u^(alpha - 1) - 1)/(alpha - 1)).
        alpha: for "alpha" only; 1 is the reverse, 0 the forward KL (TRL's number; the
            paper's is 1 - alpha).
        reference_free: take log q as 0.

    Returns:
        f32[...], limited as `bend` says.

    Raises:
        UserError: for another `f_divergence`.

    >>> p, q = jnp.log(2.0), jnp.log(1.0)
    >>> divergence_scores(p, q, f_divergence="forward_kl").round(3).item()
    0.5
    """
    masked.check_shapes(policy_logps=policy_logps, ref_logps=ref_logps)
    log_ratio = policy_logps if reference_free else policy_logps - ref_logps
    if f_divergence == "js":
        return math.log(2.0) + jax.nn.log_sigmoid(log_ratio)
    schema.choice("f_divergence", f_divergence, DIVERGENCES)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": alpha - 1}[f_divergence]
    return bend(log_ratio, power)


def on_logps(loss: Callable[..., Array]) -> Callable[..., Result]:
    """Makes a loss on scores one on log-probabilities, with the rewards as metrics.

    A stage computes scores once, as its config says, and passes them. A call without
    `scores=`, as in a notebook, compares log-ratios.

    Args:
        loss: (scores f32[B, 2], arrays..., *, beta, ...) -> f32[B], not reduced.

    Returns:
        (policy_logps f32[B, 2], ref_logps f32[B, 2], arrays..., *, scores=None, beta,
        ...) -> (loss f32[B], metrics of `implied_rewards`). Logged rewards are those
        of the log-ratios, whatever is compared.

    >>> margin = on_logps(lambda scores, *, beta=0.5: beta * difference(scores))
    >>> policy, reference = jnp.array([[-5.0, -9.0]]), jnp.array([[-6.0, -8.0]])
    >>> margin(policy, reference)[0].tolist()
    [1.0]
    >>> margin(policy, reference, scores=jnp.array([[3.0, 1.0]]), beta=1.0)[0].tolist()
    [2.0]
    """
    parameter = inspect.Parameter
    _, *own = inspect.signature(loss).parameters.values()
    arrays = [p for p in own if p.kind is not p.KEYWORD_ONLY]
    settings = [p for p in own if p.kind is p.KEYWORD_ONLY]
    logps = [
        parameter(name, parameter.POSITIONAL_OR_KEYWORD)
        for name in ("policy_logps", "ref_logps")
    ]
    scores = parameter("scores", parameter.KEYWORD_ONLY, default=None)
    signature = inspect.Signature([*logps, *arrays, scores, *settings])

    @functools.wraps(loss)
    def on_logps_loss(*args, **kwargs) -> Result:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        policy_logps, ref_logps = given.pop("policy_logps"), given.pop("ref_logps")
        scores = given.pop("scores")
        metrics = implied_rewards(policy_logps, ref_logps, given["beta"])
        if scores is None:
            scores = divergence_scores(policy_logps, ref_logps)
        masked.check_shapes(scores=scores, policy_logps=policy_logps)
        return loss(scores, **given), metrics

    on_logps_loss.__signature__ = signature  # type: ignore[attr-defined]
    return on_logps_loss


def implied_rewards(policy_logps: Array, ref_logps: Array, beta: float) -> Metrics:
    """Returns the metrics of a pair whose reward is beta times the log-ratio.

    Args:
        policy_logps: f32[B, 2], nats; column 0 is the chosen completion.
        ref_logps: f32[B, 2], the same under the reference.
        beta: reward a nat.

    Returns:
        {name: f32[B]}: "rewards/chosen", "rewards/rejected", "rewards/margins",
        "rewards/accuracies" (a tie counts as wrong), "logps/chosen", "logps/rejected".

    Raises:
        ValueError: when the two arrays are not both [B, 2].
        UserError: when `beta` is not above 0.
    """
    check_pairs(policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive(beta=beta)
    return reward_metrics(policy_logps, beta * (policy_logps - ref_logps))


def reward_metrics(logps: Array, rewards: Array) -> Metrics:
    """Returns the metrics of `implied_rewards` from rewards f32[B, 2] of any origin."""
    margins = difference(rewards)
    return {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).astype(jnp.float32),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }


def length_desensitized(logps: Array, mask: Array, *, alpha: float) -> Array:
    """Sums log-probs of completions, surplus length counting less (LD-DPO).

    Liu et al. 2024, arxiv.org/abs/2409.06411. As many tokens as the shorter completion
    of the pair has count in full, the rest of the longer one by `alpha`. Policy and
    reference must be summed alike.

    Args:
        logps: f32[B, 2, T], nats: log-probs of the tokens.
        mask: bool[B, 2, T], the tokens of each completion.
        alpha: weight in [0, 1] of the surplus; 1 is the plain sum.

    Returns:
        f32[B, 2], nats.

    >>> mask = jnp.array([[[True, True, True], [True, False, False]]])
    >>> length_desensitized(-jnp.ones((1, 2, 3)), mask, alpha=0.5).tolist()
    [[-2.0, -1.0]]
    """
    check_range(0, 1, closed=True, alpha=alpha)
    position = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)  # 1 at a completion's first
    lengths = jnp.sum(mask, axis=-1, dtype=jnp.int32)  # [B, 2]
    shared = jnp.min(lengths, axis=-1)[:, None, None]
    ones = jnp.ones_like(logps)
    weights = jnp.where(position <= shared, ones, alpha * ones)
    return masked.sum(masked.clear(logps, mask) * weights, mask, axis=-1)


def wpo_weights(logps: Array, log_p2: Array, mask: Array) -> Array:
    """Returns weights of pairs by how likely the policy is to write both (WPO).

    Zhou et al. 2024, arxiv.org/abs/2406.11827, eq. 2, with the alignment of its section
    on sampled pairs: each token's probability is compared with the one that a sampled
    token has on average, so that a policy's own samples weigh about 1.

    Args:
        logps: f32[B, 2, T], nats: log-probs of the tokens under the policy.
        log_p2: f32[B, 2, T], log of the sum over the vocabulary of squared
            probabilities, at the same places.
        mask: bool[B, 2, T], the tokens of each completion.

    Returns:
        f32[B], to multiply a loss by; no gradient flows through it.

    >>> certain = jnp.zeros((1, 2, 3))  # one token has all the probability
    >>> wpo_weights(certain, certain, jnp.ones((1, 2, 3), bool)).tolist()
    [1.0]
    """
    masked.check_shapes(logps=logps, log_p2=log_p2, mask=mask)
    surprise = masked.clear(logps, mask) - masked.clear(log_p2, mask)
    means = masked.mean(surprise, mask, axis=-1)  # [B, 2]
    return jax.lax.stop_gradient(jnp.exp(jnp.sum(means, axis=-1)))


__all__ = [
    "DIVERGENCES",
    "divergence_scores",
    "implied_rewards",
    "length_desensitized",
    "on_logps",
    "wpo_weights",
]
