"""Every training objective: arrays in, unreduced losses and metrics out.

No function here sees a model or a config, and none takes a mean: the one reduction is
masked and belongs to the step that calls them. Hyper-parameters are keyword-only.

| objective         | takes                                   | stage              | source             |
|-------------------|-----------------------------------------|--------------------|--------------------|
| `next_token`      | log-probs [B, T]                        | pretraining, SFT   | maximum likelihood |
| `bradley_terry`   | rewards [B, 2]                          | reward model       | arXiv 2203.02155   |
| `dpo`             | policy, reference log-probs [B, 2]      | DPO                | arXiv 2305.18290   |
| `ppo_policy`      | new, old log-probs, advantages [B, T]   | PPO, the policy    | arXiv 1707.06347   |
| `ppo_value`       | new, old values, returns [B, T]         | PPO, the critic    | arXiv 2005.12729   |

What prepares their inputs:

| function             | does                                                  | source           |
|----------------------|-------------------------------------------------------|------------------|
| `shift`              | aligns targets with the positions that predict them   |                  |
| `sequence_logps`     | log-probability of whole completions                  |                  |
| `k1`, `k2`, `k3`     | estimators of a KL divergence from samples            | Schulman 2020    |
| `missing_eos`        | lowers the score of completions that never ended      | arXiv 2403.17031 |
| `kl_reward`          | per-token rewards: KL penalty, score at the end       | arXiv 2203.02155 |
| `adaptive`           | moves the KL coefficient towards a target KL          | arXiv 1909.08593 |
| `gae`                | advantages and returns                                | arXiv 1506.02438 |
| `whiten`             | mean 0 and variance 1 under a mask                    |                  |
| `explained_variance` | how much of the returns the critic foresees           |                  |

B batch, T tokens; log-probabilities in nats. Column 0 of a pair is the chosen response.
"""  # noqa: E501

from stagecraft.losses.advantage import explained_variance, gae, whiten
from stagecraft.losses.kl import adaptive, k1, k2, k3, kl_reward, missing_eos
from stagecraft.losses.next_token import next_token, sequence_logps, shift
from stagecraft.losses.policy import ppo_policy, ppo_value
from stagecraft.losses.preference import dpo
from stagecraft.losses.reward import bradley_terry

__all__ = [
    "adaptive",
    "bradley_terry",
    "dpo",
    "explained_variance",
    "gae",
    "k1",
    "k2",
    "k3",
    "kl_reward",
    "missing_eos",
    "next_token",
    "ppo_policy",
    "ppo_value",
    "sequence_logps",
    "shift",
    "whiten",
]
