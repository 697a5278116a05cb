r"""Raw files to text worth training on.

    stagecraft curate --config=curate:in=raw/*.jsonl.gz,out=clean
    stagecraft curate --config=curate:in=FILES,out=DIR,good=FILES,\
bad=FILES,evaluation=FILES,tokenizer=FILE

FILES is a file, a folder or a glob, several separated by commas.

    in          what to read; each part of the list is a source on the page
    out         the folder that appears: text/, shards/, report.html, ...
    language    the one to keep (en), or all
    good, bad   samples; a classifier trained on them scores every document
    share       of the documents, kept by that score (1, all)
    evaluation  files whose text must not be in the result
    tokenizer   a .model file, a Hugging Face folder or "bytes"; without one, no shards

Everything else is a key of `stagecraft/curate/config.py`: --config.rules=language,c4
runs two rules only, --config.minhash.on=False keeps near duplicates, and so on. Then
train on it: data.files=DIR/shards, or DIR/text.
"""

from experiments import common
from stagecraft.curate import config


def get_config(arg=""):
    arg = common.parse_arg(
        arg,
        **{"in": ""},
        out="",
        language="en",
        good="",
        bad="",
        share=1.0,
        evaluation="",
        tokenizer="",
        tiny=False,
    )
    c = config.defaults()
    c.files = getattr(arg, "in")
    c.out = arg.out
    c.language.keep = "" if arg.language == "all" else arg.language
    c.quality.good, c.quality.bad = arg.good, arg.bad
    c.quality.share = arg.share
    c.contamination.files = arg.evaluation
    c.tokenizer = arg.tokenizer
    if arg.tiny:  # tasks so small that a few files make several
        c.task_bytes = 4096
    return c
