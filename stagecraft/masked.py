"""Reductions over the places a mask marks True, safe when the mask is empty.

Values under a False mask are replaced before any arithmetic, so NaN or infinity there
reaches neither the result nor a gradient (NaN times zero would still be NaN). Masks are
boolean and have exactly the shape of the values: a mask that broadcasts would count
each place once and sum it many times.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

Axes = int | tuple[int, ...] | None


def check_shapes(**arrays: Any) -> None:
    """Refuses arrays whose shapes differ, before broadcasting hides the mistake.

    Args:
        **arrays: arrays of any rank by the name the message should give them.

    Raises:
        ValueError: naming every array with its shape.
    """
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these arrays must have one shape: {listed}")


def _prepare(x: Any, mask: Any) -> tuple[Array, Array]:
    x, mask = jnp.asarray(x), jnp.asarray(mask)
    check_shapes(values=x, mask=mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"the mask must be boolean, got {mask.dtype}")
    # Half precision and integers add up in float32; float64 is kept for tests.
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return x, mask


def clear(x: Any, mask: Any) -> Array:
    """Returns the values where the mask is True, zero elsewhere.

    A loss that is not linear in its input (an exponential, a square) must get inputs
    cleared by this function: masking only its output leaves NaN in the gradient.

    Args:
        x: array of any shape and dtype.
        mask: bool, same shape.

    Returns:
        Array like `x`.
    """
    check_shapes(values=x, mask=mask)
    return jnp.where(mask, x, jnp.zeros_like(x))


def count(mask: Any, axis: Axes = None) -> Array:
    """Counts the places that are True: f32, shape of `mask` less the reduced axes."""
    return jnp.sum(jnp.asarray(mask), axis=axis, dtype=jnp.int32).astype(jnp.float32)


def sum(x: Any, mask: Any, axis: Axes = None) -> Array:
    """Sums the values under True; 0 for an empty mask.

    Args:
        x: array of any shape; integers and booleans count as numbers.
        mask: bool, same shape.
        axis: axis or axes to reduce; None reduces all.

    Returns:
        f32 (f64 for f64 values), the shape of `x` less the reduced axes.
    """
    x, mask = _prepare(x, mask)
    return jnp.sum(clear(x, mask), axis=axis)


def mean(x: Any, mask: Any, axis: Axes = None) -> Array:
    """Averages the values under True; 0 for an empty mask. Arguments as in `sum`."""
    total = sum(x, mask, axis)
    return total / jnp.maximum(count(mask, axis), 1.0).astype(total.dtype)


def var(x: Any, mask: Any, axis: Axes = None, *, unbiased: bool = False) -> Array:
    """Computes the variance of the values under True; 0 when fewer than two are.

    Args:
        x: array of any shape.
        mask: bool, same shape.
        axis: axis or axes to reduce; None reduces all.
        unbiased: divide by n - 1 instead of n.

    Returns:
        f32, the shape of `x` less the reduced axes.
    """
    x, mask = _prepare(x, mask)
    center = mean(x, mask, axis)
    if axis is None:
        centers = jnp.reshape(center, (1,) * x.ndim)
    else:
        centers = jnp.expand_dims(center, axis)
    # Places that are False are dropped by sum.
    spread = jnp.square(clear(x, mask) - centers)
    n = count(mask, axis).astype(center.dtype)
    return sum(spread, mask, axis) / jnp.maximum(n - 1.0 if unbiased else n, 1.0)


def max(x: Any, mask: Any, axis: Axes = None) -> Array:
    """Finds the largest value under True; 0 for an empty mask; see `sum`."""
    x, mask = _prepare(x, mask)
    largest = jnp.max(jnp.where(mask, x, -jnp.inf), axis=axis, initial=-jnp.inf)
    return jnp.where(jnp.any(mask, axis=axis), largest, jnp.zeros_like(largest))


class Reduction(NamedTuple):
    """How the elements of an unreduced loss become one number: sum / count.

    A plain masked mean has its mask twice. Others weigh elements (a source's weight,
    the inverse of a completion's length) or divide by a number of their own.

    Attributes:
        weights: f32, the loss's shape; 0 where an element does not count.
        count: f32 whose sum is the divisor.
    """

    weights: Array
    count: Array

    @classmethod
    def of(cls, mask: Array, weights: Array | None = None) -> Self:
        """Describes the mean under a mask, of weighted elements with `weights`."""
        inside = jnp.asarray(mask).astype(jnp.float32)
        inside = inside if weights is None else inside * weights
        return cls(inside, inside)

    def sum(self, values: Array) -> Array:
        """Sums with weights; elements of weight 0 may be NaN."""
        check_shapes(values=values, weights=self.weights)
        values = clear(values, self.weights != 0)
        return jnp.sum(values * self.weights.astype(values.dtype))

    def total(self) -> Array:
        """Returns the divisor, f32 scalar; 1 when nothing counts."""
        return _divisor(jnp.sum(self.count))


def _divisor(count: Array) -> Array:
    """Returns the count, or 1 where there is nothing to divide."""
    return jnp.where(count > 0, count, jnp.ones_like(count))


class Mean(NamedTuple):
    """A mean still in two parts, so that parts of a batch merge to the exact whole.

    Attributes:
        total: f32 scalar, the sum under the mask.
        count: f32 scalar, how many places were True.

    >>> first = Mean.of(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False]))
    >>> second = Mean.of(jnp.array([6.0]), jnp.array([True]))
    >>> float(first.merge(second).compute())  # three tokens, not two micro-batches
    3.0
    """

    total: Array
    count: Array

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> Self:
        """Averages `values` where `mask` (bool, same shape) is True; None: all."""
        mask = jnp.ones(jnp.shape(values), bool) if mask is None else mask
        return cls(sum(values, mask), count(mask))

    @classmethod
    def weighted(cls, values: Array, reduction: Reduction) -> Self:
        """Takes the mean that a `Reduction` of the same shape describes."""
        return cls(reduction.sum(values), jnp.sum(reduction.count))

    @classmethod
    def empty(cls) -> Self:
        """Returns the mean of nothing: what an accumulation starts from."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def merge(self, other: "Mean") -> "Mean":
        """Returns the mean over both sets of places."""
        return Mean(self.total + other.total, self.count + other.count)

    def reduce(self) -> "Mean":
        """Merges along a leading axis."""
        return Mean(jnp.sum(self.total, axis=0), jnp.sum(self.count, axis=0))

    def compute(self) -> Array:
        """f32 scalar; 0 when no place was True."""
        return self.total / _divisor(self.count).astype(self.total.dtype)


