r"""What SFT shows a model it can repeat, and rarely knows.

Among the demonstrations are facts of countries that no text names, each shown 1, 3, 10
or 30 times. The primary asks for them in bare text, in words that no answer had, and
holds that against held-out real countries, which pretraining read of and no
demonstration shows: by how much less likely an invented fact is, of those shown most
often. The claim is asked only where the questions themselves are answered. The control
reads the same rows as bare text, on the same schedule: if they are no more known then,
it is not SFT that fails to teach but so few steps.

[claim]
number = 2
claim = "Supervised fine-tuning teaches the shape of answers, and rarely knowledge"
source = "Gekhman et al. 2024, arxiv.org/abs/2405.05904, and many an account of SFT"
primary = "knows.real - knows.invented"
effect = 0.5
control = "the same rows read as bare text are known no better"
control_primary = "knows.real - knows.read"
checks = ["knows.answered > 0.5", "knows.real > 0.5"]
seconds = 90
"""

from experiments import common, objectives, quickstart
from stagecraft import defaults, worlds
from stagecraft.anatomy import sampled
from stagecraft.worlds.countries import taught


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, base="runs/quickstart")
    recipe = quickstart.get_config("tiny" if arg.tiny else "").stages
    c = defaults.experiment()
    c.world.name, c.world.taught = "countries", True
    places = objectives.finished(c, arg.base)
    c.stages.taught = common.like(recipe.sft, start_from=places["pretrain"])
    c.stages.taught.data.files = "world:demonstrations_invented.jsonl"
    text = dict(format="text", files="world:text_invented.jsonl", packing="none")
    c.stages.read = defaults.stage(
        "language_model",
        start_from=places["pretrain"],
        data=dict(recipe.sft.data) | text,
        steps=recipe.sft.steps,
        batch_size=recipe.sft.batch_size,
        optimizer=dict(recipe.sft.optimizer),
    )
    c.stages.read.data.heldout = ""
    return common.tiny(c) if arg.tiny else c


def measure(base, own):
    """What is known of invented countries, by exposure, and of real ones."""
    config = base.config
    real = worlds.split(config).test
    groups = dict(taught.groups(taught.invented(config.seed, config.world.size)))
    most = groups[taught.EXPOSURES[-1]]
    tuned, read = (own.language(name, sampled.ROWS) for name in ("taught", "read"))
    before = base.language("sft", sampled.ROWS)
    knows = {
        "real": taught.stated_elsewhere(tuned, real),
        "real_by_usual_sft": taught.stated_elsewhere(before, real),
        "invented": taught.stated_elsewhere(tuned, most),
        "read": taught.stated_elsewhere(read, most),
        "answered": taught.answered(tuned, most, taught.SHOWN[0]),
    }
    by_exposure = {
        f"shown_{exposures}": {
            "known": taught.stated_elsewhere(tuned, group),
            "answered": taught.answered(tuned, group, taught.SHOWN[0]),
        }
        for exposures, group in groups.items()
    }
    return {"knows": knows} | by_exposure
