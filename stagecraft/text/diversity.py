"""How much texts differ from each other."""

import itertools


def distinct_2(texts: list[str]) -> float:
    """Returns the share of different pairs of neighbouring words among all of them.

    Low where a model has collapsed to a few phrases (Li et al. 2016,
    arxiv.org/abs/1510.03055, section 5); 0 without any pair.

    >>> distinct_2(["a b a b", "a b"])
    0.5
    """
    words = [text.split() for text in texts]
    pairs = [pair for one in words for pair in itertools.pairwise(one)]
    return len({*pairs}) / len(pairs) if pairs else 0.0
