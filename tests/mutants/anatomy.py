"""Mistakes in what is said of weights: ranks, sides, roundings, nulls."""

from tests.mutants.mutant import in_file

_PLANTED = "tests/anatomy/planted_test.py"
_MODELS = "tests/anatomy/weights_test.py"

_ELEMENTS = in_file(
    "stagecraft/anatomy/elements.py",
    _PLANTED,
    (
        "the change is cast and not both sides",
        'cast(a, "BF16") != cast(b, "BF16")',
        'cast(b - a, "BF16") != 0',
        f"{_PLANTED} -k below_a_unit",
        {"within": "_count"},
    ),
    (
        "the sign of the change is flipped",
        "np.subtract(b, a, dtype=np.float64)",
        "np.subtract(a, b, dtype=np.float64)",
        f"{_PLANTED} -k rescaling",
    ),
    (
        "a cast between dtypes counts as sparsity",
        "whole = self.sparse == self.count",
        "whole = True",
        f"{_PLANTED} -k another_dtype",
    ),
    (
        "a change from nothing is no change",
        "(self.moved / self.before) ** 0.5 if self.before else None",
        "(self.moved / self.before) ** 0.5 if self.before else 0.0",
        f"{_MODELS} -k fold",
    ),
    (
        "NaN is compared",
        "not all(np.isfinite(block).all() for (block,) in blocks(values))",
        "False",
        f"{_PLANTED} -k no_number",
    ),
    (
        "quantiles are of a bucket's edge",
        "np.uint32(bucket << 16 | last)",
        "np.uint32(bucket << 16)",
        f"{_PLANTED} -k thirds",
    ),
)

_SPECTRA = in_file(
    "stagecraft/anatomy/spectra.py",
    _PLANTED,
    (
        "rank by the default tolerance",
        "int(np.sum(values > 3 * edge))",
        "int(np.sum(values > values[0] * n * np.finfo(np.float64).eps))",
        f"{_PLANTED} -k planted_change",
    ),
    (
        "left and right are swapped",
        "(small, large) if self.turned else (large, small)",
        "(large, small) if self.turned else (small, large)",
        f"{_PLANTED} -k numpy",
    ),
    (
        "the difference is a sum",
        "block -= self.parts[1][start : start + size]",
        "block += self.parts[1][start : start + size]",
        f"{_PLANTED} -k numpy",
    ),
    (
        "the shift of the spectrum is not scaled by its size",
        "nss * max(shape) ** 0.5 / relative",
        "nss * max(shape) ** 0.5",
        f"{_PLANTED} -k rescaling",
    ),
    (
        "near ties are intruders",
        "np.abs(before.values - at) <= 0.05 * at",
        "before.values == at",
        f"{_PLANTED} -k intruders",
    ),
    (
        "ranks are of singular values and not of energies",
        "_exp_entropy(energies / total)",
        "_exp_entropy(values / values.sum())",
        f"{_PLANTED} -k noise_looks",
    ),
    (
        "rounding has the edge of one row",
        "(m**0.5 + n**0.5) * step / 12**0.5",
        "step / 12**0.5",
        f"{_PLANTED} -k noise_edge",
    ),
)

_NULLS = in_file(
    "stagecraft/anatomy/nulls.py",
    f"{_PLANTED} -k null",
    (
        "noise is not rounded as the file is",
        "out[...] = elements.cast(a + np.float32(scale) * noise, dtype)",
        "out[...] = a + np.float32(scale) * noise",
    ),
    (
        "rounding adds to the null's norm",
        'dtype in ("F32", "F64") or not target',
        "True",
    ),
    (
        "every draw is the same noise",
        "[seed, draw, zlib.crc32(name.encode())]",
        "[seed, zlib.crc32(name.encode())]",
    ),
)

_STORED = in_file(
    "stagecraft/anatomy/stored.py",
    _MODELS,
    (
        "heads fold into the wrong side",
        'len(shape) - 1 if kind in ("output", "down", "expert_down") else 1',
        "1",
        f"{_MODELS} -k fold",
    ),
    (
        "an adapter has no scale",
        "read() + np.float32(scale) * product.T",
        "read() + product.T",
        f"{_MODELS} -k adapter",
    ),
)

