"""Every training objective: arrays in, unreduced losses and metrics out.

No function here sees a model or a config, and none takes a mean: the one reduction is
masked and belongs to the step that calls them. Hyper-parameters are keyword-only.
`TABLES` says which names a stage of each kind knows.

| objective              | from                                              | source           |
|------------------------|---------------------------------------------------|------------------|
| **tokens**: language_model                                                                   |
| `next_token`           | log-probs [B, T]                                  | likelihood       |
| `dft`                  | the same, each token weighted by its probability  | arXiv 2508.05629 |
| `z_loss`               | log-normalizers [B, T]                            | arXiv 2204.02311 |
| **scores**: reward                                                                           |
| `bradley_terry`        | rewards [B, 2]; margins, soft labels              | arXiv 2203.02155 |
| `bradley_terry_ranked` | rewards [B, K] of ranked completions              | arXiv 2203.02155 |
| **pairs**: preference, online_preference; log-probs [B, 2] of policy and reference           |
| `dpo` (`sigmoid`)      | soft labels, smoothing (cDPO), f-divergences      | arXiv 2305.18290 |
| `hinge`                |                                                   | arXiv 2305.10425 |
| `ipo`, `ipo_sum`       | per token, or sums                                | arXiv 2310.12036 |
| `exo_pair`             |                                                   | arXiv 2402.00856 |
| `nca_pair`             |                                                   | arXiv 2402.05369 |
| `robust`               |                                                   | arXiv 2403.00409 |
| `bco_pair`             |                                                   | arXiv 2404.04656 |
| `sppo_hard`            |                                                   | arXiv 2405.00675 |
| `aot`, `aot_unpaired`  | sorts the whole batch                             | arXiv 2406.05882 |
| `apo_zero`, `apo_down` |                                                   | arXiv 2408.06266 |
| `discopop`             |                                                   | arXiv 2406.08414 |
| `sigmoid_norm`         | per token                                         | arXiv 2411.15124 |
| `sft`                  | the chosen completion's tokens                    | likelihood       |
| `orpo`                 | no reference                                      | arXiv 2403.07691 |
| `cpo`, `cpo_hinge`, `cpo_ipo` | no reference                               | arXiv 2401.08417 |
| `simpo`                | no reference                                      | arXiv 2405.14734 |
| `alphapo`              | no reference                                      | arXiv 2501.03884 |
| **single completions**: unpaired_preference                                                  |
| `kto`                  | log-probs [B], labels, the reference point        | arXiv 2402.01306 |
| `bco`                  | log-probs [B], labels, the running mean reward    | arXiv 2404.04656 |
| `apo_zero_unpaired`    | log-probs [B], labels                             | arXiv 2408.06266 |
| **sampled tokens**: policy, group_policy; log-probs and advantages [B, T]                    |
| `ppo_policy` (`grpo`)  | clip, clip-higher, dual clip, two-sided clip      | arXiv 1707.06347 |
| `gspo`                 | one ratio a sequence, its geometric mean          | arXiv 2507.18071 |
| `cispo`                | the ratio as a bounded weight                     | arXiv 2506.13585 |
| `sapo`                 | a smooth gate                                     | arXiv 2511.20347 |
| `rloo_policy`          | one ratio a sequence, the product                 | arXiv 2402.14740 |
| `reinforce`            | no ratio                                          | Williams 1992    |
| `entropy_bonus`        | entropies [B, T]                                  | Williams 1991    |
| `ppo_value`            | new, old values, returns [B, T]: PPO's critic     | arXiv 2005.12729 |

What prepares their inputs:

| function               | does                                              | source           |
|------------------------|---------------------------------------------------|------------------|
| `shift`                | aligns targets with the positions that predict them |                |
| `sequence_logps`       | log-probability of whole completions              |                  |
| `length_desensitized`  | the same, the longer one's tail weighed down      | arXiv 2409.06411 |
| `wpo_weights`          | how likely the policy is to write a pair          | arXiv 2406.11827 |
| `k1`, `k2`, `k3`       | estimators of a KL divergence from samples        | Schulman 2020    |
| `kl_reward`            | per-token rewards: KL penalty, score at the end   | arXiv 2203.02155 |
| `kl_in_loss`           | a KL penalty as a loss of tokens                  | arXiv 2402.03300 |
| `value_mask`           | where the critic counts                           | arXiv 2403.17031 |
| `missing_eos`          | lowers the score of completions that never ended  | arXiv 2403.17031 |
| `soft_overlong`        | lowers it near the length limit                   | arXiv 2503.14476 |
| `adaptive`             | moves the KL coefficient towards a target KL      | arXiv 1909.08593 |
| `gae`                  | advantages and returns                            | arXiv 1506.02438 |
| `discounted_returns`   | what was paid from each token on                  | Williams 1992    |
| `group_advantages`     | better or worse than the prompt's other samples   | arXiv 2402.03300 |
| `leave_one_out`        | the same without oneself                          | arXiv 2402.14740 |
| `dynamic_sampling`     | which prompts teach anything                      | arXiv 2503.14476 |
| `whiten`               | mean 0 and variance 1 under a mask                |                  |
| `aggregate`            | how tokens of completions become one number       | arXiv 2503.20783 |
| `overlong_filter`      | leaves out what was cut off                       | arXiv 2503.14476 |
| `explained_variance`   | how much of the returns the critic foresees       |                  |

B batch, T tokens, K completions; log-probabilities in nats. Column 0 of a pair is the
chosen response.
"""  # noqa: E501

