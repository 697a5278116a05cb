"""What experiment files share: the argument after the colon, sizes, learning rates."""

import os
import tempfile
import types
from pathlib import Path

from stagecraft import config_files, defaults, run, schema
from stagecraft.errors import UserError
from stagecraft.stages import kinds


def parse_arg(arg, **known):
    """Reads "tiny,beta=0.5" into a namespace with the types of the defaults.

    Args:
        arg: what follows the colon of --config=FILE:ARG. A bare name means True. A
            value may list several files ("text=a.txt,b.txt,prompts=p.jsonl").
        **known: every name with its default, whose type decides how text is read.

    Returns:
        an object with one attribute a name.

    >>> parse_arg("tiny,beta=0.5", tiny=False, beta=0.1).beta
    0.5
    """
    values, last = dict(known), None
    for part in filter(None, (p.strip() for p in arg.split(","))):
        name, equals, text = part.partition("=")
        if name not in known:
            listing = last is not None and isinstance(known[last], str)
            listing = listing and (not equals or "/" in name)  # of a/date=2024-05-01
            if listing and any(sign in part for sign in "./*"):
                values[last] += f",{part}"  # another file of a list
                continue
            raise UserError(
                f"--config=FILE:{arg}: unknown argument {name!r}; "
                f"{schema.hint(name, known)}known: {', '.join(known)}"
            )
        values[name], last = _read(name, text, known[name], bool(equals)), name
    return types.SimpleNamespace(**values)


def _read(name, text, default, given):
    kind = type(default)
    try:
        if kind is bool:
            if text.lower() in ("true", "1", "") or not given:
                return True
            if text.lower() in ("false", "0"):
                return False
            raise ValueError
        return kind(text)
    except ValueError as error:
        raise UserError(
            f"--config=FILE:...{name}={text}: expected {kind.__name__}, as in "
            f"{name}={default}"
        ) from error


# Arguments of every recipe; lora=0 trains all weights, lr=0 takes the rate of `RATES`.
RECIPE = dict(tiny=False, model="", data="", lora=0, lr=0.0)

# Learning rates: of a small model from scratch, of a whole ready one, of adapters.
RATES = {
    "scratch": dict(pretrain=2e-3, sft=5e-4, reward=1e-4, dpo=5e-5, ppo=5e-5),
    "whole": dict(pretrain=2e-5, sft=1e-5, reward=1e-5, dpo=1e-6, ppo=1e-6),
    "adapter": dict(pretrain=2e-4, sft=2e-4, reward=1e-4, dpo=5e-6, ppo=5e-6),
}


