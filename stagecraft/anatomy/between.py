"""Whether two stages changed the same things: their task vectors side by side.

D_a and D_b are the changes of two stages, each against its own parent.
"""

import numpy as np

from stagecraft.anatomy import elements, nulls, spectra, weights


def compare(one, other, *, seed: int = 0) -> dict | None:
    """Compares the changes of two stages, matrix by matrix.

    Args:
        one, other: `changes.Pair`s.
        seed: of the noise.

    Returns:
        stages: their names. cosine: of D_a and D_b, all weights; null: 1 / sqrt(N), the
            SD of that of noise. overlap_write, overlap_read: ||U_a^T U_b||_F^2 / k of
            the first 8 directions, mean over matrices, with overlap_write_chance and
            overlap_read_chance, k over the side. changed_overlap: share of weights that
            both changed in bfloat16, with what independence gives (changed_chance) and
            what two isotropic changes of the same norms give on the same weights
            (changed_null). None for two stages without a matrix in common.
    """
    names = [
        name
        for name in one.after.matrices
        if all(
            name in w.matrices
            and w.matrices[name].shape == one.after.matrices[name].shape
            for w in (one.before, other.before, other.after)
        )
    ]
    if not names:
        return None
    rows = [_matrix(one, other, name, seed) for name in names]
    dot, a, b, count = (
        sum(row[key] for row in rows) for key in ("dot", "a", "b", "count")
    )
    out = {
        "stages": [one.stage, other.stage],
        "cosine": float(dot / (a * b) ** 0.5) if a * b else None,
        "cosine_null": float(count**-0.5),
    }
    for key in ("overlap_write", "overlap_read"):
        for part in (key, f"{key}_chance"):
            values = [row[part] for row in rows if part in row]
            out[part] = float(np.mean(values)) if values else None
    for key in ("changed_overlap", "changed_chance", "changed_null"):
        values, sizes = ([row[k] for row in rows] for k in (key, "count"))
        whole = None not in values
        out[key] = float(np.average(values, weights=sizes)) if whole else None
    return out


def _matrix(one, other, name, seed):
    a, b = _change(one, name), _change(other, name)
    row = {"dot": 0.0, "a": 0.0, "b": 0.0, "count": a.size}
    for x, y in elements.blocks(a, b):
        x, y = x.astype(np.float64), y.astype(np.float64)
        row["dot"] += float(np.vdot(x, y))
        row["a"] += float(np.vdot(x, x))
        row["b"] += float(np.vdot(y, y))
    if a.ndim == 2 and row["a"] and row["b"]:
        k = max(1, min(spectra.TOP, min(a.shape) - 1))
        with weights.one_thread():
            tops = [spectra.Product(change).directions(k) for change in (a, b)]
        for side, size in (("write", a.shape[0]), ("read", a.shape[1])):
            vectors = [getattr(top, side) for top in tops]
            row[f"overlap_{side}"] = subspace_overlap(*vectors)
            row[f"overlap_{side}_chance"] = k / size
    del a, b
    return row | _changed(one, other, name, row, seed)


def _change(pair, name):
    """D of a pair, taken off in place."""
    change = np.array(pair.after.matrices[name].read(), np.float32)
    change -= pair.before.matrices[name].read()
    return change


def subspace_overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Returns ||A^T B||_F^2 / k of two orthonormal f64[m, k]; k / m by chance."""
    return float(np.sum((one.T @ other) ** 2) / one.shape[1])


def _changed(one, other, name, row, seed):
    """The overlap of what both changed in bfloat16, by chance and for noise."""
    matrices = [(p.before.matrices[name], p.after.matrices[name]) for p in (one, other)]
    if any(before.dtype != after.dtype for before, after in matrices):
        return dict.fromkeys(("changed_overlap", "changed_chance", "changed_null"))
    masks, noise = [], []
    for (before, after), norm, draw in zip(
        matrices, (row["a"], row["b"]), (101, 102), strict=True
    ):
        w0 = before.read()
        masks.append(elements.visible(w0, after.read()))
        random = nulls.isotropic(
            w0, norm**0.5, after.dtype, name=name, draw=draw, seed=seed
        )
        noise.append(elements.visible(w0, random))
    return {
        "changed_overlap": float(np.mean(masks[0] & masks[1])),
        "changed_chance": float(masks[0].mean() * masks[1].mean()),
        "changed_null": float(np.mean(noise[0] & noise[1])),
    }


def corrected(rows: list[dict], siblings: dict[str, list[str]]) -> list[dict]:
    """Adds cosine_corrected: cos_ab / sqrt(cos_aa' cos_bb').

    a' is another seed of a from the same parent: two seeds of one stage agree only as
    far as a change is not chance, and no two stages can agree more than that.

    Args:
        rows: of `compare`.
        siblings: {stage: its other seeds}.
    """
    cosines = {frozenset(row["stages"]): row["cosine"] for row in rows}

    def reliability(stage):
        values = [cosines.get(frozenset((stage, s))) for s in siblings.get(stage, ())]
        values = [value for value in values if value is not None]
        return float(np.mean(values)) if values else None

    out = []
    for row in rows:
        own = [reliability(stage) for stage in row["stages"]]
        value = None
        if row["cosine"] is not None and all(r is not None and r > 0 for r in own):
            value = row["cosine"] / (own[0] * own[1]) ** 0.5
        out.append(row | {"cosine_corrected": value})
    return out
