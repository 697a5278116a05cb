"""Reductions over the places a mask marks True, safe when the mask is empty.

Values under a False mask are replaced before any arithmetic, so NaN or infinity there
reaches neither the result nor a gradient (NaN times zero would still be NaN). Masks are
boolean and have exactly the shape of the values: a mask that broadcasts would count
each place once and sum it many times.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def check_shapes(**arrays):
    """Refuses arrays whose shapes differ, before broadcasting hides the mistake.

    Args:
        **arrays: arrays of any rank by the name the message should give them.

    Raises:
        ValueError: naming every array with its shape.
    """
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these arrays must have one shape: {told}")


def _prepare(x, mask):
    x, mask = jnp.asarray(x), jnp.asarray(mask)
    check_shapes(values=x, mask=mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"the mask must be boolean, got {mask.dtype}")
    # Half precision and integers add up in float32; float64 is kept for tests.
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return x, mask


def clear(x, mask):
    """The values where the mask is True, zero elsewhere.

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


def count(mask, axis=None):
    """How many places are True: f32, shape of `mask` less the reduced axes."""
    return jnp.sum(jnp.asarray(mask), axis=axis, dtype=jnp.int32).astype(jnp.float32)


def sum(x, mask, axis=None):
    """Sum of the values under True; 0 for an empty mask.

    Args:
        x: array of any shape; integers and booleans count as numbers.
        mask: bool, same shape.
        axis: axis or axes to reduce; None reduces all.

    Returns:
        f32 (f64 for f64 values), the shape of `x` less the reduced axes.
    """
    x, mask = _prepare(x, mask)
    return jnp.sum(clear(x, mask), axis=axis)


def mean(x, mask, axis=None):
    """Mean of the values under True; 0 for an empty mask. Arguments as in `sum`."""
    total = sum(x, mask, axis)
    return total / jnp.maximum(count(mask, axis), 1.0).astype(total.dtype)


