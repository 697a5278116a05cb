"""Half precision: no further from float32 than transformers' own half precision is.

Bit for bit the two cannot agree, since they round in other places. What can be held
against each other is the error that rounding leaves: both are measured against the
float32 logits of the same weights. Ours keeps parameters in float32 and computes in
bfloat16; theirs keeps both in bfloat16. So that all see the same weights, they are
rounded to bfloat16 first.
"""

import numpy as np
import pytest
import torch
import transformers

from stagecraft.models import huggingface
from tests.peers import bridge
from tests.peers.families_test import FAMILIES, LENGTH, VOCAB, make, ours, theirs

pytestmark = pytest.mark.peers


def error(logits, exact):
    """Root mean square error of a token, in shares of the logits' spread: the median.

    Where rounding lets a token choose another expert its logits are other ones; the
    median is that of the tokens that chose alike.
    """
    rows = np.sqrt(((logits - exact) ** 2).mean(-1)) / exact.std()
    return float(np.median(rows))


def opened(folder, dtype):
    """transformers' model of a folder; made so, its rotations stay in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_errors(family, parity_seed, parity_rng, tmp_path):
    make(family, parity_seed, 0).bfloat16().save_pretrained(tmp_path)
    ids = parity_rng.integers(0, VOCAB, (8, LENGTH))
    exact = theirs(opened(tmp_path, torch.float32), ids)
    half = opened(tmp_path, torch.bfloat16)
    with torch.no_grad():
        half = half(input_ids=torch.as_tensor(ids)).logits.float().numpy()
    shared = bridge.single()
    same = huggingface.load(tmp_path, shared)
    np.testing.assert_allclose(ours(same, ids), exact, atol=1e-4)
    found = ours(huggingface.load(tmp_path, shared, dtype="bfloat16"), ids)
    found, allowed = error(found, exact), error(half, exact)
    print(family, round(found, 5), round(allowed, 5), round(found / allowed, 3))
    assert 1e-4 < found < 1.25 * allowed, (found, allowed)
