"""What a layer's change means at the output: logit gain, logit lens, linear lens."""

import numpy as np


def logit_metric(
    unembed: np.ndarray, scale: np.ndarray, frequencies: np.ndarray
) -> np.ndarray:
    """Returns how much a step in the residual stream moves the logits of likely tokens.

    M = sum_t p_t (g * (u_t - u)) (g * (u_t - u))^T with u = sum_t p_t u_t, since the
    softmax ignores what all logits share. With more tokens than dimensions the span of
    the u_t is everything; the weights p_t are what makes directions differ.

    Args:
        unembed: f[V, D], the output embeddings u_t.
        scale: f[D], what the final norm multiplies by, g.
        frequencies: f[V], p_t, of tokens in a stage's targets; need not add up to 1.

    Returns:
        f64[D, D].
    """
    p = np.asarray(frequencies, np.float64)
    p = p / p.sum()
    rows = np.asarray(unembed, np.float64)
    rows = (rows - p @ rows) * np.asarray(scale, np.float64)
    return rows.T @ (p[:, None] * rows)


def logit_gain(change: np.ndarray, metric: np.ndarray) -> float | None:
    """Returns tr(D M D^T) / (||D||^2 tr(M) / width): 1 for a change in any direction.

    Args:
        change: f[N, width], rows in the residual stream: what a matrix changed that
            writes to it, or a table of embeddings.
        metric: f64[width, width]: `logit_metric`; for a matrix that reads the stream,
            the covariance of what it reads.

    Returns:
        None for no change.
    """
    change = np.asarray(change, np.float64)
    size = np.sum(change**2) * np.trace(metric) / len(metric)
    return float(np.sum((change @ metric) * change) / size) if size else None


def linear_lens(
    hidden: np.ndarray, final: np.ndarray, ridge: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """Fits the affine map from a layer's residual stream to the last one's.

    Ridge regression in closed form: the same least squares that a tuned lens
    (2303.08112) approaches step by step, on the stream and not on the KL. Fit it on the
    parent and apply it to both: a lens fitted again takes up the change.

    Args:
        hidden, final: f[N, D], of the same positions.
        ridge: added to the covariance, in units of its mean diagonal.

    Returns:
        f64[D, D], f64[D]: final is about hidden @ map + offset.
    """
    x, y = np.asarray(hidden, np.float64), np.asarray(final, np.float64)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = np.linalg.solve(gram, x.T @ y)
    return weights, mean_y - mean_x @ weights


def kl(logits: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns KL(p || q) in nats of two f[..., V] tables of logits; f64[...]."""
    p, q = (_log_softmax(np.asarray(x, np.float64)) for x in (logits, others))
    terms = np.exp(p) * np.subtract(p, q, out=np.zeros_like(p), where=p > -np.inf)
    return terms.sum(axis=-1)


def _log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
