"""A small run that nobody trained."""

import pytest

from tests.report import fake_run


@pytest.fixture
def run(tmp_path):
    return fake_run.write(tmp_path)
