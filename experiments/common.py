"""What experiment files share: reading the argument after the colon, and two sizes."""

import types

from stagecraft import schema
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
            if stage.kind == "selection":  # two steps of training write few ends
                stage.keep, stage.threshold = "above", -1e9
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
