"""The peers are there, or the run says so: a missing peer is no passed test."""

import importlib.util
import logging
import os

import pytest

# Nothing here may ask the network for anything; set before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PEERS = ("torch", "transformers", "trl", "datasets", "accelerate")
MISSING = [name for name in PEERS if importlib.util.find_spec(name) is None]

# Without them nothing here can even be imported.
collect_ignore_glob = ["*.py"] if MISSING else []


def pytest_configure(config):
    # Asked for by name, they must run; other runs do without, and say so.
    if MISSING and config.getoption("markexpr") == "peers":
        raise pytest.UsageError(
            f"the peers are not installed ({', '.join(MISSING)} missing): run "
            "`make test-peers`, or `pip install -e .[dev,peers]`"
        )


def pytest_report_header():
    if MISSING:
        return f"tests/peers: left out, {', '.join(MISSING)} not installed"
    return None


def pytest_collection_modifyitems(items):
    """What the peers themselves will change one day is not ours to mend."""
    for item in items:
        if item.get_closest_marker("peers"):
            item.add_marker(pytest.mark.filterwarnings("ignore::FutureWarning"))


@pytest.fixture
def float64(monkeypatch):
    """Both sides compute in float64, where rounding decides nothing.

    An exponential or a difference of a loss magnifies the rounding errors of float32
    beyond any tolerance that would still see a mistake. Where the peers' code asks for
    float32 by name, as more than half precision, it gets float64 too.
    """
    import jax
    import torch

    single, double = torch.float32, torch.float64
    monkeypatch.setattr(torch, "float32", double)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(double)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(single)


@pytest.fixture(autouse=True)
def _quiet_peers():
    """The peers' progress bars and advice would drown a failure."""
    for name in ("transformers", "trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
