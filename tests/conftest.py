"""Settings every test runs under, and the one tiny run that many tests look at."""

import gc
import importlib.util
import os
import shutil
import sys
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
# The emitter of fusions runs a pipeline of passes for each: half of all compilation. A
# jaxlib that has no other ends at the flag.
if jax.__version_info__ < (0, 11):
    _FLAGS = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {_FLAGS}".strip()

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Tests, commands that they start and later runs share what was compiled, however small
# (JAX by itself keeps only what took a second). The key of a program is its whole text
# with all options, so a changed one is compiled. "make clean" removes them.
_CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "compiled")
)
jax.config.update("jax_compilation_cache_dir", _CACHE)
for _name, _value in (
    ("jax_persistent_cache_min_compile_time_secs", 0),
    ("jax_persistent_cache_min_entry_size_bytes", -1),
):
    os.environ[_name.upper()] = str(_value)
    jax.config.update(_name, _value)

# Tests that "make quick" leaves out, the longest first.
SLOW = Path(__file__).parent / "slow.txt"
# Those that "make test" leaves to "make test-whole", which .ci/run calls as well.
WHOLE = Path(__file__).parent / "whole.txt"


def pytest_addoption(parser):
    parser.addoption(
        "--parity-seed",
        type=int,
        default=0,
        metavar="N",
        help="draws the cases that are compared with the peers; every N must pass",
    )


def pytest_configure(config):
    """Takes back, for the check of an accelerator, what only makes tests faster."""
    if config.option.markexpr == "accelerator":
        del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
        jax.config.update("jax_disable_most_optimizations", False)
        # Compared with a CPU's float32, which has no shorter products.
        jax.config.update("jax_default_matmul_precision", "highest")


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
    """Marks slow tests, and says which tests one worker takes.

    A file's tests share fixtures and what they compile: they stay on one worker. So do
    all that look at the tiny run, which is made once. Groups with the longest tests go
    first, so that no worker is left with one at the end.
    """
    slow, whole = listed(SLOW), listed(WHOLE)
    first = {}  # {group: place of its longest test in the list}
    groups = []
    for item in items:
        shared = "tiny_run" in getattr(item, "fixturenames", ())
        groups.append("tiny" if shared else str(item.path))
        item.add_marker(pytest.mark.xdist_group(groups[-1]))
        test = item.nodeid.split("[")[0]
        place = slow.get(test, slow.get(test.split("::")[0], len(slow)))
        place = 0 if shared else place
        if place < len(slow):
            item.add_marker(pytest.mark.slow)
        if test in whole or test.split("::")[0] in whole:
            item.add_marker(pytest.mark.whole)
        first[groups[-1]] = min(place, first.get(groups[-1], place))
    order = sorted(range(len(items)), key=lambda i: first[groups[i]])
    items[:] = [items[i] for i in order]


def pytest_collection_finish():
    """What is imported lives to the end: cycles are looked for in the rest, seldom."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def listed(path):
    """{"FILE::TEST" or "FILE": its place} in a list of tests."""
    lines = path.read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    return {name: place for place, name in enumerate(names)}


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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    """Chromium; skipped where there is none, but for CI."""
    if not CHROMIUM and not os.environ.get("CI"):
        pytest.skip("needs a browser: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "no browser: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run of quickstart:tiny on one device: its work directory."""
    from stagecraft import run

    root = tmp_path_factory.mktemp("tiny") / "run"
    run.run(single_device(load_experiment("quickstart").get_config("tiny")), root)
    return root