def var(x, mask, axis=None, *, unbiased=False):
    """Variance of the values under True; 0 when fewer than two are.

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
        kept = jnp.reshape(center, (1,) * x.ndim)
    else:
        kept = jnp.expand_dims(center, axis)
    spread = jnp.square(clear(x, mask) - kept)  # what is False is dropped by sum
    n = count(mask, axis).astype(center.dtype)
    return sum(spread, mask, axis) / jnp.maximum(n - 1.0 if unbiased else n, 1.0)


def max(x, mask, axis=None):
    """Largest value under True; 0 for an empty mask. Arguments as in `sum`."""
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

    weights: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, mask, weights=None):
        """The mean under a mask, of weighted elements when `weights` are given."""
        found = jnp.asarray(mask).astype(jnp.float32)
        found = found if weights is None else found * weights
        return cls(found, found)

    def sum(self, values):
        """Weighted sum; what has weight 0 may be NaN."""
        check_shapes(values=values, weights=self.weights)
        values = clear(values, self.weights != 0)
        return jnp.sum(values * self.weights.astype(values.dtype))

    def total(self):
        """The divisor, f32 scalar; 1 when nothing counts."""
        return _divisor(jnp.sum(self.count))


def _divisor(count):
    """The count, or 1 where there is nothing to divide."""
    return jnp.where(count > 0, count, jnp.ones_like(count))


class Mean(NamedTuple):
    """A mean still in two parts, so that parts of a batch merge to the exact whole.

    Attributes:
        total: f32 scalar, the sum under the mask.
        count: f32 scalar, how many places were True.

    >>> first = Mean.of(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False]))
    >>> second = Mean.of(jnp.array([6.0]), jnp.array([True]))
    >>> float(first.merge(second).result())  # three tokens, not two micro-batches
    3.0
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values, mask=None):
        """The mean of `values` where `mask` (bool, same shape) is True; None: all."""
        mask = jnp.ones(jnp.shape(values), bool) if mask is None else mask
        return cls(sum(values, mask), count(mask))

    @classmethod
    def weighted(cls, values, reduction):
        """The mean that a `Reduction` of the same shape describes."""
        return cls(reduction.sum(values), jnp.sum(reduction.count))

    @classmethod
    def empty(cls):
        """The mean of nothing: what an accumulation starts from."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def merge(self, other):
        """The mean over both sets of places."""
        return Mean(self.total + other.total, self.count + other.count)

    def fold(self):
        """Merges along a leading axis."""
        return Mean(jnp.sum(self.total, axis=0), jnp.sum(self.count, axis=0))

    def result(self):
        """f32 scalar; 0 when no place was True."""
        return self.total / _divisor(self.count).astype(self.total.dtype)


class Max(NamedTuple):
    """A maximum that merges over parts of a batch.

    Attributes:
        value: f32 scalar; minus infinity while no place was True.
    """

    value: jax.Array

    @classmethod
    def of(cls, values, mask=None):
        """The largest of `values` where `mask` (same shape) is True; None: of all."""
        mask = jnp.ones(jnp.shape(values), bool) if mask is None else mask
        values, mask = _prepare(values, mask)
        return cls(jnp.max(jnp.where(mask, values, -jnp.inf), initial=-jnp.inf))

    @classmethod
    def empty(cls):
        """The maximum of nothing: what an accumulation starts from."""
        return cls(jnp.full((), -jnp.inf, jnp.float32))

    def merge(self, other):
        """The maximum over both sets of places."""
        return Max(jnp.maximum(self.value, other.value))

    def fold(self):
        """Merges along a leading axis."""
        return Max(jnp.max(self.value, axis=0))

    def result(self):
        """f32 scalar; 0 when no place was True, so no log ever shows -inf."""
        nothing = jnp.isneginf(self.value)
        return jnp.where(nothing, jnp.zeros_like(self.value), self.value)


class Min(NamedTuple):
    """A minimum that merges over parts of a batch.

    Attributes:
        value: f32 scalar; infinity while no place was True.
    """

    value: jax.Array

    @classmethod
    def of(cls, values, mask=None):
        """The smallest of `values` where `mask` (same shape) is True; None: of all."""
        return cls(-Max.of(-jnp.asarray(values), mask).value)

    @classmethod
    def empty(cls):
        """The minimum of nothing: what an accumulation starts from."""
        return cls(-Max.empty().value)

    def merge(self, other):
        """The minimum over both sets of places."""
        return Min(jnp.minimum(self.value, other.value))

    def fold(self):
        """Merges along a leading axis."""
        return Min(jnp.min(self.value, axis=0))

    def result(self):
        """f32 scalar; 0 when no place was True."""
        return -Max(-self.value).result()


class Gap(NamedTuple):
    """Expected calibration error: a mean over buckets of |confidence - accuracy|.

    Attributes:
        confidence, hits, count: f32[K], sums in each bucket.
    """

    confidence: jax.Array
    hits: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, confidence, hits, buckets):
        """From f32[B] confidences and hits, and bool[B, K]: the bucket of each row."""
        inside = buckets.astype(jnp.float32)
        confidence, hits = (x[:, None] * inside for x in (confidence, hits))
        return cls(*(jnp.sum(x, axis=0) for x in (confidence, hits, inside)))

    def merge(self, other):
        """The error over both sets of rows."""
        return Gap(*(a + b for a, b in zip(self, other, strict=True)))

    def fold(self):
        """Merges along a leading axis."""
        return Gap(*(jnp.sum(x, axis=0) for x in self))

    def result(self):
        """f32 scalar in [0, 1]; 0 when there were no rows."""
        gap = jnp.sum(jnp.abs(self.confidence - self.hits))
        return gap / _divisor(jnp.sum(self.count))


class Sum(NamedTuple):
    """A weighted sum of means of different places, each exact over merged parts.

    Attributes:
        totals, counts: f32[N]: of each mean, its total times its weight.

    >>> one, two = Mean.of(jnp.array([1.0, 3.0])), Mean.of(jnp.array([5.0]))
    >>> float(Sum.of([one, two], [1.0, -1.0]).result())
    -3.0
    """

    totals: jax.Array
    counts: jax.Array

    @classmethod
    def of(cls, means, weights):
        """From `Mean`s and their weights."""
        totals = [w * m.total for m, w in zip(means, weights, strict=True)]
        return cls(jnp.stack(totals), jnp.stack([m.count for m in means]))

    def merge(self, other):
        """The sum over both sets of places."""
        return Sum(self.totals + other.totals, self.counts + other.counts)

    def fold(self):
        """Merges along a leading axis."""
        return Sum(*(jnp.sum(x, axis=0) for x in self))

    def result(self):
        """f32 scalar; a mean of nothing counts as 0."""
        return jnp.sum(self.totals / _divisor(self.counts))


PARTIAL = (Mean, Max, Min, Gap, Sum)  # what merges over parts of a batch


def _each(function, *trees):
    def is_leaf(x):
        return isinstance(x, PARTIAL)

    return jax.tree.map(function, *trees, is_leaf=is_leaf)


def empty_like(tree):
    """The same tree of the mean and so on of nothing: where an accumulation starts."""
    return _each(_nothing, tree)


def _nothing(x):
    if isinstance(x, (Gap, Sum)):
        return type(x)(*(jnp.zeros(v.shape, jnp.float32) for v in x))
    return type(x).empty()


def merge(a, b):
    """Merges two trees (usually dicts) of `Mean`, `Max` and so on, key by key."""
    return _each(lambda x, y: x.merge(y), a, b)


def fold(tree):
    """Merges over a leading axis, such as the one `jax.lax.scan` stacks."""
    return _each(lambda x: x.fold(), tree)


def results(tree):
    """The same tree with every `Mean`, `Max` and so on replaced by its number."""
    return _each(lambda x: x.result(), tree)
