r"""Direct preference optimisation (DPO) of a Hugging Face model on pairs of answers.

    stagecraft run --config=recipes/dpo_from_hf:model=FOLDER,data=pairs.jsonl,lora=16 \
        --workdir=runs/dpo
    stagecraft export --workdir=runs/dpo --stage=dpo --to=models/dpo

data holds {"prompt","chosen","rejected"}, texts or messages. model is usually one that
recipes/sft_from_hf has trained on answers of the same kind (model=runs/sft/sft), which
is also the frozen reference. objective=ipo, simpo, orpo, ... is any pair loss of
docs/objectives.md.

Measured with the SmolLM2-135M-Instruct of recipes/sft_from_hf after its 30 steps, on
731 pairs of a right and a wrong solution of one GSM8K question, on two CPU cores, one
seed: 10 steps of 2 pairs (length=320,batch=2,steps=10,heldout=0.01), held-out loss
0.6929 after 1 step and 0.6881 after 10, margins 0.0005 and 0.0103 (7 prompts: the
direction shows, no effect does); 2 pairs of 384 tokens take 5.1 GiB at most. The same
stage on the embedded world is in docs/results.md.
"""

from experiments import common
from stagecraft import defaults


def get_config(arg=""):
    arg = common.parse_arg(
        arg,
        **common.RECIPE,
        objective="dpo",
        length=1024,
        steps=100,
        batch=16,
        micro_batches=1,
        heldout=0.02,
    )
    c, start = common.begin(arg)
    pairs = common.files(arg, "data", "") or common.world_pairs(c, start)
    c.stages.dpo = defaults.stage(
        "preference",
        start_from=start,
        objective=arg.objective,
        data=dict(files=pairs, length=arg.length, heldout_share=arg.heldout),
        batch_size=arg.batch,
        micro_batches=arg.micro_batches,
        **common.tuned(arg, "dpo", arg.steps),
    )
    return common.tiny(c) if arg.tiny else c
