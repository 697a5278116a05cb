"""The same batches on any number of hosts and workers, and after a resume."""

import contextlib
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stagecraft.data import mixture, packing, shards
from stagecraft.data.dataset import Dataset
from stagecraft.data.documents import Stored
from stagecraft.errors import UserError
from tests.data.packed import InMemory, pack

STEPS = 1000


def fingerprint(batch):
    total = hashlib.sha256()
    for name, value in sorted(batch.items()):
        total.update(f"{name} {value.dtype} {value.shape}".encode())
        total.update(np.ascontiguousarray(value).data)
    return total.hexdigest()


def own_rows(host, hosts):
    """(rows of a batch) -> those that one of several hosts reads."""
    return lambda rows: np.arange(rows // hosts) + host * rows // hosts


def joined(parts):
    """The batch of the rows that each host read."""
    whole = {}
    for name in parts[0]:
        own = [own_rows(n, len(parts))(len(p[name])) for n, p in enumerate(parts)]
        each = [p[name][rows] for p, rows in zip(parts, own, strict=True)]
        whole[name] = np.concatenate(each)
    return whole


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three folders of shards, whose documents are told by their ids."""
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for number, (count, most) in enumerate(((300, 40), (80, 12), (20, 90))):
        documents = [
            rng.integers(100 * number, 100 * (number + 1), rng.integers(3, most))
            for _ in range(count)
        ]
        told = dict(tokenizer_digest="t", vocab_size=300, shard_tokens=1500)
        shards.write(root / str(number), documents, **told)
    return [root / str(number) for number in range(3)]


def mixed(folders, *, workers=0, seed=0, caps=(0, 0, 0), phases=None):
    """Three sources packed into rows of 32 and mixed, eight rows in a batch."""
    documents = Stored([[shards.Shards(f)] for f in folders], bos=None)
    plans, members, rows, pieces = [], [], 0, 0
    for source in range(3):
        group = np.flatnonzero(documents.sources == source)
        made = packing.plan(documents.lengths[group], 32)
        made = made._replace(documents=group[made.documents], ends=made.ends + pieces)
        members.append(np.arange(rows, rows + len(made.ends) - 1))
        rows, pieces = rows + len(members[-1]), pieces + len(made.documents)
        plans.append(made)
    plan = packing.Plan(
        *(np.concatenate([p[i] for p in plans]) for i in range(3)),
        np.concatenate([plans[0].ends, plans[1].ends[1:], plans[2].ends[1:]]),
    )
    phases = phases or [(0, (0.6, 0.3, 0.1)), (8 * 500, (0.1, 0.1, 0.8))]
    mix = mixture.Mixture(members, phases, caps, seed)
    found = packing.Rows(documents, plan, 32)
    return Dataset([(found, 8)], seed=seed, mixture=mix, workers=workers)


@pytest.fixture(scope="module")
def want(folders):
    """Hashes of the first thousand batches, each looked up by itself."""
    data = mixed(folders)
    return [fingerprint(data.batch_at(step)) for step in range(STEPS)]


def source(row):
    return int(row[0]) // 100


def test_batches_differ_and_another_seed_gives_others(folders, want):
    assert len(set(want)) > 0.99 * STEPS
    other = mixed(folders, seed=1)
    assert not {fingerprint(other.batch_at(step)) for step in range(50)} & set(want)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_same_thousand_batches_on_any_number_of_hosts(folders, want, hosts):
    iterators = [mixed(folders).iterator(own=own_rows(i, hosts)) for i in range(hosts)]
    found = [fingerprint(joined([next(i) for i in iterators])) for _ in range(STEPS)]
    assert found == want


@pytest.fixture
def begun(folders):
    """(workers, hosts) -> an iterator for each host; all end with the test."""
    with contextlib.ExitStack() as stack:

        def begin(workers, hosts=1):
            made = [
                mixed(folders, workers=workers).iterator(own=own_rows(i, hosts))
                for i in range(hosts)
            ]
            return [stack.enter_context(contextlib.closing(one)) for one in made]

        yield begin


@pytest.mark.parametrize("hosts, workers", [(1, 2), (2, 2), (4, 0)])
def test_all_the_rest_after_a_resume_elsewhere(begun, want, parity_rng, hosts, workers):
    """Up to a random step by one host and two workers, then by others to the end."""
    [first] = begun(2)
    stop = int(parity_rng.integers(100, STEPS - 100))
    assert [fingerprint(next(first)) for _ in range(stop)] == want[:stop]
    state = json.loads(json.dumps(first.get_state()))
    assert state == {"next_index": stop}
    first.close()
    parts = begun(workers, hosts)
    for part in parts:
        part.set_state(state)
    rest = STEPS - stop
    found = [fingerprint(joined([next(p) for p in parts])) for _ in range(rest)]
    assert found == want[stop:]


def test_an_iterator_goes_back_with_its_workers(begun, want):
    [iterator] = begun(2)
    for step in (900, 7):
        iterator.set_state({"next_index": step})
        found = [fingerprint(next(iterator)) for _ in range(5)]
        assert found == want[step : step + 5]


LEFT_ALONE = """
import multiprocessing, numpy as np, os, signal
from stagecraft.data.dataset import Dataset

if __name__ == "__main__":
    rows = {"index": np.arange(8)}
    batches = Dataset([(rows, 2)], seed=0, workers=2).iterator()
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    (tmp_path / "alone.py").write_text(LEFT_ALONE)
    with open(tmp_path / "pids", "w") as out:  # a pipe would wait for the workers
        command = [sys.executable, str(tmp_path / "alone.py")]
        root = str(Path(__file__).parents[2])
        subprocess.run(command, stdout=out, env=os.environ | {"PYTHONPATH": root})
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    for _ in range(100):
        left = [pid for pid in pids if alive(pid)]
        if not left:
            return
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"{len(left)} workers are still there")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # who has died may wait to be noticed
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_dataset_is_shipped_without_its_tokens(folders):
    data = mixed(folders)
    data.batch_at(0)
    size = sum(f.stat().st_size for folder in folders for f in folder.iterdir())
    rows = data.parts[0][0]
    assert len(pickle.dumps(rows.documents)) < size / 2
    assert len(pickle.dumps(rows.documents.shards)) < 500
    again = pickle.loads(pickle.dumps(data))
    assert fingerprint(again.batch_at(3)) == fingerprint(data.batch_at(3))


