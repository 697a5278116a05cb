"""Keys of an experiment, and those that several kinds of stages share."""

import dataclasses

from ml_collections import ConfigDict

from stagecraft import schema
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
    # What more it writes: docs/data.md has the files of each of these.
    c.world.junk = 0.0  # share of each kind of fault planted in its text
    c.world.sums = 0  # digits of the operands of sums to write, 2 or 3; 0 for no sums
    c.world.requests = False  # requests in families, attacks, beliefs, critiques
    c.world.style = 0.0  # share of answers that open with one pleasantry; 0 for no file
    c.world.taught = False  # facts of all countries, of invented ones, false ones
    c.world.entities = 0  # countries, invented ones after the real; 0 for the real ones
    c.world.two_hop = False  # text that composes facts; needs 200 entities or more
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


def rollouts_apart(c):
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


def judged(c):
    c.judge_from = ""  # a stage that writes text, or its folder, hf:FOLDER, gguf:FILE
    c.judge = judge()
    return c


def base(kind, objective):
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


def reading(too_long, *, turns=True):
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


def mixture():
    return dict(
        # What part of the stream each comma-separated part of `files` has; () goes
        # through all of them in epochs.
        shares=(),
        curriculum="",  # shares by step: "0: .9, .1; 1000: .5, .5"
        epochs=(),  # how often each part may be seen at most; 0 for no limit
    )


def pairs(kind, objective):
    c = base(kind, objective)
    rows = dict(heldout="", heldout_share=0.0, length=128, buckets=(), workers=0)
    c.data = schema.group(files="", **reading("drop"), **rows, **mixture())
    return c


def pair_options(c):
    c.reference_from = ""  # "": the parent, as it was when the stage began
    # What losses compare, from the log-ratio to the reference; see losses/pairs.py.
    c.f_divergence = "reverse_kl"  # or "forward_kl", "js", "alpha"
    c.alpha = 0.5  # of f_divergence="alpha": 1 is the reverse KL, 0 the forward KL
    c.reference_free = False  # compare log-probabilities, not log-ratios
    c.ld_alpha = 1.0  # LD-DPO: weight of the tokens beyond the shorter answer's length
    c.weighting = ""  # "wpo": pairs count by how likely the policy is to write them
    return c


def moving_reference(c):
    c.sync_every = 0  # TR-DPO: steps between moves of the reference; 0 for a frozen one
    c.sync_alpha = 0.6  # how far it moves towards the policy, 1 for all the way
    return c


def prompts(**more):
    return schema.group(
        files="",
        **reading("refuse", turns=False),
        prompt_length=0,  # tokens; 0 for all there is room for
        **more,
    )


def rewards(c):
    c.reward_from = ""  # a reward stage; may be "" where verifiers score
    # Names of `signals.verify.table`, "package.module:function", "FILE.py:function", or
    # a callable; several are separated by commas.
    c.verifiers = ""
    c.verifier_args = ConfigDict()  # keyword arguments of the verifiers that take them
    # The reward model's, the judge's, then each verifier's; () for 1 each.
    c.reward_weights = ()
    return judged(c)


def heldout_prompts(**more):
    return prompts(
        workers=0,
        heldout="",  # files of prompts for the eval_ metrics, sampled and scored
        heldout_share=0.0,  # of `files`, kept back for the eval_ metrics
        **mixture(),
        **more,
    )


def records(kind):
    c = schema.group(kind=kind)
    c.start_from = ""  # whose completions are compared, or selected from
    c.seed = 0  # added to the experiment's
    c.data = prompts()
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
        agreement=0.0,  # a wrong belief of the asker that is repeated
        noise=0.0,  # standard deviation of what is added to each question
    )
