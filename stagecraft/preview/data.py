"""The data of each stage on the terminal: counts, lengths, shares, epochs, rows."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.text import Text

from stagecraft import experiment, run, runs
from stagecraft.data import answers, packing, stage_data
from stagecraft.models.language import Language
from stagecraft.preview.graph import edges
from stagecraft.preview.temporary import temporary

# Tokens of a row that are shown: its beginning and its end.
HEAD, TAIL = 400, 200
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def show(
    config: ConfigDict,
    root: Path | None = None,
    only: Sequence[str] = (),
    rows: int = 3,
    file=None,
) -> None:
    """Prints for each stage counts, lengths, shares, epochs, and rows as they are read.

    Args:
        config: what an experiment's `get_config` returns.
        root: a work directory whose finished stages' records are read, or None.
        only: names of stages; () for all.
        rows: how many are shown of each stage, in the order of training.
        file: where to print.
    """
    console = Console(file=file, highlight=False, soft_wrap=True)
    with temporary(config, root) as this:
        for name in experiment.chosen(this.config, "--stage", only):
            stage = this.config.stages[name]
            console.print()
            console.print(Text.assemble((name, "bold"), f"  {stage.kind}"))
            if missing := run.awaited(this, name):
                said = f"its data are not there yet: {', '.join(missing)}"
                console.print(Text(f"  {said}"))
                continue
            data = run.data_of(this, name)
            for line in (*edges(this.config, name), *described(stage, data, this)):
                console.print(Text(f"  {line}"))
            for text in first_rows(stage, data, this.tokenizer, rows, console):
                console.print(text)


def described(stage: ConfigDict, data: stage_data.StageData, this: runs.Run):
    """Yields lines about a stage's data: counts, lengths, shares, a step, epochs."""
    if data.dataset is None:
        language = Language(None, this.tokenizer)
        prompts = data.prompts
        sizes = [len(language.encode(p, chat_format=True)) for p in prompts]
        yield _lengths("prompts", np.array(sizes))
        passes = stage.prompts / len(prompts)
        yield f"asks {stage.prompts:,} prompts: {passes:.2f} epochs"
        return
    dataset, report = data.dataset, dict(data.dataset.report)
    sources = report.pop("sources", [])
    yield _counted(report)
    counts = [f"{k.replace('_', ' ')} {_shown(v)}" for k, v in report.items()]
    counts.append(f"rows {dataset.rows:,}")
    if data.heldout:
        counts.append(f"held-out rows {data.heldout.rows:,}")
    yield "counts: " + ", ".join(counts)
    source, count = dataset.parts[0]
    yield _lengths(*document_lengths(source))
    if line := over_limit(stage, source, report):
        yield line
    for one in sources:
        shares = [
            f"{value:.1%} of the {key.removeprefix('share_of_')}"
            for key, value in one.items()
            if key.startswith("share_of_")
        ]
        epochs = f"{one['epochs']:.2f} epochs"
        yield f"mixture: {one['files']}: {', '.join([*shares, epochs])}"
    for rows, extra in dataset.parts[1:]:
        share = extra / dataset.batch_size
        epochs = stage.steps * extra / len(rows)
        yield f"replay: {extra} rows of a batch ({share:.0%}), {epochs:.2f} epochs"
    for rows, extra in dataset.beside:
        epochs = stage.steps * extra / len(rows)
        yield f"beside each batch: {extra} rows of text, {epochs:.2f} epochs"
    yield from _steps(stage, dataset, count)


def _counted(report):
    """Returns how many records to train on were read, kept and dropped."""
    what = next(k for k in ("documents", "pairs", "answers", "prompts") if k in report)
    dropped = report.get("dropped", 0)
    count = report[what]  # those that are left
    return f"{count + dropped:,} {what} read: {count:,} kept, {dropped:,} dropped"


def _steps(stage, dataset, count):
    """Yields what a step reads, by the first batch, and the epochs of all steps."""
    batch = dataset.batch_at(0)
    epochs = stage.steps * count / dataset.rows
    if "prompt_mask" in batch:
        real = int(batch["prompt_mask"].sum())
        yield f"a step: {dataset.batch_size} prompts, {real:,} tokens to answer"
    else:
        real, learned = int((batch["segments"] > 0).sum()), int(_learned(batch).sum())
        yield (
            f"a step: {dataset.batch_size} rows, {real:,} tokens ({learned:,} learned) "
            f"and {batch['ids'].size - real:,} of padding"
        )
    total = round(dataset.tokens / dataset.rows * count * stage.steps)
    yield f"{stage.steps:,} steps: {epochs:.2f} epochs, about {total:,} tokens"


def document_lengths(rows: Any) -> tuple[str, np.ndarray]:
    """Returns what the rows of a dataset hold, and the tokens of each."""
    if isinstance(rows, packing.Rows):
        used = np.unique(rows.plan.documents)
        return "documents", rows.documents.lengths[used]
    if not isinstance(rows, dict):
        prompts = isinstance(rows, answers.PromptRows)
        return "prompts" if prompts else "sequences", rows.lengths
    if "prompt_mask" in rows:
        return "prompts", rows["prompt_mask"].sum(-1)
    segments = rows["segments"].reshape(-1, rows["segments"].shape[-1])
    numbers = np.arange(len(segments))[:, None] * (segments.max() + 1) + segments
    _, counts = np.unique(numbers[segments > 0], return_counts=True)
    return "sequences", counts


