"""Planted faults are what they say, in the share asked for, the same from one seed."""

import numpy as np

from stagecraft.worlds import junk

TEXT = "the cat sat on a mat and said so to every dog that went by at noon"
WORDS = TEXT.split()


def documents(count):
    rng = np.random.default_rng(1)
    return [f"{i} " + " ".join(rng.choice(WORDS, 200)) for i in range(count)]


def test_each_kind_is_planted_in_its_share():
    clean = documents(50)
    found = junk.plant(clean, np.random.default_rng(0), exact=0.2, noise=0.04)
    kinds = [p.fault for p in found]
    counts = {kind: kinds.count(kind) for kind in ("clean", *junk.FAULTS)}
    assert counts == dict(clean=50, exact=10, near=5, boilerplate=5, noise=2)
    assert found == junk.plant(clean, np.random.default_rng(0), exact=0.2, noise=0.04)
    assert [p.fault for p in found[:50]] != ["clean"] * 50
    for planted in found:
        if planted.fault == "clean":
            assert planted.text == clean[planted.origin]
        elif planted.fault == "exact":
            same = planted.text.lower().split()
            assert same == clean[planted.origin].lower().split()
        elif planted.fault == "near":
            pairs = zip(
                planted.text.split(), clean[planted.origin].split(), strict=True
            )
            assert 0 <= sum(a != b for a, b in pairs) <= 2
        else:
            assert planted.origin == -1 and planted.text


def test_edits_are_bounded_by_their_share():
    [clean] = documents(1)
    for edits, most in ((0.0, 1), (0.1, 20), (1.0, 201)):
        found = junk.plant([clean], np.random.default_rng(0), edits=edits, near=1)
        [near] = [p.text for p in found if p.fault == "near"]
        changed = sum(a != b for a, b in zip(near.split(), clean.split(), strict=True))
        assert changed <= most and near.count("\n") == clean.count("\n")