class Max(NamedTuple):
    """A maximum that merges over parts of a batch.

    Attributes:
        value: f32 scalar; minus infinity while no place was True.
    """

    value: Array

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> Self:
        """Takes the largest of `values` where `mask` (same shape) is True."""
        mask = jnp.ones(jnp.shape(values), bool) if mask is None else mask
        values, mask = _prepare(values, mask)
        return cls(jnp.max(jnp.where(mask, values, -jnp.inf), initial=-jnp.inf))

    @classmethod
    def empty(cls) -> Self:
        """Returns the maximum of nothing: what an accumulation starts from."""
        return cls(jnp.full((), -jnp.inf, jnp.float32))

    def merge(self, other: "Max") -> "Max":
        """Returns the maximum over both sets of places."""
        return Max(jnp.maximum(self.value, other.value))

    def reduce(self) -> "Max":
        """Merges along a leading axis."""
        return Max(jnp.max(self.value, axis=0))

    def compute(self) -> Array:
        """f32 scalar; 0 when no place was True, so no log ever shows -inf."""
        nothing = jnp.isneginf(self.value)
        return jnp.where(nothing, jnp.zeros_like(self.value), self.value)


class Min(NamedTuple):
    """A minimum that merges over parts of a batch.

    Attributes:
        value: f32 scalar; infinity while no place was True.
    """

    value: Array

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> Self:
        """Takes the smallest of `values` where `mask` (same shape) is True."""
        return cls(-Max.of(-jnp.asarray(values), mask).value)

    @classmethod
    def empty(cls) -> Self:
        """Returns the minimum of nothing: what an accumulation starts from."""
        return cls(-Max.empty().value)

    def merge(self, other: "Min") -> "Min":
        """Returns the minimum over both sets of places."""
        return Min(jnp.minimum(self.value, other.value))

    def reduce(self) -> "Min":
        """Merges along a leading axis."""
        return Min(jnp.min(self.value, axis=0))

    def compute(self) -> Array:
        """f32 scalar; 0 when no place was True."""
        return -Max(-self.value).compute()