from stagecraft.losses.advantage import (
    discounted_returns,
    explained_variance,
    gae,
    whiten,
)
from stagecraft.losses.aggregate import NAMES as AGGREGATIONS
from stagecraft.losses.aggregate import aggregate, overlong_filter
from stagecraft.losses.group import (
    cispo,
    dynamic_sampling,
    frac_reward_zero_std,
    group_advantages,
    gspo,
    leave_one_out,
    rloo_policy,
    sapo,
    soft_overlong,
)
from stagecraft.losses.kl import (
    adaptive,
    k1,
    k2,
    k3,
    kl_in_loss,
    kl_reward,
    missing_eos,
    value_mask,
)
from stagecraft.losses.next_token import (
    dft,
    next_token,
    sequence_logps,
    shift,
    z_loss,
)
from stagecraft.losses.pairs import length_desensitized, wpo_weights
from stagecraft.losses.policy import entropy_bonus, ppo_policy, ppo_value, reinforce
from stagecraft.losses.preference import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    dpo,
    exo_pair,
    hinge,
    ipo,
    ipo_sum,
    nca_pair,
    robust,
    sft,
    sigmoid_norm,
    sppo_hard,
)
from stagecraft.losses.reference_free import (
    alphapo,
    cpo,
    cpo_hinge,
    cpo_ipo,
    orpo,
    simpo,
)
from stagecraft.losses.reward import bradley_terry, bradley_terry_ranked
from stagecraft.losses.unpaired import apo_zero_unpaired, bco, kto


def _named(*functions):
    return {f.__name__: f for f in functions}


_TOKENS = _named(next_token, dft, z_loss)
_REWARD = _named(bradley_terry, bradley_terry_ranked)
_PAIRED = {"dpo": dpo, "sigmoid": dpo} | _named(
    *(hinge, ipo, ipo_sum, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot),
    *(aot_unpaired, apo_zero, apo_down, discopop, sigmoid_norm, sft),
    *(orpo, cpo, cpo_hinge, cpo_ipo, simpo, alphapo),
)
_UNPAIRED = _named(kto, bco, apo_zero_unpaired)
_POLICY = {"ppo_policy": ppo_policy, "grpo": ppo_policy} | _named(
    gspo, cispo, sapo, rloo_policy, reinforce, entropy_bonus
)

# The objectives that a stage of each kind knows by name.
TABLES = {
    "language_model": _TOKENS,
    "reward": _REWARD,
    "preference": _PAIRED,
    "online_preference": _PAIRED,
    "unpaired_preference": _UNPAIRED,
    "policy": _POLICY,
    "group_policy": _POLICY,
}
# Those that compare the rows of a batch with each other, so that it cannot be split.
ACROSS_ROWS = ("aot", "aot_unpaired")
# Those with one loss a sequence, spread over its tokens: right as a mean of sequences.
BY_SEQUENCE = ("gspo", "rloo_policy")

__all__ = [
    "ACROSS_ROWS",
    "AGGREGATIONS",
    "BY_SEQUENCE",
    "TABLES",
    "adaptive",
    "aggregate",
    "alphapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_pair",
    "bradley_terry",
    "bradley_terry_ranked",
    "cispo",
    "cpo",
    "cpo_hinge",
    "cpo_ipo",
    "dft",
    "discopop",
    "discounted_returns",
    "dpo",
    "dynamic_sampling",
    "entropy_bonus",
    "exo_pair",
    "explained_variance",
    "frac_reward_zero_std",
    "gae",
    "group_advantages",
    "gspo",
    "hinge",
    "ipo",
    "ipo_sum",
    "k1",
    "k2",
    "k3",
    "kl_in_loss",
    "kl_reward",
    "kto",
    "leave_one_out",
    "length_desensitized",
    "missing_eos",
    "nca_pair",
    "next_token",
    "orpo",
    "overlong_filter",
    "ppo_policy",
    "ppo_value",
    "reinforce",
    "rloo_policy",
    "robust",
    "sapo",
    "sequence_logps",
    "sft",
    "shift",
    "sigmoid_norm",
    "simpo",
    "soft_overlong",
    "sppo_hard",
    "value_mask",
    "whiten",
    "wpo_weights",
    "z_loss",
]
