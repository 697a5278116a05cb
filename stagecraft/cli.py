"""The commands: `stagecraft run`, `prompt`, `export`, `report` and others. Each is a
Python call too.

A UserError is printed as one line and ends the command with status 2; `--debug` shows
the traceback. Anything else that escapes is a bug of ours and is shown whole.
"""

import difflib
import importlib.util
import logging
import os
import sys
from pathlib import Path

from absl import flags

from stagecraft import schema
from stagecraft.errors import UserError

FLAGS = flags.FLAGS
# How tasks are asked.
ASKED = ("limit", "batch_size", "apply_chat_template", "num_fewshot", "seed", "out")


def main(argv=None):
    """The entry point; returns the exit status."""
    argv = list(sys.argv if argv is None else argv)
    debug = "--debug" in argv
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        return _dispatch(argv)
    except UserError as error:
        if debug:
            raise
        print(f"stagecraft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nstagecraft: stopped; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(argv):
    if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    name = argv[1]
    if name == "--version":
        from stagecraft import __version__

        print(f"stagecraft {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"unknown command {name!r}; {hint}commands: {', '.join(COMMANDS)}"
        )
    command = COMMANDS[name]
    names = _define(command)
    if any(a in ("-h", "--help", "--helpfull") for a in argv[2:]):
        print(_help(name, command, names))
        return 0
    rest = _parse(argv[1:])
    _quiet()
    command(rest[1:])
    return 0


# -- commands --------------------------------------------------------------------------


def run(rest):
    """Run or resume a graph of stages.

    stagecraft run --config=experiments/quickstart.py --workdir=runs/a
    stagecraft run --config=FILE:tiny,beta=0.5 --workdir=DIR --only=sft,dpo
    stagecraft run --config=FILE --workdir=DIR --config.stages.sft.optimizer.lr=1e-3

    What follows the colon goes to the file's get_config; --config.KEY=VALUE overrides
    one key. The same command again goes on where it stopped; finished stages are
    skipped.
    """
    _no_more(rest)
    from stagecraft import run as running

    only = _listed(FLAGS.only)
    if FLAGS.config is None:
        raise UserError("--config is missing, as in --config=experiments/quickstart.py")
    running.run(FLAGS.config, _workdir(), only=only)


def prompt(rest):
    """Show one prompt through every finished stage, side by side.

    stagecraft prompt --workdir=runs/a "What is the capital of France?"
    """
    from stagecraft import run as running
    from stagecraft.anatomy import behaviour

    if len(rest) != 1:
        raise UserError(
            "give one prompt in quotes, as in: stagecraft prompt --workdir=runs/a "
            '"What is the capital of France?"'
        )
    current = running.open_run(_workdir())
    answers = behaviour.through_stages(
        current,
        rest[0],
        temperature=FLAGS.temperature,
        samples=FLAGS.samples,
        max_new_tokens=FLAGS.max_new_tokens,
        seed=FLAGS.seed,
    )
    behaviour.show(rest[0], answers)


def chat(rest):
    """Talk to one stage's model, turn by turn.

    An empty line, /quit or ctrl-D ends the talk, /reset begins anew; lines may be
    piped in.

    stagecraft chat --workdir=runs/a --stage=dpo
    """
    _no_more(rest)
    from stagecraft import run as running
    from stagecraft.anatomy import behaviour

    current = running.open_run(_workdir())
    if not FLAGS.stage:
        raise UserError(
            f"--stage is missing; stages: {', '.join(current.config.stages)}"
        )
    behaviour.chat(
        current,
        FLAGS.stage,
        temperature=FLAGS.temperature,
        max_new_tokens=FLAGS.max_new_tokens,
        seed=FLAGS.seed,
    )


def report(rest):
    """Write WORKDIR/report.html: curves, weights, cost, tax, the single prompt.

    stagecraft report --workdir=runs/a
    """
    _no_more(rest)
    from stagecraft.anatomy import report as page

    path = _workdir()
    if not (path / "config.json").exists():
        raise UserError(f"{path}: no run here (no config.json)")
    print(page.write(path))


def compare(rest):
    """Hold runs side by side: figures by arm, intervals over seeds, what is noise.

    stagecraft compare runs/dpo_seed0 runs/dpo_seed1 runs/ipo_seed0 runs/ipo_seed1
    stagecraft compare runs/a runs/b --stages=dpo,ppo --baseline=dpo --out=ab.html
    stagecraft compare runs/zoo --baseline=dpo

    Runs that differ only in seed are one arm; so are the stages NAME_seed0,
    NAME_seed1, ... of one run. Several arms of one stage are named by the settings
    that differ. Each figure is a mean over seeds with its 95% interval; each arm is
    held against a baseline, and a difference whose interval holds 0 is within noise.
    Prints the table and writes it as a page, with the numbers as JSON beside it.
    """
    from stagecraft.anatomy import compare as sides

    found = sides.compare(rest, stages=_listed(FLAGS.stages), baseline=FLAGS.baseline)
    path = sides.write(found, FLAGS.out)
    sides.show(found)
    print(path)


def eval_(rest):
    """Ask finished stages the tasks of lm-evaluation-harness, side by side.

    stagecraft eval --workdir=runs/a --stage=all --tasks=my_tasks/
    stagecraft eval --workdir=runs/a --stage=sft,dpo --tasks=hellaswag,qa.yaml

    Tasks are names the harness knows, YAML files, or folders of them. Results add up in
    WORKDIR/evaluations.json and in the report. Bare-text stages get no chat template.
    """
    _no_more(rest)
    from stagecraft import run as running
    from stagecraft.anatomy import evaluate

    if not FLAGS.stage:
        raise UserError("--stage is missing, as in --stage=sft,dpo or --stage=all")
    current = running.open_run(_workdir())
    asked = {name: FLAGS[name].value for name in ASKED}
    stages, tasks = _listed(FLAGS.stage), _listed(FLAGS.tasks)
    records = evaluate.evaluate(current, stages, tasks, **asked)
    evaluate.show(records, current.stages)


def curate(rest):
    """Raw text to filtered, deduplicated, scored, tokenised text, and a page about it.

    stagecraft curate --config=experiments/curate.py:in=raw/*.jsonl.gz,out=clean
    stagecraft curate --config=experiments/curate.py:in=FILES,out=DIR,tokenizer=FILE
    stagecraft curate --config=FILE:in=FILES,out=DIR --config.minhash.n_grams=8
    stagecraft curate --config=FILE:... --executor=slurm:partition=cpu,time=08:00:00

    in=FILES: .txt, .jsonl, both also .gz and .zst, and .parquet; a file, folder or
    glob, several separated by commas. Beside out=DIR, perhaps language=de, good=FILES
    and bad=FILES (samples to score by), share=0.5, evaluation=FILES, tokenizer=FILE.

    DIR/text and DIR/shards are for data.files of a pretraining stage; DIR/report.html
    says what each step removed and why. Every key with its default and a word is in
    stagecraft/defaults.py, curate(). The same command goes on where it was stopped.
    Ray and Slurm need DIR on storage that all their machines share.
    """
    _no_more(rest)
    from stagecraft.curate import curation

    if FLAGS.config is None:
        raise UserError("--config is missing, as in --config=experiments/curate.py:...")
    curation.curate(FLAGS.config, executor=FLAGS.executor, workers=FLAGS.workers)


def bench(rest):
    """Time the stages on this machine: one JSON line a figure.

    stagecraft bench --what=pretrain,sft,dpo,grpo,ppo,sample --steps=8

    Real steps of a small Llama (5.5M parameters) on made-up batches of fixed shapes.
    Compare figures of one run on an idle machine only.
    """
    _no_more(rest)
    from stagecraft import bench as benching

    what = _listed(FLAGS.what) or benching.NAMES
    benching.bench(what, steps=FLAGS.steps, dtype=FLAGS.dtype)


def import_(rest):
    """Make a work directory out of a Hugging Face folder: one finished stage.

    stagecraft import models/Qwen3-0.6B --workdir=runs/qwen
    stagecraft import models/reward --workdir=runs/reward --name=reward

    prompt, chat and export work on it, and other experiments start from it:
    start_from="runs/qwen/base". (start_from="hf:FOLDER" reads a folder directly.)
    """
    from stagecraft import exchange

    if len(rest) != 1:
        raise UserError(
            "give one folder, as in: stagecraft import models/Qwen3-0.6B "
            "--workdir=runs/qwen"
        )
    print(exchange.import_folder(rest[0], _workdir(), FLAGS.name))


def export(rest):
    """Write a stage's model as a folder that transformers, vLLM and others open.

    stagecraft export --workdir=runs/a --stage=dpo --to=models/mine --dtype=bfloat16

    Weights in shards, config.json, generation_config.json, the tokenizer and its chat
    template as they came. The folder appears whole or not at all. A reward model leaves
    as a ...ForSequenceClassification with one label.

    A stage that trained an adapter (LoRA) leaves merged; with --adapter as a PEFT
    folder, on the Hugging Face folder it was trained on or on --base=FOLDER.
    """
    _no_more(rest)
    from stagecraft import exchange

    for flag, example in (("stage", "dpo"), ("to", "models/mine")):
        if not FLAGS[flag].value:
            raise UserError(f"--{flag} is missing, as in --{flag}={example}")
    lines = exchange.export(
        _workdir(),
        FLAGS.stage,
        FLAGS.to,
        dtype=FLAGS.dtype,
        shard_size=_bytes("shard_size", FLAGS.shard_size),
        overwrite=FLAGS.overwrite,
        adapter=FLAGS.adapter,
        base=FLAGS.base,
    )
    print("\n".join(lines))


COMMANDS = {
    "run": run,
    "prompt": prompt,
    "chat": chat,
    "report": report,
    "compare": compare,
    "eval": eval_,
    "curate": curate,
    "bench": bench,
    "import": import_,
    "export": export,
}


# -- flags -----------------------------------------------------------------------------


def _define(command):
    """Defines a command's flags and returns their names."""
    FLAGS.set_gnu_getopt(True)  # flags may stand behind folders and prompts
    flags.DEFINE_bool("debug", False, "show the traceback of an error")
    if command is compare:
        flags.DEFINE_string("stages", "", "stages to compare, as in dpo,ppo")
        flags.DEFINE_string("baseline", "", "the arm others are held against")
        flags.DEFINE_string("out", "compare.html", "the page to write")
        return ["stages", "baseline", "out", "debug"]
    if command is bench:
        flags.DEFINE_string("what", "", "figures to measure; all by default")
        flags.DEFINE_integer("steps", 8, "timed steps of each")
        flags.DEFINE_string("dtype", "float32", "of the computation, or bfloat16")
        return ["what", "steps", "dtype", "debug"]
    if command is curate:
        from ml_collections import config_flags

        config_flags.DEFINE_config_file("config", None, "what to do: FILE[:ARG]")
        flags.DEFINE_string(
            "executor", "local", "or ray:ADDRESS, or slurm:partition=NAME,time=HH:MM:SS"
        )
        flags.DEFINE_integer("workers", os.cpu_count() or 1, "tasks at once")
        return ["config", "executor", "workers", "debug"]
    flags.DEFINE_string("workdir", None, "the run's folder")
    names = ["workdir"]
    if command is import_:
        flags.DEFINE_string("name", "base", "of the stage")
        names.append("name")
    if command is eval_:
        flags.DEFINE_string("stage", "", "whose models, as in sft,dpo, or all")
        flags.DEFINE_string("tasks", "", "names, YAML files, folders of them")
        flags.DEFINE_integer("limit", 0, "documents of each task; 0 for all", 0)
        flags.DEFINE_integer("batch_size", 32, "rows worked on at once", 1)
        flags.DEFINE_bool("apply_chat_template", False, "ask in turns of a chat")
        flags.DEFINE_integer("num_fewshot", None, "examples before each question", 0)
        flags.DEFINE_integer("seed", 0, "of sampled generations")
        flags.DEFINE_string("out", None, "the results; WORKDIR/evaluations.json")
        names += ["stage", "tasks", *ASKED]
    if command is export:
        flags.DEFINE_string("stage", "", "whose model to write")
        flags.DEFINE_string("to", "", "the folder to write")
        flags.DEFINE_string("dtype", "float32", "of the weights: bfloat16, float16")
        flags.DEFINE_string("shard_size", "5GB", "most bytes in a file: 500MB, 5GB")
        flags.DEFINE_bool("overwrite", False, "replace a folder that is there")
        flags.DEFINE_bool("adapter", False, "write the LoRA adapter, as PEFT does")
        flags.DEFINE_string("base", "", "the folder that --adapter is to sit on")
        names += ["stage", "to", "dtype", "shard_size", "overwrite", "adapter", "base"]
    if command is run:
        from ml_collections import config_flags

        config_flags.DEFINE_config_file("config", None, "an experiment: FILE[:ARG]")
        flags.DEFINE_string("only", "", "stages to run, as in sft,dpo; all by default")
        names = ["config", "workdir", "only"]
    if command in (prompt, chat):
        flags.DEFINE_float("temperature", 0.0, "0 for the likeliest answer")
        flags.DEFINE_integer("max_new_tokens", 48, "longest answer, in tokens")
        flags.DEFINE_integer("seed", 0, "of the sampling")
        names += ["temperature", "max_new_tokens", "seed"]
    if command is prompt:
        flags.DEFINE_integer("samples", 1, "answers a stage")
        names.append("samples")
    if command is chat:
        flags.DEFINE_string("stage", "", "whose model to talk to")
        names.append("stage")
    return [*names, "debug"]


def _parse(argv):
    """Parses the flags; what goes wrong in them is a UserError."""
    given = next((a for a in argv if a.startswith("--config=")), None)
    if given:
        path, _, argument = given.removeprefix("--config=").partition(":")
        if not Path(path).is_file():
            raise UserError(
                f"--config={path}: no such file; experiments lie in experiments/"
            )
        # An experiment file may import its neighbours: experiments.common.
        for folder in (str(Path(path).absolute().parent.parent), os.getcwd()):
            if folder not in sys.path:
                sys.path.insert(0, folder)
        _check_overrides(_load(path, argument), argv)
    try:
        return FLAGS(argv)
    except (flags.Error, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{line} (see stagecraft {argv[0]} --help)") from error


def _load(path, argument):
    """What the experiment's get_config returns, before any override."""
    spec = importlib.util.spec_from_file_location("experiment_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={path}: has no function get_config(arg)")
    return module.get_config(argument)


def _check_overrides(config, argv):
    """Refuses --config.KEY=VALUE whose key is not there, with the nearest name."""
    for argument in argv:
        if not argument.startswith("--config."):
            continue
        keys = argument.removeprefix("--config.").partition("=")[0].split(".")
        node = config
        for i, key in enumerate(keys):
            where = f"--config.{'.'.join(keys[: i + 1])}"
            if not hasattr(node, "keys"):
                raise UserError(f"{where}: {'.'.join(keys[:i])} has no keys below it")
            if key not in node:
                raise UserError(schema.unknown(where, key, node.keys()))
            node = node[key]


def _workdir():
    if not FLAGS.workdir:
        raise UserError("--workdir is missing, as in --workdir=runs/a")
    return Path(FLAGS.workdir)


def _bytes(flag, text):
    """5000000 of "5MB"."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.isdecimal() or not int(number):
        raise UserError(f"--{flag}={text}: expected a size such as 500MB or 5GB")
    return int(number) * units[unit]


def _listed(text):
    """("sft", "dpo") of "sft,dpo"."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _no_more(rest):
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; flags begin with --")


class _Told(logging.Handler):
    """Our own remarks, on what standard error is now: a live line steps aside."""

    def emit(self, record):
        print(f"stagecraft: {record.getMessage()}", file=sys.stderr)


def _quiet():
    """Libraries speak up only about what goes wrong."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    own = logging.getLogger("stagecraft")
    own.setLevel(logging.INFO)
    own.propagate = False
    if not own.handlers:
        own.addHandler(_Told())


# -- help ------------------------------------------------------------------------------


def _overview():
    lines = [
        "stagecraft: train a language model through all its stages, and measure what "
        "each one changed.",
        "",
        "commands:",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<8} {command.__doc__.splitlines()[0]}")
    lines += ["", "stagecraft COMMAND --help tells the flags of each."]
    return "\n".join(lines)


def _help(name, command, names):
    lines = [f"stagecraft {name}: {command.__doc__.splitlines()[0]}"]
    lines += [line.removeprefix("    ") for line in command.__doc__.splitlines()[1:]]
    lines.append("flags:")
    for flag in names:
        found = FLAGS[flag]
        default = "" if found.default in (None, "", False) else f" [{found.default}]"
        lines.append(f"  --{flag:<16} {found.help}{default}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
