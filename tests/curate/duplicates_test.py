"""Which duplicate stays: the best, then the first; the same however work was split."""

import gc

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline import dedup

from stagecraft.curate import duplicates, steps
from stagecraft.curate.duplicates import EXACT, KEPT, NEAR, UNCHOSEN
from stagecraft.curate.words import Words
from tests.curate import prose


def decide(tmp_path, texts, scores, split, pairs=(), **settings):
    """(codes, twins by number) of documents given to tasks by `split`."""
    keys = [duplicates.key(t, s) for t, s in zip(texts, scores, strict=True)]
    bounds = [0, *np.cumsum(split)]
    for rank, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        duplicates.save_keys(tmp_path, rank, keys[a:b])
    place = {}
    for rank, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        place |= {i: (rank, i - a) for i in range(a, b)}
    folder = tmp_path / "pairs"
    folder.mkdir(exist_ok=True)
    rows = np.array([[*place[a], *place[b]] for a, b in pairs], "<u4").reshape(-1, 4)
    rows[::2].tofile(folder / "00000_00.dups")
    rows[1::2].tofile(folder / "00001_00.dups")
    settings = dict(exact=True, threshold=0.0, share=1.0, temperature=0.0) | settings
    duplicates.Choose(tmp_path, len(split), pairs=str(folder), seed=0, **settings).run()
    found = np.concatenate(
        [duplicates.verdicts(tmp_path, rank) for rank in range(len(split))]
    )
    twins = [bounds[v["task"]] + v["document"] for v in found]
    return found["code"].tolist(), twins


TEXTS = ["a b", "c", "A  b", "d", "e", "a b\n", "f"]


@pytest.mark.parametrize("split", [[7], [3, 4], [1, 0, 1, 1, 1, 1, 2]])
def test_the_first_stays_and_with_scores_the_best(tmp_path, split):
    pairs = [(2, 3), (4, 5), (1, 6)]  # a b ~ d, e ~ a b, c ~ f
    codes, twins = decide(tmp_path, TEXTS, [0.0] * 7, split, pairs)
    assert codes == [KEPT, KEPT, EXACT, NEAR, NEAR, EXACT, NEAR]
    assert twins == [0, 1, 0, 0, 0, 0, 1]
    scores = [0.1, 0.5, 0.2, 0.9, 0.3, 0.2, 0.5]
    codes, twins = decide(tmp_path, TEXTS, scores, split, pairs)
    assert codes == [EXACT, KEPT, NEAR, KEPT, NEAR, EXACT, NEAR]
    assert twins == [2, 1, 3, 3, 3, 2, 1]
    codes, _ = decide(tmp_path, TEXTS, scores, split, pairs, exact=False)
    assert codes == [KEPT, KEPT, NEAR, KEPT, KEPT, NEAR, NEAR]
    codes, _ = decide(tmp_path, TEXTS, scores, split, (), threshold=0.3)
    assert codes == [EXACT, KEPT, UNCHOSEN, KEPT, KEPT, EXACT, KEPT]


def test_a_share_is_chosen_by_score_and_temperature():
    rng = np.random.default_rng(0)
    keys = np.zeros(4000, duplicates.KEY)
    keys["low"] = rng.integers(2**63, size=4000)
    keys["score"] = rng.uniform(0.01, 0.99, 4000)
    every = np.arange(4000)

    def mean(temperature, seed=0, share=0.25):
        found = duplicates.choose(keys, every, 0.0, share, temperature, seed)
        assert len(found) == round(share * 4000) and (np.diff(found) > 0).all()
        return keys["score"][found].mean()

    assert mean(0.0) == pytest.approx(0.8675, abs=0.01)  # the best quarter
    assert mean(1000.0) == pytest.approx(0.5, abs=0.02)  # any quarter
    assert mean(0.0) > mean(0.5) + 0.02 > mean(2.0) + 0.04
    assert mean(1.0) == mean(1.0) != mean(1.0, seed=1)
    # The chance of a document does not depend on who is beside it in the list.
    back = keys[::-1]
    found = duplicates.choose(back, every, 0.0, 0.25, 1.0, 0)
    same = duplicates.choose(keys, every, 0.0, 0.25, 1.0, 0)
    np.testing.assert_array_equal(np.sort(3999 - found), same)


def test_sampling_follows_its_law():
    """Of many pairs, the share in which the better is drawn, against the softmax."""
    keys = np.zeros(2, duplicates.KEY)
    keys["score"] = [0.3, 0.6]
    temperature, wins = 0.7, 0
    rng = np.random.default_rng(1)
    for _ in range(4000):
        keys["low"] = rng.integers(2**63, size=2)
        wins += duplicates.choose(keys, np.arange(2), 0.0, 0.5, temperature, 0)[0] == 1
    odds = np.array([0.3 / 0.7, 0.6 / 0.4]) ** (1 / temperature)
    assert wins / 4000 == pytest.approx(odds[1] / odds.sum(), abs=0.025)


def test_signatures_of_a_task_cut_off_are_written_anew(tmp_path):
    rng = np.random.default_rng(0)
    words = prose.vocabulary(rng)
    documents = [
        Document(text=prose.document(rng, words), id=str(i)) for i in range(12)
    ]

    def cut_off():
        yield from documents[:5]
        raise OSError("No space left on device")

    def sign(folder, data):
        config = dedup.MinhashConfig()
        steps.Sign(str(folder), config=config, language=Words("en")).run(data)

    sign(tmp_path / "whole", documents)
    # While the error is held, so are the files that were open when it was raised:
    # letting go of it flushes them.
    with pytest.raises(OSError, match="No space") as held:
        sign(tmp_path / "again", cut_off())
    sign(tmp_path / "again", documents)
    del held
    gc.collect()
    assert prose.files(tmp_path / "again") == prose.files(tmp_path / "whole")
    # Those of a task that was killed lie there whole, of fewer documents.
    sign(tmp_path / "again", documents[:5])
    sign(tmp_path / "again", documents)
    assert prose.files(tmp_path / "again") == prose.files(tmp_path / "whole")
