"""Commands that show runs."""

from stagecraft import schema, stores
from stagecraft.commands.flag import (
    FLAGS,
    WORKDIR,
    Flag,
    takes,
    workdir_given,
)
from stagecraft.errors import UserError


@takes(WORKDIR)
def report_(rest):
    """Write the page WORKDIR/report.html: curves, figures, weights, cost.

    stagecraft report --workdir=runs/a
    """
    from stagecraft.report import page

    root = workdir_given()
    if not (root / "config.json").exists():
        raise UserError(f"{root}: no run here (no config.json)")
    print(stores.named(page.write(root)))


@takes(
    Flag("stages", "", "stages to compare, as in dpo,ppo"),
    Flag("baseline", "", "the arm to compare the others with"),
    Flag("figures", "", "figures of the table, as in gold_mean,kl"),
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
    printed, and written as a page and as JSON. Its figures are those of --figures, or
    of measure.table where all runs have the same.
    """
    from stagecraft.report import compare, compare_page, markdown, terminal

    comparison = compare.compare(
        rest,
        stages=schema.listed(FLAGS.stages),
        baseline=FLAGS.baseline,
        names=schema.listed(FLAGS.figures),
    )
    if FLAGS.markdown:
        print(markdown.table(comparison))
        return
    path = compare_page.write(comparison, FLAGS.out)
    terminal.show_comparison(comparison)
    print(path)
