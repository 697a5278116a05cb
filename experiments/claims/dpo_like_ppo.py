r"""DPO gets as far as PPO from the same pairs.

Both start from one SFT model and learn from the same comparisons, PPO through a reward
model. That two things are alike is shown only by an interval within the margin: one
that is merely wide says nothing. The control is SFT itself: if it too is within the
margin of PPO, the measure tells nothing apart. Ivison et al. 2024
(arxiv.org/abs/2406.09279) say the reverse of the source.

[claim]
number = 8
claim = "DPO matches or exceeds PPO, without a reward model or sampling"
source = "Rafailov et al. 2023, arxiv.org/abs/2305.18290, section 6"
primary = "dpo.gold_mean - ppo.gold_mean"
effect = 0.25
alike = true
control = "SFT, which neither has changed, is as near to PPO"
control_primary = "sft.gold_mean - ppo.gold_mean"
checks = ["dpo.kl <= 12", "ppo.kl <= 12"]
seconds = 0
"""
