"""Hand-made folders for the tests of models."""

import numpy as np
import pytest

from tests.models import folders


@pytest.fixture(scope="module")
def arrays():
    return folders.weights(np.random.default_rng(0))


@pytest.fixture
def folder(tmp_path, arrays):
    return folders.put(tmp_path / "in", arrays, shards=3)
