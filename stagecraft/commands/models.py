"""Commands that take the models of a run."""

from stagecraft import schema, stores
from stagecraft.commands.flag import (
    ASKING,
    FLAGS,
    PROCESSES,
    SAMPLING,
    WORKDIR,
    Flag,
    size_in_bytes,
    takes,
    values_of,
    workdir_given,
)
from stagecraft.errors import UserError


@takes(
    WORKDIR,
    *SAMPLING,
    Flag("samples", 1, "answers of each stage"),
    *PROCESSES,
    words=True,
)
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
    run = open_run(workdir_given())
    answers = behaviour.through_stages(
        run, rest[0], samples=FLAGS.samples, **values_of(SAMPLING)
    )
    terminal.show_answers(rest[0], answers)


@takes(WORKDIR, *SAMPLING, Flag("stage", "", "by default the longest chain's end"))
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

    conversation.chat(open_run(workdir_given()), FLAGS.stage, **values_of(SAMPLING))


@takes(
    WORKDIR,
    Flag("stage", "", "a stage; or hf:FOLDER, gguf:FILE, or a stage's folder"),
    Flag("port", 8000, "port to listen on; 0 for any that is free", least=0),
    Flag("host", "127.0.0.1", "address to listen on; by default this machine alone"),
    Flag("key", "", "the environment variable with the key that requests must bring"),
    Flag("rows", 16, "texts that are decoded at once", least=1),
    Flag(
        "context", 0, "tokens of a prompt and its answer; 0 for all it holds", least=0
    ),
)
def serve(rest):
    """Serve a model behind OpenAI's protocol.

    stagecraft serve --workdir=runs/a --stage=dpo
    stagecraft serve --stage=hf:models/SmolLM2 --port=0
    SECRET=... stagecraft serve --workdir=runs/a --stage=dpo --host=0.0.0.0 --key=SECRET

    The address is printed once the model is read. Below it are /v1/completions,
    /v1/chat/completions and /v1/models, which clients of OpenAI's protocol ask. What
    arrives together is decoded together. Ctrl-C ends.
    """
    from stagecraft.serve import model_app

    if not (FLAGS.workdir or FLAGS.stage):
        raise UserError("--workdir is missing, as in --workdir=runs/a --stage=dpo")
    model_app.serve(
        workdir_given() if FLAGS.workdir else None,
        FLAGS.stage,
        host=FLAGS.host,
        port=FLAGS.port,
        key=FLAGS.key,
        rows=FLAGS.rows,
        context=FLAGS.context,
    )


@takes(
    WORKDIR,
    Flag("stage", "", "the stage whose answers are compared"),
    Flag("prompts", "", "files of prompts; by default those of the run's world"),
    Flag("pairs", "", "files of pairs to show, in place of sampled ones"),
    Flag("count", 200, "prompts to answer", least=1),
    Flag("answers", 2, "answers to each, up to 9; more than two are ranked", least=2),
    Flag("repeats", 0.1, "share of the pairs that is shown twice, sides swapped"),
    Flag("temperature", 1.0, "of the sampled answers"),
    Flag("max_new_tokens", 48, "longest answer, in tokens"),
    Flag("seed", 0, "of prompts, answers and what each person is shown"),
    Flag("port", 0, "port of the page; 0 for any that is free", least=0),
    Flag("host", "127.0.0.1", "address to listen on; by default this machine alone"),
)
def label(rest):
    """Serve a page on which people pick the better of two answers, or rank several.

    stagecraft label --workdir=runs/a --stage=sft
    stagecraft label --workdir=runs/a --stage=sft --prompts=mine.jsonl --count=50
    stagecraft label --workdir=runs/a --stage=sft --answers=4
    stagecraft label --workdir=runs/a --stage=mine --pairs=pairs.jsonl

    Open the address that is printed. Several people label under names of their own, in
    as many tabs as they like; each verdict is on disk before the next pair shows. End
    with ctrl-C: WORKDIR/labels/STAGE/records.jsonl then holds the pairs, unpaired.jsonl
    the answers of pairs that were both bad, report.json how raters agree. The same
    command goes on. A stage reads them with data.files="labels:STAGE".
    """
    from stagecraft.serve import items, label_app

    if not FLAGS.stage:
        raise UserError("--stage is missing, as in --stage=sft")
    if not 0 <= FLAGS.repeats <= 1:
        raise UserError(f"--repeats={FLAGS.repeats}: expected a share from 0 to 1")
    if FLAGS.answers > items.MOST:
        raise UserError(f"--answers={FLAGS.answers}: expected 2 to {items.MOST}")
    label_app.label(
        workdir_given(),
        FLAGS.stage,
        prompts=FLAGS.prompts,
        pairs=FLAGS.pairs,
        count=FLAGS.count,
        answers=FLAGS.answers,
        repeats=FLAGS.repeats,
        seed=FLAGS.seed,
        sampling={k: FLAGS[k].value for k in ("temperature", "max_new_tokens")},
        host=FLAGS.host,
        port=FLAGS.port,
    )


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
    run = open_run(workdir_given())
    stages, tasks = schema.listed(FLAGS.stage), schema.listed(FLAGS.tasks)
    records = evaluate.evaluate(run, stages, tasks, **values_of(ASKING))
    terminal.show_tasks(records, run.stages)


