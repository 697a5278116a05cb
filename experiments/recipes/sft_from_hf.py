r"""Supervised fine-tuning (SFT) of a Hugging Face model on demonstrations.

    stagecraft run --config=recipes/sft_from_hf:model=FOLDER,data=chats.jsonl,lora=16 \
        --workdir=runs/sft
    stagecraft export --workdir=runs/sft --stage=sft --to=models/sft

data holds {"messages"} or {"prompt","completion"}; the assistant's turns are learned,
their ends included, and several conversations share a row. lora=16 trains adapters of
that rank, lora=0 all weights. model may also be a finished stage, as in
model=runs/mine/pretrain. Go on with recipes/dpo_from_hf:model=runs/sft/sft.

Measured with SmolLM2-135M-Instruct (weights from 4-bit blocks, float32) on GSM8K's
7,473 demonstrations, on two CPU cores (busy ones), one seed. All weights, 30 steps of
4 x 384 tokens (length=384,batch=4,steps=30,heldout=0.004): held-out loss 1.317 after 3
steps and 1.018 after 30, token accuracy 0.679 and 0.733 (29 prompts), 4.4 GiB at most.
Adapters, 20 steps of 2 x 320 tokens
(lora=16,length=320,batch=2,steps=20,heldout=0.001): 1.123 after 2 steps and 0.986 after
20 (6 prompts), 3.3 GiB. The two hold out different prompts: they do not compare.
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