_CHECKPOINT = in_file(
    "stagecraft/checkpoint.py",
    "tests/anatomy/memory_test.py",
    (
        "a stack is one piece on disk",
        "leaf.size * leaf.dtype.itemsize <= CHUNK",
        "True",
    ),
)

_WEIGHTS = in_file(
    "stagecraft/anatomy/weights.py",
    _PLANTED,
    (
        "models of two lineages are compared",
        "median < KIN",
        "False",
        f"{_PLANTED} -k permuted",
    ),
    (
        "a share is the mean over matrices",
        "float(np.average(values, weights=weights))",
        "float(np.average(values))",
        f"{_MODELS} -k pooled",
    ),
)

_BETWEEN = in_file(
    "stagecraft/anatomy/between.py",
    f"{_PLANTED} -k stages_that_share",
    (
        "reliability is not taken out",
        'row["cosine"] / (own[0] * own[1]) ** 0.5',
        'row["cosine"]',
    ),
    (
        "the cosine of two changes is of their sizes",
        'row["dot"] += float(np.vdot(x, y))',
        'row["dot"] += abs(float(np.vdot(x, y)))',
    ),
)

_CHANGES = in_file(
    "stagecraft/anatomy/changes.py",
    _MODELS,
    (
        "lines of other settings are taken",
        "[pair.before.id, pair.after.id, ids, name, settings]",
        "[pair.before.id, pair.after.id, ids, name]",
        f"{_MODELS} -k again",
    ),
    (
        "a stage of another parent is a null",
        "parent is not None and opened(parent) is pair.before",
        "parent is not None",
        f"{_MODELS} -k null",
    ),
)

_GRAFTED = "tests/anatomy/grafts_test.py"

_GRAFTS = in_file(
    "stagecraft/anatomy/grafts.py",
    _GRAFTED,
    (
        "necessity is of the part alone",
        "1 - value(frozenset(names) - {name})",
        "value(frozenset([name]))",
        f"{_GRAFTED} -k needed",
    ),
    (
        "coalitions weigh alike",
        "math.factorial(len(some))\n * math.factorial(n - len(some) - 1)"
        "\n / math.factorial(n)",
        "1 / 2 ** (n - 1)",
        f"{_GRAFTED} -k orders",
    ),
    (
        "noise is attributed",
        "abs(change) < 3 * error or not change",
        "not change",
        f"{_GRAFTED} -k within_its_error",
    ),
    (
        "a graft takes whole arrays",
        "if index is None:",
        "if True:",
        f"{_GRAFTED} -k only_new",
    ),
    (
        "the chord is the loss before",
        "(1 - own[name]) * losses[0] + own[name] * losses[1]",
        "losses[0]",
        f"{_GRAFTED} -k broke",
    ),
    (
        "a barrier is above the start and not the chord",
        "(1 - step) * ends[0] + step * ends[1]",
        "ends[0]",
        f"{_GRAFTED} -k barrier",
    ),
)

_LENS = in_file(
    "stagecraft/anatomy/lens.py",
    _GRAFTED,
    (
        "what all logits share counts",
        "rows = (rows - p @ rows) * np.asarray(scale, np.float64)",
        "rows = rows * np.asarray(scale, np.float64)",
        f"{_GRAFTED} -k gain",
    ),
    (
        "a lens has no offset",
        "mean_y - mean_x @ weights",
        "0 * mean_y",
        f"{_GRAFTED} -k affine",
    ),
)

_CAUSES = in_file(
    "stagecraft/anatomy/causes.py",
    "tests/anatomy/causes_test.py",
    (
        "the divergence is the other way round",
        "jnp.sum(jnp.exp(p) * (p - q), axis=-1)",
        "jnp.sum(jnp.exp(q) * (q - p), axis=-1)",
        "tests/anatomy/causes_test.py -k divergence",
    ),
    (
        "a lens of a few positions",
        "fitted.shape[1] > 2 * fitted.shape[2]",
        "True",
        "tests/anatomy/causes_test.py -k last_layer",
    ),
)

MUTANTS = (
    *(_ELEMENTS + _SPECTRA + _NULLS + _STORED),
    *(_CHECKPOINT + _WEIGHTS + _BETWEEN + _CHANGES),
    *(_GRAFTS + _LENS + _CAUSES),
)
