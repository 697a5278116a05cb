"""What changed in a matrix, weight by weight: sums over blocks of rows.

W0 is the weights before, W1 after, D = W1 - W0. Numbers are float32 values of what is
stored; sums are float64. Nothing larger than a block is made.
"""

import ml_dtypes
import numpy as np

from stagecraft.errors import UserError

BLOCK = 1 << 17  # weights worked on at once
ETA = 1e-3  # 2511.08567, section 3: a weight moved if |D| > ETA max(|W0|, |W1|)
# Upper ends of the histogram of |D| in bfloat16 units in the last place of W0.
ULPS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_FLOATS = {  # as stored: numpy's dtype, explicit bits of its fraction, least exponent
    "F64": (np.float32, 23, -126),  # read as float32
    "F32": (np.float32, 23, -126),
    "F16": (np.float16, 10, -14),
    "BF16": (ml_dtypes.bfloat16, 7, -126),
}


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds f32 values to a dtype of a file, "F32", "BF16", ..., and back to f32."""
    return values.astype(_FLOATS[dtype][0]).astype(np.float32)


def coarser(one: str, other: str) -> str:
    """Returns the dtype with fewer bits in its fraction."""
    return min(one, other, key=lambda dtype: _FLOATS[dtype][1])


def ulp(values: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the distance of neighbouring numbers of a dtype at f32 values, as f32."""
    _, bits, least = _FLOATS[dtype]
    binade = (np.abs(values).view(np.uint32) & 0x7F800000).view(np.float32)
    return np.maximum(binade, np.float32(2.0**least)) * np.float32(2.0**-bits)


