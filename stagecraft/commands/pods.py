"""Commands for machines that are not here: what a run would need, and its manifest."""

from stagecraft import schema
from stagecraft.commands.flag import (
    CONFIG,
    FLAGS,
    GIVEN,
    Flag,
    config_given,
    takes,
)
from stagecraft.errors import UserError


def topology_given():
    """Returns the topology of --topology; refuses to go on without one."""
    from stagecraft import chips

    if not FLAGS.topology:
        raise UserError("--topology is missing, as in --topology=v5e:16x16 or h200:8")
    return chips.parse(FLAGS.topology)


@takes(
    Flag("config", None, "an experiment: a file or a name, [:ARG]", CONFIG),
    Flag("topology", "", "chips: v5e:16x16, 2xv5e:16x16, v5p:8x8x8, h200:8, ..."),
    Flag("stage", "", "stages to plan, as in sft,ppo; all by default"),
    Flag("program", "", "programs to compile, as in update; all by default"),
    Flag("price", 0.0, "dollars a chip-hour, for the cost of the whole graph"),
    Flag("suggest", False, "search mesh, micro-batches and remat of the first stage"),
    Flag("compiles", 3, "programs that --suggest compiles at most", least=0),
    Flag("chip_mtbf_hours", 50_000.0, "hours of a chip between failures of the job"),
    Flag("restart_minutes", 10.0, "from a failure to the first step after it"),
    Flag("to", "", "folder for plan.json and plan.html"),
)
def plan(rest):
    """Plan a run for chips that are not here: memory, FLOPs, bounds, time, cost.

    stagecraft plan --config=recipes/pods/llama31_8b --topology=v5e:16x16 --to=plans/8b
    stagecraft plan --config=FILE --topology=2xv5e:16x16 --stage=sft,ppo --price=1.2
    stagecraft plan --config=FILE --topology=h200:8 --stage=sft --suggest

    Every program of every stage is compiled ahead of time for a TPU topology, from
    shapes alone (extra `plan`); for GPUs the figures are from formulas, and say so. No
    data is read, no chip is used. docs/plan.md says what each figure means and assumes.
    """
    import logging

    import jax

    from stagecraft.pods import page, plan, show, suggest

    topology = topology_given()
    # A plan is for other chips: those that may be here are left alone.
    jax.config.update("jax_platforms", "cpu")
    # What kernels it would log are those of this machine.
    logging.getLogger("stagecraft").setLevel(logging.ERROR)
    config, only = config_given(), schema.listed(FLAGS.stage)
    schema.positive("--price", FLAGS.price, zero=True)
    schema.positive("--chip_mtbf_hours", FLAGS.chip_mtbf_hours)
    schema.positive("--restart_minutes", FLAGS.restart_minutes, zero=True)
    failing = {
        "chip_hours": FLAGS.chip_mtbf_hours,
        "restart": 60 * FLAGS.restart_minutes,
    }
    if FLAGS.suggest:
        suggest.show(config, topology, only, FLAGS.compiles)
        return
    show.heading(config, topology)
    stages = []
    programs = schema.listed(FLAGS.program)
    for stage in plan.plan(config, topology, only, programs, **failing):
        show.stage(stage, topology)
        stages.append(stage)
    show.total(plan.total(stages, topology, FLAGS.price), topology)
    if FLAGS.to:
        print(page.write(FLAGS.to, plan.as_json(stages, topology, FLAGS.price)))
    unfit = [stage.name for stage in stages if not stage.fits]
    if unfit:
        raise UserError(
            f"--topology={topology.name}: {', '.join(unfit)} would not fit; see above"
        )


@takes(
    Flag("config", None, "an experiment: a file or a name, [:ARG]", CONFIG),
    Flag("on", "", "gke, xpk, slurm, ray, skypilot or ssh"),
    Flag("topology", "", "chips: v5e:16x16, 2xv5e:16x16, h200:8, ..."),
    Flag("workdir", "", "the folder of the run, which all hosts reach"),
    Flag("only", "", "stages to run, as in sft,dpo; all by default"),
    Flag("name", "", "of the job; by default the experiment's"),
    Flag("image", "", "a container image with the package"),
    Flag("env", "", "NAMES passed on and NAME=VALUE set, separated by commas"),
    Flag("restarts", 3, "after failures", least=0),
    Flag("spot", False, "on capacity that may be taken away"),
    Flag("grace", 120, "seconds to save when asked to end", least=1),
    Flag("volume", "", "gke: CLAIM:/PATH, storage that all hosts share"),
    Flag("hosts", "", "ssh: the machines, the first one coordinates"),
    Flag("partition", "", "slurm: the partition"),
    Flag("cluster", "", "xpk: the cluster"),
    Flag("port", 8476, "of the coordinator", least=1),
    Flag("to", "", "the file to write; by default NAME.TOOL.ENDING"),
    Flag("submit", False, "hand the file to the tool's own command"),
)
def launch(rest):
    """Write the manifest that runs an experiment on a cluster, and submit it.

    stagecraft launch --config=recipes/pods/llama31_8b --on=gke --topology=v5e:16x16 \\
        --image=REGISTRY/stagecraft:tpu --workdir=gs://BUCKET/8b --env=HF_TOKEN
    stagecraft launch --config=FILE --on=slurm --topology=h200:16 --workdir=/shared/a
    stagecraft launch --config=FILE --on=ssh --hosts=a,b --topology=h200:16 \\
        --workdir=/shared/a --submit

    The config is checked against the topology first. --config and its overrides go into
    the command as they were given; a file must be in the image, or on the machines, at
    the same path. Values that look like secrets are refused: pass their names.
    docs/launch.md says what each tool gets.
    """
    from stagecraft import experiment
    from stagecraft.pods import job
    from stagecraft.pods import launch as launching

    topology, config = topology_given(), config_given()
    experiment.resolve(config, devices=topology.devices)
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: a folder that all hosts reach")
    words = ["stagecraft", "run", *_config_words(), f"--workdir={FLAGS.workdir}"]
    words += [f"--only={FLAGS.only}"] if FLAGS.only else []
    given, passed = job.environment(FLAGS.env)
    described = job.Job(
        name=FLAGS.name or _job_name(words[2]),
        command=tuple(words),
        topology=topology,
        image=FLAGS.image,
        environment=given,
        passed=passed,
        restarts=FLAGS.restarts,
        spot=FLAGS.spot,
        grace=FLAGS.grace,
        volume=FLAGS.volume,
        port=FLAGS.port,
        hosts=tuple(schema.listed(FLAGS.hosts)),
        partition=FLAGS.partition,
        cluster=FLAGS.cluster,
    )
    path = launching.write(described, FLAGS.on, FLAGS.to)
    print(path)
    if FLAGS.submit:
        launching.submit(described, FLAGS.on, path)


def _config_words():
    """Returns --config and its overrides as they were given."""
    words, arguments = [], iter(GIVEN)
    for word in arguments:
        if word == "--config":
            words.append(f"--config={next(arguments, '')}")
        elif word.startswith(("--config=", "--config.")):
            words.append(word)
    return sorted(words, key=lambda word: not word.startswith("--config="))


def _job_name(word):
    """Returns a job's name from --config=FILE:ARG."""
    experiment = word.partition("=")[2].partition(":")[0]
    stem = experiment.rpartition("/")[2].removesuffix(".py").lower()
    return "".join(c if c.isalnum() else "-" for c in stem)[:40].strip("-")
