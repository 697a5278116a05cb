r"""Along what RLHF changed, a small step in the weights turns answers most.

From the SFT model steps of one relative size, a hundredth, go along the change that PPO
made and along the one that SFT had made. Stages at their own distances cannot be
compared: SFT moved ten times as far. The square root of KL(SFT || moved) is a length,
so the log of the ratio of both is the primary; the effect is a factor of one and a
half. The control is noise of the same size in each array: where that turns answers as
much more than SFT's direction does, nothing is peculiar to RLHF.

[claim]
number = 9
claim = "RLHF touches what the model is most sensitive to"
source = "after Mukherjee et al. 2025, arxiv.org/abs/2505.11711, on small subnetworks"
primary = "log(sensitivity.ppo / sensitivity.sft)"
effect = 0.405
control = "noise of the size of PPO's change turns answers as much"
control_primary = "log(sensitivity.noise / sensitivity.sft)"
checks = ["sensitivity.sft > 0.001"]
seconds = 20
"""

from stagecraft.anatomy import sensitivity, texts

SIZE = 0.01


def measure(base, own):
    """Root of the divergence after a step of one size, by direction."""
    said = texts.of_stage(base, "sft")
    before, model, after = (base.model(name) for name in ("pretrain", "sft", "ppo"))
    ppo = sensitivity.change(model, after)
    directions = {"sft": sensitivity.change(before, model), "ppo": ppo}
    directions["noise"] = sensitivity.noise(ppo, seed=base.config.seed)
    rows = sensitivity.measure(model, directions, (SIZE,), said, said)
    return {"sensitivity": {row["direction"]: row["divergence"] ** 0.5 for row in rows}}
