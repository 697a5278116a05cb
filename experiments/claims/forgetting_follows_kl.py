r"""What a model forgets follows how far its answers moved, not how far its weights did.

From the SFT model steps of five sizes go along the changes that SFT, PPO, DPO and PPO
pushed hard made and along noise, so that both distances vary apart. Forgetting is what
pretraining's text costs more. The primary is how much better its rank correlation is
with KL(SFT || moved) on SFT's own answers than with the relative change of the weights.

[claim]
number = 16
claim = "Forgetting is predicted by KL on the new task, not by changes of weights"
source = "Shenfeld et al. 2025, arxiv.org/abs/2509.04259"
primary = "forgetting.by_kl - forgetting.by_weights"
effect = 0.1
control = "the relative change of the weights, which is the primary's own arm"
checks = ["forgetting.most > 0.1"]
seconds = 40
"""

from scipy import stats

from stagecraft.anatomy import sensitivity, texts

SIZES = (0.003, 0.01, 0.03, 0.1, 0.2)


def measure(base, own):
    """Rank correlations of forgetting with both distances, over all steps."""
    said = texts.of_stage(base, "sft")
    bare = texts.bare(base, str(base.root / "world" / "text.jsonl"))
    model = base.model("sft")
    directions = {"sft": sensitivity.change(base.model("pretrain"), model)}
    for name in ("ppo", "dpo", "ppo_hard"):
        directions[name] = sensitivity.change(model, base.model(name))
    directions["noise"] = sensitivity.noise(directions["ppo"], seed=base.config.seed)
    rows = sensitivity.measure(model, directions, SIZES, said, bare)
    lost = [row["forgotten"] for row in rows]
    correlations = {
        f"by_{name}": float(stats.spearmanr([row[key] for row in rows], lost)[0])
        for name, key in (("kl", "divergence"), ("weights", "size"))
    }
    return {"forgetting": correlations | {"most": max(lost)}}
