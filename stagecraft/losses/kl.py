"""KL to the reference policy: estimators, the penalty, its coefficient."""

import jax.numpy as jnp
from jax import Array

from stagecraft import masked, schema
from stagecraft.errors import UserError
from stagecraft.losses.policy import MAX_LOG_RATIO, probability_ratio
from stagecraft.losses.types import Result


def k1(logps: Array, ref_logps: Array) -> Array:
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


def k2(logps: Array, ref_logps: Array) -> Array:
    """Half the squared log-ratio: never negative, biased. Arguments as in `k1`."""
    return 0.5 * jnp.square(k1(logps, ref_logps))


def k3(logps: Array, ref_logps: Array) -> Array:
    """q/p - 1 - log(q/p): never negative and unbiased. Arguments as in `k1`.

    The ratio q/p ends at e^20, as `policy.probability_ratio` does: where p is lower
    still, the value stays e^20 - 21 and the gradient is 0.
    """
    difference = jnp.maximum(k1(logps, ref_logps), -MAX_LOG_RATIO)
    return jnp.exp(-difference) - 1 + difference


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def kl_in_loss(
    logps: Array,
    ref_logps: Array,
    old_logps: Array | None = None,
    *,
    estimator: str = "k3",
    bias_correction: bool = False,
) -> Result:
    """Returns a KL penalty for the loss of each token, as GRPO has it.

    Which gradient that gives differs by estimator (arxiv.org/abs/2510.01555). On
    samples of the policy itself, "k2" has the gradient of KL(policy, reference), the
    divergence meant; "k3" has that of KL(reference, policy), the same only while the
    two are near; "k3" with bias correction (a factor of the probability ratio,
    DeepSeek-AI 2025, arxiv.org/abs/2512.02556) is right again, also on samples of an
    earlier policy.

    Args:
        logps: f32[B, T], nats: log-probs of the sampled tokens now, at the temperature
            they were sampled with.
        ref_logps: f32[B, T], the same under the frozen reference, same temperature.
        old_logps: f32[B, T], the same under the policy that sampled; read only for
            `bias_correction`.
        estimator: "k2" or "k3", whose ratio is limited, see `k3`.
        bias_correction: multiply "k3" by the probability ratio to `old_logps`.

    Returns:
        loss f32[B, T], nats, not reduced; metrics {"kl": f32[B, T]}, the same.

    Raises:
        ValueError: when the shapes differ.
        UserError: for "k1", an unknown estimator, or "k2" with bias correction.

    >>> same = jnp.full((1, 1), -3.0)
    >>> float(kl_in_loss(same, same)[0][0, 0])
    0.0
    """
    if estimator == "k1":
        raise UserError(
            "estimator='k1' in the loss: its expected gradient on the policy's own "
            "samples is zero, so it would penalize nothing; use 'k2' (the gradient of "
            "the KL) or 'k3' here, or 'k1' in the reward"
        )
    schema.choice("estimator", estimator, ("k2", "k3"))
    kl = ESTIMATORS[estimator](logps, ref_logps)
    if bias_correction:
        if estimator != "k3":
            raise UserError(
                f"bias_correction=True with estimator={estimator!r}: the factor makes "
                "'k3' right and 'k2' wrong; expected estimator='k3'"
            )
        if old_logps is None:
            raise ValueError("bias_correction=True needs old_logps")
        masked.check_shapes(logps=logps, old_logps=old_logps)
        kl = kl * probability_ratio(logps - old_logps)
    return kl, {"kl": kl}


def missing_eos(
    scores: Array, ended: Array, *, penalty: float = 0.0, replace: float | None = None
) -> Array:
    """Lowers the score of completions that never reached their end token.

    Without it a policy may learn to talk until the length limit (Huang et al. 2024,
    arxiv.org/abs/2403.17031).

    Args:
        scores: f32[B], one score per completion.
        ended: bool[B], True where the stop token was sampled.
        penalty: points taken from the others; 0 switches it off.
        replace: the score they get instead of their own (-1 in the paper), and then
            no penalty. None: they keep theirs.

    Returns:
        f32[B].

    >>> ended = jnp.array([True, False])
    >>> missing_eos(jnp.array([3.0, 3.0]), ended, penalty=1.0).tolist()
    [3.0, 2.0]
    >>> missing_eos(jnp.array([3.0, 3.0]), ended, replace=-1.0).tolist()
    [3.0, -1.0]
    """
    masked.check_shapes(scores=scores, ended=ended)
    lowered = scores - penalty if replace is None else jnp.full_like(scores, replace)
    return jnp.where(ended, scores, lowered)


