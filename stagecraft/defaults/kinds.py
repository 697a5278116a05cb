"""Keys of each kind of stage, and the table of their defaults."""

from stagecraft import schema
from stagecraft.defaults import shared


def _language_model():
    c = shared.base("language_model", "next_token")
    c.data = schema.group(
        format="text",  # or "demonstrations"
        files="",
        **shared.reading("drop"),
        heldout="",  # files for the eval_ metrics
        heldout_share=0.0,  # of `files`, kept back for the eval_ metrics
        replay="",  # text mixed into demonstrations
        replay_share=0.0,  # of the rows of a batch
        length=128,
        # By TRL's names "bfd" (overflow lost), "bfd_split" or "wrapped"; "none" is
        # one document a row; "" is bfd_split for text, bfd for demonstrations.
        packing="",
        buckets=(),  # row lengths to pad to with packing="none"
        turns="all",  # learn every turn of the assistant, or the "last" alone
        weights=(),  # of the loss, one for each comma-separated part of `files`
        **shared.mixture(),
        share_by="tokens",  # or "examples", which records always are
        cache="",  # folder of tokenised text; "" is WORKDIR/cache
        workers=0,  # processes that put batches together; 0 for a thread
    )
    return c


def _reward():
    c = shared.pairs("reward", "bradley_terry")
    c.data.demonstrations = ""  # whose mean reward is set to 0 after the last step
    return c


def _preference():
    return shared.moving_reference(
        shared.pair_options(shared.pairs("preference", "dpo"))
    )


def _unpaired_preference():
    c = shared.moving_reference(shared.pairs("unpaired_preference", "kto"))
    c.reference_from = ""
    return c


def _online_preference():
    c = shared.rewards(shared.pair_options(shared.base("online_preference", "dpo")))
    c.data = shared.heldout_prompts()
    c.sampling = shared.sampling()
    c.missing_eos_penalty = 1.0
    return c


def _group_policy():
    c = shared.rollouts_apart(shared.rewards(shared.base("group_policy", "ppo_policy")))
    c.batch_size = 16  # prompts; rows are group_size times as many
    c.data = shared.heldout_prompts()
    c.reference_from = ""  # "": the parent
    c.sampling = shared.sampling()
    c.group_size = 8  # completions of each prompt
    # "group" (GRPO), "leave_one_out" (RLOO), or token by token "returns"
    # (REINFORCE++) and "returns_baseline"
    c.advantage = "group"
    c.scale_rewards = "group"  # deviation to divide by: "group", "batch" or "none"
    c.normalize_advantages = False  # of "leave_one_out", over the batch
    c.discount = 1.0  # of "returns"
    c.aggregation = "dapo"  # of tokens: "grpo", "bnpo", "dapo" or "dr_grpo"
    c.epochs = 1
    c.minibatches = 1
    c.kl_coef = 0.0
    c.kl_placement = "loss"  # or "reward"
    c.kl_estimator = "k3"  # or "k2"; of a KL in the reward "k1"
    c.kl_bias_correction = False  # k3 times the probability ratio
    c.missing_eos_penalty = 0.0
    c.mask_truncated = False  # DAPO's filter: what was cut off teaches nothing
    c.overlong_cache = 0  # DAPO's soft penalty: tokens below the limit; 0 for none
    c.oversample = 1  # DAPO's dynamic sampling: prompts sampled for each one kept
    return c


def _policy():
    c = shared.base("policy", "ppo_policy")
    c.batch_size = 64
    c.data = shared.heldout_prompts(
        ptx="",  # text whose loss is added to the policy's (PPO-ptx)
        ptx_rows=0,  # of a batch, beside the prompts
        ptx_length=64,
        cache="",
    )
    c.reference_from = ""  # "": the parent
    c = shared.rollouts_apart(shared.rewards(c))
    c.value_from = ""  # "": the reward model; without one, the policy and a new head
    c.sampling = shared.sampling()
    c.epochs = 4
    c.minibatches = 1
    c.discount = 1.0
    c.lambda_ = 0.95
    c.bootstrap_truncated = False  # go on with the critic's value where one was cut off
    c.whiten_rewards = False
    c.unbiased_whitening = False  # divide variances by n - 1, as TRL, rather than n
    c.value_clip = 0.2  # 0 for none
    c.value_coef = 0.1
    c.value_lr_scale = 1.0  # the critic's learning rate / the policy's
    c.value_optimizer = shared.optimizer()  # the critic's own
    c.value_optimizer.name = ""  # "": one optimizer for both
    c.kl_coef = 0.05
    c.kl_placement = "reward"  # or "loss"
    c.kl_estimator = "k1"  # in the reward "k1" or "k3", in the loss "k2" or "k3"
    c.kl_target = 0.0  # nats a sequence; > 0 adapts kl_coef towards it
    c.kl_horizon = 10_000.0
    c.score_placement = "A"  # on the end token; "B": on the slot after it
    c.missing_eos_penalty = 1.0
    c.replace_missing_eos = False  # rather than lower the score, replace it by
    c.missing_eos_score = -1.0
    c.ptx_coef = 1.0  # weight of the loss on data.ptx
    return c


def _comparisons():
    c = shared.records("comparisons")  # of two completions of each prompt
    # One of `signals.raters.RATERS`, "package.module:function" or "FILE.py:function"
    c.rater = "world"
    c.reward_from = ""  # the reward stage of rater="reward"
    c.soft_labels = False  # keep the rater's probability, not only the choice
    c.planted = shared.planted()
    c.constitution = ""  # of rater="constitution": a name or a file, or several
    c.principles = 1  # of it that are drawn for each pair, and averaged over
    return shared.judged(c)


def _revisions():
    c = shared.records("revisions")  # of completions, by a critique or without
    c.constitution = ""  # a name or a file: signals/constitution.py; or several
    c.revisions = 1  # of each completion, one after the other; 0 for none
    c.critique = True  # False: the revision is asked for without a critique
    c.paired = True  # False: critique and revision are of principles drawn apart
    c.reviser = "model"  # or "world", by its rules: a ceiling
    c.keep = "last"  # of the revisions of a completion, or "all"
    c.revising = shared.sampling()  # how critiques and revisions are drawn
    return c


def _selection():
    c = shared.rewards(shared.records("selection"))
    c.samples = 4  # completions of each prompt
    c.keep = "best"  # of each prompt; or "above": all whose reward exceeds
    c.threshold = 0.0
    return c


def _attacks():
    c = shared.records("attacks")
    c.target_from = ""  # the model that is attacked, and answers
    c.data.known = ""  # files of earlier attacks ("attack"), which are not new
    c.samples = 4  # attacks for each prompt
    c.threshold = 0.0  # of the reward; an attack that has more is written
    c.withstood = "refuse"  # where none has; "harmful": write what asks for harm
    return c


KINDS = {
    "language_model": _language_model,
    "reward": _reward,
    "preference": _preference,
    "unpaired_preference": _unpaired_preference,
    "policy": _policy,
    "group_policy": _group_policy,
    "online_preference": _online_preference,
    "comparisons": _comparisons,
    "revisions": _revisions,
    "selection": _selection,
    "attacks": _attacks,
}
