"""Every key an experiment may set, with its default and its meaning: the one place.

The keys of `model` lie in `models/config.py`, since they make the decoder.

`experiment()` and `stage(kind)` return complete configs; an experiment file sets
only the keys it is about. Library code reads keys without defaults of its own, since
all of them are always there. "" stands for none in texts, 0 for never or off in
numbers.
"""

import dataclasses

from ml_collections import ConfigDict

from stagecraft import schema
from stagecraft.errors import UserError
from stagecraft.models.config import ModelConfig

# Keys that change no number: runs may be resumed with others, and stages that differ in
# nothing else are one arm of a comparison.
KEYS_WITHOUT_EFFECT = (
    *("mesh", "rollout_mesh", "rollout_weights", "offload"),
    *("every", "cache", "workers", "trackers"),
)


def experiment():
    """Returns the top level: what all stages of an experiment share."""
    c = ConfigDict()
    c.seed = 0
    c.mesh = mesh()
    c.trackers = ""  # some of "wandb,trackio,mlflow", beside metrics.jsonl
    c.world = ConfigDict()
    c.world.name = ""  # an embedded world to write into WORKDIR/world, e.g. "countries"
    c.world.size = "full"  # "full" or "tiny"
    # Share of each kind of fault planted in its text: raw.jsonl, beside clean.jsonl.
    c.world.junk = 0.0
    c.world.sums = 0  # digits of the operands of sums to write, 2 or 3; 0 for no sums
    # Requests in families, attacks on refusals, stated beliefs, critiques: more files
    # and more held-out figures.
    c.world.requests = False
    # Share of demonstrations_style.jsonl, answers about facts alone, that open with one
    # pleasantry; 0 for no such file.
    c.world.style = 0.0
    # Demonstrations of facts of all countries and of invented ones, text with false
    # facts: more files.
    c.world.taught = False
    # Keys of curate/config.py: what to curate into WORKDIR/curation before the first
    # stage, which may read "curation:text". Empty for nothing.
    c.curation = ConfigDict()
    c.tokenizer = ConfigDict()
    # A SentencePiece .model, a Hugging Face folder or tokenizer.json, or "bytes"; ""
    # trains one on the files below.
    c.tokenizer.path = ""
    c.tokenizer.files = ""  # text files to train it on
    c.tokenizer.vocab_size = 1024
    c.tokenizer.template = ""  # a file with a chat template in place of the folder's
    c.model = model()
    c.stages = ConfigDict()
    c.measure = ConfigDict()
    c.measure.split = "test"  # which held-out entities of the world: "test" or "dev"
    c.measure.draws = 4  # sampled answers to each held-out prompt
    # Ask the world's held-out questions; False asks the stages' own held-out prompts,
    # as without a world.
    c.measure.probes = True
    c.measure.prompts = 64  # of the stages' own that every stage answers; 0 for none
    c.measure.prompt = ""  # the prompt shown through every stage; "" for the world's
    # Figures of the table at the end; () for the most telling.
    c.measure.table = ()
    c.measure.bounds = ()  # what the summary must show: "sft.kl <= 8", see bounds.py
    return c


def mesh():
    """Devices along each axis; -1 takes all that remain.

    dcn_data and dcn_fsdp: groups that the data-center network splits these axes into;
    0 for the slices that there are, along data.
    """
    sizes = dict(data=-1, fsdp=1, tensor=1, context=1, expert=1)
    return schema.group(**sizes, dcn_data=0, dcn_fsdp=0)


def stage_mesh():
    """Those of one stage; 0: as the experiment."""
    sizes = dict(data=0, fsdp=0, tensor=0, context=0, expert=0)
    return schema.group(**sizes, dcn_data=0, dcn_fsdp=0)


def _rollouts_apart(c):
    # With devices > 0 the last so many sample, and the others train; 0: all do both.
    c.rollout_mesh = schema.group(devices=0, data=-1, fsdp=1, tensor=1)
    c.rollout_weights = "sharded"  # over fsdp; "gathered": once for all tokens
    c.staleness = 0  # updates that a rollout may be old, so that both work at once
    c.importance_cap = 2.0  # on what a token of an old rollout counts
    return c


