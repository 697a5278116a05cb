"""The page of a curation: what each step removed, why, with examples."""

from pathlib import Path

from stagecraft import schema, storage
from stagecraft.errors import UserError
from stagecraft.report import render

# What a step does, in the page's words.
SAYS = {
    "read": "Lines that could not be read; the rest of their file was.",
    "language": "Documents recognised as another language, from script and commonest "
    "words.",
    "gopher_repetition": "Documents that repeat themselves: lines, paragraphs, runs of "
    "words (Rae et al. 2021, table A1).",
    "gopher_quality": "Documents whose words, symbols and lines are not those of prose "
    "(Rae et al. 2021).",
    "c4": "Lines and documents that C4 leaves out (Raffel et al. 2019).",
    "fineweb": "Documents whose line ends, line lengths or repeated lines FineWeb "
    "leaves out (Penedo et al. 2024).",
    "exact duplicate": "Documents with the same words and punctuation as one that "
    "stays.",
    "near duplicate": "Documents that MinHash finds nearly equal to one that stays.",
    "quality": "Documents whose score did not suffice, or that were not drawn.",
    "contamination": "Documents that share a run of words with an evaluation file.",
    "personal data": "E-mail and IP addresses and phone numbers, replaced.",
    "write": "What was written.",
}


def write(folder) -> Path:
    """Writes FOLDER/report.html from what `curation.curate` left there.

    Args:
        folder: its result.
    """
    folder = Path(folder)
    result = storage.read_json(folder / "curation.json")
    examples = storage.read_json(folder / "examples.json")
    if result is None or examples is None:
        raise UserError(f"{folder}: no curation here; make it with stagecraft curate")
    html = render.render(
        "curation.html.jinja",
        result=result,
        examples=examples,
        config=list(schema.flat(result["config"])),
        says=SAYS,
    )
    path = folder / "report.html"
    storage.write_text(path, html)
    return path
