"""Looking at one matrix of a large model reads neither its stack nor its shard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from stagecraft.models import huggingface
from stagecraft.models.transformer import Transformer
from tests import tiny
from tests.anatomy.weights_test import write_stage
from tests.conftest import ROOT

LAYERS, WIDTH, WIDE = 40, 128, 1 << 12
MATRIX = 4 * WIDTH * WIDE  # bytes of the largest in float32
STACK = LAYERS * MATRIX
PROMISED = 2 * MATRIX + 2 * 8 * WIDTH**2 + (64 << 20)

# The peak is that of a process of its own, from where everything is imported.
CHILD = """
import json, sys
from stagecraft.anatomy import stored, weights
from stagecraft.models import locate

def kept(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

def compare(models, name):
    weights.compare(*(model.matrices[name] for model in models), draws=1)

peaks = {}
for label, place in json.loads(sys.argv[1]).items():
    models = [stored.weights_of(locate.locate(place)) for _ in range(2)]
    compare(models, "layers/0/attention/query")
    before = kept("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
    for kind in ("up", "down"):
        compare(models, f"layers/5/ff/{kind}")
    peaks[label] = kept("VmHWM") - before
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_what_is_read_is_two_matrices_however_large_the_model(tmp_path):
    config = tiny.config(
        **dict(layers=LAYERS, width=WIDTH, ff_width=WIDE, heads=2, kv_heads=2),
        **dict(norm="layer", positions="learned", gated=False, qk_norm=False),
        **dict(qkv_bias=True, out_bias=True, ff_bias=True, activation="gelu_tanh"),
        **dict(head_dim=WIDTH // 2),
    )
    model = jax.jit(lambda key: Transformer(config, key))(jax.random.key(0))
    write_stage(tmp_path, "stage", model, "")
    # Three shards, each as large as a stack.
    huggingface.save(model, tmp_path / "hf", shard_size=STACK)
    assert len([*(tmp_path / "hf").glob("*.safetensors")]) == 3
    places = {"stage": str(tmp_path / "stage"), "folder": f"hf:{tmp_path}/hf"}
    # Without the pool of threads that a process has before it is asked for anything.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(places)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    peaks = json.loads(ran.stdout.splitlines()[-1])
    assert PROMISED < STACK  # a whole stack, or two whole shards, would not fit
    assert max(peaks.values()) < PROMISED, (peaks, PROMISED)
