"""The list of steps, from files to the result: one list, wherever it runs.

filter   read, rules in the order of `rules`, score, keep, MinHash's signatures
match    MinHash's pairs, one task a band
choose   which of the duplicates stay, which scores suffice: one task
finish   duplicates out, evaluation text out, personal data out, written and cut
publish  the result put together: one task
"""

from pathlib import Path

from datatrove.pipeline import dedup, filters
from datatrove.utils.hashing import HashConfig

from stagecraft import schema, storage
from stagecraft.curate import (
    classifier,
    duplicates,
    inputs,
    language_id,
    overlap,
    publish,
    reader,
    steps,
)
from stagecraft.curate.engine import Phase
from stagecraft.curate.words import Words
from stagecraft.errors import UserError


def phases(c, work, tasks, survey, identity) -> list[Phase]:
    """Returns the phases; trains the classifier and indexes evaluation files.

    Args:
        c: a complete, checked config.
        work: its work folder.
        tasks: how many task files lie in it.
        survey: the inputs.Survey, for the report.
        identity: what names this work.
    """
    work, about = Path(work), {}
    model = _classifier(c.quality, work, c, about)
    filtering, names = _filtering(c, work, model)
    duplicates_of, pairs = _near_duplicates(c, work, filtering)
    q = c.quality
    chance = (q.threshold, q.share, q.temperature, c.seed)
    choose = duplicates.Choose(work, tasks, c.exact, pairs, *chance)
    finishing, more = _finishing(c, work, model, about)
    put_together = publish.Publish(
        work=work,
        out=Path(c.out),
        tasks=tasks,
        steps=names + more,
        config=schema.plain(c),
        about=about | {"files": survey.files, "size": survey.size},
        model=model,
        identity=identity,
    )
    return [
        Phase("filter", filtering, tasks),
        *duplicates_of,
        Phase("choose", [choose], 1),
        Phase("finish", finishing, tasks),
        Phase("publish", [put_together], 1),
    ]


def _filtering(c, work, model):
    """Returns the steps up to where documents are written, and the tallies' names."""
    words = Words(c.language.keep or "en")
    filtering = [steps.Read(work, c.examples, c.text_key, c.source_key, c.document)]
    names = ["read"]
    for name in c.rules:
        rule = _rule(name, c, words)
        if rule is not None:
            filtering.append(steps.Filter(name, work, c.examples, rule))
            names.append(name)
    if model:
        filtering.append(steps.Score(model))
    return [*filtering, steps.Keep(work)], names


def _near_duplicates(c, work, filtering):
    """Adds MinHash's signatures to the steps; returns its phases and their folder."""
    if not c.minhash.on:
        return [], ""
    config = dedup.MinhashConfig(
        n_grams=c.minhash.n_grams,
        num_buckets=c.minhash.buckets,
        hashes_per_bucket=c.minhash.hashes,
        seed=c.minhash.seed,
        hash_config=HashConfig(precision=64),
    )
    signatures, pairs = str(work / "signatures"), str(work / "pairs")
    words = Words(c.language.keep or "en")
    sign = steps.Sign(signatures, config=config, language=words)
    filtering.append(sign)
    match = dedup.MinhashDedupBuckets(signatures, pairs, config=config)
    return [Phase("match", [match], c.minhash.buckets)], pairs


def _finishing(c, work, model, about):
    """Returns the steps after duplicates are known, and the tallies' names."""
    finishing, names = [steps.Reread(work)], []
    for name, code, wanted in (
        ("exact duplicate", duplicates.EXACT, c.exact),
        ("near duplicate", duplicates.NEAR, c.minhash.on),
        ("quality", duplicates.UNCHOSEN, model),
    ):
        if wanted:
            finishing.append(steps.Verdict(work, c.examples, name, code))
            names.append(name)
    if c.contamination.files:
        folder = work / "evaluation"
        folder.mkdir(exist_ok=True)
        a = c.contamination
        about["evaluation"] = overlap.build(a.files, folder, a.n_grams, a.common)
        rule = overlap.Rule(folder, a.n_grams)
        finishing.append(steps.Filter("contamination", work, c.examples, rule))
        names.append("contamination")
    if any(c.personal.values()):
        finishing.append(steps.Scrub(work, c.examples, **c.personal))
        names.append("personal data")
    finishing.append(steps.Write(work, c.examples, c.tokenizer))
    return finishing, [*names, "write"]


def _rule(name, c, words):
    """Returns the filter of a rule, with the config's numbers; None if it is off."""
    if name == "language":
        if not c.language.keep:
            return None
        return language_id.Rule(c.language.keep, c.language.unknown)
    settings = dict(c[name])
    if name == "gopher_quality":
        stop = language_id.STOP_WORDS.get(c.language.keep)
        if c.language.keep not in ("", "en") and stop:
            settings["stop_words"] = sorted(stop)
        elif c.language.keep != "en":
            settings["min_stop_words"] = 0
        return filters.GopherQualityFilter(**settings, language=words)
    rules = {
        "gopher_repetition": filters.GopherRepetitionFilter,
        "c4": filters.C4QualityFilter,
        "fineweb": filters.FineWebQualityFilter,
    }
    return rules[name](**settings, language=words)


def _classifier(q, work, c, about):
    """Writes the classifier's file into the work folder; returns "" for none."""
    if q.model:
        data = Path(q.model).read_bytes()
        path = work / Path(q.model).name
        storage.write_bytes(path, data)
        return str(path)
    if not q.good:
        return ""
    samples = [_samples(q[name], c, f"quality.{name}") for name in ("good", "bad")]
    path, about["classifier"] = classifier.train(*samples, work)
    return str(path)


def _samples(spec, c, where):
    texts = []
    try:
        for parts in inputs.survey(spec, c.text_key, c.document, 0).tasks:
            for part in parts:
                for item in reader.read(part, c.text_key, c.source_key, c.document):
                    if isinstance(item, reader.Text) and item.text.strip():
                        texts.append(item.text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return texts