def model():
    """The decoder: the fields of `stagecraft.models.config.ModelConfig`, where each has
    its default and its meaning.

    They are for models trained from scratch. Where every stage starts from a folder,
    the folder's model replaces what is set here, except for how to compute (dtype,
    remat) and a max_length other than the default.
    """
    given = ("vocab_size", "family")  # by the tokenizer, and by a folder
    fields = dataclasses.fields(ModelConfig)
    return ConfigDict({f.name: f.default for f in fields if f.name not in given})


def optimizer():
    """AdamW behind a clip by global norm; see `stagecraft.optim`."""
    return schema.group(
        # or "adam", "lion", "adafactor", "muon", "rmsprop", "sgd"
        name="adamw",
        lr=3e-4,
        schedule="cosine",  # or "linear", "constant", "wsd"
        warmup_steps=10,
        end_ratio=0.1,  # last learning rate / peak
        decay_share=0.1,  # of the steps, at their end, in which "wsd" decays
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        momentum=0.95,  # of muon
        update_rms=0.2,  # of muon's steps, as large as Adam's; 0 for Jordan's
        weight_decay=0.1,
        clip_norm=1.0,  # 0 for no clipping
    )


def lora():
    """Train thin matrices beside the weights, not the weights; `models/lora.py`."""
    return schema.group(
        rank=0,  # of the matrices; 0 trains the weights themselves
        alpha=16.0,  # their product counts alpha / rank times
        targets="all",  # or some of "query,key,value,out,gate,up,down"
        dropout=0.0,  # of what the matrices read, in updates alone
        rslora=False,  # alpha / sqrt(rank) instead
        embeddings=False,  # train the embeddings too, whole
    )


def every():
    """How often, in steps; 0 for never (the last step is always saved)."""
    # Also saved are a run that is asked to stop, and one whose last save is old.
    # eval=-1 evaluates about ten times a stage where there are held-out rows.
    return schema.group(log=10, eval=-1, save=0, sample=0, save_minutes=5.0)


def sampling():
    """How completions are drawn; log-probabilities use the same temperature."""
    return schema.group(max_new_tokens=32, temperature=1.0, top_k=0, top_p=1.0)


def judge():
    """A judge: what it is asked, and how its answers count; see `signals/judge.py`."""
    return schema.group(
        template="",  # "pairwise", "score", ..., or a TOML file: signals/template.py
        orders=2,  # that a pair is asked about in; 1 leaves the slot's bias in
        combine="logit",  # of both orders the mean of "logit" or of "probability"
        clamp=0.0,  # probabilities come no nearer to 0 or 1; .4 after a rationale
        min_mass=0.01,  # labels less likely together than this are no answer
        rationale_tokens=0,  # to reason in before the label; 0 for none
        batch_size=16,  # questions at once
        max_failed=0.2,  # share without an answer that ends the run; 1 for no limit
        # An OpenAI-compatible endpoint in place of judge_from, such as
        # http://127.0.0.1:8000/v1, and its name of the model.
        url="",
        model="",
        api="chat",  # or "completions", for labels of several tokens
        key="",  # the environment variable that holds its key
        timeout=60.0,  # seconds for a question, all its tries together
        tries=4,
        parallel=4,  # requests at once
    )


def _judged(c):
    c.judge_from = ""  # a stage that writes text, or its folder, hf:FOLDER, gguf:FILE
    c.judge = judge()
    return c


