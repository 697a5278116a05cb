"""The stages that the recipes for pods share: from bare text to GRPO, one model."""

from experiments import common
from stagecraft import defaults

# The model is from scratch: its shape is all that a plan needs. `data` and the like are
# the files of a run; rows of a batch divide over the chips of every topology planned.
KNOWN = dict(
    tiny=False,
    layers=0,  # 0: all; fewer to see whether it compiles
    tokenizer="",
    text="text/*.parquet",
    chats="chats.jsonl",
    pairs="pairs.jsonl",
    prompts="problems.jsonl",
    length=8192,
    chat_length=4096,
    pair_length=2048,
    prompt=512,
    answer=512,
    batch=512,
    micro_batches=1,
    group=4,
    fsdp=16,
    tensor=1,
    remat="full",
    steps=1000,
)


def build(arg, vocab, **model):
    """Returns the experiment: pretrain, sft, reward, dpo, ppo and grpo.

    Args:
        arg: what follows the colon, with the names of `KNOWN`.
        vocab: ids of the tokenizer that goes with the model.
        **model: the keys of `model`.
    """
    arg = common.parse_arg(arg, **KNOWN)
    c = defaults.experiment()
    c.tokenizer.path, c.tokenizer.vocab_size = arg.tokenizer, vocab
    c.mesh.fsdp, c.mesh.tensor = arg.fsdp, arg.tensor
    how = dict(dtype="bfloat16", remat=arg.remat, max_length=arg.length)
    c.model.update(model | how)
    c.model.layers = arg.layers or c.model.layers
    if arg.tiny:
        _embedded(c, arg)
    elif not arg.tokenizer:  # trained on the text where none is given
        c.tokenizer.files = arg.text

    def stage(kind, rate, **more):
        shared = dict(batch_size=arg.batch, micro_batches=arg.micro_batches)
        tuned = dict(steps=arg.steps, optimizer=common.gentle(rate, arg.steps))
        return defaults.stage(kind, **shared | tuned | more)

    def prompts():
        return dict(files=arg.prompts, prompt_length=arg.prompt)

    c.stages.pretrain = stage(
        "language_model", 3e-4, data=dict(files=arg.text, length=arg.length)
    )
    c.stages.sft = stage(
        "language_model",
        1e-5,
        start_from="pretrain",
        data=dict(format="demonstrations", files=arg.chats, length=arg.chat_length),
    )
    pairs = common.world_pairs(c, "sft") if arg.tiny else arg.pairs
    compared = dict(files=pairs, length=arg.pair_length)
    c.stages.reward = stage("reward", 1e-5, start_from="sft", data=compared)
    c.stages.dpo = stage("preference", 1e-6, start_from="sft", data=compared)
    sampling = dict(max_new_tokens=arg.answer)
    c.stages.ppo = stage(
        "policy",
        1e-6,
        start_from="sft",
        reward_from="reward",
        data=prompts(),
        sampling=sampling,
        epochs=1,
    )
    c.stages.grpo = stage(
        "group_policy",
        1e-6,
        start_from="sft",
        verifiers="length" if arg.tiny else "number",
        verifier_args=dict(most=20) if arg.tiny else {},
        data=prompts(),
        sampling=sampling,
        group_size=arg.group,
    )
    return common.tiny(c) if arg.tiny else c


def _embedded(c, arg):
    """Puts a small model and the embedded world in the place of model and files."""
    c.world.name, c.world.size = "countries", "tiny"
    c.tokenizer.path, c.tokenizer.files = "", "world:text.jsonl"
    c.tokenizer.vocab_size = 512
    small = common.tiny_model()
    if c.model.experts:
        small |= dict(experts=4, experts_per_token=2, expert_width=32)
    c.model.update(small | dict(dtype="float32"))
    c.mesh.fsdp = c.mesh.tensor = 1
    arg.text, arg.chats = "world:text.jsonl", "world:demonstrations.jsonl"
    arg.prompts, arg.prompt = "world:prompts.jsonl", 0
    arg.length = arg.chat_length = arg.pair_length = 64
