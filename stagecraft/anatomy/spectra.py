"""In how many directions a matrix changed, and whether its own main ones turned.

Spectra come from the smaller Gram matrix, summed in float64 over blocks of rows; where
the smaller side is at most `EXACT` the singular values of a change are exact, by a QR
of the blocks. Both stay within two arrays of float64[n, n] and a block.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg

from stagecraft.anatomy import elements

EXACT = 1024
TOP = 8  # directions of a principal subspace
INTRUDERS = 10  # directions of W1 that may be intruders, as 2410.21228 counts
ALIEN = 0.5  # and the cosine below which they are
_BYTES = 1 << 23  # of a block in float64


class Directions(NamedTuple):
    """The main directions of a matrix [out, in].

    Attributes:
        values: f64[n], singular values, largest first; the top ones alone where no more
            were asked for.
        write, read: f64[out, k], f64[in, k], left and right singular vectors.
        total: sum of all squared singular values.
    """

    values: np.ndarray
    write: np.ndarray
    read: np.ndarray
    total: float


class Product:
    """A matrix [out, in], or the difference of two, read in blocks of its longer side.

    Args:
        after: f32[out, in].
        before: f32[out, in] to take off it; None for none.
    """

    def __init__(self, after: np.ndarray, before: np.ndarray | None = None):
        self.turned = after.shape[0] < after.shape[1]
        self.parts = [after] if before is None else [after, before]
        if self.turned:
            self.parts = [part.T for part in self.parts]
        self.rows, self.columns = self.parts[0].shape

    def blocks(self, size: int = 0):
        """Yields (start, f64 block of rows), of so many rows or of `_BYTES`."""
        size = size or max(1, _BYTES // (8 * self.columns))
        for start in range(0, self.rows, size):
            block = self.parts[0][start : start + size].astype(np.float64)
            if len(self.parts) > 1:
                block -= self.parts[1][start : start + size]
            yield start, block

    def gram(self) -> np.ndarray:
        """Returns f64[n, n], n the smaller side."""
        total = np.zeros((self.columns, self.columns))
        for _, block in self.blocks():
            total += block.T @ block
        return total

    def values(self) -> np.ndarray:
        """Returns all singular values, largest first; exact up to a side of `EXACT`."""
        if self.columns > EXACT:
            energies = scipy.linalg.eigvalsh(self.gram(), overwrite_a=True)
            return np.sqrt(np.clip(energies[::-1], 0.0, None))
        factor = np.zeros((0, self.columns))
        # A block is copied twice on its way: half the size, but no wider than high.
        size = max(1, _BYTES // (16 * self.columns), min(self.columns, self.rows))
        for _, block in self.blocks(size):
            factor = np.linalg.qr(np.vstack([factor, block]), mode="r")
        return np.linalg.svd(factor, compute_uv=False)

    def times(self, vectors: np.ndarray) -> np.ndarray:
        """Returns the matrix, its longer side first, times f64[n, k]."""
        out = np.empty((self.rows, vectors.shape[1]))
        for start, block in self.blocks():
            out[start : start + len(block)] = block @ vectors
        return out

    def directions(self, k: int) -> Directions:
        """Returns the top k singular directions, and one value more."""
        gram, n = self.gram(), self.columns
        total, k = float(np.trace(gram)), min(k, n)
        more = min(k + 1, n)
        energies, small = scipy.linalg.eigh(
            gram, subset_by_index=[n - more, n - 1], overwrite_a=True
        )
        values = np.sqrt(np.clip(energies[::-1], 0.0, None))
        small = small[:, ::-1][:, :k]
        large = self.times(small) / np.where(values[:k] > 0, values[:k], 1.0)
        sides = (small, large) if self.turned else (large, small)
        return Directions(values, *sides, total)


def ranks(values: np.ndarray, shape: tuple[int, int], edge: float) -> dict:
    """Measures in how many directions a change acts, from all singular values.

    Args:
        values: f64[n], largest first.
        shape: of the matrix.
        edge: `noise_edge` of the matrix that changed.

    Returns:
        rank: singular values above 3 edges. effective_rank: exp of the entropy of
            s^2 / sum(s^2). effective_rank_rv: of s / sum(s), as Roy and Vetterli
            (2007) have it. stable_rank: sum(s^2) /
            max(s^2). top_energy: share of s^2 in the first 8. full_rank: what ranks are
            at most. stable_rank_gaussian: of noise of that shape, m / (sqrt m +
            sqrt n)^2 n. A change of zero has ranks 0, and no share.
    """
    m, n = max(shape), min(shape)
    gaussian = n * m / (m**0.5 + n**0.5) ** 2
    out = {"full_rank": n, "stable_rank_gaussian": gaussian}
    out["rank"] = int(np.sum(values > 3 * edge))
    energies = values**2
    total = energies.sum()
    if not total:
        zero = dict.fromkeys(
            ("effective_rank", "effective_rank_rv", "stable_rank"), 0.0
        )
        return out | zero | {"top_energy": None}
    return out | {
        "effective_rank": _exp_entropy(energies / total),
        "effective_rank_rv": _exp_entropy(values / values.sum()),
        "stable_rank": float(total / energies[0]),
        "top_energy": float(energies[:TOP].sum() / total),
    }


def _exp_entropy(shares):
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def noise_edge(before: np.ndarray, dtype: str) -> float:
    """Returns the largest singular value that rounding of W0 as stored would make.

    (sqrt m + sqrt n) rms(ulp(W0)) / sqrt 12, the edge of a random matrix whose entries
    are uniform within half a unit in the last place.
    """
    m, n = before.shape
    step = elements.mean_square_ulp(before, dtype) ** 0.5
    return (m**0.5 + n**0.5) * step / 12**0.5


def rotation(before: Directions, after: Directions, k: int) -> dict:
    """Measures how far the principal subspaces turned, in degrees.

    Args:
        before, after: of W0 and W1, at least k directions each.
        k: of them.

    Returns:
        rotation_write, rotation_read: the largest principal angle between the spans of
            the k first left, and right, singular vectors. rotation_write_median,
            rotation_read_median. gap: (s_k - s_k+1) / s_k of W0; where it is no larger
            than the change, vectors k and k+1 trade places and the largest angle means
            nothing.
    """
    out = {}
    for side in ("write", "read"):
        one, other = (getattr(d, side)[:, :k] for d in (before, after))
        angles = np.degrees(scipy.linalg.subspace_angles(one, other))
        out[f"rotation_{side}"] = float(angles.max())
        out[f"rotation_{side}_median"] = float(np.median(angles))
    s = before.values
    out["gap"] = (
        float((s[k - 1] - s[k]) / s[k - 1]) if len(s) > k and s[k - 1] else None
    )
    return out


class Before:
    """What every comparison with W0 needs of it, computed once.

    Args:
        matrix: f32[out, in].
        full: whether all its singular values and vectors are wanted, or the top alone.
    """

    def __init__(self, matrix: np.ndarray, *, full: bool):
        self.matrix, self.product = matrix, Product(matrix)
        self.top = self.product.directions(TOP)
        self.values = self.small = None
        if full:
            energies, vectors = scipy.linalg.eigh(self.product.gram(), overwrite_a=True)
            self.values = np.sqrt(np.clip(energies[::-1], 0.0, None))
            self.small = vectors[:, ::-1]  # f64[n, n], of the smaller side

    def cosines(self, vectors: np.ndarray) -> np.ndarray:
        """Returns |cos| of W0's left singular vectors with others.

        Args:
            vectors: f64[out, k].

        Returns:
            f64[n, k].
        """
        if self.product.turned:  # the smaller side is the left one
            return np.abs(self.small.T @ vectors)
        back = np.zeros((self.product.columns, vectors.shape[1]))
        for start, block in self.product.blocks():
            back += block.T @ vectors[start : start + len(block)]
        inverse = np.zeros_like(self.values)
        large = self.values > 1e-7 * self.values[0]
        inverse[large] = 1 / self.values[large]
        return np.abs(inverse[:, None] * (self.small.T @ back))


def intruders(before: Before, after: Directions) -> dict:
    """Counts main directions of W1 that W0 has not, after 2410.21228.

    Returns:
        intruders: how many of the 10 first left singular vectors of W1 have |cos| below
            .5 with every one of W0. intruders_apart: of these, how many keep less than
            .5 of their length also in the span of W0's vectors whose singular values
            lie within 5% of the most similar one's: near ties share a direction out
            among several vectors, which makes nothing new.
    """
    cosines = before.cosines(after.write[:, :INTRUDERS])
    plain = cosines.max(axis=0) < ALIEN
    apart = 0
    for column in np.flatnonzero(plain):
        at = before.values[np.argmax(cosines[:, column])]
        near = np.abs(before.values - at) <= 0.05 * at
        apart += np.linalg.norm(cosines[near, column]) < ALIEN
    return {"intruders": int(plain.sum()), "intruders_apart": int(apart)}


def compare(
    before: Before,
    after: np.ndarray,
    relative: float | None,
    *,
    edge: float,
    full: bool,
) -> dict:
    """Compares the spectra of W0 and W1, and measures that of their difference D.

    Args:
        before: of W0.
        after: f32[out, in], W1.
        relative: ||D|| / ||W0||; None where W0 is 0.
        edge: `noise_edge` of W0.
        full: False leaves out what needs all singular values.

    Returns:
        the figures of `ranks`, `rotation` and `intruders`, and
        spectral_change: s_1(D) / s_1(W0).
        nss: ||s(W1) - s(W0)|| / ||s(W0)||. nss_scaled: nss sqrt(m) / relative change, m
            the longer side: 1 for noise, sqrt(m) for a rescaling, 0 for a rotation.
    """
    shape, change = after.shape, Product(after, before.matrix)
    k = max(1, min(TOP, min(shape) - 1))
    if full:
        values = change.values()
        out = ranks(values, shape, edge)
    else:
        top = change.directions(TOP)
        values, energies = top.values, top.values[:TOP] ** 2
        total = top.total
        out = {
            "full_rank": min(shape),
            "stable_rank": float(total / energies[0]) if total else 0.0,
            "top_energy": float(energies.sum() / total) if total else None,
        }
    largest = before.top.values[0]
    out["spectral_change"] = float(values[0] / largest) if largest else None
    if relative is None or not largest:
        return out
    count = max(INTRUDERS, TOP)
    main = Product(after).directions(count)
    out |= rotation(before.top, main, k)
    if full:
        energies = scipy.linalg.eigvalsh(Product(after).gram(), overwrite_a=True)
        moved = np.sqrt(np.clip(energies[::-1], 0.0, None)) - before.values
        nss = float(np.linalg.norm(moved) / np.linalg.norm(before.values))
        scaled = nss * max(shape) ** 0.5 / relative if relative else None
        out |= {"nss": nss, "nss_scaled": scaled}
        out |= intruders(before, main)
    return out
