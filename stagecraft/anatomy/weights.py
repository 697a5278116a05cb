"""What a stage changed in the weights: how far, where, and in how many directions.

Two versions of a model are compared one matrix at a time: at most two float32 matrices
are in memory, with their Gram matrix twice and 64 MB of blocks. Beside every figure
stand those of isotropic changes of the same norm, by the same code.
"""

import collections
import functools
from collections.abc import Iterable, Mapping

import numpy as np
import threadpoolctl

from stagecraft.anatomy import elements, nulls, spectra
from stagecraft.anatomy.stored import Matrix, Weights
from stagecraft.errors import UserError
from stagecraft.models import translation

SPECTRA = ("all", "top", "none")
DRAWS = 2  # isotropic changes of each matrix
KIN = 0.5  # median cosine of weights below which two models share no lineage
_SAMPLE = 1 << 20  # weights of a matrix that the cosine is taken of
ISOTROPIC = "isotropic"
# Figures that a group of matrices has as the mean of its matrices'.
MEANS = (
    "effective_rank",
    "effective_rank_rv",
    "stable_rank",
    "stable_rank_gaussian",
    "full_rank",
    "rank",
    "top_energy",
    "spectral_change",
    "rotation_write",
    "rotation_read",
    "rotation_write_median",
    "rotation_read_median",
    "gap",
    "nss",
    "nss_scaled",
    "intruders",
    "intruders_apart",
)
# And as the mean over their weights.
SHARES = (
    "unchanged_exact",
    "unchanged_bf16",
    "unchanged_eta",
    "unchanged_1e5",
)


