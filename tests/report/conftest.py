"""Small runs that nobody trained."""

import pytest

from tests.report import fake_run
from tests.report.runs_to_compare import gold, graph, make


@pytest.fixture
def run(tmp_path):
    return fake_run.write(tmp_path)


@pytest.fixture
def ablation(tmp_path):
    """dpo and ipo, three seeds each: the gold differs, the win rate does not."""
    folders = []
    for objective, level in (("dpo", 1.5), ("ipo", 2.5)):
        for seed in range(3):
            figures = gold(level + 0.1 * seed, rate=0.6 + 0.02 * seed)
            made = graph(figures, objective)
            folders.append(make(tmp_path / f"{objective}{seed}", made, seed))
    return folders
