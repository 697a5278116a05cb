"""Every key an experiment may set, with its default and its meaning: the one place.

`experiment()` and `stage(kind)` return complete configs; an experiment file changes
what it is about and nothing else. Library code reads keys plainly, since all of them
are always there. "" stands for none in texts, 0 for never or off in numbers.
"""

from ml_collections import ConfigDict

from stagecraft import schema
from stagecraft.errors import UserError


def experiment():
    """The top level: what all stages of an experiment share."""
    c = ConfigDict()
    c.seed = 0
    c.mesh = mesh()
    c.world = ConfigDict()
    c.world.name = ""  # an embedded world to write into WORKDIR/world, e.g. "countries"
    c.world.size = "full"  # "full" or "tiny"
    c.tokenizer = ConfigDict()
    c.tokenizer.path = ""  # a .model file to use; "" trains one on the files below
    c.tokenizer.files = ""  # text files to train it on
    c.tokenizer.vocab_size = 1024
    c.model = model()
    c.stages = ConfigDict()
    c.measure = ConfigDict()
    c.measure.split = "test"  # which held-out entities of the world: "test" or "dev"
    c.measure.prompt = ""  # the prompt shown through every stage; "" for the world's
    c.measure.claims = ()  # what the summary must show: "sft.kl <= 8", see summary.py
    return c


def mesh():
    """Devices along each axis; -1 takes all that remain."""
    return ConfigDict(dict(data=-1, fsdp=1, tensor=1))


def model():
    """The decoder's shape; see `stagecraft.models.config.ModelConfig`."""
    return ConfigDict(
        dict(
            width=128,
            layers=4,
            heads=4,
            kv_heads=4,
            head_dim=32,
            ff_width=352,
            max_length=256,  # the context, in tokens
            tied=True,  # one table for input and output embedding
            qk_norm=True,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            init_std=0.02,
            dtype="float32",  # of the computation; master weights are float32
            remat="none",
        )
    )


def optimizer():
    """AdamW behind a clip by global norm; see `stagecraft.optimizer`."""
    return ConfigDict(
        dict(
            name="adamw",
            lr=3e-4,
            schedule="cosine",  # or "linear", "constant"
            warmup_steps=10,
            end_ratio=0.1,  # last learning rate / peak
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,  # 0 for no clipping
        )
    )


def every():
    """How often, in steps; 0 for never (the last step is always saved)."""
    return ConfigDict(dict(log=10, eval=0, save=0, sample=0))


def sampling():
    """How completions are drawn; log-probabilities use the same temperature."""
    return ConfigDict(dict(max_new_tokens=32, temperature=1.0, top_k=0, top_p=1.0))


def _base(kind, objective):
    c = ConfigDict()
    c.kind = kind
    # A name in stagecraft.losses, "package.module:function", or a callable.
    c.objective = objective
    c.objective_args = ConfigDict()  # keyword arguments of the loss
    c.start_from = ""  # a stage of this experiment, or the folder of a finished one
    c.steps = 100
    c.batch_size = 32
    c.micro_batches = 1  # gradient accumulation: parts a batch is worked on in
    c.optimizer = optimizer()
    c.every = every()
    c.mesh = ConfigDict(dict(data=0, fsdp=0, tensor=0))  # 0: as the experiment
    return c


def _language_model():
    c = _base("language_model", "next_token")
    c.data = ConfigDict(
        dict(
            format="text",  # or "demonstrations"
            files="",
            fields="",  # "prompt=question+completion=answer" renames a file's keys
            heldout="",  # files for the eval_ metrics
            heldout_share=0.0,  # of `files`, kept back for the eval_ metrics
            replay="",  # text mixed into demonstrations
            replay_share=0.0,  # of the rows of a batch
            length=128,
            packing="best_fit",  # or "concatenate", or "none": one document a row
            buckets=(),  # row lengths to pad to with packing="none"
        )
    )
    return c


def _pairs(kind, objective):
    c = _base(kind, objective)
    c.batch_size = 32
    c.data = ConfigDict(
        dict(
            files="",
            fields="",
            heldout="",
            heldout_share=0.0,
            length=128,
            buckets=(),
        )
    )
    return c


def _reward():
    return _pairs("reward", "bradley_terry")


def _preference():
    c = _pairs("preference", "dpo")
    c.reference_from = ""  # "": the parent, as it was when the stage began
    return c


def _policy():
    c = _base("policy", "ppo_policy")
    c.batch_size = 64
    c.data = ConfigDict(dict(files="", fields="", prompt_length=0))
    c.reference_from = ""  # "": the parent
    c.reward_from = ""
    c.value_from = ""  # "": the reward model
    c.sampling = sampling()
    c.epochs = 4
    c.minibatches = 1
    c.discount = 1.0
    c.lambda_ = 0.95
    c.value_clip = 0.2
    c.value_coef = 0.1
    c.value_lr_scale = 1.0  # the critic's learning rate / the policy's
    c.kl_coef = 0.05
    c.kl_target = 0.0  # nats a sequence; > 0 adapts kl_coef towards it
    c.kl_horizon = 10_000.0
    c.missing_eos_penalty = 1.0
    return c


def _comparisons():
    c = ConfigDict()
    c.kind = "comparisons"
    c.start_from = ""  # whose completions are compared
    c.rater = "world"  # "world", or "package.module:function"
    c.data = ConfigDict(dict(files="", fields="", prompt_length=0))
    c.prompts = 1000  # how many prompts, two completions each
    c.batch_size = 128
    c.sampling = sampling()
    c.mesh = ConfigDict(dict(data=0, fsdp=0, tensor=0))
    return c


KINDS = {
    "language_model": _language_model,
    "reward": _reward,
    "preference": _preference,
    "policy": _policy,
    "comparisons": _comparisons,
}


def stage(kind, **changes):
    """The complete config of a stage of one kind.

    Args:
        kind: one of `KINDS`.
        **changes: keys to set; nested ones as dicts, optimizer=dict(lr=1e-3).

    >>> stage("preference", steps=5, optimizer=dict(lr=1e-5)).optimizer.lr
    1e-05
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r}: no such stage; there are {', '.join(KINDS)}")
    return schema.merge(KINDS[kind](), changes)
