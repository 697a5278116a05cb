"""Faults planted in good text, each named, to measure what finds them.

exact         a document once more, its white space and case perhaps changed
near          a document with a few of its words replaced
boilerplate   menus, cookie notices, lists of links: what surrounds text on the web
noise         keys struck at random, columns of numbers, one phrase over and over
"""

import json
import string
from typing import NamedTuple

import numpy as np

HELD = 20  # one document in this many is held out
FAULTS = ("exact", "near", "boilerplate", "noise")

_MENU = (
    *("Home", "About us", "Contact", "Log in", "Sign up", "My account", "Basket (0)"),
    *("Search", "Site map", "Help", "Careers", "Press", "Blog", "Shop", "Terms of use"),
    *("Privacy policy", "Next page", "Previous page", "Share", "Print this page"),
    *("Back to top", "Subscribe", "Follow us", "Read more", "Related posts"),
)
_NOTICES = (
    "This website uses cookies to improve your experience.",
    "By continuing you accept our terms of use and our privacy policy.",
    "Copyright 2019 Example Media Ltd. All rights reserved.",
    "Please enable JavaScript to view the comments.",
    "Subscribe to our newsletter and never miss an offer.",
    "You must be logged in to post a comment.",
    "Click here to read more of this story",
    "0 comments 3 shares 12 likes",
)


class Planted(NamedTuple):
    """A document and what was done to it.

    Attributes:
        fault: one of FAULTS, or "clean".
        origin: number of the clean document it was made from; its own for a clean one,
            -1 where there is none.
    """

    text: str
    fault: str
    origin: int


def plant(documents, rng, *, edits=0.01, **shares) -> list[Planted]:
    """Returns documents with faults among them, in a random order.

    Args:
        documents: list of str, taken as clean.
        rng: numpy Generator.
        edits: share of the words replaced in a near duplicate, at least one.
        **shares: of each of FAULTS, planted documents / clean ones; 0.1 if not given.
    """
    planted = [Planted(text, "clean", i) for i, text in enumerate(documents)]
    words = " ".join(documents).split()
    for fault in FAULTS:
        for _ in range(round(shares.get(fault, 0.1) * len(documents))):
            origin = int(rng.integers(len(documents)))
            text = documents[origin]
            if fault == "exact":
                text = _respaced(text, rng)
            elif fault == "near":
                text = _edited(text, rng, edits, words)
            else:
                origin = -1
                text = _boilerplate(rng) if fault == "boilerplate" else _noise(rng)
            planted.append(Planted(text, fault, origin))
    return [planted[i] for i in rng.permutation(len(planted))]


def write(folder, share, seed):
    """Plants faults in a world's text.

    Writes raw.jsonl (all of it, with what is planted), clean.jsonl (the same documents
    without) and heldout.jsonl (clean ones that are in neither).

    Args:
        folder: a Path with text.jsonl.
        share: of each of FAULTS, planted documents / clean ones.
        seed: int.
    """
    lines = (folder / "text.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    clean = [text for i, text in enumerate(texts) if i % HELD]
    rng = np.random.default_rng([seed, 7])
    planted = plant(clean, rng, **dict.fromkeys(FAULTS, share))
    for name, rows in (
        ("heldout", [{"text": text} for text in texts[::HELD]]),
        ("clean", [{"text": text} for text in clean]),
        ("raw", [document._asdict() for document in planted]),
    ):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")


def _respaced(text, rng):
    choice = rng.integers(3)
    if choice == 0:
        return text
    return f"  {text}\n" if choice == 1 else text.upper()


def _edited(text, rng, share, words):
    """Replaces some words of a text by others of the corpus; line ends stay."""
    lines = [line.split(" ") for line in text.split("\n")]
    places = [(i, j) for i, line in enumerate(lines) for j, w in enumerate(line) if w]
    count = max(round(share * len(places)), 1)
    for place in rng.choice(len(places), min(count, len(places)), replace=False):
        i, j = places[place]
        lines[i][j] = words[rng.integers(len(words))]
    return "\n".join(" ".join(line) for line in lines)


def _boilerplate(rng):
    menu = [_MENU[i] for i in rng.integers(len(_MENU), size=rng.integers(20, 60))]
    notices = [
        _NOTICES[i] for i in rng.integers(len(_NOTICES), size=rng.integers(2, 6))
    ]
    sign = [" | ", "\n", " - "][rng.integers(3)]
    return sign.join(menu) + "\n" + "\n".join(notices)


def _noise(rng):
    choice = rng.integers(4)
    size = int(rng.integers(60, 200))
    if choice == 0:  # keys
        letters = list(string.ascii_lowercase + "#%&*{}[]<>/\\|~^=")
        return " ".join(
            "".join(rng.choice(letters, rng.integers(2, 12))) for _ in range(size)
        )
    if choice == 1:  # numbers
        rows = (rng.integers(10_000, size=6) for _ in range(size // 4))
        return "\n".join(" ".join(map(str, row)) for row in rows)
    if choice == 2:  # one phrase
        phrase = " ".join(_MENU[i] for i in rng.integers(len(_MENU), size=3))
        return (phrase + "! ") * (size // 4)
    return "".join(f"{b:02x}" for b in rng.integers(256, size=size * 3))  # a dump
