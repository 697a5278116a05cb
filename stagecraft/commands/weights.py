"""Commands that look into weights."""

from stagecraft import schema, stores
from stagecraft.commands.flag import FLAGS, WORKDIR, Flag, takes
from stagecraft.errors import UserError


@takes(
    WORKDIR,
    Flag("before", "", "in place of a run: hf:FOLDER, or WORKDIR/STAGE"),
    Flag("after", "", "and what it became"),
    Flag("stages", "", "stages to look at; by default all that are finished"),
    Flag("null", "", "stages or folders that began where the stage did, as controls"),
    Flag("spectra", "all", "all, top (the first directions) or none"),
    Flag("draws", 2, "isotropic changes that each matrix is held against", least=0),
    Flag("seed", 0, "of their noise"),
    Flag(
        "prompts",
        "",
        "files of prompts: also asks which weights did it, and to which tokens",
    ),
    Flag("to", "", "folder to write into; by default WORKDIR/anatomy"),
)
def anatomy(rest):
    """Measure what changed in the weights, each figure beside that of noise.

    stagecraft anatomy --workdir=runs/a
    stagecraft anatomy --workdir=runs/a --stages=dpo --null=dpo_shuffled
    stagecraft anatomy --workdir=runs/a --prompts=runs/a/world/prompts.jsonl
    stagecraft anatomy --before=hf:base --after=hf:tuned --to=anatomy

    Every stage is compared with its parent and with pretraining, matrix by matrix, and
    all stages with one another. Written are anatomy.json and the page anatomy.html. It
    needs no training code and at most two matrices of memory; a second call goes on.
    With --prompts both models are read whole, and weights of one are grafted into the
    other to see which of them change the answers, and which tokens (causes.json).
    """
    from stagecraft.anatomy import causes, changes
    from stagecraft.report import anatomy_page, terminal

    if bool(FLAGS.before) != bool(FLAGS.after):
        raise UserError("--before and --after go together: two versions of one model")
    if bool(FLAGS.workdir) == bool(FLAGS.before):
        raise UserError("give --workdir=RUN, or --before=A --after=B")
    settings = {"depth": FLAGS.spectra, "draws": FLAGS.draws, "seed": FLAGS.seed}
    settings["nulls"] = schema.listed(FLAGS.null)
    asked = None
    if FLAGS.workdir:
        stages = schema.listed(FLAGS.stages)
        tables = changes.of_run(FLAGS.workdir, stages=stages, to=FLAGS.to, **settings)
        if FLAGS.prompts:
            own = {"stages": stages, "to": FLAGS.to}
            asked = causes.of_run(FLAGS.workdir, FLAGS.prompts, **own)
    else:
        if not FLAGS.to:
            raise UserError("--to is missing: the folder to write into")
        if FLAGS.stages:
            raise UserError("--stages is of a run: leave it away with --before")
        pair = (FLAGS.before, FLAGS.after)
        tables = changes.of_pair(*pair, to=FLAGS.to, **settings)
        if FLAGS.prompts:
            asked = causes.of_pair(*pair, FLAGS.prompts, to=FLAGS.to)
    terminal.show_anatomy(tables)
    print(stores.named(anatomy_page.write(tables, asked)))