def test_held_out_rows_are_seen_once(folders):
    data = mixed(folders)
    rows = np.concatenate([batch["ids"] for batch in data.epoch(8)])
    want = data.parts[0][0].take(np.arange(data.rows))["ids"]
    assert np.array_equal(rows[: data.rows], want)
    assert len(rows) < data.rows + 8 and not rows[data.rows :].any()


# -- shares ----------------------------------------------------------------------------


def counted(data, steps):
    """Rows of each source in some steps, and how often each row came."""
    rows = np.concatenate([data.mixture.rows(range(8 * s, 8 * s + 8)) for s in steps])
    at = np.searchsorted(
        np.cumsum([len(m) for m in data.mixture.members]), rows, "right"
    )
    return np.bincount(at, minlength=3), np.bincount(rows, minlength=data.rows)


def test_shares_are_kept_at_every_step_and_change_with_the_curriculum(folders):
    data = mixed(folders)
    for first, last, shares in (
        (0, 40, (0.6, 0.3, 0.1)),
        (0, 500, (0.6, 0.3, 0.1)),
        (500, 1000, (0.1, 0.1, 0.8)),
        (730, 750, (0.1, 0.1, 0.8)),
    ):
        seen, _ = counted(data, range(first, last))
        rows = 8 * (last - first)
        # Evenly spread: a few rows off at any time, less than by chance alone.
        assert np.abs(seen - rows * np.array(shares)).max() <= 4
        assert (
            seen == data.mixture.counts(8 * last) - data.mixture.counts(8 * first)
        ).all()
    batch = data.batch_at(10)
    assert {source(row) for row in batch["ids"]} <= {0, 1, 2}


def test_every_row_of_a_source_comes_equally_often(folders):
    data = mixed(folders)
    seen, times = counted(data, range(STEPS))
    for members, count in zip(data.mixture.members, seen, strict=True):
        epochs = count / len(members)
        assert set(times[members]) <= {int(epochs), int(epochs) + 1}
    assert seen.sum() == 8 * STEPS


