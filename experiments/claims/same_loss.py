r"""SFT and DPO pull the weights the same way: all stages share roughly one loss.

Each objective's gradient at the SFT model, on the same pairs of its own answers. Two
halves of the pairs give two estimates; the cosine between SFT's on one half and DPO's
on the other is divided by how far each agrees with itself. The control turns half of
the pairs round: preferences that mean nothing should leave no cosine.

[claim]
number = 15
claim = "All stages share roughly the same loss"
source = "the common account of post-training as cross-entropy, reweighted"
primary = "cosine.sft_dpo"
effect = 0.5
control = "DPO on pairs whose order is drawn by a coin agrees with SFT as well"
control_primary = "cosine.sft_coin"
checks = ["reliability.sft > 0.05", "reliability.dpo > 0.05"]
seconds = 30
"""

import jax.numpy as jnp
import numpy as np

from stagecraft.anatomy import gradients, texts


def measure(base, own):
    """Corrected cosines of gradients; that of shuffled pairs as it is."""
    model = base.model("sft")
    halves = texts.compared(base, "comparisons", "reward")
    whole = [gradients.gradients(model, half) for half in halves]
    rng = np.random.default_rng(base.config.seed)
    coins = [gradients.gradients(model, _shuffled(half, rng))["dpo"] for half in halves]
    both = {k: gradients.agreement(tuple(whole), "sft", k) for k in ("dpo", "ppo")}
    both["text"] = gradients.agreement(tuple(whole), "sft", "text")
    cosines = {f"sft_{k}": v["corrected"] or 0.0 for k, v in both.items()}
    shuffled = [gradients.cosine(whole[1 - i]["sft"], coins[i]) for i in (0, 1)]
    own_cosines = {
        name: gradients.cosine(whole[0][name], whole[1][name])
        for name in gradients.OBJECTIVES
    }
    cosines["sft_coin"] = float(np.mean(shuffled))
    return {"cosine": cosines, "reliability": own_cosines}


def _shuffled(batch, rng):
    """The same pairs, each the other way round or not by a coin."""
    pairs = len(batch["ids"]) // 2
    turned = rng.integers(0, 2, pairs)
    order = np.stack([2 * np.arange(pairs) + turned, 2 * np.arange(pairs) + 1 - turned])
    rows = jnp.asarray(order.T.reshape(-1))
    return {key: array[rows] for key, array in batch.items()}
