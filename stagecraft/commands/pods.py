"""Commands for machines that are not here: what a run would need, and its manifest."""

from stagecraft import schema
from stagecraft.commands.flag import CONFIG, FLAGS, Flag, config_given, takes
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
    if FLAGS.suggest:
        suggest.show(config, topology, only, FLAGS.compiles)
        return
    show.heading(config, topology)
    stages = []
    for stage in plan.plan(config, topology, only, schema.listed(FLAGS.program)):
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