def test_a_source_that_is_used_up_leaves_its_share_to_the_others(folders):
    data = mixed(folders, caps=(0, 1.5, 1), phases=[(0, (0.5, 0.25, 0.25))])
    sizes = [len(m) for m in data.mixture.members]
    seen, times = counted(data, range(STEPS))
    assert seen[1:].tolist() == [int(1.5 * sizes[1]), sizes[2]]
    assert set(times[data.mixture.members[2]]) == {1}
    assert set(times[data.mixture.members[1]]) == {1, 2}
    late, _ = counted(data, range(STEPS - 10, STEPS))
    assert late.tolist() == [80, 0, 0]
    # Before the first is used up, shares are as they were asked for.
    early, _ = counted(data, range(sizes[2] * 4 // 8 - 2))
    assert np.abs(early - early.sum() * np.array([0.5, 0.25, 0.25])).max() <= 3
    ending = mixed(folders, caps=(1, 1, 1), phases=[(0, (1, 1, 1))]).mixture
    assert ending.end == sum(sizes)
    assert sorted(ending.rows(range(ending.end))) == list(range(sum(sizes)))
    with pytest.raises(UserError, match="data.epochs: every source is used up after"):
        ending.rows([ending.end])


def test_blocks_join_without_a_seam(folders, monkeypatch):
    monkeypatch.setattr(mixture, "BLOCK", 40)
    data = mixed(folders, phases=[(0, (0.5, 0.3, 0.2))], caps=(0, 0, 3))
    for place in (0, 1, 39, 40, 41, 80, 777):
        seen = np.zeros(3, int)
        for row in data.mixture.rows(range(place)):
            seen[
                np.searchsorted(
                    np.cumsum([len(m) for m in data.mixture.members]), row, "right"
                )
            ] += 1
        assert seen.tolist() == data.mixture.counts(place).tolist()
    _, times = counted(data, range(300))
    assert set(times[data.mixture.members[2]]) == {3}


def test_a_tiny_share_comes_all_the_same():
    rows = [np.arange(5), np.arange(5, 9)]
    found = mixture.Mixture(rows, [(0, (1.0, 1e-9))], (0, 0), 0)
    assert found.counts(mixture.BLOCK + 1)[1] >= 1


@pytest.mark.parametrize(
    "text, told",
    [
        ("0: 1", r"step 0=\(1.0,\): expected a number of 0 or more for each of the 2"),
        ("0: 1, x", "'0: 1, x' is not a step and its shares"),
        ("1, 1", "is not a step"),
        ("5: 1, 1", "its steps are 5; expected 0 first"),
        ("0: 1, 1; 9: 1, 2; 9: 1, 3", "its steps are 0, 9, 9"),
        ("0: 0, 0", "not all 0"),
        ("0: -1, 2", "0 or more"),
    ],
)
def test_a_curriculum_that_cannot_be_read_is_told(text, told):
    with pytest.raises(UserError, match=told) as error:
        mixture.curriculum(text, 2)
    assert "\n" not in str(error.value)


# -- documents and rows that are put together late -------------------------------------


def test_stored_and_held_documents_make_the_same_rows(folders):
    bos = int(shards.Shards(folders[0])[0][0])
    stored = Stored([[shards.Shards(f)] for f in folders], bos=bos)
    rows = []
    for number in range(len(stored.lengths)):
        ids, mask = stored.piece(number, 0, 10**6)
        assert mask[1:].all() and mask[0] == (ids[0] != bos)
        rows.append((ids.tolist(), mask.tolist()))
    held = InMemory(rows)
    assert (held.lengths == stored.lengths).all()
    for length in (None, 7):
        assert (held.learned(length) == stored.learned(length)).all()
    for strategy in (*packing.STRATEGIES, "none"):
        made = packing.plan(stored.lengths, 24, strategy)
        late, early = (packing.Rows(d, made, 24) for d in (stored, held))
        index = np.arange(len(late))
        one, two = late.take(index), early.take(index)
        want = (
            pack(rows, 24, strategy=strategy)
            if strategy != "none"
            else packing.pad(rows, 24)
        )
        assert all(
            (one[k] == want[k]).all() and (two[k] == want[k]).all() for k in want
        )
        some = late.take([5, 0, 5])
        assert all((some[k] == want[k][[5, 0, 5]]).all() for k in want)
