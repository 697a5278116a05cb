"""Settings every test runs under, and the one tiny run that many tests look at."""

import importlib.util
import os
import sys
import tempfile
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

# Eight virtual CPU devices, so that every mesh shape up to (2, 2, 2) is real in tests.
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile far more than they compute; commands started by tests do alike.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Runs of one session share what they compile; a run of its own keeps it in WORKDIR.
_CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="stagecraft-compiled-")
)
jax.config.update("jax_compilation_cache_dir", _CACHE)


def pytest_addoption(parser):
    parser.addoption(
        "--parity-seed",
        type=int,
        default=0,
        metavar="N",
        help="draws the cases that are compared with the peers; every N must pass",
    )


@pytest.fixture(scope="session")
def parity_seed(request):
    """The N of --parity-seed=N."""
    return request.config.getoption("--parity-seed")


@pytest.fixture
def parity_rng(request, parity_seed):
    """A numpy generator of this test's own, the same in every run with one seed."""
    return np.random.default_rng(
        [parity_seed, zlib.crc32(request.node.nodeid.encode())]
    )


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(items):
    """A file's tests share what they compile: they stay on one worker.

    So do all that look at the tiny run, which is made once.
    """
    for item in items:
        shared = "tiny_run" in getattr(item, "fixturenames", ())
        group = "tiny" if shared else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


def load_experiment(name):
    """The module of experiments/NAME.py."""
    path = ROOT / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def single_device(config):
    """The config on one device: what a laptop does."""
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    return config


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run of quickstart:tiny on one device: its work directory."""
    from stagecraft import run

    root = tmp_path_factory.mktemp("tiny") / "run"
    run.run(single_device(load_experiment("quickstart").get_config("tiny")), root)
    return root
