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
    c.trackers = ""  # some of "wandb,trackio,mlflow", beside metrics.jsonl
    c.world = ConfigDict()
    c.world.name = ""  # an embedded world to write into WORKDIR/world, e.g. "countries"
    c.world.size = "full"  # "full" or "tiny"
    c.tokenizer = ConfigDict()
    # A SentencePiece .model, a Hugging Face folder or tokenizer.json, or "bytes"; ""
    # trains one on the files below.
    c.tokenizer.path = ""
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
    """The decoder's shape; see `stagecraft.models.config.ModelConfig`.

    It is for models made from nothing. Where every stage starts from a folder, it is
    the folder's model, whatever is set here; only how to compute (dtype, remat) and a
    max_length that is not this one stay the experiment's.
    """
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
            embed_scale=1.0,  # Gemma: width^0.5
            norm="rms",  # or "layer"
            norm_offset=0.0,  # Gemma: 1
            norm_place="pre",  # or "post" (OLMo 2), "both" (Gemma)
            norm_eps=1e-5,
            qk_norm=True,
            qk_norm_over="head",  # or "projection" (OLMo 2)
            qkv_bias=False,
            out_bias=False,
            ff_bias=False,
            attention_scale=0.0,  # 0: head_dim^-0.5
            attention_softcap=0.0,  # 0 for none
            logit_softcap=0.0,
            window=0,  # tokens a sliding layer sees; 0 for no such layers
            sliding=(),  # (True, False): every other layer; () for all
            positions="rope",  # or "learned", "none"
            rotates=(),  # which layers rotate, repeated; () for all
            rope_theta=10_000.0,
            rope_theta_sliding=0.0,  # of sliding layers; 0 for the same
            rope_share=1.0,  # of a head's channels
            rope_scaling="none",  # or "linear", "dynamic", "llama3", "yarn", "longrope"
            rope_arguments=(),  # its numbers, in the order of config.ROPE_SCALING
            gated=True,
            activation="silu",  # or "gelu", "gelu_tanh", "relu"
            experts=0,  # feed-forwards to choose from; 0 for one
            experts_per_token=2,
            expert_width=0,
            experts_renormalize=True,
            sparse=(),  # which layers have experts, repeated; () for all
            balance_coef=0.0,  # of the load-balancing loss
            init_std=0.02,
            dtype="float32",  # of the computation; master weights are float32
            remat="none",
            attention="auto",  # or "xla", "blockwise", "cudnn", "splash"
            strict_kernels=False,  # a kernel that cannot be had is an error
        )
    )


