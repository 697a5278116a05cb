"""The other side of `stagecraft bench` does the work that is asked of it."""

import sys

import pytest

from stagecraft.bench import presets, timing

pytestmark = pytest.mark.peers

SMALL = dict(vocab_size=512, width=64, layers=2, heads=2, kv_heads=1, ff_width=128)


@pytest.mark.parametrize(
    ("name", "tokens"), [("sample_2", 2 * 128), ("dpo", 16 * 225), ("grpo", 16 * 64)]
)
def test_a_step_of_the_peers(name, tokens):
    model = presets.PRESETS["laptop"].model | SMALL
    peer = timing.Peer(sys.prefix, name, model)
    try:
        peer.step()
    finally:
        peer.close()
    assert {"torch", "transformers"} <= set(peer.versions)
    (step,) = peer.steps
    # As many as on our side: the words of a text are its tokens.
    assert step["tokens"] == tokens
    assert step["seconds"] > 0 and step["cpu_seconds"] > 0
    assert peer.process.returncode == 0
