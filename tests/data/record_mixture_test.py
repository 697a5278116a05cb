"""Sources of records, mixed in given shares of the examples."""

import json

import numpy as np
import pytest

from stagecraft import defaults, experiment
from stagecraft.errors import UserError

KINDS = ("reward", "preference", "unpaired_preference", "policy", "group_policy")
COUNTS = (30, 12, 5)
STEPS = 60


def record(kind, source, number):
    prompt = {"prompt": f"What is {source} + {number}?"}
    if kind in ("reward", "preference"):
        return prompt | {"chosen": "It is.", "rejected": "No."}
    if kind == "unpaired_preference":
        return prompt | {"completion": "It is.", "label": number % 2 == 0}
    return prompt


@pytest.fixture
def parts(tmp_path):
    """(kind) -> three files of records, told by the first number in a prompt."""

    def write(kind):
        found = []
        for source, count in enumerate(COUNTS):
            path = tmp_path / f"{source}.jsonl"
            lines = [json.dumps(record(kind, source, n)) + "\n" for n in range(count)]
            path.write_text("".join(lines))
            found.append(str(path))
        return found

    return write


def sources(made, tokenizer, steps):
    """Sources of the rows of some steps, i64[steps, B]; and their index."""
    found, index = [], []
    for step in steps:
        batch = made.dataset.batch_at(step)
        prompts = "prompt_ids" in batch
        ids = batch["prompt_ids" if prompts else "ids"].reshape(len(batch["index"]), -1)
        texts = [tokenizer.decode(row) for row in ids]
        found.append([int(t.split("What is ")[1].split(" +")[0]) for t in texts])
        index.append(batch["index"])
    return np.array(found), np.array(index)


def settings(kind):
    return dict(max_new_tokens=16) if "policy" in kind else {}


@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_of_the_examples_at_every_step(build, tokenizer, parts, kind):
    files = parts(kind)
    made = build(
        *(kind, []),
        files=",".join(files),
        shares=(5, 3, 2),
        batch_size=10,
        **settings(kind),
    )
    seen, index = sources(made, tokenizer, range(STEPS))
    for first, last in ((0, STEPS), (0, 10), (37, 40)):
        counts = np.bincount(seen[first:last].ravel(), minlength=3)
        want = np.array([0.5, 0.3, 0.2]) * counts.sum()
        assert np.abs(counts - want).max() <= 4
    # Rows of a source come equally often, those of another as often as they have to.
    for source, count in enumerate(COUNTS):
        times = np.bincount(index[seen == source])
        times = times[times > 0]
        assert len(times) == count and times.max() - times.min() <= 1
    told = made.dataset.report
    assert told["share_by"] == "examples"
    assert [one["files"] for one in told["sources"]] == files
    assert [one["rows"] for one in told["sources"]] == [30, 12, 5]
    for one, share in zip(told["sources"], (0.5, 0.3, 0.2), strict=True):
        assert one["share_of_examples"] == pytest.approx(share, abs=0.01)
        assert "share_of_tokens" not in one


def test_a_curriculum_and_caps_of_records(build, tokenizer, parts):
    made = build(
        *("preference", []),
        files=",".join(parts("preference")),
        curriculum="0: 1, 0, 0; 20: 0, 1, 1",
        batch_size=4,
    )
    seen, _ = sources(made, tokenizer, range(40))
    assert set(seen[:20].ravel()) == {0} and set(seen[20:].ravel()) == {1, 2}
    with pytest.raises(UserError, match="every source is used up after 58 of 100"):
        build(
            *("preference", []),
            files=",".join(parts("preference")),
            shares=(1, 1, 1),
            epochs=(5, 5, 5),
            batch_size=4,
        )


def test_a_curriculum_of_prompts_that_are_sampled_in_excess(build, tokenizer, parts):
    made = build(
        *("group_policy", []),
        files=",".join(parts("group_policy")),
        curriculum="0: 1, 0, 0; 20: 0, 1, 1",
        batch_size=4,
        oversample=3,
        max_new_tokens=16,
    )
    seen, _ = sources(made, tokenizer, range(40))
    assert seen.shape == (40, 12)
    assert set(seen[:20].ravel()) == {0} and set(seen[20:].ravel()) == {1, 2}