def optimizer():
    """AdamW behind a clip by global norm; see `stagecraft.optim`."""
    return ConfigDict(
        dict(
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
    )


def lora():
    """Train thin matrices beside the weights, not the weights; `models/lora.py`."""
    return ConfigDict(
        dict(
            rank=0,  # of the matrices; 0 trains the weights themselves
            alpha=16.0,  # their product counts alpha / rank times
            targets="all",  # or some of "query,key,value,out,gate,up,down"
            dropout=0.0,  # of what the matrices read, in updates alone
            rslora=False,  # alpha / sqrt(rank) instead
            embeddings=False,  # train the embeddings too, whole
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
    # A name of `stagecraft.losses.TABLES`, "package.module:function", or a callable;
    # several losses are separated by commas and add up.
    c.objective = objective
    c.objective_weights = ()  # one for each of several losses; () for 1 each
    c.objective_args = ConfigDict()  # keyword arguments of the losses that take them
    c.start_from = ""  # a stage here, a finished one's folder, or "hf:FOLDER"
    c.seed = 0  # added to the experiment's: another order, other samples
    c.steps = 100
    c.batch_size = 32
    c.micro_batches = 1  # gradient accumulation: parts a batch is worked on in
    c.optimizer = optimizer()
    c.lora = lora()  # a policy's critic gets an adapter of its own
    c.ema_decay = 0.0  # of an average of the weights, kept in their place; 0 for none
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
    c.batch_size = 32
    c.data = ConfigDict(
        dict(
            files="",
            fields="",
            heldout="",
            heldout_share=0.0,
            length=128,
            buckets=(),
            **_mixture(),
            workers=0,
        )
    )
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
    return ConfigDict(
        dict(
            files="",
            fields="",
            prompt_length=0,  # tokens; 0 for all there is room for
            workers=0,
            **more,
        )
    )


def _rewards(c):
    c.reward_from = ""  # a reward stage; may be "" where verifiers score
    c.verifiers = ""  # "package.module:function, ...": see signals/verifier.py
    c.reward_weights = ()  # the reward model's, then each verifier's; () for 1 each
    return c


def _online_preference():
    c = _rewards(_pair_options(_base("online_preference", "dpo")))
    c.data = _prompts(**_mixture())
    c.sampling = sampling()
    c.missing_eos_penalty = 1.0
    return c


def _group_policy():
    c = _rewards(_base("group_policy", "ppo_policy"))
    c.batch_size = 16  # prompts; rows are group_size times as many
    c.data = _prompts(**_mixture())
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
    c.kl_estimator = "k3"  # or "k2"; of a KL in the loss
    c.kl_bias_correction = False  # k3 times the probability ratio
    c.missing_eos_penalty = 0.0
    c.mask_truncated = False  # DAPO's filter: what was cut off teaches nothing
    c.overlong_cache = 0  # DAPO's soft penalty: tokens below the limit; 0 for none
    c.oversample = 1  # DAPO's dynamic sampling: prompts sampled for each one kept
    return c


def _policy():
    c = _base("policy", "ppo_policy")
    c.batch_size = 64
    c.data = _prompts(
        ptx="",  # text whose loss is added to the policy's (PPO-ptx)
        ptx_rows=0,  # of a batch, beside the prompts
        ptx_length=64,
        cache="",
        **_mixture(),
    )
    c.reference_from = ""  # "": the parent
    c = _rewards(c)
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


def _comparisons():
    c = ConfigDict()
    c.kind = "comparisons"
    c.start_from = ""  # whose completions are compared
    c.seed = 0  # added to the experiment's
    c.rater = "world"  # "world", "reward", or "package.module:function"
    c.reward_from = ""  # the reward stage of rater="reward"
    c.soft_labels = False  # rater="reward": keep the probability, not the choice
    c.data = _prompts()
    c.prompts = 1000  # how many prompts, two completions each
    c.batch_size = 128
    c.sampling = sampling()
    c.mesh = ConfigDict(dict(data=0, fsdp=0, tensor=0))
    return c


def _selection():
    c = _rewards(ConfigDict(dict(kind="selection")))
    c.start_from = ""  # whose completions are selected from
    c.seed = 0  # added to the experiment's
    c.samples = 4  # completions of each prompt
    c.keep = "best"  # of each prompt; or "above": all whose reward exceeds
    c.threshold = 0.0
    c.data = _prompts()
    c.prompts = 1000
    c.batch_size = 128
    c.sampling = sampling()
    c.mesh = ConfigDict(dict(data=0, fsdp=0, tensor=0))
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
    "selection": _selection,
}
RECORDS = ("comparisons", "selection")  # kinds that write records and train nothing


def curate():
    """What `stagecraft curate` does to raw text; see `stagecraft.curate`.

    The numbers of the rules are those of their papers, under datatrove's names.
    """
    c = ConfigDict()
    c.files = ""  # what to read: .txt, .jsonl (both also .gz, .zst) and .parquet
    c.out = ""  # the folder that appears
    c.work = ""  # for what is half done; "" for OUT.work
    c.seed = 0  # of the sampling by score
    c.text_key = "text"  # of records and columns
    c.source_key = "source"  # a text by which records are counted, where they have it
    c.document = 2000  # characters of a document of .txt, cut at blank lines; 0: a file
    c.task_bytes = 0  # text of one task; 0 for a 64th of all, from 1 MiB to 256 MiB
    c.examples = 5  # on the page, of each reason
    # In this order; leave out what should not run.
    c.rules = ("language", "gopher_repetition", "gopher_quality", "c4", "fineweb")
    c.language = ConfigDict()
    c.language.keep = "en"  # or "de", "fr", ...: one of curate/language.py; "" for all
    c.language.unknown = False  # keep what is recognised as none
    c.gopher_repetition = ConfigDict(
        dict(
            dup_line_frac=0.3,
            dup_para_frac=0.3,
            dup_line_char_frac=0.2,
            dup_para_char_frac=0.2,
            top_n_grams=((2, 0.2), (3, 0.18), (4, 0.16)),
            dup_n_grams=(
                *((5, 0.15), (6, 0.14), (7, 0.13)),
                *((8, 0.12), (9, 0.11), (10, 0.10)),
            ),
        )
    )
    c.gopher_quality = ConfigDict(
        dict(
            min_doc_words=50,
            max_doc_words=100_000,
            min_avg_word_length=3.0,
            max_avg_word_length=10.0,
            max_symbol_word_ratio=0.1,
            max_bullet_lines_ratio=0.9,
            max_ellipsis_lines_ratio=0.3,
            max_non_alpha_words_ratio=0.8,  # the least share of words with a letter
            min_stop_words=2,
        )
    )
    c.c4 = ConfigDict(
        dict(
            split_paragraph=True,
            remove_citations=True,
            filter_no_terminal_punct=False,  # True in C4; FineWeb found it too harsh
            min_num_sentences=5,
            min_words_per_line=3,
            max_word_length=1000,
            filter_lorem_ipsum=True,
            filter_javascript=True,
            filter_curly_bracket=True,
            filter_policy=True,
        )
    )
    c.fineweb = ConfigDict(
        dict(
            line_punct_thr=0.12,
            line_punct_exclude_zero=False,
            short_line_thr=0.67,
            short_line_length=30,
            char_duplicates_ratio=0.01,
            new_line_ratio=0.3,
        )
    )
    c.exact = True  # remove documents with the same words and punctuation
    c.minhash = ConfigDict(dict(on=True, n_grams=5, buckets=14, hashes=8, seed=1))
    c.quality = ConfigDict(
        dict(
            good="",  # files of samples to train a classifier on
            bad="",
            model="",  # or one trained before: quality-HASH.npy
            threshold=0.0,  # least score, from 0 to 1
            share=1.0,  # of the documents left, chosen by score
            temperature=0.0,  # of that choice: 0 takes the best, more lets chance in
        )
    )
    c.contamination = ConfigDict(
        dict(
            files="",  # evaluation files; every text in a record counts
            n_grams=13,  # words of a run that must not be shared
            common=10,  # a run in more items than this is nobody's content
        )
    )
    c.personal = ConfigDict(dict(emails=True, addresses=True, phones=True))
    c.tokenizer = ""  # a .model file; "" writes text and no ids
    return c


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
