r"""Pretraining a small model from scratch on your own text.

    stagecraft run --config=recipes/pretrain_own_text:data=book.txt --workdir=runs/mine
    stagecraft prompt --workdir=runs/mine "Once upon a time"

data is .txt, .jsonl with {"text"}, .parquet, a folder or a glob; several are separated
by commas. A tokenizer of `vocab` pieces is trained on it, or tokenizer=FILE is used.
size is small, medium or large (1M to 20M parameters without embeddings); a share of the
documents (heldout=0.02) is kept for eval_loss. Go on with recipes/sft_from_hf:
model=runs/mine/pretrain. No result has been measured with it yet.
"""

from experiments import common, your_text
from stagecraft import defaults
from stagecraft.errors import UserError


def get_config(arg=""):
    arg = common.parse_arg(
        arg,
        tiny=False,
        data="",
        tokenizer="",
        size="small",
        vocab=4096,
        length=256,
        steps=1000,
        batch=32,
        lr=2e-3,
        heldout=0.02,
    )
    c = defaults.experiment()
    if arg.size not in your_text.SIZES:
        raise UserError(common.unknown("size", arg.size, your_text.SIZES))
    if arg.tiny and not arg.data:
        c.world.name, c.world.size = "countries", "tiny"
        arg.data, arg.vocab, arg.length = "world:text.jsonl", 512, 64
    if not arg.data:
        raise UserError("data=FILES is missing, as in data=book.txt or data=texts/")
    c.tokenizer.path = arg.tokenizer
    c.tokenizer.files = "" if arg.tokenizer else arg.data
    c.tokenizer.vocab_size = arg.vocab
    c.model.update(common.tiny_model() if arg.tiny else your_text.SIZES[arg.size])
    c.model.max_length = arg.length
    c.stages.pretrain = defaults.stage(
        "language_model",
        data=dict(files=arg.data, length=arg.length, heldout_share=arg.heldout),
        steps=arg.steps,
        batch_size=arg.batch,
        optimizer=common.gentle(arg.lr, arg.steps),
        every=dict(sample=max(arg.steps // 4, 1)),
    )
    return common.tiny(c) if arg.tiny else c