def test_what_is_held_out_or_too_long_is_in_no_source(build, tokenizer, parts):
    files = parts("preference")
    with open(files[2], "a") as file:
        file.write(json.dumps(record("preference", 2, 9) | {"chosen": "No. " * 99}))
    made = build(
        *("preference", []),
        files=",".join(files),
        shares=(1, 1, 1),
        heldout=files[0],
        heldout_share=0.25,
        batch_size=6,
    )
    seen, index = sources(made, tokenizer, range(STEPS))
    assert np.bincount(seen.ravel()).tolist() == [2 * STEPS] * 3
    rows = made.dataset.rows
    assert set(index.ravel()) == set(range(rows))
    held = np.concatenate([b["index"] for b in made.heldout.epoch(6)])
    assert set(held[held >= 0]) == set(range(rows, rows + made.heldout.rows))
    assert made.dataset.report["dropped"] + rows + made.heldout.rows == 47 + 1 + 30


def test_rankings_count_as_the_rows_they_become(build, tmp_path):
    ranked = {"prompt": "What is 0 + 1?", "ranked": ["It is.", "Yes.", "No."]}
    pair = {"prompt": "What is 1 + 1?", "chosen": "It is.", "rejected": "No."}
    for name, one in (("a", ranked), ("b", pair)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(one) + "\n")
    files = f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
    for kind, rows in (("preference", [3, 1]), ("reward", [1, 1])):
        made = build(kind, [], files=files, shares=(1, 1))
        told = made.dataset.report["sources"]
        assert [one["rows"] for one in told] == rows
        assert [one["share_of_examples"] for one in told] == [0.5, 0.5]


def test_without_shares_nothing_changes(build, parts):
    """All records of all parts, in the order of the files."""
    files = parts("preference")
    made = build("preference", [], files=",".join(files), batch_size=4)
    assert made.dataset.mixture is None and "sources" not in made.dataset.report
    one = build("preference", [], files=f"{files[0]}, {files[1]},{files[2]}")
    assert made.dataset.digest == one.dataset.digest


@pytest.mark.parametrize(
    "more, told",
    [
        (dict(shares=(1.0,)), r"shares=\(1.0,\): expected a number of 0 or more"),
        (dict(curriculum="1: 1, 1"), "curriculum.* its steps are 1; expected 0 first"),
        (dict(epochs=(1, 1)), "epochs.*caps sources that are mixed; give data.shares"),
    ],
)
def test_impossible_mixtures_are_told_before_anything_is_read(more, told):
    c = defaults.experiment()
    c.stages.base = defaults.stage("language_model", data=dict(files="a"))
    c.stages.x = defaults.stage(
        "preference", start_from="base", data=dict(files="a,b", **more)
    )
    with pytest.raises(UserError, match=f"stages.x.data.{told}") as error:
        experiment.resolve(c)
    assert "\n" not in str(error.value)


def test_a_source_without_a_row_and_kinds_that_know_no_shares_are_told(build, parts):
    files = parts("preference")
    with open(files[1], "w") as file:
        file.write(json.dumps(record("preference", 1, 9) | {"chosen": "No. " * 99}))
    with pytest.raises(UserError, match="1.jsonl: has a share, but no row to learn"):
        build("preference", [], files=",".join(files), shares=(1, 1, 1))
    with pytest.raises(UserError, match="data.shares: unknown key"):
        defaults.stage("comparisons", data=dict(shares=(1, 1)))


def test_a_renamed_prompt_is_found_by_verifiers_under_our_name(build):
    records = [{"question": "What is 1 + 1?", "answer": 2}]
    made = build(
        *("policy", records), fields="prompt=question", batch_size=1, max_new_tokens=16
    )
    assert list(made.records) == [records[0] | {"prompt": "What is 1 + 1?"}]