def over_limit(stage: ConfigDict, rows: Any, report: Mapping) -> str:
    """Returns what becomes of documents longer than a row; "" where none are."""
    if isinstance(rows, packing.Rows) and stage.data.format == "text":
        _, sizes = document_lengths(rows)
        share, length = (sizes > rows.length).mean(), rows.length
        return f"{share:.1%} are longer than data.length={length}: split over rows"
    if "prompts" in report:
        return ""
    length = stage.data.length
    dropped = report.get("dropped", 0) - report.get("identical", 0)
    held = [report[k] for k in ("pairs", "answers") if k in report]
    if not held and stage.data.too_long == "drop":
        held = [report["documents"]]
    if held:
        share = dropped / max(held[0] + dropped, 1)
        return f"{share:.1%} are longer than data.length={length}: dropped"
    _, sizes = document_lengths(rows)
    return f"{(sizes >= length).mean():.1%} fill data.length={length} or are cut there"


def _lengths(what, sizes):
    marks = ("min", "5%", "25%", "median", "75%", "95%", "max")
    values = np.quantile(sizes, QUANTILES)
    listed = [f"{m} {v:,.0f}" for m, v in zip(marks, values, strict=True)]
    return f"tokens of {what}: {', '.join(listed)}"


def _shown(value):
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def first_rows(
    stage: ConfigDict,
    data: stage_data.StageData,
    tokenizer: Any,
    count: int,
    console: Console,
) -> Iterator[Text]:
    """Yields the first rows that training reads; what is learned is marked.

    On a terminal by bold and underlined letters, elsewhere by brackets.
    """
    if data.dataset is None:
        language = Language(None, tokenizer)
        for number, prompt in enumerate(data.prompts[:count]):
            ids = np.array(language.encode(prompt, chat_format=True))
            yield Text(f"  prompt {number + 1}:", style="dim")
            yield rendered(ids, np.zeros(len(ids), bool), tokenizer, console)
        return
    size, batch = data.dataset.batch_size, data.dataset.batch_at(0)
    prompts = "prompt_mask" in batch
    if count and not prompts:
        how = "underlined" if console.is_terminal else "in ⟦brackets⟧"
        yield Text(f"  the first rows; what is learned is {how}:", style="dim")
    for number in range(min(count, stage.steps * size)):
        if number and number % size == 0:
            batch = data.dataset.batch_at(number // size)
        row = {key: value[number % size] for key, value in batch.items()}
        if prompts:
            ids = row["prompt_ids"][row["prompt_mask"]]
            yield Text(f"  prompt {number + 1}:", style="dim")
            yield rendered(ids, np.zeros(len(ids), bool), tokenizer, console)
            continue
        sides = np.atleast_2d(row["ids"])
        learned, segments = (np.atleast_2d(x) for x in (_learned(row), row["segments"]))
        for side, ids in enumerate(sides):
            if not segments[side].any():
                continue
            yield Text(f"  row {number + 1}{_side(row, side, len(sides))}:", "dim")
            for document in range(1, segments[side].max() + 1):
                at = segments[side] == document
                yield rendered(ids[at], learned[side][at], tokenizer, console)


def _side(row, side, sides):
    if "label" in row:
        return ", desirable" if row["label"] else ", undesirable"
    if sides == 1:
        return ""
    return f", {('chosen', 'rejected')[side]}" if sides == 2 else f", rank {side + 1}"


def _learned(batch):
    """Returns which tokens are targets: those of the mask with a token before them."""
    learned = batch["mask"] & (batch["positions"] > 0)
    return learned & (batch["weight"] > 0) if "weight" in batch else learned


def rendered(
    ids: np.ndarray, learned: np.ndarray, tokenizer: Any, console: Console
) -> Text:
    """Returns the text of ids: control tokens by name, what is learned marked."""
    text = Text("    ")
    if len(ids) > HEAD + TAIL:
        hidden = len(ids) - HEAD - TAIL
        text += rendered(ids[:HEAD], learned[:HEAD], tokenizer, console)
        text.append(f"\n    [... {hidden:,} tokens ...]\n", "dim")
        return text + rendered(ids[-TAIL:], learned[-TAIL:], tokenizer, console)
    control = np.isin(ids, _control_ids(tokenizer))
    changes = np.flatnonzero((np.diff(learned) != 0) | (np.diff(control) != 0)) + 1
    before = False
    for part in np.split(np.arange(len(ids)), changes):
        if not len(part):
            continue
        marked, named = learned[part[0]], control[part[0]]
        if named:
            words = "".join(tokenizer.name(ids[i]) for i in part)
        else:
            words = visible(tokenizer.decode(ids[part].tolist()))
        if not console.is_terminal and marked != before:
            text.append("⟦" if marked else "⟧")
        before = marked
        style = ("bold underline " if marked else "") + ("cyan" if named else "")
        text.append(words, style.strip())
    return text.append("⟧") if before and not console.is_terminal else text


def _control_ids(tokenizer):
    ids = (tokenizer.pad, tokenizer.bos, tokenizer.eos)
    ids = [*ids, *tokenizer.stops, *tokenizer.control_ids]
    return [i for i in ids if i is not None]


def visible(text: str) -> str:
    r"""Returns a text whose control characters can be seen; lines stay lines.

    >>> visible("a\tb\x1b[1m\r\u202e")
    'a␉b␛[1m␍<U+202E>'
    """
    out = []
    for character in text:
        code = ord(character)
        if character == "\n":
            out.append("␊\n    ")
        elif code < 32 or code == 127:
            out.append(chr(0x2421 if code == 127 else 0x2400 + code))
        elif character.isprintable():
            out.append(character)
        else:
            out.append(f"<U+{code:04X}>")
    return "".join(out)
