"""Commands that run experiments, and those that look before."""

import os
from pathlib import Path

from stagecraft import schema, stores
from stagecraft.commands.flag import (
    CONFIG,
    FLAGS,
    PROCESSES,
    WORKDIR,
    Flag,
    config_given,
    takes,
    workdir_given,
)
from stagecraft.errors import UserError


@takes(
    Flag("config", None, "an experiment: a file or a name, [:ARG]", CONFIG),
    WORKDIR,
    Flag("only", "", "stages to run, as in sft,dpo; all by default"),
    Flag("dry_run", False, "check everything and estimate what it takes"),
    *PROCESSES,
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

    DIR may be at gs://BUCKET/PATH or s3://BUCKET/PATH, here and in every command that
    takes one (extra `stores`).

    Of a run on several machines each starts this command, with one --workdir that all
    see. On SLURM, Open MPI, Kubernetes and TPU pods they find each other; elsewhere:

    stagecraft run ... --coordinator=HOST:PORT --process=0 --processes=2
    """
    from stagecraft import run
    from stagecraft.preview import plan

    config, only = config_given(), schema.listed(FLAGS.only)
    if FLAGS.dry_run:
        plan.show(config, FLAGS.workdir and workdir_given(), only)
    else:
        run.run(config, workdir_given(), only=only)


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

    root = FLAGS.workdir and workdir_given()
    only = schema.listed(FLAGS.stage)
    preview.show(config_given(), root, only, FLAGS.rows)


@takes(Flag("config", None, "an experiment: a file or a name, [:ARG]", CONFIG))
def graph(rest):
    """Draw the stages of an experiment and what each takes from others.

    stagecraft graph --config=quickstart
    """
    from stagecraft.preview import graph as preview

    preview.show(config_given())


@takes(
    WORKDIR,
    Flag("only", "", "claims to ask, as in over_optimised,dpo_like_ppo, or files"),
    Flag("tier", 1, "1: four seeds; 2: eight", least=1),
    Flag("seeds", 0, "seeds in place of the tier's", least=0),
    Flag("tiny", False, "tiny stages: does everything run?"),
    Flag("markdown", False, "print the table as Markdown"),
)
def claims(rest):
    """Ask claims about what stages do, over several seeds, and give verdicts.

    stagecraft claims --workdir=runs/claims
    stagecraft claims --workdir=runs/claims --only=over_optimised --tier=2

    Every claim is a file that states, before anything is run, its primary figure, the
    smallest effect of interest and the control that could refute it. All share one
    quickstart a seed. The verdict is from the 95% interval over seeds: holds, refuted,
    undecided (with the seeds it would need), or cannot be asked here. Given again, the
    same command goes on where it stopped; a header that has changed since is refused.
    Written are claims.json and the page claims.html.
    """
    from stagecraft import claims_lab
    from stagecraft.report import claims_page, terminal

    if FLAGS.tier not in claims_lab.TIERS:
        raise UserError(f"--tier={FLAGS.tier}: expected 1 or 2")
    seeds = FLAGS.seeds or claims_lab.TIERS[FLAGS.tier]
    root, names = workdir_given(), schema.listed(FLAGS.only)
    asked = claims_lab.ask(root, names, seeds, FLAGS.tiny)
    page = claims_page.write(root, asked, seeds)
    if FLAGS.markdown:
        print(claims_page.markdown(asked))
    else:
        terminal.show_claims(asked)
        print(stores.named(page))


@takes(WORKDIR)
def status(rest):
    """Show how far each stage of a run has come.

    stagecraft status --workdir=runs/a
    """
    from stagecraft import runs
    from stagecraft.report import terminal

    terminal.show_status(runs.read(workdir_given()))


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
    Flag("what", "all", "what to time, as in sft,dpo; all of the preset by default"),
    Flag("preset", "laptop", "model and batches: laptop, 1b or 8b"),
    Flag("length", 0, "tokens of a row, other lengths in proportion", least=0),
    Flag("growth", False, "also at 2 and 4 times the length, the rows and the width"),
    Flag("steps", 8, "timed steps of each"),
    Flag("dtype", "", "of the computation: float32, bfloat16; else the preset's"),
    Flag("peers", "", "an environment with torch and TRL, timed in turn with ours"),
    Flag("page", "", "a Markdown file, whose table between two marks is replaced"),
)
def bench_(rest):
    """Time the stages on this machine; each result is one line of JSON.

    stagecraft bench --what=pretrain,sft,dpo,grpo,ppo,sample --steps=8
    stagecraft bench --what=all --peers=ENV --page=docs/speed.md
    stagecraft bench --preset=1b --length=4096 --page=docs/speed.md

    Real steps on synthetic batches of fixed shapes: of a Llama of 4M parameters, or on
    an accelerator of 1B or 8B, the second with an adapter. There a line also has MFU,
    sampling's share of the memory's rate, and the kernel of attention. Compare times
    only with others of the same command, on an idle machine.

    --peers names a virtual environment with torch, transformers, trl and datasets: each
    step is followed by one of theirs on the same work, in a process of its own. TRL
    1.12 is the last with PPO; where ENV has a newer one, the variable TRL_PPO names a
    folder with 1.12 (pip install --no-deps --target=FOLDER trl==1.12.0).
    """
    from stagecraft.bench import timing

    what = () if FLAGS.what == "all" else schema.listed(FLAGS.what)
    timing.bench(
        what,
        preset=FLAGS.preset,
        length=FLAGS.length,
        growth=FLAGS.growth,
        steps=FLAGS.steps,
        dtype=FLAGS.dtype,
        peers=FLAGS.peers,
        page=FLAGS.page,
    )