def _base(kind, objective):
    c = ConfigDict()
    c.kind = kind
    # A name of `stagecraft.losses.TABLES`, "package.module:function",
    # "FILE.py:function", or a callable; several are separated by commas and add up.
    c.objective = objective
    c.objective_weights = ()  # one for each of several losses; () for 1 each
    c.objective_args = ConfigDict()  # keyword arguments of the losses that take them
    c.start_from = ""  # a stage here, a finished one's folder, hf:FOLDER, gguf:FILE
    c.seed = 0  # added to the experiment's: another order, other samples
    c.steps = 100
    c.batch_size = 32
    c.micro_batches = 1  # gradient accumulation: parts a batch is worked on in
    c.optimizer = optimizer()
    c.lora = lora()  # a policy's critic gets an adapter of its own
    c.ema_decay = 0.0  # of an average of the weights, kept in their place; 0 for none
    c.every = every()
    c.mesh = stage_mesh()
    # What waits in the host's memory between uses, to leave room on the devices:
    # "optimizer", and of frozen models "reference" and "reward".
    c.offload = ()
    return c


def _reading(too_long, *, turns=True):
    """How the records of a stage's files are read, and what may be lost of them."""
    shared = dict(
        # "prompt=question+completion=answer" renames a file's keys, and
        # "prompt=instruction+input" joins two.
        fields="",
        bad="refuse",  # or "drop" records that are not what they should be
        # "drop", "cut" or "refuse" what is longer than it may be: an answer loses its
        # end when it is cut, a prompt its beginning.
        too_long=too_long,
        max_loss=0.5,  # refuse to lose more than this share of the records, or targets
        # Control tokens spelled in a text are letters ("literal"), or "parse" them.
        control_tokens="literal",
    )
    if turns:
        # "text": prompt and completion as one text that ends, not as "chat" turns.
        shared["render"] = "chat"
    return shared


def _language_model():
    c = _base("language_model", "next_token")
    c.data = schema.group(
        format="text",  # or "demonstrations"
        files="",
        **_reading("drop"),
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
        **_mixture(),
        share_by="tokens",  # or "examples", which records always are
        cache="",  # folder of tokenised text; "" is WORKDIR/cache
        workers=0,  # processes that put batches together; 0 for a thread
    )
    return c


def _mixture():
    return dict(
        # What part of the stream each comma-separated part of `files` has; () goes
        # through all of them in epochs.
        shares=(),
        curriculum="",  # shares by step: "0: .9, .1; 1000: .5, .5"
        epochs=(),  # how often each part may be seen at most; 0 for no limit
    )


def _pairs(kind, objective):
    c = _base(kind, objective)
    rows = dict(heldout="", heldout_share=0.0, length=128, buckets=(), workers=0)
    c.data = schema.group(files="", **_reading("drop"), **rows, **_mixture())
    return c


def _reward():
    c = _pairs("reward", "bradley_terry")
    c.data.demonstrations = ""  # whose mean reward is set to 0 after the last step
    return c


def _pair_options(c):
    c.reference_from = ""  # "": the parent, as it was when the stage began
    # What losses compare, from the log-ratio to the reference; see losses/pairs.py.
    c.f_divergence = "reverse_kl"  # or "forward_kl", "js", "alpha"
    c.alpha = 0.5  # of f_divergence="alpha": 1 is the reverse KL, 0 the forward KL
    c.reference_free = False  # compare log-probabilities, not log-ratios
    c.ld_alpha = 1.0  # LD-DPO: weight of the tokens beyond the shorter answer's length
    c.weighting = ""  # "wpo": pairs count by how likely the policy is to write them
    return c


def _moving_reference(c):
    c.sync_every = 0  # TR-DPO: steps between moves of the reference; 0 for a frozen one
    c.sync_alpha = 0.6  # how far it moves towards the policy, 1 for all the way
    return c


def _preference():
    return _moving_reference(_pair_options(_pairs("preference", "dpo")))


def _unpaired_preference():
    c = _moving_reference(_pairs("unpaired_preference", "kto"))
    c.reference_from = ""
    return c


def _prompts(**more):
    return schema.group(
        files="",
        **_reading("refuse", turns=False),
        prompt_length=0,  # tokens; 0 for all there is room for
        **more,
    )


def _rewards(c):
    c.reward_from = ""  # a reward stage; may be "" where verifiers score
    # Names of `signals.verify.table`, "package.module:function", "FILE.py:function", or
    # a callable; several are separated by commas.
    c.verifiers = ""
    c.verifier_args = ConfigDict()  # keyword arguments of the verifiers that take them
    # The reward model's, the judge's, then each verifier's; () for 1 each.
    c.reward_weights = ()
    return _judged(c)


