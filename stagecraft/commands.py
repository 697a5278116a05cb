"""What each command does, and the flags it takes. Each is a Python call too."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from stagecraft import schema
from stagecraft.errors import UserError

FLAGS = flags.FLAGS


class Flag(NamedTuple):
    """One flag of a command.

    Attributes:
        name: --NAME.
        default: its value when it is not given.
        help: a few words.
        kind: type of its value; by default that of `default`.
        least: smallest number allowed.
    """

    name: str
    default: Any
    help: str
    kind: Any = None
    least: int | None = None


CONFIG = "config"  # the kind of a flag that is read as an experiment file
WORKDIR = Flag("workdir", None, "the folder of the run", str)
SAMPLING = (
    Flag("temperature", 0.0, "0 for the likeliest answer"),
    Flag("max_new_tokens", 48, "longest answer, in tokens"),
    Flag("seed", 0, "random seed of the sampling"),
)
# How tasks are asked.
ASKING = (
    Flag("limit", 0, "documents of each task; 0 for all", least=0),
    Flag("batch_size", 32, "rows computed at once", least=1),
    Flag("apply_chat_template", False, "ask through the model's chat template"),
    Flag("num_fewshot", None, "examples before each question", int, 0),
    Flag("seed", 0, "seed of sampled generations"),
    Flag("out", None, "file of results; by default WORKDIR/evaluations.json", str),
)


def takes(*taken, words=False):
    """Marks a command with its flags, and with whether it takes other arguments."""

    def mark(command):
        command.flags, command.words = taken, words
        return command

    return mark


@takes(
    Flag("config", None, "an experiment: a file or a name, [:ARG]", CONFIG),
    WORKDIR,
    Flag("only", "", "stages to run, as in sft,dpo; all by default"),
    Flag("dry_run", False, "check everything and estimate what it takes"),
)
def run_(rest):
    """Run or resume a graph of stages.

    stagecraft run --config=quickstart --workdir=runs/a
    stagecraft run --config=FILE:tiny,beta=0.5 --workdir=DIR --only=sft,dpo
    stagecraft run --config=FILE --workdir=DIR --config.stages.sft.optimizer.lr=1e-3

    The experiment is a file, or a name that `stagecraft list` shows. What follows the
    colon is passed to its get_config, and --config.KEY=VALUE overrides one key. Given
    again, the same command skips finished stages and resumes where it stopped.

    With --dry_run the config and the data are checked, and a table shows parameters,
    memory, tokens, FLOPs and time of each stage. Nothing is written, and --workdir may
    be left out.
    """
    from stagecraft import run
    from stagecraft.preview import plan

    config, only = _config(), schema.listed(FLAGS.only)
    if FLAGS.dry_run:
        plan.show(config, FLAGS.workdir and Path(FLAGS.workdir), only)
    else:
        run.run(config, _workdir(), only=only)


@takes(
    Flag("config", None, "an experiment: a file or a name, [:ARG]", CONFIG),
    Flag("workdir", None, "a run whose finished records are read too", str),
    Flag("stage", "", "stages to look at, as in sft,dpo; all by default"),
    Flag("rows", 3, "rows to show of each stage", least=0),
)
def data(rest):
    """Show what each stage would learn from: rows, counts, lengths, epochs.

    stagecraft data --config=quickstart --stage=sft
    stagecraft data --config=FILE --workdir=DIR --stage=dpo --rows=5

    Rows are rendered as the model reads them, control tokens by name. What is learned
    is bold and underlined on a terminal, and in brackets elsewhere. Data are read,
    checked and packed as in a run, in a temporary folder: nothing is written.
    """
    from stagecraft.preview import data as preview

    root = FLAGS.workdir and Path(FLAGS.workdir)
    only = schema.listed(FLAGS.stage)
    preview.show(_config(), root, only, FLAGS.rows)


@takes(Flag("config", None, "an experiment: a file or a name, [:ARG]", CONFIG))
def graph(rest):
    """Draw the stages of an experiment and what each takes from others.

    stagecraft graph --config=quickstart
    """
    from stagecraft.preview import graph as preview

    preview.show(_config())


@takes(WORKDIR)
def status(rest):
    """Show how far each stage of a run has come.

    stagecraft status --workdir=runs/a
    """
    from stagecraft import runs
    from stagecraft.report import terminal

    terminal.show_status(runs.read(_workdir()))


@takes()
def list_(rest):
    """List the experiments, kinds of stage, objectives, verifiers, model families.

    stagecraft list
    """
    from stagecraft import config_files, losses
    from stagecraft.models import families
    from stagecraft.signals.verify import table
    from stagecraft.stages import kinds

    width = max(map(len, config_files.shipped()))
    print("experiments (stagecraft run --config=NAME; curate: stagecraft curate):")
    for name, line in config_files.shipped().items():
        print(f"  {name:<{width}}  {line}")
    print("kinds of stage:\n  " + ", ".join(kinds.KINDS))
    print("objectives:")
    for title, names in losses.TABLES.items():
        print(f"  {title}: {', '.join(names)}")
    print("verifiers:\n  " + ", ".join(table.VERIFIERS))
    print("model families:\n  " + ", ".join(families.FAMILIES))


@takes(Flag("from", "quickstart", "the experiment to copy"), words=True)
def new(rest):
    """Copy an experiment to a file of your own, to edit.

    stagecraft new mine.py --from=objectives
    """
    from stagecraft import config_files

    if len(rest) != 1:
        raise UserError("give one file: stagecraft new mine.py --from=quickstart")
    path = config_files.copy(FLAGS["from"].value, rest[0])
    print(f"{path}\nstagecraft run --config={path} --workdir=runs/{path.stem}")


@takes(WORKDIR, *SAMPLING, Flag("samples", 1, "answers of each stage"), words=True)
def prompt(rest):
    """Show what every finished stage answers to one prompt.

    stagecraft prompt --workdir=runs/a "What is the capital of France?"
    """
    from stagecraft.anatomy import behaviour
    from stagecraft.report import terminal
    from stagecraft.run import open_run

    if len(rest) != 1:
        raise UserError(
            "give one prompt in quotes, as in: stagecraft prompt --workdir=runs/a "
            '"What is the capital of France?"'
        )
    run = open_run(_workdir())
    answers = behaviour.through_stages(
        run, rest[0], samples=FLAGS.samples, **_values(SAMPLING)
    )
    terminal.show_answers(rest[0], answers)


@takes(WORKDIR, *SAMPLING, Flag("stage", "", "by default the last that chats"))
def chat(rest):
    r"""Talk to one stage's model, turn by turn.

    stagecraft chat --workdir=runs/a
    stagecraft chat --workdir=runs/a --stage=sft --temperature=0.7

    /quit, an empty line, ctrl-D, or ctrl-C twice ends the conversation; /reset starts a
    new one; ctrl-C stops an answer. The arrow keys bring back earlier lines. Text of
    several lines can be pasted where the terminal marks what is pasted, or typed with a
    backslash at the end of each line but the last. A line that begins with a slash is a
    command; put a space before it to say it. Lines may be piped in.
    """
    from stagecraft.report import chat as conversation
    from stagecraft.run import open_run

    conversation.chat(open_run(_workdir()), FLAGS.stage, **_values(SAMPLING))


@takes(WORKDIR)
def report_(rest):
    """Write the page WORKDIR/report.html: curves, figures, weights, cost.

    stagecraft report --workdir=runs/a
    """
    from stagecraft.report import page

    root = _workdir()
    if not (root / "config.json").exists():
        raise UserError(f"{root}: no run here (no config.json)")
    print(page.write(root))


@takes(
    Flag("stages", "", "stages to compare, as in dpo,ppo"),
    Flag("baseline", "", "the arm to compare the others with"),
    Flag("out", "compare.html", "the page to write"),
    Flag("markdown", False, "print the table as Markdown"),
    words=True,
)
def compare_(rest):
    """Compare runs: means and intervals over seeds, and which differences are noise.

    stagecraft compare runs/dpo_seed0 runs/dpo_seed1 runs/ipo_seed0 runs/ipo_seed1
    stagecraft compare runs/a runs/b --stages=dpo,ppo --baseline=dpo --out=ab.html
    stagecraft compare runs/zoo --baseline=dpo
    stagecraft compare runs/zoo --baseline=dpo --markdown

    Runs that differ only in their seed are one variant, called an arm; so are the
    stages NAME_seed0, NAME_seed1, ... of one run. Arms are named by the settings that
    differ. Each figure is a mean over seeds with its 95% interval. Each arm is compared
    with a baseline: a difference whose interval contains 0 may be noise. The table is
    printed, and written as a page and as JSON.
    """
    from stagecraft.report import compare, compare_page, markdown, terminal

    stages = schema.listed(FLAGS.stages)
    comparison = compare.compare(rest, stages=stages, baseline=FLAGS.baseline)
    if FLAGS.markdown:
        print(markdown.table(comparison))
        return
    path = compare_page.write(comparison, FLAGS.out)
    terminal.show_comparison(comparison)
    print(path)


@takes(
    WORKDIR,
    Flag("stage", "", "stages to evaluate, as in sft,dpo, or all"),
    Flag("tasks", "", "names of tasks, YAML files, or folders of them"),
    *ASKING,
)
def eval_(rest):
    """Evaluate finished stages on tasks of lm-evaluation-harness.

    stagecraft eval --workdir=runs/a --stage=all --tasks=my_tasks/
    stagecraft eval --workdir=runs/a --stage=sft,dpo --tasks=hellaswag,qa.yaml

    Tasks are names that the harness knows, YAML files, or folders of them. Results are
    added to WORKDIR/evaluations.json and shown in the report. Stages that were trained
    on bare text alone are asked without a chat template.
    """
    from stagecraft.anatomy import evaluate
    from stagecraft.report import terminal
    from stagecraft.run import open_run

    if not FLAGS.stage:
        raise UserError("--stage is missing, as in --stage=sft,dpo or --stage=all")
    run = open_run(_workdir())
    stages, tasks = schema.listed(FLAGS.stage), schema.listed(FLAGS.tasks)
    records = evaluate.evaluate(run, stages, tasks, **_values(ASKING))
    terminal.show_tasks(records, run.stages)


@takes(
    Flag("config", None, "a curation: a file or a name, [:ARG]", CONFIG),
    Flag("executor", "local", "or ray:ADDRESS, or slurm:partition=NAME,time=HH:MM:SS"),
    Flag("workers", os.cpu_count() or 1, "tasks at once"),
)
def curate(rest):
    """Curate raw text: filter, deduplicate, score and tokenise it.

    stagecraft curate --config=curate:in=raw/*.jsonl.gz,out=clean
    stagecraft curate --config=curate:in=FILES,out=DIR,tokenizer=FILE
    stagecraft curate --config=FILE:in=FILES,out=DIR --config.minhash.n_grams=8
    stagecraft curate --config=FILE:... --executor=slurm:partition=cpu,time=08:00:00

    in=FILES: .txt, .jsonl, .json (all also .gz, .zst), .parquet, .arrow and more; a
    file, folder, glob or address (s3://...), several separated by commas. Optional:
    language=de, good=FILES and bad=FILES (samples to score by),
    share=0.5, evaluation=FILES, tokenizer=FILE.

    DIR/text and DIR/shards are for data.files of a pretraining stage; DIR/report.html
    shows what each step removed and why. Every key with its default and meaning is in
    stagecraft/curate/config.py. Given again, the same command resumes where it stopped.
    Ray and Slurm need DIR on storage that all their machines share. With Slurm, give
    the same command again when the jobs have ended: it writes the page.
    """
    from stagecraft.curate import curation
    from stagecraft.report import curation as page

    if FLAGS.config is None:
        raise UserError("--config is missing, as in --config=curate:in=FILES,out=DIR")
    how = dict(executor=FLAGS.executor, workers=FLAGS.workers)
    if curation.curate(FLAGS.config, **how) is not None:
        path = Path(FLAGS.config.out) / "report.html"
        print(path if path.exists() else page.write(path.parent))


@takes(
    Flag("what", "", "what to time, as in sft,dpo; everything by default"),
    Flag("steps", 8, "timed steps of each"),
    Flag("dtype", "float32", "dtype of the computation; or bfloat16"),
)
def bench_(rest):
    """Time the stages on this machine; each result is one line of JSON.

    stagecraft bench --what=pretrain,sft,dpo,grpo,ppo,sample --steps=8

    Real steps of a small Llama (5.5M parameters) on synthetic batches of fixed shapes.
    Compare times only with others of the same command, on an idle machine.
    """
    from stagecraft import bench

    what = schema.listed(FLAGS.what) or bench.NAMES
    bench.bench(what, steps=FLAGS.steps, dtype=FLAGS.dtype)


@takes(WORKDIR, Flag("name", "base", "name of the stage"), words=True)
def import_(rest):
    """Import a Hugging Face folder as a work directory with one finished stage.

    stagecraft import models/Qwen3-0.6B --workdir=runs/qwen
    stagecraft import models/reward --workdir=runs/reward --name=reward

    prompt, chat and export work on it, and other experiments may start from it with
    start_from="runs/qwen/base". (start_from="hf:FOLDER" reads a folder directly.)
    """
    from stagecraft import exchange

    if len(rest) != 1:
        raise UserError(
            "give one folder, as in: stagecraft import models/Qwen3-0.6B "
            "--workdir=runs/qwen"
        )
    print(exchange.import_folder(rest[0], _workdir(), FLAGS.name))


@takes(
    WORKDIR,
    Flag("stage", "", "the stage whose model to write"),
    Flag("to", "", "the folder to write"),
    Flag("dtype", "float32", "dtype of the weights; or bfloat16, float16"),
    Flag("shard_size", "5GB", "largest size of a file: 500MB, 5GB"),
    Flag("overwrite", False, "replace an existing folder"),
    Flag("adapter", False, "write the LoRA adapter, as PEFT does"),
    Flag("base", "", "the base model of --adapter, a folder"),
)
def export(rest):
    """Write a stage's model as a Hugging Face folder.

    stagecraft export --workdir=runs/a --stage=dpo --to=models/mine --dtype=bfloat16

    The folder holds the weights, config.json, generation_config.json, and the tokenizer
    with its chat template, as transformers and PEFT open them. It appears whole or not
    at all. A reward model is written as a ...ForSequenceClassification with one label.

    An adapter (LoRA) is merged into its base; with --adapter it is written as a PEFT
    folder, for the Hugging Face folder it was trained on or for --base=FOLDER.
    """
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


def _values(flags_):
    return {flag.name: FLAGS[flag.name].value for flag in flags_}


def _config():
    if FLAGS.config is None:
        raise UserError("--config is missing, as in --config=quickstart")
    return FLAGS.config


def _workdir():
    if not FLAGS.workdir:
        raise UserError("--workdir is missing, as in --workdir=runs/a")
    return Path(FLAGS.workdir)


def _bytes(flag, text):
    """Returns the bytes of a size: 5000000 of "5MB"."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.isdecimal() or not int(number):
        raise UserError(f"--{flag}={text}: expected a size such as 500MB or 5GB")
    return int(number) * units[unit]


COMMANDS = {
    "run": run_,
    "data": data,
    "graph": graph,
    "status": status,
    "list": list_,
    "new": new,
    "prompt": prompt,
    "chat": chat,
    "report": report_,
    "compare": compare_,
    "eval": eval_,
    "curate": curate,
    "bench": bench_,
    "import": import_,
    "export": export,
}