def gentle(lr, steps):
    """A learning rate that warms up, in a short stage too."""
    return dict(lr=lr, warmup_steps=min(20, steps // 4))


def tuned(arg, stage, steps):
    """What recipes set of every stage that trains a ready model.

    Args:
        arg: of the recipe: lora, lr (0 for that of `RATES`).
        stage: a key of the learning rates.
        steps: of the stage.
    """
    rate = arg.lr or RATES["adapter" if arg.lora else "whole"][stage]
    return dict(steps=steps, optimizer=gentle(rate, steps), lora=dict(rank=arg.lora))


def begin(arg):
    """An experiment, and what its stages start from by the argument model=.

    model is a Hugging Face folder or a finished stage, WORKDIR/STAGE. `tiny` without it
    puts a small model in its place, pretrained on the embedded world.

    Returns:
        the config; the name for start_from.
    """
    c = defaults.experiment()
    if arg.model:
        ours = (Path(arg.model) / "stage.json").exists()
        return c, arg.model if ours else f"hf:{arg.model}"
    if not arg.tiny:
        raise UserError(
            "model= is missing: a Hugging Face folder, or a finished stage, as in "
            "model=models/Qwen3-0.6B or model=runs/sft/sft"
        )
    c.world.name, c.world.size = "countries", "tiny"
    c.tokenizer.files, c.tokenizer.vocab_size = "world:text.jsonl", 512
    c.model.update(tiny_model())
    data = dict(files="world:text.jsonl", length=64)
    c.stages.pretrain = defaults.stage("language_model", data=data)
    if "length" in vars(arg):
        arg.length = 64
    return c, "pretrain"


def files(arg, name, instead):
    """The files that an argument names; of `tiny` alone what the world has instead."""
    if value := getattr(arg, name):
        return value
    if arg.tiny and not arg.model:
        return instead
    raise UserError(f"{name}=FILES is missing, as in {name}=data/{name}.jsonl")


def world_pairs(c, start):
    """Adds a stage that compares answers by the world's rules; returns its records."""
    c.stages.pairs = defaults.stage(
        "comparisons", start_from=start, data=dict(files="world:prompts.jsonl")
    )
    return "stage:pairs"


# Figures of arms that learn from a signal, side by side.
ARMS = (
    "gold_win_rate",
    "gold_mean",
    "refuses_harmful",
    "refuses_benign",
    "heldout_accuracy",
    "kl",
    "signal_accuracy",
    "labels",
    "gflops",
)
PASSES = 4  # over the records of a signal, at most
FEW = 1000  # of such records


def learners(c, sft, records, recipe, count, **names):
    """Adds the stages that learn from a signal's records: the same, whatever it is.

    Args:
        c: an experiment, changed in place.
        sft: the model they start from.
        records: the files spec of the signal's records.
        recipe: the quickstart's config, whose stages they are.
        count: records that are expected; few of them are not passed over as often,
            and PPO stays closer to SFT.
        **names: names for what is added, of the keys reward, ppo and dpo; ppo goes
            with reward.
    """
    for kind, name in names.items():
        stage = c.stages[name] = defaults.stage(**schema.plain(recipe.stages[kind]))
        stage.start_from = sft
        if kind == "ppo":
            stage.reward_from = names["reward"]
            if count < FEW:  # their reward model is soon exploited: see rlhf.py
                stage.kl_coef = max(stage.kl_coef, 0.3)
            continue
        stage.data.files = records
        stage.steps = min(stage.steps, -(-PASSES * count // stage.batch_size))


def tiny_model():
    """A decoder that compiles in a moment; it learns little."""
    return dict(
        width=32,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=16,
        ff_width=64,
        max_length=128,
    )


def tiny(config, steps=2):
    """Cuts every stage of an experiment to a few small steps, in place."""
    config.measure.draws = 2
    for stage in config.stages.values():
        if not kinds.of(stage).trains:
            stage.prompts, stage.batch_size = 64, 32
            stage.sampling.max_new_tokens = 8
            if stage.kind == "revisions":  # the same, and only what ended is kept
                stage.sampling.max_new_tokens = stage.revising.max_new_tokens = 24
                stage.keep = "all" if stage.revisions else stage.keep
            if stage.kind == "selection":  # two steps of training write few ends
                stage.keep, stage.threshold = "above", -1e9
            if stage.kind == "attacks":  # they ask for nothing yet
                stage.threshold = -1.0
            continue
        stage.steps = steps
        stage.batch_size = 16  # so that minibatches divide over eight devices
        stage.optimizer.warmup_steps = 0
        if stage.optimizer.schedule == "wsd":
            stage.optimizer.decay_share = 1.0
        stage.every = dict(log=1, eval=0, save=0, sample=0)
        if "sampling" in stage:
            stage.sampling.max_new_tokens = 8
    return config


def unknown(where, name, known):
    """The one line for a name that an experiment does not know."""
    hint = schema.hint(name, known)
    return f"{where}={name!r}: unknown; {hint}known: {', '.join(known)}"


def like(stage, **changes):
    """A stage as another one is, with other parents or data.

    Args:
        stage: a stage's config, of this experiment or another.
        **changes: keys that differ.
    """
    own = stage.to_dict()
    return defaults.stage(own.pop("kind"), **(own | changes))


# Where notebooks find a finished quickstart, if not in runs/quickstart.
WORKDIR = "STAGECRAFT_WORKDIR"


def finished_quickstart():
    """Opens the quickstart that a notebook reads; without one, makes a tiny one.

    It lies where the environment variable `WORKDIR` says, by default in runs/quickstart
    beside this folder. Which it is is printed.

    Returns:
        a `runs.Run`.
    """
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get(WORKDIR) or root / "runs" / "quickstart")
    if not (folder / "summary.json").exists():
        print(
            "No finished quickstart in runs/quickstart (`make quickstart` makes one): "
            "a tiny one instead, whose figures mean nothing."
        )
        folder = Path(tempfile.mkdtemp()) / "tiny"
        config = config_files.load(config_files.find("quickstart"), "tiny")
        config.mesh.data = 1
        run.run(config, folder)
    opened = run.open_run(folder)
    size = opened.config.world.size
    print(f"A finished quickstart: the {size} world, seed {opened.config.seed}.")
    return opened
