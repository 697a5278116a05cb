"""What a loss returns: unreduced values, and metrics."""

from collections.abc import Mapping

from jax import Array

# {name: values}, or {name: (values, mask)} where a metric has a mask of its own.
Metrics = dict[str, Array | tuple[Array, Array]]
# One loss an element, at the first place of the stage.
Result = tuple[Array, Mapping[str, Array | tuple[Array, Array]]]
# {place: losses}, for losses with terms at places that they name.
PlacedResult = tuple[dict[str, Array], Metrics]
