"""The cache of the hub is found as its own client finds it."""

import subprocess
import sys

import pytest

from stagecraft import hub

pytestmark = pytest.mark.peers

ASK = "import huggingface_hub.constants as c; print(c.HF_HUB_CACHE)"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "/x"},
        {"XDG_CACHE_HOME": "/x", "HF_HOME": "~/home"},
        {"HF_HOME": "/home", "HF_HUB_CACHE": "~/cache"},
        {"HF_HOME": "/home", "HUGGINGFACE_HUB_CACHE": "/older"},
    ],
)
def test_the_cache(variables, monkeypatch, tmp_path):
    environment = {"HOME": str(tmp_path)} | variables
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True
    )
    assert str(hub.cache()) == told.stdout.strip()


def test_a_snapshot(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    root = tmp_path / "models--org--small"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    (root / "snapshots" / commit / "model.safetensors").write_bytes(b"")
    theirs = huggingface_hub.snapshot_download(
        "org/small", cache_dir=tmp_path, local_files_only=True
    )
    assert str(hub.find("org/small")) == theirs