def check_lineage(before: Weights, after: Weights) -> float:
    """Refuses two models whose weights cannot be compared one by one.

    Returns:
        the median over matrices of cos(W0, W1).

    Raises:
        UserError: their configs differ, names the first key; a matrix is missing or has
            another shape; the median cosine is below .5.
    """
    configs = [_shape_of(one.config) for one in (before, after)]
    for key in translation.differences(*configs):
        one, other = (config.get(key) for config in configs)
        raise UserError(
            f"{after.name}: its {key} is {other!r}, that of {before.name} is {one!r}; "
            "compare stages of one model"
        )
    cosines = []
    for name in shared(before, after):
        one, other = before.matrices[name], after.matrices[name]
        if one.shape != other.shape:
            raise UserError(
                f"{after.name}: {name} is {list(other.shape)}, in {before.name} "
                f"{list(one.shape)}; compare stages of one model"
            )
        if len(one.shape) == 2:
            a, b = one.read(), other.read()
            rows = max(1, _SAMPLE // a.shape[1])
            a, b = a[:rows].astype(np.float64), b[:rows].astype(np.float64)
            size = np.linalg.norm(a) * np.linalg.norm(b)
            cosines += [float(np.vdot(a, b) / size)] if size else []
    median = float(np.median(cosines)) if cosines else 1.0
    if median < KIN:
        raise UserError(
            f"{after.name}: shares no lineage with {before.name}: the median cosine "
            f"of their weights is {median:.3f}, expected at least {KIN}; figures "
            "weight by weight mean nothing between models that began apart (or whose "
            "heads and channels are in another order)"
        )
    return median


def _shape_of(config):
    """What decides a model's matrices: the context it is cut to does not."""
    meaning = translation.meaning(config)
    if config.positions != "learned":
        meaning.pop("max_length", None)
    return meaning


def shared(before: Weights, after: Weights) -> list[str]:
    """Returns the names of the matrices that both models have, in their order."""
    names = [name for name in before.matrices if name in after.matrices]
    if not names:
        raise UserError(f"{before.name} and {after.name} share no matrix")
    return names


@functools.cache
def _pools():
    return threadpoolctl.ThreadpoolController()


def one_thread():
    """Returns a context in which linear algebra runs on one thread.

    More are slower for matrices of a layer, much so where they wait for other work.
    """
    return _pools().limit(limits=1, user_api="blas")


def compare(
    before: Matrix,
    after: Matrix,
    *,
    depth: str = "all",
    draws: int = DRAWS,
    seed: int = 0,
    others: Mapping[str, Matrix] | None = None,
) -> dict:
    """Compares two versions of one matrix, and its nulls.

    Args:
        before, after: of one name and shape.
        depth: "all" spectra, "top" for what the first directions give, "ranks" for
            those of the change alone, "none".
        draws: isotropic changes of the same norm.
        seed: of their noise.
        others: {name: the matrix after another stage that started from `before`}: a
            matched-norm control, another seed, continued pretraining.

    Returns:
        {kind, layer, name, shape, dtypes}, the figures of `elements.measure` and
        `spectra.compare`, and null: {name: [figures, one dict a draw]}.
    """
    with one_thread():
        return _compare(before, after, depth, draws, seed, others or {})


def _read(matrix):
    values = matrix.read()
    elements.check_finite(values, matrix.name)
    return values


def _compare(before, after, depth, draws, seed, others):
    a, dtypes = _read(before), (before.dtype, after.dtype)
    coarse, matrix = elements.coarser(*dtypes), len(before.shape) == 2
    start, edge = None, spectra.noise_edge(a, coarse) if matrix else 0.0
    if matrix and depth in ("all", "top"):
        start = spectra.Before(a, full=depth == "all")

    def figures(b, stored):
        sums = elements.measure(a, b, (before.dtype, stored))
        measured = sums.figures()
        if start is not None:
            relative = measured["relative_change"]
            full = depth == "all"
            measured |= spectra.compare(start, b, relative, edge=edge, full=full)
        elif matrix and depth == "ranks":
            measured |= spectra.ranks(spectra.Product(b, a).values(), b.shape, edge)
        return measured

    line = {"kind": before.kind, "layer": before.layer, "name": before.name}
    line |= {"shape": list(before.shape), "dtypes": list(dtypes)}
    b = _read(after)
    line |= figures(b, after.dtype)
    del b  # before the next is made: two matrices at a time
    null = {ISOTROPIC: []}
    for draw in range(draws):
        noise = nulls.isotropic(
            *(a, line["change_norm"], after.dtype),
            name=before.name,
            draw=draw,
            seed=seed,
        )
        null[ISOTROPIC].append(figures(noise, after.dtype))
        del noise
    for name, other in others.items():
        null[name] = [figures(_read(other), other.dtype)]
    return line | {"null": {name: rows for name, rows in null.items() if rows}}


# -- groups of matrices ----------------------------------------------------------------


def pooled(lines: list[dict]) -> dict:
    """Pools matrices into one: all of a kind, of a layer, of a model.

    Norms, cosines and shares are those of all weights together; ranks, rotations and
    spectra are means over matrices; intruders are counted together.

    Args:
        lines: of `compare`.

    Returns:
        the figures, `matrices`, and null: {name: [figures, one dict a draw]}.
    """
    out = {"matrices": len(lines)} | _pool(lines)
    names = dict.fromkeys(name for line in lines for name in line["null"])
    null = {}
    for name in names:
        rows = [line["null"][name] for line in lines if name in line["null"]]
        if len(rows) == len(lines):
            draws = min(map(len, rows))
            null[name] = [_pool([row[draw] for row in rows]) for draw in range(draws)]
    return out | {"null": null}


def _pool(rows):
    before = np.array([row["before_norm"] for row in rows])
    moved = np.array([row["change_norm"] for row in rows])
    after = _after_norms(rows, before, moved)
    weights = np.array([row["weights"] for row in rows])
    size, change = np.linalg.norm(before), np.linalg.norm(moved)
    out = {
        "weights": int(weights.sum()),
        "before_norm": float(size),
        "change_norm": float(change),
        "relative_change": float(change / size) if size else None,
    }
    dots = np.array([row["cosine"] or 0.0 for row in rows]) * before * after
    along = np.array([row["along"] or 0.0 for row in rows]) * before * moved
    out["cosine"] = _ratio(dots.sum(), size * np.linalg.norm(after))
    out["along"] = _ratio(along.sum(), size * change)
    floors = [row["dtype_floor"] for row in rows]
    out["dtype_floor"] = None
    if all(floor is not None for floor in floors):
        out["dtype_floor"] = _ratio(
            np.linalg.norm(after * floors), np.linalg.norm(after)
        )
    for key in SHARES:
        out[key] = _mean([row[key] for row in rows], weights)
    ulps = [row["ulps"] for row in rows]
    out["ulps"] = None
    if all(one is not None for one in ulps):
        out["ulps"] = np.average(ulps, axis=0, weights=weights).tolist()
    seen = [(1 - (row["unchanged_bf16"] or 0.0)) * row["weights"] for row in rows]
    for key in ("low_overlap", "high_overlap"):
        has = [i for i, row in enumerate(rows) if row[key] is not None]
        values = [rows[i][key] for i in has]
        out[key] = _mean(values, [seen[i] for i in has])
    for key in MEANS:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            total = key.startswith("intruders")
            out[key] = float(np.sum(values) if total else np.mean(values))
    return out


def _after_norms(rows, before, moved):
    """||W1|| from ||W0||, ||D|| and their angle."""
    along = np.array([row["along"] or 0.0 for row in rows])
    return np.sqrt(np.maximum(before**2 + moved**2 + 2 * along * before * moved, 0.0))


def _ratio(part, whole):
    return float(part / whole) if whole else None


def _mean(values, weights):
    if not values or any(value is None for value in values) or not np.sum(weights):
        return None
    return float(np.average(values, weights=weights))


def by(lines: Iterable[dict], key: str) -> dict:
    """Pools the lines of each value of a key, "kind" or "layer": {value: figures}."""
    return {value: pooled(rows) for value, rows in _grouped(lines, key).items()}


def gini(shares: Iterable[float]) -> float:
    """Returns the Gini coefficient of some amounts: 0 where all are equal.

    sum_ij |x_i - x_j| / (2 n^2 mean), which is (n - 1) / n where one has all.

    >>> gini([1, 1, 1, 1]), gini([0, 0, 0, 1])
    (0.0, 0.75)
    """
    x = np.asarray(list(shares), np.float64)
    if not x.sum():
        return 0.0
    return float(np.abs(x[:, None] - x[None]).mean() / (2 * x.mean()))


def band(null: Mapping[str, list[dict]], key: str) -> dict:
    """Returns {null: [least, mean, largest]} of a figure over its draws."""
    out = {}
    for name, draws in null.items():
        values = [draw[key] for draw in draws if draw.get(key) is not None]
        if values and not isinstance(values[0], list):
            out[name] = [min(values), float(np.mean(values)), max(values)]
    return out


def summary(before: Weights, after: Weights) -> dict:
    """Compares two versions of a model in short, for a run's summary.

    Returns:
        A nested dict of floats, ready for JSON: relative_change, unchanged_bf16,
        unchanged_exact, unchanged_eta and unchanged_1e5 of all weights; null, the same
        of one isotropic change of the same norm; by_kind, {matrix: these with
        effective_rank, stable_rank, rank and full_rank of the change, means over its
        matrices}; by_layer, {kind: [relative_change of layer 0, ...]}. What is null in
        `compare` is left out, but in by_layer.
    """
    lines = [
        compare(before.matrices[name], after.matrices[name], depth="ranks", draws=1)
        for name in shared(before, after)
    ]
    keys = ("relative_change", *SHARES)
    whole = pooled(lines)

    def short(row, *more):
        return {k: row[k] for k in (*keys, *more) if row.get(k) is not None}

    ranks = ("effective_rank", "stable_rank", "rank", "full_rank")
    layers = [line for line in lines if line["layer"] is not None]
    by_layer = {
        kind: [
            pooled([one for one in rows if one["layer"] == layer])["relative_change"]
            for layer in sorted({one["layer"] for one in rows})
        ]
        for kind, rows in _grouped(layers, "kind").items()
    }
    return {
        **short(whole),
        "null": short(whole["null"][ISOTROPIC][0]),
        "by_kind": {k: short(row, *ranks) for k, row in by(lines, "kind").items()},
        "by_layer": by_layer,
    }


def _grouped(lines, key):
    groups = collections.defaultdict(list)
    for line in lines:
        groups[line[key]].append(line)
    return groups