def value_mask(mask: Array, placement: str = "A") -> Array:
    """Masks where the critic's value counts: `mask`, and the slot of the score.

    With placement "B" the score is paid one slot after the end token. The value there
    is the critic's output on the end token; it takes part in advantages and in the
    critic's loss, while the policy's loss keeps to `mask`.

    Args:
        mask: bool[B, T], True on the completion: one unbroken run from column 0.
        placement: "A" or "B", see `kl_reward`.

    Returns:
        bool[B, T]; an empty row stays empty.

    Raises:
        UserError: for an unknown placement.

    >>> value_mask(jnp.array([[True, False, False]]), "B").tolist()
    [[True, True, False]]
    """
    schema.choice("placement", placement, ("A", "B"))
    if placement == "A":
        return mask
    return mask | jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))


def kl_reward(
    scores: Array,
    logps: Array,
    ref_logps: Array,
    mask: Array,
    *,
    kl_coef: float | Array,
    placement: str = "A",
    estimator: str = "k1",
) -> Array:
    """Returns rewards per token: a KL penalty on each, and the score at the end.

    Ouyang et al. 2022 (arxiv.org/abs/2203.02155), eq. 2, spread over tokens as in
    Ziegler et al. 2019. The last masked token is the end token, or the last one that
    fitted; a row with nothing masked gets no reward at all.

    Args:
        scores: f32[B], one score per completion.
        logps: f32[B, T], nats, of the sampled tokens under the policy, at the sampling
            temperature.
        ref_logps: f32[B, T], the same under the frozen reference, same temperature.
        mask: bool[B, T], True on the completion up to and including its end token: one
            unbroken run from column 0.
        kl_coef: points paid per nat.
        placement: "A" pays the score on the last masked token. "B" pays it on the slot
            after, or on the last one when the completion fills the window, as Huang et
            al. 2024 (arxiv.org/abs/2403.17031) and TRL do: there the critic may judge
            the whole completion, see `value_mask`.
        estimator: "k1", whose policy gradient is that of the KL; or "k3", never
            negative, which TRL's PPO offers too. Paid as a reward, "k3" pulls with the
            difference of the KL's two directions, which near the reference is nothing.

    Returns:
        f32[B, T], 0 outside `value_mask(mask, placement)`.

    Raises:
        ValueError: when the shapes do not fit.
        UserError: for an unknown placement or estimator.

    >>> zero = jnp.zeros((1, 3))
    >>> ended = jnp.array([[True, True, False]])
    >>> kl_reward(jnp.array([2.0]), zero, zero, ended, kl_coef=0.1).tolist()
    [[0.0, 2.0, 0.0]]
    """
    schema.choice("estimator", estimator, ("k1", "k3"))
    masked.check_shapes(logps=logps, ref_logps=ref_logps, mask=mask)
    masked.check_shapes(scores=scores, rows=mask[:, 0])
    logps, ref_logps = masked.clear(logps, mask), masked.clear(ref_logps, mask)
    kl = ESTIMATORS[estimator](logps, ref_logps)  # [B, T]
    slots = value_mask(mask, placement)
    column = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    last = jnp.max(jnp.where(slots, column, -1), axis=1, keepdims=True)  # -1: empty row
    at_end = jnp.where(column == last, scores[:, None], jnp.zeros_like(kl))
    return at_end - kl_coef * kl


def adaptive(
    kl_coef: Array | float,
    kl: Array | float,
    *,
    target: float,
    horizon: float,
    batch_size: int,
) -> Array:
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


__all__ = [
    "ESTIMATORS",
    "adaptive",
    "k1",
    "k2",
    "k3",
    "kl_in_loss",
    "kl_reward",
    "missing_eos",
    "value_mask",
]
