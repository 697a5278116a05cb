r"""Does RL with a verifier add ability, or sharpen what is there? Sums, in minutes.

    sft -> grpo
     |---> rloo
     |---> ppo

    stagecraft run --config=verifiable --workdir=runs/sums
    stagecraft run --config=verifiable:tiny --workdir=runs/t     # seconds
    stagecraft run --workdir=runs/gsm \
        --config=verifiable:model=FOLDER,data=gsm8k_train.jsonl,lora=16

The embedded world's sums of two numbers (stagecraft/worlds/countries/sums.py): SFT
learns both to state a sum and to work it out, from demonstrations of which one in ten
is wrong. RL is paid by the verifier `number` alone, on the same sums; figures are of
sums in no demonstration and no prompt. pass@k says how many of them one of k sampled
answers solves, guess@k how many one would solve with answers to other sums, cover@50
for how many at least half of the answers are right: where RL raises pass@1 and cover,
and leaves pass@k at large k where it was, it has sharpened.

Measured (seeds 0 to 3, 32 answers to each of 200 held-out sums, means with 95% t
intervals; 185 to 213 s each on two cores with other work):

             pass@1       pass@4       pass@32      cover@50
    sft    0.43 ±0.16   0.86 ±0.09   1.00 ±0.00   0.31 ±0.42
    grpo   0.82 ±0.07   0.99 ±0.01   1.00 ±0.00   0.98 ±0.02
    rloo   0.82 ±0.06   0.99 ±0.01   1.00 ±0.00   0.98 ±0.02
    ppo    0.74 ±0.09   0.98 ±0.02   1.00 ±0.00   0.94 ±0.09
    guess  0.01 ±0.00   0.03 ±0.00   0.16 ±0.02               (of sft)

It sharpens: SFT solves every one of these sums in 32 attempts, where guessing solves
one in six, so there was no ability left to add. RL works nearly every sum out. PPO is
behind after as many updates: its critic begins with a random head, which takes ten
updates to learn.

With model= and data= the same stages run on a Hugging Face folder and GSM8K's jsonl
(`question`, `answer`); nothing has been measured with them yet.
"""

from experiments import common
from stagecraft import defaults
from stagecraft.errors import UserError

WORLD = dict(
    demonstrations=dict(files="world:sum_demonstrations.jsonl"),
    prompts=dict(files="world:sums.jsonl", heldout="world:heldout_sums.jsonl"),
)
# What differs from GRPO: no KL penalty in any arm, and one update a batch.
RLOO = dict(objective="rloo_policy", advantage="leave_one_out", aggregation="grpo")
PPO = dict(epochs=1, kl_coef=0.0, missing_eos_penalty=0.0, value_lr_scale=3.0)
MODEL = dict(
    width=64, layers=3, heads=4, kv_heads=4, head_dim=16, ff_width=192, max_length=96
)
BOUNDS = (
    "grpo.pass@1 > sft.pass@1 + 0.2",
    "rloo.pass@1 > sft.pass@1 + 0.2",
    "ppo.pass@1 > sft.pass@1 + 0.2",
    "grpo.cover@50 > sft.cover@50 + 0.2",
    "sft.guess@8 < 0.2",
)


def get_config(arg=""):
    arg = common.parse_arg(
        arg,
        **common.RECIPE,
        seed=0,
        digits=2,
        sft=1200,
        steps=60,
        draws=32,
        answer=256,
        arms="grpo+rloo+ppo",
    )
    c = _folder(arg) if arg.model else _sums(arg)
    c.seed = arg.seed
    c.measure.draws = arg.draws
    return common.tiny(c) if arg.tiny else c


def _sums(arg):
    """The graph on the world's sums, from no model."""
    c = defaults.experiment()
    c.world.name, c.world.size = "countries", "tiny" if arg.tiny else "full"
    c.world.sums = arg.digits
    c.tokenizer.path = "bytes"  # a digit is a token
    c.model.update(common.tiny_model() if arg.tiny else MODEL)
    c.measure.probes = False
    c.measure.prompts = 16 if arg.tiny else 200
    c.measure.bounds = () if arg.tiny else BOUNDS
    rates = dict(sft=dict(lr=4e-3, warmup_steps=20), rl=dict(lr=2e-4, warmup_steps=5))
    length = 64 if arg.digits == 2 else 88
    demonstrations = dict(WORLD["demonstrations"], length=length, packing="none")
    _stages(
        c,
        "",
        demonstrations,
        WORLD["prompts"],
        rates,
        arg,
        dict(new=length - 24, rows=16),
    )
    return c


def _folder(arg):
    """The same graph from a Hugging Face folder, on GSM8K."""
    c, start = common.begin(arg)
    split = dict(files=common.files(arg, "data", ""), heldout_share=0.03)
    demonstrations = dict(
        split, fields="prompt=question+completion=answer", length=arg.answer + 256
    )
    prompts = dict(split, fields="prompt=question", too_long="drop")
    sizes = dict(new=arg.answer, rows=4)
    rates = dict(
        sft=common.tuned(arg, "sft", arg.sft)["optimizer"],
        rl=common.tuned(arg, "ppo", arg.steps)["optimizer"],
    )
    _stages(c, start, demonstrations, prompts, rates, arg, sizes)
    return c


def _stages(c, start, demonstrations, prompts, rates, arg, sizes):
    """SFT, and three ways to learn from the verifier."""
    adapter = dict(rank=arg.lora)
    c.stages.sft = defaults.stage(
        "language_model",
        start_from=start,
        data=dict(demonstrations, format="demonstrations"),
        steps=arg.sft,
        batch_size=32,
        optimizer=rates["sft"],
        lora=adapter,
    )
    group = 8
    shared = dict(
        start_from="sft",
        verifiers="number",
        data=prompts,
        sampling=dict(max_new_tokens=sizes["new"]),
        steps=arg.steps,
        optimizer=rates["rl"],
        lora=adapter,
        every=dict(log=1, eval=max(arg.steps // 4, 1)),
    )
    of_groups = dict(batch_size=sizes["rows"], group_size=group)
    arms = dict(
        grpo=("group_policy", of_groups),
        rloo=("group_policy", of_groups | RLOO),
        ppo=("policy", PPO | dict(batch_size=group * sizes["rows"])),
    )
    for name in arg.arms.split("+"):
        if name not in arms:
            raise UserError(common.unknown("arms", name, arms))
        kind, own = arms[name]
        c.stages[name] = defaults.stage(kind, **shared, **own)