def blocks(*arrays: np.ndarray):
    """Yields matching blocks of rows of arrays of one shape."""
    width = max(1, arrays[0].size // max(1, len(arrays[0])))
    rows = max(1, BLOCK // width)
    for start in range(0, len(arrays[0]), rows):
        yield tuple(array[start : start + rows] for array in arrays)


def check_finite(values: np.ndarray, name: str) -> None:
    """Raises a UserError that names a matrix with NaN or infinity in it."""
    if not all(np.isfinite(block).all() for (block,) in blocks(values)):
        raise UserError(
            f"{name}: holds values that are not finite (NaN or infinity); a model that "
            "broke cannot be compared: go back to an earlier checkpoint"
        )


def quantiles(values: np.ndarray, shares: tuple[float, ...]) -> list[float]:
    """Returns exact quantiles of |values|, by two counts of the bits of a float32.

    The quantile of share p is the smallest |v| such that at least p of all are at or
    below it.
    """
    high = np.zeros(1 << 16, np.int64)
    for (block,) in blocks(values):
        high += np.bincount(_bits(block) >> 16, minlength=1 << 16)
    limits = []
    for share in shares:
        rank = max(1, int(np.ceil(share * values.size)))
        bucket = int(np.searchsorted(np.cumsum(high), rank))
        rank -= int(high[:bucket].sum())
        low = np.zeros(1 << 16, np.int64)
        for (block,) in blocks(values):
            bits = _bits(block)
            inside = bits[bits >> 16 == bucket]
            low += np.bincount(inside & 0xFFFF, minlength=1 << 16)
        last = int(np.searchsorted(np.cumsum(low), rank))
        bits = np.uint32(bucket << 16 | last)
        limits.append(float(bits.view(np.float32)))
    return limits


def _bits(block):
    return np.abs(block).ravel().view(np.uint32).astype(np.int64)


class Sums:
    """Running sums from which every figure of `figures` follows; they add up."""

    def __init__(self):
        self.count = 0
        self.before = self.after = self.moved = 0.0  # squared Frobenius norms
        self.dot = self.along = 0.0  # <W0, W1>, <D, W0>
        self.exact = self.bf16 = self.near = self.eta = 0  # weights that count as same
        self.visible = self.low = self.high = 0  # that differ in bfloat16; of these
        self.ulps = np.zeros(len(ULPS) + 1, np.int64)
        self.rounding = 0.0  # squared norm of what a cast to the coarser dtype does
        self.sparse = 0  # weights of matrices whose two dtypes are one
        self.floored = 0  # weights of those whose are not

    def add(self, other: "Sums") -> None:
        """Adds the sums of other weights."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def figures(self) -> dict:
        """Returns the figures, as `measure` describes them."""
        out = {
            "weights": self.count,
            "before_norm": self.before**0.5,
            "change_norm": self.moved**0.5,
            # Biases begin at zero: a move from there has no relative size.
            "relative_change": (self.moved / self.before) ** 0.5
            if self.before
            else None,
            "cosine": _ratio(self.dot, (self.before * self.after) ** 0.5),
            "along": _ratio(self.along, (self.before * self.moved) ** 0.5),
            "dtype_floor": None,
        }
        if self.floored and self.after:
            out["dtype_floor"] = (self.rounding / self.after) ** 0.5
        names = ("exact", "bf16", "eta", "near")
        counts = (self.exact, self.bf16, self.eta, self.near)
        whole = self.sparse == self.count
        for name, count in zip(names, counts, strict=True):
            key = "unchanged_1e5" if name == "near" else f"unchanged_{name}"
            out[key] = count / self.count if whole else None
        out["ulps"] = (self.ulps / self.count).tolist() if whole else None
        out["low_overlap"] = _ratio(self.low, self.visible) if whole else None
        out["high_overlap"] = _ratio(self.high, self.visible) if whole else None
        return out


def _ratio(part, whole):
    return float(part / whole) if whole else None


def measure(before: np.ndarray, after: np.ndarray, dtypes: tuple[str, str]) -> Sums:
    """Compares two versions of a matrix, weight by weight.

    The figures of the sums are, with N weights:
        relative_change: ||D|| / ||W0||, Frobenius; null where W0 is 0.
        cosine: of W0 and W1. along: of D and W0, 1 where D only enlarges.
        unchanged_exact: share with W0 = W1; -0 equals 0. unchanged_bf16: equal after
            both sides are cast. unchanged_eta: |D| <= 1e-3 max(|W0|, |W1|), the rule of
            2511.08567. unchanged_1e5: |D| <= 1e-5, as 2505.11711 counts, which depends
            on the scale of the weights.
        ulps: shares by |D| in bfloat16 units in the last place of W0: 0, and up to
            1/4, 1/2, 1, 2, 4, 8, and beyond.
        low_overlap, high_overlap: of the weights that differ in bfloat16, the share
            among the 30% smallest and largest |W0|; null where none differs.
        dtype_floor: where the two are stored in different dtypes, the relative change
            of the cast to the coarser one alone. Shares unchanged are null then: they
            would count the cast.

    Args:
        before, after: f32 of one shape.
        dtypes: that of each as stored, such as ("F32", "BF16").
    """
    sums, same = Sums(), dtypes[0] == dtypes[1]
    low, high = quantiles(before, (0.3, 0.7)) if same else (0.0, 0.0)
    finer = 1 if coarser(*dtypes) == dtypes[0] else 0
    for a, b in blocks(before, after):
        change = np.subtract(b, a, dtype=np.float64)
        one = Sums()
        one.count, one.moved = a.size, float(np.vdot(change, change))
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        one.before, one.after = float(np.vdot(a64, a64)), float(np.vdot(b64, b64))
        one.dot, one.along = float(np.vdot(a64, b64)), float(np.vdot(change, a64))
        if same:
            _count(one, a, b, np.abs(change), low, high)
        else:
            fine = (a, b)[finer]
            error = cast(fine, coarser(*dtypes)) - fine.astype(np.float64)
            one.floored, one.rounding = a.size, float(np.vdot(error, error))
        sums.add(one)
    return sums


def _count(sums, a, b, size, low, high):
    sums.sparse = a.size
    sums.exact = int(np.sum(a == b))
    moved = cast(a, "BF16") != cast(b, "BF16")
    sums.visible = int(np.sum(moved))
    sums.bf16 = a.size - sums.visible
    sums.near = int(np.sum(size <= 1e-5))
    large = np.maximum(np.abs(a), np.abs(b)).astype(np.float64)
    sums.eta = int(np.sum(size <= ETA * large))
    steps = size / ulp(a, "BF16")
    sums.ulps = np.bincount(
        np.searchsorted(ULPS, steps.ravel()), minlength=len(ULPS) + 1
    )
    magnitude = np.abs(a)
    sums.low = int(np.sum(moved & (magnitude <= low)))
    sums.high = int(np.sum(moved & (magnitude > high)))


def visible(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Returns bool: which weights differ after both sides are cast to bfloat16."""
    out = np.empty(before.shape, bool)
    for a, b, part in blocks(before, after, out):
        part[...] = cast(a, "BF16") != cast(b, "BF16")
    return out


def mean_square_ulp(values: np.ndarray, dtype: str) -> float:
    """Returns the mean of the squared unit in the last place over a matrix."""
    total = 0.0
    for (block,) in blocks(values):
        step = ulp(block, dtype).astype(np.float64)
        total += float(np.vdot(step, step))
    return total / values.size
