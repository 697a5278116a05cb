"""Every key of a curation with its default and its meaning, and what is refused.

"" stands for none in texts, 0 for off in numbers.
"""

from ml_collections import ConfigDict

from stagecraft import schema
from stagecraft.curate import language_id
from stagecraft.errors import UserError

RULES = ("language", "gopher_repetition", "gopher_quality", "c4", "fineweb")


def defaults() -> ConfigDict:
    """Returns what `stagecraft curate` does to raw text, as published.

    The numbers of the rules are those of their papers, under datatrove's names.
    """
    c = ConfigDict()
    c.files = ""  # what to read: see stagecraft/data/containers.py
    c.out = ""  # the folder that appears
    c.work = ""  # for what is half done; "" for OUT.work
    c.seed = 0  # of the sampling by score
    c.text_key = "text"  # of records and columns
    c.source_key = "source"  # a text by which records are counted, where they have it
    c.document = 2000  # characters of a document of .txt, cut at blank lines; 0: a file
    c.task_bytes = 0  # text of one task; 0 for a 64th of all, from 1 MiB to 256 MiB
    c.examples = 5  # on the page, of each reason
    # In this order; leave out what should not run.
    c.rules = RULES
    c.language = ConfigDict()
    c.language.keep = "en"  # or "de", "fr", ...: one of language_id.py; "" for all
    c.language.unknown = False  # keep what is recognised as none
    c.gopher_repetition = schema.group(
        dup_line_frac=0.3,
        dup_para_frac=0.3,
        dup_line_char_frac=0.2,
        dup_para_char_frac=0.2,
        top_n_grams=((2, 0.2), (3, 0.18), (4, 0.16)),
        dup_n_grams=(
            *((5, 0.15), (6, 0.14), (7, 0.13)),
            *((8, 0.12), (9, 0.11), (10, 0.10)),
        ),
    )
    c.gopher_quality = schema.group(
        min_doc_words=50,
        max_doc_words=100_000,
        min_avg_word_length=3.0,
        max_avg_word_length=10.0,
        max_symbol_word_ratio=0.1,
        max_bullet_lines_ratio=0.9,
        max_ellipsis_lines_ratio=0.3,
        max_non_alpha_words_ratio=0.8,  # the least share of words with a letter
        min_stop_words=2,
    )
    c.c4 = schema.group(
        split_paragraph=True,
        remove_citations=True,
        filter_no_terminal_punct=False,  # True in C4; FineWeb found it too harsh
        min_num_sentences=5,
        min_words_per_line=3,
        max_word_length=1000,
        filter_lorem_ipsum=True,
        filter_javascript=True,
        filter_curly_bracket=True,
        filter_policy=True,
    )
    c.fineweb = schema.group(
        line_punct_thr=0.12,
        line_punct_exclude_zero=False,
        short_line_thr=0.67,
        short_line_length=30,
        char_duplicates_ratio=0.01,
        new_line_ratio=0.3,
    )
    c.exact = True  # remove documents with the same words and punctuation
    c.minhash = schema.group(on=True, n_grams=5, buckets=14, hashes=8, seed=1)
    c.quality = schema.group(
        good="",  # files of samples to train a classifier on
        bad="",
        model="",  # or one trained before: quality-HASH.npy
        threshold=0.0,  # least score, from 0 to 1
        share=1.0,  # of the documents left, chosen by score
        temperature=0.0,  # of that choice: 0 takes the best, more lets chance in
    )
    c.contamination = schema.group(
        files="",  # evaluation files; every text in a record counts
        n_grams=13,  # words of a run that must not be shared
        common=10,  # a run in more items than this is nobody's content
    )
    c.personal = schema.group(emails=True, addresses=True, phones=True)
    c.tokenizer = ""  # a .model file; "" writes text and no ids
    return c


def resolve(config) -> ConfigDict:
    """Returns the complete config, checked; raises UserError."""
    c = schema.merge(defaults(), config)
    if not c.files:
        raise UserError("files: is empty; name the files to read, as in in=FILES")
    if not c.out:
        raise UserError("out: is empty; name the folder to write, as in out=DIR")
    for rule in c.rules:
        schema.choice("rules", rule, RULES)
    if len(set(c.rules)) < len(c.rules):
        raise UserError(f"rules={tuple(c.rules)}: names one twice")
    if c.language.keep:
        schema.choice("language.keep", c.language.keep, language_id.NAMES)
    for key in ("document", "task_bytes", "examples"):
        schema.positive(key, c[key], zero=True)
    for key in ("n_grams", "buckets", "hashes"):
        schema.positive(f"minhash.{key}", c.minhash[key])
    for key in ("n_grams", "common"):
        schema.positive(f"contamination.{key}", c.contamination[key])
    _check_quality(c.quality)
    return c


def of_run(config) -> ConfigDict:
    """Returns the complete curation of a run, whose folder the run decides."""
    for key in ("out", "work"):
        if config.get(key):
            raise UserError(
                f"curation.{key}={config[key]!r}: leave it out; a run curates into "
                "WORKDIR/curation"
            )
    try:
        c = resolve({**config, "out": "WORKDIR/curation"})
    except UserError as error:
        raise UserError(f"curation.{error}") from None
    c.out = ""
    return c


def _check_quality(q):
    if bool(q.good) != bool(q.bad):
        raise UserError(
            f"quality.good={q.good!r} with quality.bad={q.bad!r}: a classifier is "
            "trained on both; name both, or neither"
        )
    if q.good and q.model:
        raise UserError(
            f"quality.model={q.model!r}: with quality.good and quality.bad one is "
            "trained; name the model or the samples"
        )
    if not 0 <= q.threshold <= 1:
        raise UserError(f"quality.threshold={q.threshold}: expected from 0 to 1")
    if not 0 < q.share <= 1:
        raise UserError(f"quality.share={q.share}: expected above 0, up to 1 (all)")
    schema.positive("quality.temperature", q.temperature, zero=True)
    if (q.threshold > 0 or q.share < 1) and not (q.good or q.model):
        raise UserError(
            f"quality.threshold={q.threshold}, quality.share={q.share}: there is no "
            "score to choose by; name quality.good and quality.bad, or quality.model"
        )
