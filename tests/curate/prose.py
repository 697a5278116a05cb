"""Made-up prose that the published rules take for clean, and files of it."""

import gzip
import json

from stagecraft.worlds import junk

_SYLLABLES = (
    *("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi"),
    *("wo", "zu", "lan", "mer", "tin", "sol"),
)
_FRAMES = (
    "The {} of the {} was {} to the {}, and that is why they have {} it with a {}.",
    "When a {} came to {}, it had to be {} by the {} that we {} in the {}.",
    "It is not the {} but the {} which the {} {} for, and this {} is in the {}.",
    "They {} a {} to the {}, with which the {} could be {} and {} in time.",
)


def vocabulary(rng, count=400):
    """Words of two or three syllables."""
    return ["".join(rng.choice(_SYLLABLES, rng.integers(2, 4))) for _ in range(count)]


def document(rng, words, sentences=9):
    """A document of about 150 words in lines of three sentences."""
    said = [
        _FRAMES[rng.integers(4)].format(*rng.choice(words, 6)) for _ in range(sentences)
    ]
    return "\n".join(" ".join(said[i : i + 3]) for i in range(0, len(said), 3))


def planted(rng, count, **shares):
    """Clean documents with faults among them; list of junk.Planted."""
    words = vocabulary(rng)
    clean = [document(rng, words) for _ in range(count)]
    return junk.plant(clean, rng, **shares)


def write(path, found, **more):
    """Records that remember what was planted, as .jsonl or .jsonl.gz."""
    rows = [p._asdict() | more for p in found]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def read(out):
    """Rows of a curated folder, in order."""
    rows = []
    for path in sorted((out / "text").glob("*.jsonl.gz")):
        rows += map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
    return rows


def files(out):
    """{name: bytes} of all in a folder."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file()
    }
