"""The distance to the reference policy: how it is estimated, paid for and steered."""

import jax.numpy as jnp

from stagecraft import masked


def k1(logps, ref_logps):
    """log p - log q: unbiased for KL(p, q) on samples of p, of either sign.

    Estimator names after Schulman 2020, joschu.net/blog/kl-approx.html. This one goes
    into rewards; put into a loss its expected gradient is zero.

    Args:
        logps: f32[...], nats, under the distribution that was sampled.
        ref_logps: f32[...], nats, the same tokens under the other one.

    Returns:
        f32[...], nats.
    """
    masked.check_shapes(logps=logps, ref_logps=ref_logps)
    return logps - ref_logps


def k2(logps, ref_logps):
    """Half the squared log-ratio: never negative, biased. Arguments as in `k1`."""
    return 0.5 * jnp.square(k1(logps, ref_logps))


def k3(logps, ref_logps):
    """q/p - 1 - log(q/p): never negative and unbiased. Arguments as in `k1`."""
    difference = k1(logps, ref_logps)
    return jnp.exp(-difference) - 1 + difference


def missing_eos(scores, ended, *, penalty):
    """Lowers the score of completions that never reached their end token.

    Without it a policy may learn to talk until the length limit (Huang et al. 2024,
    arxiv.org/abs/2403.17031).

    Args:
        scores: f32[B], one score per completion.
        ended: bool[B], True where the stop token was sampled.
        penalty: points taken from the others; 0 switches it off.

    Returns:
        f32[B].
    """
    masked.check_shapes(scores=scores, ended=ended)
    return jnp.where(ended, scores, scores - penalty)


def kl_reward(scores, logps, ref_logps, mask, *, kl_coef):
    """Rewards per token: a KL penalty on each, and the score on the last.

    Ouyang et al. 2022 (arxiv.org/abs/2203.02155), eq. 2, spread over tokens as in
    Ziegler et al. 2019. The last masked token is the end token, or the last one that
    fitted; a row with nothing masked gets no reward at all.

    Args:
        scores: f32[B], one score per completion.
        logps: f32[B, T], nats, of the sampled tokens under the policy, at the sampling
            temperature.
        ref_logps: f32[B, T], the same under the frozen reference, same temperature.
        mask: bool[B, T], True on the completion up to and including its end token.
        kl_coef: points paid per nat.

    Returns:
        f32[B, T], 0 outside the mask.

    Raises:
        ValueError: when the shapes do not fit.

    >>> zero = jnp.zeros((1, 3))
    >>> ended = jnp.array([[True, True, False]])
    >>> kl_reward(jnp.array([2.0]), zero, zero, ended, kl_coef=0.1).tolist()
    [[0.0, 2.0, 0.0]]
    """
    masked.check_shapes(logps=logps, ref_logps=ref_logps, mask=mask)
    masked.check_shapes(scores=scores, rows=mask[:, 0])
    kl = masked.clear(k1(logps, ref_logps), mask)  # [B, T]
    column = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    last = jnp.max(jnp.where(mask, column, -1), axis=1, keepdims=True)  # -1: empty row
    at_end = jnp.where(column == last, scores[:, None], jnp.zeros_like(kl))
    return at_end - kl_coef * kl


def adaptive(kl_coef, kl, *, target, horizon, batch_size):
    """Raises the KL coefficient above the target, lowers it below.

    Ziegler et al. 2019, arxiv.org/abs/1909.08593, section 2.2: the relative error is
    limited to 0.2 either way.

    Args:
        kl_coef: f32 scalar, the coefficient just used.
        kl: f32 scalar, nats: batch mean of the KL summed over each completion's tokens.
        target: nats, the KL aimed at.
        horizon: larger moves slower; at the limit of 0.2 the coefficient changes e-fold
            in five horizons of completions.
        batch_size: completions since the last call.

    Returns:
        f32 scalar, the coefficient to use next.

    >>> round(float(adaptive(0.1, 9.0, target=6.0, horizon=1e4, batch_size=256)), 6)
    0.100512
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * batch_size / horizon)
