r"""Post-training takes at most a hundredth of pretraining's compute.

Accounting, not chance: FLOPs are counted from tokens and shapes, so that seeds do not
differ and one chain is enough. In this world pretraining is as short as an afternoon
walk, so the claim cannot be expected to hold here; the same line over the published
counts of InstructGPT (4.9 + 60 of 3,640 PF-days) gives 1.8 percent,
and DeepSeek-V3.2 spends over 10 on RL alone.

[claim]
number = 11
claim = "Post-training is 0.1 to 1 percent of pretraining's compute"
source = "Ouyang et al. 2022, arxiv.org/abs/2203.02155"
primary = '''(0.01 - cost.sft.share - cost.comparisons.share
    - cost.reward.share - cost.ppo.share)'''
effect = 0.0
exact = true
control = "none: nothing is left to chance"
seconds = 0
"""