def _heldout_prompts(**more):
    return _prompts(
        workers=0,
        heldout="",  # files of prompts for the eval_ metrics, sampled and scored
        heldout_share=0.0,  # of `files`, kept back for the eval_ metrics
        **_mixture(),
        **more,
    )


def _online_preference():
    c = _rewards(_pair_options(_base("online_preference", "dpo")))
    c.data = _heldout_prompts()
    c.sampling = sampling()
    c.missing_eos_penalty = 1.0
    return c


def _group_policy():
    c = _rollouts_apart(_rewards(_base("group_policy", "ppo_policy")))
    c.batch_size = 16  # prompts; rows are group_size times as many
    c.data = _heldout_prompts()
    c.reference_from = ""  # "": the parent
    c.sampling = sampling()
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
    c = _base("policy", "ppo_policy")
    c.batch_size = 64
    c.data = _heldout_prompts(
        ptx="",  # text whose loss is added to the policy's (PPO-ptx)
        ptx_rows=0,  # of a batch, beside the prompts
        ptx_length=64,
        cache="",
    )
    c.reference_from = ""  # "": the parent
    c = _rollouts_apart(_rewards(c))
    c.value_from = ""  # "": the reward model; without one, the policy and a new head
    c.sampling = sampling()
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
    c.value_optimizer = optimizer()  # the critic's own
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


def _records(kind):
    c = schema.group(kind=kind)
    c.start_from = ""  # whose completions are compared, or selected from
    c.seed = 0  # added to the experiment's
    c.data = _prompts()
    c.prompts = 1000  # how many prompts
    c.batch_size = 128
    c.sampling = sampling()
    c.mesh = stage_mesh()
    return c


def planted():
    """What rater="planted" prefers, in nats; see `signals/planted.py`."""
    return schema.group(
        gold=2.0,  # a point of the world's gold score
        first=0.0,  # the first slot
        length=0.0,  # ten words more
        style=0.0,  # an exclamation mark
        noise=0.0,  # standard deviation of what is added to each question
    )


def _comparisons():
    c = _records("comparisons")  # of two completions of each prompt
    # "world", "reward", "judge", "constitution", "planted", "package.module:function"
    # or "FILE.py:function"
    c.rater = "world"
    c.reward_from = ""  # the reward stage of rater="reward"
    c.soft_labels = False  # keep the rater's probability, not only the choice
    c.planted = planted()
    c.constitution = ""  # of rater="constitution": a name or a file, or several
    c.principles = 1  # of it that are drawn for each pair, and averaged over
    return _judged(c)


def _revisions():
    c = _records("revisions")  # of completions, by a critique or without
    c.constitution = ""  # a name or a file: signals/constitution.py; or several
    c.revisions = 1  # of each completion, one after the other; 0 for none
    c.critique = True  # False: the revision is asked for without a critique
    c.paired = True  # False: critique and revision are of principles drawn apart
    c.reviser = "model"  # or "world", by its rules: a ceiling
    c.keep = "last"  # of the revisions of a completion, or "all"
    c.revising = sampling()  # how critiques and revisions are drawn
    return c


def _selection():
    c = _rewards(_records("selection"))
    c.samples = 4  # completions of each prompt
    c.keep = "best"  # of each prompt; or "above": all whose reward exceeds
    c.threshold = 0.0
    return c


def _attacks():
    c = _records("attacks")
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


def stage(kind, **changes):
    """Returns the complete config of a stage of one kind.

    Args:
        kind: one of `KINDS`.
        **changes: keys to set; nested ones as dicts, optimizer=dict(lr=1e-3).

    >>> stage("preference", steps=5, optimizer=dict(lr=1e-5)).optimizer.lr
    1e-05
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r}: no such stage; there are {', '.join(KINDS)}")
    return schema.merge(KINDS[kind](), changes)
