"""How good a text is, by a classifier trained on samples of good and bad ones.

Logistic regression on hashed words and word pairs: small, quick, offline, the same
weights from the same samples. Its score is the probability of "good" for a sample drawn
from equal parts of both.
"""

import hashlib
import io
import re
import zlib
from pathlib import Path

import numpy as np
from scipy import sparse, special

from stagecraft import storage
from stagecraft.errors import UserError

FEATURES = 2**17
_LEAST = 20  # samples of each kind
_HELD = 5  # one sample in this many is held back to measure with
_SHOWN = 20_000  # characters of a text that are looked at
_TOKEN = re.compile(r"\w+|[^\w\s]")


def features(text):
    """Returns hashed counts of words and pairs of words.

    Returns:
        (places i64[N], values f32[N]): log of one plus each count, of length 1.
    """
    words = _TOKEN.findall(text[:_SHOWN].lower())
    pairs = [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]
    hashed = [zlib.crc32(term.encode("utf-8", "replace")) for term in words + pairs]
    places, counts = np.unique(
        np.array(hashed, np.int64) % FEATURES, return_counts=True
    )
    values = np.log1p(counts).astype(np.float32)
    return places, values / max(np.sqrt(np.sum(values**2)), 1e-12)


class Classifier:
    """Weights, read from a file that `train` wrote.

    Args:
        path: the file.
    """

    def __init__(self, path):
        try:
            weights = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"quality.model={path}: not a classifier of stagecraft curate ({error})"
            ) from None
        if weights.shape != (FEATURES + 1,) or weights.dtype != np.float32:
            raise UserError(
                f"quality.model={path}: holds {weights.dtype}{list(weights.shape)}, "
                f"expected float32[{FEATURES + 1}]"
            )
        self.weights, self.bias = weights[:-1], weights[-1]

    def score(self, text):
        """Returns the probability of "good", rounded alike on every platform."""
        places, values = features(text)
        logit = float(self.weights[places].astype(np.float64) @ values + self.bias)
        return round(float(special.expit(logit)), 6)


def train(good, bad, folder, penalty=1e-4):
    """Fits the weights and writes them under the hash of their content.

    Args:
        good, bad: lists of str.
        folder: where the file goes.
        penalty: of the squared weights.

    Returns:
        (path, measured): the file, and {"accuracy", "auc", "held", "good", "bad"} on
        samples held back; the weights kept are fitted on all.
    """
    for name, texts in (("good", good), ("bad", bad)):
        if len(texts) < _LEAST:
            raise UserError(
                f"quality.{name}: holds {len(texts)} documents, expected {_LEAST} or "
                "more to learn from"
            )
    held = [np.arange(len(texts)) % _HELD == 0 for texts in (good, bad)]
    matrix = _matrix(good + bad)
    labels = np.repeat([1.0, 0.0], [len(good), len(bad)])
    aside = np.concatenate(held)
    tried = _fit(matrix[~aside], labels[~aside], penalty)
    guess = matrix[aside] @ tried[:-1] + tried[-1]
    truth = labels[aside] > 0
    right = [np.mean((guess > 0)[truth]), np.mean((guess <= 0)[~truth])]
    measured = {
        "accuracy": round(float(np.mean(right)), 4),
        "auc": round(_auc(guess, truth), 4),
        "held": int(aside.sum()),
        "good": len(good),
        "bad": len(bad),
    }
    data = io.BytesIO()
    np.save(data, _fit(matrix, labels, penalty).astype(np.float32))
    name = hashlib.sha256(data.getvalue()).hexdigest()[:16]
    path = Path(folder) / f"quality-{name}.npy"
    storage.write_bytes(path, data.getvalue())
    return path, measured


def _matrix(texts):
    rows = [features(text) for text in texts]
    ends = np.cumsum([0] + [len(places) for places, _ in rows])
    return sparse.csr_matrix(
        (
            np.concatenate([v for _, v in rows]).astype(np.float64),
            np.concatenate([p for p, _ in rows]),
            ends,
        ),
        shape=(len(rows), FEATURES),
    )


def _fit(matrix, labels, penalty):
    """Returns weights and bias, f64[FEATURES + 1]; good and bad weigh the same."""
    # Features that no sample has stay at 0; leaving them out saves most of the work.
    used = np.unique(matrix.indices)
    matrix = matrix[:, used]
    weight = np.where(labels > 0, 0.5 / labels.sum(), 0.5 / (1 - labels).sum())
    sign = 2 * labels - 1

    def loss(parameters):
        w, b = parameters[:-1], parameters[-1]
        margin = sign * (matrix @ w + b)
        value = weight @ np.logaddexp(0, -margin) + 0.5 * penalty * w @ w
        slope = -weight * sign * special.expit(-margin)
        return value, np.append(matrix.T @ slope + penalty * w, slope.sum())

    start = np.zeros(len(used) + 1)
    from scipy import optimize  # which takes long to import

    fitted = optimize.minimize(loss, start, jac=True, method="L-BFGS-B").x
    whole = np.zeros(FEATURES + 1)
    whole[used], whole[-1] = fitted[:-1], fitted[-1]
    return whole


def _auc(guess, truth):
    """Returns the share of (good, bad) pairs in the right order."""
    order = np.argsort(guess, kind="stable")
    ranks = np.empty(len(guess))
    ranks[order] = np.arange(1, len(guess) + 1)
    goods, bads = int(truth.sum()), int((~truth).sum())
    return float((ranks[truth].sum() - goods * (goods + 1) / 2) / (goods * bads))
