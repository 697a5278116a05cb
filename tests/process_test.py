"""Compiled programs are kept for the next process; what a stage is made with."""

import os
import subprocess
import sys
from pathlib import Path

import jax

import stagecraft
from stagecraft import process

PROGRAM = """
import jax
from stagecraft import process
process.reuse_programs()
print(jax.config.jax_compilation_cache_dir)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
assert jax.jit(lambda x: x * 2 + 1)(20.0) == 41
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def run(**environment):
    without = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment |= {k: v for k, v in os.environ.items() if k not in without}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, hits = done.stdout.split()
    return folder, int(hits)


def test_the_next_process_compiles_nothing_again(tmp_path):
    folder, hits = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(str(tmp_path / "stagecraft" / "compiled")) and hits == 0
    again, hits = run(XDG_CACHE_HOME=str(tmp_path))
    assert again == folder and hits > 0


def test_jaxs_own_variable_goes_first(tmp_path):
    folder, _ = run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert folder == str(tmp_path / "own")


def test_what_a_stage_is_made_with(monkeypatch):
    words = ["/site-packages/stagecraft/__main__.py", "run", "--config=mine.py:a=b c"]
    monkeypatch.setattr(sys, "argv", words)
    process.made_with.cache_clear()
    made = process.made_with()
    process.made_with.cache_clear()
    assert made["stagecraft"] == stagecraft.__version__
    assert made["jax"] == jax.__version__
    assert made["device"].startswith(f"{jax.device_count()} × ")
    assert made["command"] == "stagecraft run '--config=mine.py:a=b c'"
    root = Path(stagecraft.__file__).parent.parent
    assert ("commit" in made) == (root / ".git").exists()


def test_a_program_of_ones_own_is_no_command(monkeypatch):
    words = ["site-packages/pytest/__main__.py", "--secret=1"]
    monkeypatch.setattr(sys, "argv", words)
    process.made_with.cache_clear()
    made = process.made_with()
    process.made_with.cache_clear()
    assert "command" not in made
