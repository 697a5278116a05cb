r"""Your own files through the same graph of stages.

    stagecraft run --config=your_text:text=FILES,demonstrations=FILES,\
comparisons=FILES,prompts=FILES --workdir=runs/mine

For one stage alone see experiments/recipes/. FILES is a file, a directory or a glob,
here or at gs://, s3:// and the like. It may be .txt, .jsonl or .json (each also .gz or
.zst), .parquet, what `datasets` saved to disk, .array_record with JSON objects, or,
for text, a folder of tokenised shards:

    text            plain text, or {"text"}                     -> pretrain
    demonstrations  {"prompt","completion"} or {"messages"}     -> sft
    comparisons     {"prompt","chosen","rejected"}              -> reward, dpo
    prompts         {"prompt"}                                  -> ppo

Values are texts or messages, ShareGPT's from/value or hh-rlhf's transcripts; the prompt
of a comparison may be left to what chosen and rejected have in common. What a file was
taken for is printed; one of mixed forms is refused. Several texts are gone through in
epochs, or mixed in shares of the tokens: text=web.parquet,books.txt,shares=3+1. Shards
need the tokenizer that wrote them: tokenizer=FILE.

With model=FOLDER, a Hugging Face folder with its tokenizer and chat template, the
stages start from that model; text is then learned on top of it, or left out:

    stagecraft run --config=your_text:model=FOLDER,demonstrations=FILES,\
comparisons=FILES,lora=16,length=1024 --workdir=runs/mine
    stagecraft export --workdir=runs/mine --stage=dpo --to=models/mine

lora=16 trains adapters of that rank instead of the weights. Learning rates depend on
which it is: see RATES in experiments/common.py.

What is not given is left out, with the stages that need it. Keys of other names are
mapped by demonstrations_fields="prompt=question+completion=answer", two keys joined by
demonstrations_fields="prompt=instruction+input+completion=output", and so on. A share
of the demonstrations and comparisons (heldout=0.05) is kept for the eval_ metrics.
"""

from experiments import common
from stagecraft import defaults
from stagecraft.errors import UserError

SIZES = {
    "small": dict(width=128, layers=4, heads=4, kv_heads=4, ff_width=352),
    "medium": dict(width=256, layers=6, heads=8, kv_heads=4, ff_width=688),
    "large": dict(width=512, layers=8, heads=8, kv_heads=4, ff_width=1376),
}


def get_config(arg=""):
    arg = common.parse_arg(
        arg,
        tiny=False,
        text="",
        demonstrations="",
        comparisons="",
        prompts="",
        demonstrations_fields="",
        comparisons_fields="",
        prompts_fields="",
        shares="",
        tokenizer="",
        model="",
        lora=0,
        heldout=0.05,
        size="small",
        vocab=2048,
        length=256,
        answer=64,
        steps=400,
    )
    if not arg.text and not (arg.model and (arg.demonstrations or arg.comparisons)):
        raise UserError(
            "your_text needs text=FILES to pretrain on, or model=FOLDER and "
            "demonstrations or comparisons, as in "
            "--config=your_text:text=corpus.txt,demonstrations=qa.jsonl"
        )
    if arg.size not in SIZES:
        raise UserError(f"size={arg.size}: expected one of {', '.join(SIZES)}")
    try:
        shares = tuple(float(share) for share in arg.shares.split("+") if share)
    except ValueError:
        raise UserError(
            f"shares={arg.shares}: expected a number for each of text's files, as in "
            "shares=3+1"
        ) from None
    c = defaults.experiment()
    c.tokenizer.path = arg.tokenizer or arg.model
    c.tokenizer.files = "" if c.tokenizer.path else arg.text
    c.tokenizer.vocab_size = arg.vocab
    c.model.update(SIZES[arg.size])
    c.model.max_length = arg.length
    if arg.tiny:
        c.model.update(common.tiny_model())
        c.model.max_length = arg.length

    rates = common.RATES["adapter" if arg.lora else "whole" if arg.model else "scratch"]
    shared = dict(lora=dict(rank=arg.lora))
    base = f"hf:{arg.model}" if arg.model else ""
    if arg.text:
        c.stages.pretrain = defaults.stage(
            "language_model",
            start_from=base,
            data=dict(
                files=arg.text,
                length=arg.length,
                heldout_share=arg.heldout,
                shares=shares,
            ),
            steps=arg.steps,
            batch_size=16,
            optimizer=common.gentle(rates["pretrain"], arg.steps),
            every=dict(save=100),
            **shared,
        )
        base = "pretrain"
    if arg.demonstrations:
        c.stages.sft = defaults.stage(
            "language_model",
            start_from=base,
            data=dict(
                format="demonstrations",
                files=arg.demonstrations,
                fields=arg.demonstrations_fields,
                heldout_share=arg.heldout,
                length=arg.length,
            ),
            steps=arg.steps // 2,
            batch_size=16,
            optimizer=common.gentle(rates["sft"], arg.steps // 2),
            every=dict(save=100),
            **shared,
        )
        base = "sft"
    if arg.comparisons:
        pairs = dict(
            files=arg.comparisons,
            fields=arg.comparisons_fields,
            heldout_share=arg.heldout,
            length=arg.length,
        )
        c.stages.reward = defaults.stage(
            "reward",
            start_from=base,
            data=pairs,
            steps=arg.steps // 4,
            batch_size=8,
            optimizer=common.gentle(rates["reward"], arg.steps // 4),
            **shared,
        )
        c.stages.dpo = defaults.stage(
            "preference",
            start_from=base,
            objective_args=dict(beta=0.1),
            data=pairs,
            steps=arg.steps // 4,
            batch_size=8,
            optimizer=common.gentle(rates["dpo"], arg.steps // 4),
            **shared,
        )
    if arg.comparisons and arg.prompts:
        c.stages.ppo = defaults.stage(
            "policy",
            start_from=base,
            reward_from="reward",
            data=dict(files=arg.prompts, fields=arg.prompts_fields),
            sampling=dict(max_new_tokens=arg.answer),
            steps=max(arg.steps // 40, 1),
            batch_size=16,
            epochs=2,
            optimizer=dict(lr=rates["ppo"], warmup_steps=0, schedule="linear"),
            every=dict(log=1, save=5),
            **shared,
        )
    return common.tiny(c) if arg.tiny else c
