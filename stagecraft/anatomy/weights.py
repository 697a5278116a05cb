"""What a stage changed in the weights: how far, where, and in how many directions.

All figures are about `after - before` on the parameters that both trees hold. They are
computed one leaf at a time on the host, in float64 sums over float32 weights.
"""

import jax.numpy as jnp
import numpy as np

from stagecraft import tree
from stagecraft.errors import UserError

# Reward and value models keep their decoder under this name, next to a scalar head.
_BODY = "body/"
_STACK = "layers/"  # leaves below it carry the layers on axis 0


def matrix_name(name):
    """Returns which matrix of a layer a parameter is, from its path in the tree.

    >>> [matrix_name(f"layers/attention/{n}") for n in ("query", "query_norm/scale")]
    ['query', 'norm']
    >>> [matrix_name(f"layers/sparse/experts/{n}") for n in ("gate", "router")]
    ['expert_gate', 'router']
    """
    if "norm" in name:
        return "norm"
    last = name.rsplit("/", 1)[-1]
    if "experts/" in name and last != "router":
        return f"expert_{last}"
    return "output" if last == "out" else last


def compare(before, after):
    """Measures how far `after` is from `before`.

    Shares of unchanged weights are given at three tolerances, because sparsity after a
    cast to bfloat16 is partly rounding: with 8 significant bits, an update below 2^-9
    of a weight vanishes (Mukherjee et al. 2505.11711 count at 1e-5; the caveat is from
    "The Path Not Taken", 2511.08567).

    Args:
        before, after: pytrees of parameters, NNX modules included. A tree whose decoder
            lies under "body/" is compared by that decoder.

    Returns:
        A nested dict of floats, ready for JSON:
        relative_change: Frobenius norm of the update over that of `before`.
        unchanged_bf16, unchanged_fp32: share of the weights that are equal, as they are
            or after both sides are cast to bfloat16; unchanged_1e5: share that moved
            by at most 1e-5.
        by_kind: {matrix: the four above, and effective_rank, stable_rank and full_rank
            (the largest possible) of the update, averaged over layers}.
        by_layer: {matrix: [relative_change of layer 0, 1, ...]} for the stacked leaves;
            "dense query" and "sparse query" where layers are stacked apart.

    Raises:
        UserError: nothing is shared, or a shared name has two shapes.
    """
    whole, by_matrix, layers, ranks = _Sums(), {}, {}, {}
    for name, a, b in _shared(before, after):
        sums, matrix = _Sums.of(a, b), matrix_name(name)
        whole.add(sums)
        by_matrix.setdefault(matrix, _Sums()).add(sums)
        if name.startswith(_STACK):
            stack = name.removeprefix(_STACK).split("/")[0]
            apart = f"{stack} " if stack in ("dense", "sparse") else ""
            slots = layers.setdefault(apart + matrix, [_Sums() for _ in a])
            for slot, one, other in zip(slots, a, b, strict=True):
                slot.add(_Sums.of(one, other))
            updates = list(b - a)
        else:
            updates = [b - a]
        if matrix.startswith("expert_"):
            updates = [expert for layer in updates for expert in layer]
        if updates[0].ndim >= 2 and not name.endswith("bias"):
            spectra = [spectrum(_two_sided(matrix, update)) for update in updates]
            ranks.setdefault(matrix, []).extend(spectra)
    by_kind = {name: sums.figures() for name, sums in by_matrix.items()}
    for name, spectra in ranks.items():
        for key in spectra[0]:
            by_kind[name][key] = float(np.mean([one[key] for one in spectra]))
    by_layer = {
        name: [slot.relative_change() for slot in slots]
        for name, slots in layers.items()
    }
    return {**whole.figures(), "by_kind": by_kind, "by_layer": by_layer}


def spectrum(matrix):
    """Measures in how many directions a matrix acts.

    Args:
        matrix: f[M, N].

    Returns:
        effective_rank: exp of the entropy of sigma^2 / sum(sigma^2), after Roy and
            Vetterli (2007), with energies in place of singular values.
        stable_rank: sum(sigma^2) / max(sigma^2).
        full_rank: min(M, N), what both are at most. A zero matrix has rank 0.
    """
    m = np.asarray(matrix, np.float64)
    # Only sigma^2 is asked for: eigenvalues of the smaller Gram matrix, never an SVD
    # of something as tall as an embedding.
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    energy = np.clip(np.linalg.eigvalsh(gram), 0.0, None)
    total, full = energy.sum(), float(min(m.shape))
    if total == 0:
        return {"effective_rank": 0.0, "stable_rank": 0.0, "full_rank": full}
    p = energy[energy > 0] / total
    return {
        "effective_rank": float(np.exp(-np.sum(p * np.log(p)))),
        "stable_rank": float(total / energy.max()),
        "full_rank": full,
    }


class _Sums:
    """Running sums from which every figure of `compare` follows."""

    def __init__(self):
        self.moved = self.size = 0.0  # squared Frobenius norms
        self.count = self.bf16 = self.fp32 = self.near = 0

    @classmethod
    def of(cls, before, after):
        sums, change = cls(), (after - before).astype(np.float64)
        sums.moved = float(np.sum(change**2))
        sums.size = float(np.sum(before.astype(np.float64) ** 2))
        sums.count = before.size
        same = before.astype(jnp.bfloat16) == after.astype(jnp.bfloat16)
        sums.bf16 = int(np.sum(same))
        sums.fp32 = int(np.sum(before == after))
        sums.near = int(np.sum(np.abs(change) <= 1e-5))
        return sums

    def add(self, other):
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def relative_change(self):
        # Biases begin at zero: a move from there has no relative size.
        return float(np.sqrt(self.moved / self.size)) if self.size else 0.0

    def figures(self):
        return {
            "relative_change": self.relative_change(),
            "unchanged_bf16": self.bf16 / self.count,
            "unchanged_fp32": self.fp32 / self.count,
            "unchanged_1e5": self.near / self.count,
        }


def _two_sided(name, array):
    """Folds heads into the side they belong to: [H, C, D] or [D, H, C] -> 2-D."""
    if name in ("output", "down", "expert_down"):
        return array.reshape(-1, array.shape[-1])
    return array.reshape(array.shape[0], -1)


def _shared(before, after):
    """Yields (name, f32, f32) for the parameters that both trees hold."""
    ours, theirs = _named(before), _named(after)
    names = [name for name in ours if name in theirs]
    if not names:
        raise UserError(
            "weights: the two trees share no parameter "
            f"(one has {', '.join(list(ours)[:3])}; "
            f"the other {', '.join(list(theirs)[:3])}); "
            "compare stages of the same model"
        )
    for name in names:
        # One leaf at a time: a large model never lies twice on the host.
        a, b = np.asarray(ours[name]), np.asarray(theirs[name])
        if a.shape != b.shape:
            raise UserError(
                f"weights: {name} is {list(a.shape)} in one tree and {list(b.shape)} "
                "in the other; compare stages of the same model"
            )
        yield name, a.astype(np.float32), b.astype(np.float32)


def _named(parameters):
    return {
        name.removeprefix(_BODY): leaf for name, leaf in tree.named(parameters).items()
    }