class CalibrationError(NamedTuple):
    """Expected calibration error: a mean over buckets of |confidence - accuracy|.

    Attributes:
        confidence, hits, count: f32[K], sums in each bucket.
    """

    confidence: Array
    hits: Array
    count: Array

    @classmethod
    def of(cls, confidence: Array, hits: Array, buckets: Array) -> Self:
        """Sums f32[B] confidences and hits by bool[B, K], the bucket of each row."""
        inside = buckets.astype(jnp.float32)
        return cls(
            jnp.sum(confidence[:, None] * inside, axis=0),
            jnp.sum(hits[:, None] * inside, axis=0),
            jnp.sum(inside, axis=0),
        )

    def merge(self, other: "CalibrationError") -> "CalibrationError":
        """Returns the error over both sets of rows."""
        return CalibrationError(*(a + b for a, b in zip(self, other, strict=True)))

    def reduce(self) -> "CalibrationError":
        """Merges along a leading axis."""
        return CalibrationError(*(jnp.sum(x, axis=0) for x in self))

    def compute(self) -> Array:
        """f32 scalar in [0, 1]; 0 when there were no rows."""
        error = jnp.sum(jnp.abs(self.confidence - self.hits))
        return error / _divisor(jnp.sum(self.count))


class Sum(NamedTuple):
    """A weighted sum of means of different places, each exact over merged parts.

    Attributes:
        totals, counts: f32[N]: of each mean, its total times its weight.

    >>> one, two = Mean.of(jnp.array([1.0, 3.0])), Mean.of(jnp.array([5.0]))
    >>> float(Sum.of([one, two], [1.0, -1.0]).compute())
    -3.0
    """

    totals: Array
    counts: Array

    @classmethod
    def of(cls, means: Sequence[Mean], weights: Sequence[float]) -> Self:
        """Weighs `Mean`s."""
        totals = [w * m.total for m, w in zip(means, weights, strict=True)]
        return cls(jnp.stack(totals), jnp.stack([m.count for m in means]))

    def merge(self, other: "Sum") -> "Sum":
        """Returns the sum over both sets of places."""
        return Sum(self.totals + other.totals, self.counts + other.counts)

    def reduce(self) -> "Sum":
        """Merges along a leading axis."""
        return Sum(*(jnp.sum(x, axis=0) for x in self))

    def compute(self) -> Array:
        """f32 scalar; a mean of nothing counts as 0."""
        return jnp.sum(self.totals / _divisor(self.counts))


# The states of metrics, which merge over parts of a batch.
STATES = (Mean, Max, Min, CalibrationError, Sum)


def _each(function, *trees):
    def is_leaf(x):
        return isinstance(x, STATES)

    return jax.tree.map(function, *trees, is_leaf=is_leaf)


def empty_like(tree: Any) -> Any:
    """Returns the same tree of empty states: what an accumulation starts from."""
    return _each(_empty, tree)


def _empty(x):
    if isinstance(x, (CalibrationError, Sum)):
        return type(x)(*(jnp.zeros(v.shape, jnp.float32) for v in x))
    return type(x).empty()


def merge(a: Any, b: Any) -> Any:
    """Merges two trees (usually dicts) of states, key by key."""
    return _each(lambda x, y: x.merge(y), a, b)


def reduce(tree: Any) -> Any:
    """Merges states over a leading axis, such as the one `jax.lax.scan` stacks."""
    return _each(lambda x: x.reduce(), tree)


def compute(tree: Any) -> Any:
    """Returns the same tree with every state replaced by its number."""
    return _each(lambda x: x.compute(), tree)
