"""Preference objectives over pairs that need no reference policy.

What keeps the policy from drifting is a likelihood term (ORPO, CPO), or nothing but a
small learning rate (SimPO, AlphaPO). Column 0 of a pair is the chosen completion.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from stagecraft.losses.pairs import (
    bend,
    check_pairs,
    check_positive,
    check_range,
    difference,
    logistic,
    per_token,
    reward_metrics,
)
from stagecraft.losses.types import Metrics, PlacedResult, Result

# Where 1 - p would round to 0 and its logarithm be infinite.
_SUREST = -1e-7  # nats a token


def orpo(
    policy_logps: Array, lengths: Array, document_logps: Array, *, beta: float = 0.1
) -> PlacedResult:
    """Odds ratio preference optimization (Hong et al. 2024, eq. 4 to 7).

    arxiv.org/abs/2403.07691. Likelihood of the whole chosen document, prompt included,
    and a penalty on the odds of the chosen over the rejected completion, both by their
    average probability per token.

    Args:
        policy_logps: f32[B, 2], nats: sum of log p(token) over the completion; column 0
            is the chosen completion, column 1 the rejected one.
        lengths: f32[B, 2], tokens of each completion.
        document_logps: f32[B, T], nats: log-probs of the tokens of prompt and chosen
            completion, 0 elsewhere.
        beta: weight of the odds ratio, the paper's lambda.

    Returns:
        {"rows": f32[B], "document": f32[B, T]}, not reduced; metrics: "rewards/chosen",
        "rewards/rejected" (beta times the average log-probs), "rewards/margins",
        "rewards/accuracies" (a tie counts as wrong), "logps/chosen", "logps/rejected"
        (averages), "log_odds_ratio" (log sigmoid of the next), "log_odds_chosen", each
        f32[B]; "nll_loss", f32[B, T] with the mask of the tokens it is over: those
        whose log-prob is not exactly 0.

    Raises:
        ValueError: when the shapes do not fit.
        UserError: for a hyper-parameter out of its range.

    >>> same, one = jnp.array([[-2.0, -2.0]]), jnp.ones((1, 2))
    >>> loss, _ = orpo(same, one, jnp.array([[-4.0, -2.0]]), beta=1.0)
    >>> round(float(loss["rows"][0]), 4), loss["document"].tolist()  # even odds: log 2
    (0.6931, [[4.0, 2.0]])
    """
    check_pairs(policy_logps=policy_logps, lengths=lengths)
    check_positive(beta=beta)
    averages = per_token(policy_logps, lengths)
    log_p = jnp.minimum(averages, _SUREST)
    log_odds = difference(log_p - _log1mexp(log_p))
    ratio = jax.nn.log_sigmoid(log_odds)
    metrics = reward_metrics(averages, beta * averages) | {
        "log_odds_ratio": ratio,
        "log_odds_chosen": log_odds,
        "nll_loss": _likelihood(document_logps),
    }
    return {"rows": -beta * ratio, "document": -document_logps}, metrics


def cpo(
    policy_logps: Array,
    chosen_logps: Array,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> PlacedResult:
    """Contrastive preference optimization (Xu et al. 2024, eq. 3).

    arxiv.org/abs/2401.08417. DPO against a uniform reference, and likelihood of the
    chosen completion.

    Args:
        policy_logps: f32[B, 2], nats: sum of log p(token) over the completion; column 0
            is the chosen completion, column 1 the rejected one.
        chosen_logps: f32[B, T], nats: log-probs of the chosen completion's tokens, 0
            elsewhere.
        beta: scale of the margin.
        alpha: weight of the likelihood term.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        {"rows": f32[B], "chosen": f32[B, T]}, not reduced; metrics: "rewards/chosen",
        "rewards/rejected" (beta times the log-probs), "rewards/margins",
        "rewards/accuracies" (a tie counts as wrong), "logps/chosen", "logps/rejected",
        each f32[B]; "nll_loss", f32[B, T] before `alpha`, with the mask of the tokens
        it is over: those whose log-prob is not exactly 0.

    Raises:
        ValueError: when the shapes do not fit.
        UserError: for a hyper-parameter out of its range.

    >>> same = jnp.array([[-2.0, -2.0]])
    >>> loss, _ = cpo(same, jnp.array([[-2.0]]), alpha=0.5)
    >>> round(float(loss["rows"][0]), 4), loss["chosen"].tolist()
    (0.6931, [[1.0]])
    """
    check_range(0, 0.5, label_smoothing=label_smoothing)
    margin, metrics = _start(policy_logps, beta)
    loss = logistic(beta * margin, label_smoothing)
    return _with_likelihood(loss, chosen_logps, alpha, metrics)


def cpo_hinge(
    policy_logps: Array, chosen_logps: Array, *, beta: float = 0.1, alpha: float = 1.0
) -> PlacedResult:
    """CPO with a hinge (SLiC-HF, Zhao et al. 2023).

    arxiv.org/abs/2305.10425. Arguments and metrics as in `cpo`.

    >>> same = jnp.array([[-2.0, -2.0]])
    >>> cpo_hinge(same, jnp.array([[-2.0]]))[0]["rows"].tolist()
    [1.0]
    """
    margin, metrics = _start(policy_logps, beta)
    loss = jax.nn.relu(1 - beta * margin)
    return _with_likelihood(loss, chosen_logps, alpha, metrics)


def cpo_ipo(
    policy_logps: Array,
    lengths: Array,
    chosen_logps: Array,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> PlacedResult:
    """CPO with IPO's square, on averages per token (Azar et al. 2023, eq. 17).

    arxiv.org/abs/2310.12036. Arguments as in `cpo`, with `lengths` f32[B, 2] in tokens.
    The target is 1/(2 beta) nats a token; "logps/chosen" and "logps/rejected" are
    averages.

    >>> same, one = jnp.array([[-2.0, -2.0]]), jnp.ones((1, 2))
    >>> cpo_ipo(same, one, jnp.array([[-2.0]]), beta=0.5)[0]["rows"].tolist()
    [1.0]
    """
    margin, metrics = _start(per_token(policy_logps, lengths), beta)
    loss = jnp.square(margin - 1 / (2 * beta))
    return _with_likelihood(loss, chosen_logps, alpha, metrics)


def simpo(
    policy_logps: Array,
    lengths: Array,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Result:
    """Simple preference optimization (Meng et al. 2024, eq. 6).

    arxiv.org/abs/2405.14734. The reward is the average log-prob per token, and the
    margin should exceed `gamma`.

    Args:
        policy_logps: f32[B, 2], nats: sum of log p(token) over the completion; column 0
            is the chosen completion, column 1 the rejected one.
        lengths: f32[B, 2], tokens of each completion.
        beta: reward a nat per token.
        gamma: the margin aimed at, in rewards.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        loss f32[B], not reduced; metrics, each f32[B]: "rewards/chosen",
        "rewards/rejected" (beta times the averages), "rewards/margins",
        "rewards/accuracies" (a tie counts as wrong; `gamma` is ignored),
        "logps/chosen", "logps/rejected" (averages).

    Raises:
        ValueError: when the shapes do not fit.
        UserError: for a hyper-parameter out of its range.

    >>> sums, lengths = jnp.array([[-2.0, -6.0]]), jnp.array([[1.0, 3.0]])
    >>> loss, _ = simpo(sums, lengths, gamma=0.0)  # as likely per token: log 2
    >>> round(float(loss[0]), 4)
    0.6931
    """
    check_range(0, 0.5, label_smoothing=label_smoothing)
    margin, metrics = _start(per_token(policy_logps, lengths), beta)
    return logistic(beta * margin - gamma, label_smoothing), metrics


def alphapo(
    policy_logps: Array,
    lengths: Array,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> Result:
    """AlphaPO: SimPO with a bent reward (Gupta et al. 2025).

    arxiv.org/abs/2501.03884. The reward of an average probability p per token is
    (1 - p^-alpha)/alpha; towards alpha 0 it becomes log p, and this SimPO. Arguments
    and metrics as in `simpo`; logged rewards are the bent ones.

    Args:
        alpha: above 0, unlikely completions cost more than their log-prob; below, less.
            The bent reward is limited, see `pairs.bend`.

    >>> sums, lengths = jnp.array([[-2.0, -6.0]]), jnp.array([[1.0, 3.0]])
    >>> loss, _ = alphapo(sums, lengths, gamma=0.0)
    >>> round(float(loss[0]), 4)
    0.6931
    """
    check_range(0, 0.5, label_smoothing=label_smoothing)
    check_pairs(policy_logps=policy_logps, lengths=lengths)
    check_positive(beta=beta)
    averages = per_token(policy_logps, lengths)
    rewards = beta * bend(averages, -alpha)
    loss = logistic(difference(rewards) - gamma, label_smoothing)
    return loss, reward_metrics(averages, rewards)


def _start(logps: Array, beta: float) -> tuple[Array, Metrics]:
    """Checks the arguments; returns chosen less rejected, f32[B], and the metrics."""
    check_pairs(policy_logps=logps)
    check_positive(beta=beta)
    return difference(logps), reward_metrics(logps, beta * logps)


def _with_likelihood(
    loss: Array, chosen_logps: Array, alpha: float, metrics: Metrics
) -> PlacedResult:
    """Adds the likelihood of the chosen completion's tokens."""
    check_range(0, jnp.inf, alpha=alpha)
    metrics = metrics | {"nll_loss": _likelihood(chosen_logps)}
    return {"rows": loss, "chosen": -alpha * chosen_logps}, metrics


def _likelihood(logps: Array) -> tuple[Array, Array]:
    """Returns losses of tokens and their mask; log-probs are 0 where there is none."""
    return -logps, logps != 0


def _log1mexp(x: Array) -> Array:
    """Returns log(1 - e^x) for x < 0, accurate near 0 and far below.

    Near 0, where e^x rounds to 1, the second branch gets -1 in place of x: an infinite
    slope would make the gradient NaN although the branch is not taken.
    """
    near = x > -math.log(2.0)
    close = jnp.log(-jnp.expm1(x))
    far = jnp.log1p(-jnp.exp(jnp.where(near, -jnp.ones_like(x), x)))
    return jnp.where(near, close, far)


LOSSES = (orpo, cpo, cpo_hinge, cpo_ipo, simpo, alphapo)
__all__ = [loss.__name__ for loss in LOSSES]
