r"""Supervised fine-tuning (SFT) of a Hugging Face model on demonstrations.

    stagecraft run --config=recipes/sft_from_hf:model=FOLDER,data=chats.jsonl,lora=16 \
        --workdir=runs/sft
    stagecraft export --workdir=runs/sft --stage=sft --to=models/sft

data holds {"messages"} or {"prompt","completion"}; the assistant's turns are learned,
their ends included, and several conversations share a row. lora=16 trains adapters of
that rank, lora=0 all weights. model may also be a finished stage, as in
model=runs/mine/pretrain. Go on with recipes/dpo_from_hf:model=runs/sft/sft. No result
has been measured with it yet.
"""

from experiments import common
from stagecraft import defaults


def get_config(arg=""):
    arg = common.parse_arg(
        arg,
        **common.RECIPE,
        length=1024,
        steps=200,
        batch=16,
        micro_batches=1,
        heldout=0.02,
    )
    c, start = common.begin(arg)
    c.stages.sft = defaults.stage(
        "language_model",
        start_from=start,
        data=dict(
            format="demonstrations",
            files=common.files(arg, "data", "world:demonstrations.jsonl"),
            length=arg.length,
            heldout_share=arg.heldout,
        ),
        batch_size=arg.batch,
        micro_batches=arg.micro_batches,
        **common.tuned(arg, "sft", arg.steps),
    )
    return common.tiny(c) if arg.tiny else c
