r"""KTO of a Hugging Face model on single answers, each judged good or bad.

    stagecraft run --config=recipes/kto_from_hf:model=FOLDER,data=judged.jsonl,lora=16 \
        --workdir=runs/kto

data holds {"prompt","completion","label": true or false}, or pairs, whose two answers
are then judged. objective=bco or apo_zero_unpaired are its kin. No result has been
measured with it yet.
"""

from experiments import common
from stagecraft import defaults


def get_config(arg=""):
    arg = common.parse_arg(
        arg,
        **common.RECIPE,
        objective="kto",
        length=1024,
        steps=100,
        batch=32,
        micro_batches=1,
        heldout=0.02,
    )
    c, start = common.begin(arg)
    judged = common.files(arg, "data", "") or common.world_pairs(c, start)
    c.stages.kto = defaults.stage(
        "unpaired_preference",
        start_from=start,
        objective=arg.objective,
        data=dict(files=judged, length=arg.length, heldout_share=arg.heldout),
        batch_size=arg.batch,
        micro_batches=arg.micro_batches,
        **common.tuned(arg, "dpo", arg.steps),
    )
    return common.tiny(c) if arg.tiny else c