@takes(
    Flag(
        "judge", "", "a judge to ask: hf:FOLDER, gguf:FILE, or a stage, as runs/a/sft"
    ),
    Flag("url", "", "or the address of an OpenAI-compatible endpoint"),
    Flag("model", "", "its name of the model"),
    Flag("api", "chat", "of the endpoint: chat, or completions"),
    Flag("key", "", "the environment variable with its key"),
    Flag("template", "", "pairwise, or a TOML file"),
    Flag("combine", "logit", "what is averaged over both orders, or probability"),
    Flag("clamp", 0.0, "how near probabilities may come to 0 and 1"),
    Flag("rationale_tokens", 0, "to reason in before the label", least=0),
    Flag("min_mass", 0.01, "probability of all labels that counts as an answer"),
    Flag("max_failed", 0.2, "share without an answer that ends the run"),
    Flag("batch_size", 16, "questions at once", least=1),
    Flag(
        "persuasion", 0, "pairs asked about again, the worse answer pleading", least=0
    ),
    Flag("world", "", "an embedded world whose gold score verdicts are held against"),
    Flag("out", "", "with --judge or --url: the file of verdicts to write"),
    words=True,
)
def judge(rest):
    """Ask a judge about compared pairs, and measure what it goes by.

    stagecraft judge runs/a/comparisons/records.jsonl --world=countries
    stagecraft judge pairs.jsonl --judge=hf:models/SmolLM2 --out=judged.jsonl
    stagecraft judge pairs.jsonl --url=http://127.0.0.1:8000/v1 --out=judged.jsonl

    The first form measures the verdicts that a file holds, a judge's or a person's:
    position, length, style, its own answers, and, where there is gold, accuracy and
    calibration. The others first ask a judge about pairs whose better answers are
    known ("chosen"), in both orders. A run that was killed asks nothing twice.
    """
    from stagecraft import defaults, judging
    from stagecraft.anatomy import bias, verdicts
    from stagecraft.report import terminal

    if len(rest) != 1:
        raise UserError("give one file, as in: stagecraft judge pairs.jsonl")
    path, name = rest[0], FLAGS.judge
    if name and FLAGS.url:
        raise UserError("--judge and --url: one judge or the other")
    if bool(FLAGS.out) != bool(name or FLAGS.url):
        raise UserError(
            "--out goes with a judge to ask (--judge, --url), and only then"
        )
    if FLAGS.out:
        settings = defaults.judge()
        settings.update({k: FLAGS[k].value for k in settings if k in FLAGS})
        counts = judging.ask(path, FLAGS.out, name, settings, FLAGS.persuasion)
        path = FLAGS.out
        print(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    terminal.show_bias(bias.measure(verdicts.read(path, FLAGS.world)))


@takes(
    WORKDIR,
    Flag("stage", "", "with --prompts: the stage to ask"),
    Flag("prompts", "", "files of prompts to ask it"),
    Flag("fields", "", "how they call a prompt, as in prompt=goal"),
    Flag("by", "", "a key of theirs whose values are reported apart, as in type"),
    Flag("phrases", "", "a file of opening phrases, in place of the rules"),
    Flag("max_new_tokens", 128, "longest answer, in tokens", least=1),
    Flag("out", "", "with --prompts: a file for the answers"),
    words=True,
)
def refusals(rest):
    """Measure how wrong a detector of refusals is, then what a stage refuses.

    stagecraft refusals labelled.csv --by=type
    stagecraft refusals labelled.csv --workdir=runs/a --stage=dpo --prompts=xstest.csv
    stagecraft refusals labelled.csv --phrases=openings.txt

    labelled.csv holds answers of any model that people have labelled, such as XSTest's
    (`completion`, `final_label`): refused in full, in part, or not. The detector's
    confusion table and errors on them are always printed first, with Wilson's 95%
    intervals. Prompts are asked greedily. A stage of an embedded world needs none of
    this: its own rules are exact, and in its figures.
    """
    from stagecraft import refusals as asking
    from stagecraft.report import terminal

    if len(rest) != 1:
        raise UserError(
            "give one file of labelled answers, on which the detector is measured "
            "first, as in: stagecraft refusals labelled.csv"
        )
    if bool(FLAGS.stage) != bool(FLAGS.prompts):
        raise UserError("--stage and --prompts go together")
    detect = asking.detector(FLAGS.phrases)
    by = "" if FLAGS.stage else FLAGS.by
    terminal.show_refusal_error(asking.error(rest[0], detect, by))
    if FLAGS.stage:
        how = {k: FLAGS[k].value for k in ("fields", "by", "max_new_tokens", "out")}
        rates = asking.ask(workdir_given(), FLAGS.stage, FLAGS.prompts, detect, **how)
        terminal.show_refusals(FLAGS.stage, rates)


@takes(WORKDIR, Flag("name", "base", "name of the stage"), words=True)
def import_(rest):
    """Import a Hugging Face folder as a work directory with one finished stage.

    stagecraft import models/Qwen3-0.6B --workdir=runs/qwen
    stagecraft import models/reward --workdir=runs/reward --name=reward
    stagecraft import gguf:models/SmolLM2.gguf --workdir=runs/smol

    prompt, chat and export work on it, and other experiments may start from it with
    start_from="runs/qwen/base". (start_from="hf:FOLDER" reads a folder directly.)
    """
    from stagecraft import exchange

    if len(rest) != 1:
        raise UserError(
            "give one folder, as in: stagecraft import models/Qwen3-0.6B "
            "--workdir=runs/qwen"
        )
    print(stores.named(exchange.import_folder(rest[0], workdir_given(), FLAGS.name)))


@takes(
    WORKDIR,
    Flag("stage", "", "the stage whose model to write"),
    Flag("to", "", "the folder to write"),
    Flag("dtype", "float32", "dtype of the weights; or bfloat16, float16"),
    Flag("shard_size", "5GB", "largest size of a file: 500MB, 5GB"),
    Flag("overwrite", False, "replace an existing folder"),
    Flag("adapter", False, "write the LoRA adapter, as PEFT does"),
    Flag("base", "", "the base model of --adapter, a folder"),
    *PROCESSES,
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
        workdir_given(),
        FLAGS.stage,
        FLAGS.to,
        dtype=FLAGS.dtype,
        shard_size=size_in_bytes("shard_size", FLAGS.shard_size),
        overwrite=FLAGS.overwrite,
        adapter=FLAGS.adapter,
        base=FLAGS.base,
    )
    print("\n".join(lines))
