"""A run killed at random moments takes as long as the formula of goodput says."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from stagecraft.pods import goodput
from tests.conftest import ROOT

pytestmark = pytest.mark.processes

FAILURES = 20.0  # seconds between two, in the mean
SAVE = 200  # steps between two saves
STEPS = 2000


def command(folder, steps):
    return [
        *(sys.executable, "-m", "stagecraft", "run", "--only=pretrain"),
        *("--config=experiments/quickstart.py:tiny", f"--workdir={folder}"),
        f"--config.stages.pretrain.steps={steps}",
        f"--config.stages.pretrain.every.save={SAVE}",
        "--config.stages.pretrain.every.eval=0",
    ]


def rows(folder):
    path = folder / "pretrain" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def whole(folder, steps):
    """Seconds to the first logged step, and of all steps, of a run left alone."""
    started = time.monotonic()
    with subprocess.Popen(command(folder, steps), cwd=ROOT) as process:
        while not rows(folder):
            time.sleep(0.05)
        restart = time.monotonic() - started
        assert process.wait() == 0
    return restart, time.monotonic() - started - restart


def killed(folder, steps, seed):
    """Seconds of a run that is killed at random moments and started again."""
    rng, kills = np.random.default_rng(seed), 0
    started = time.monotonic()
    while True:
        with subprocess.Popen(command(folder, steps), cwd=ROOT) as process:
            try:
                assert process.wait(rng.exponential(FAILURES)) == 0
                return time.monotonic() - started, kills
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1


def test_random_kills_cost_what_the_formula_says(tmp_path):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    whole(tmp_path / "warm", 20)  # compiles, and writes the caches
    restart, seconds = whole(tmp_path / "alone", STEPS)
    interval = seconds * SAVE / STEPS
    expected = goodput.share(interval, 0.05, restart, FAILURES)
    shares = []
    for seed in range(2):
        took, kills = killed(tmp_path / f"killed{seed}", STEPS, seed)
        shares.append(seconds / took)
        print(f"{kills} kills: {took:.1f} s, {shares[-1]:.2f} of it training")
    print(f"restart {restart:.1f} s, alone {seconds:.1f} s, expected {expected:.2f}")
    # Two runs with a handful of failures each, and one start that none of them saves.
    assert np.mean(shares) == pytest.approx(expected, abs=0.15)
