"""Conversations are rendered once; from the cache everything is as it was at first."""

import logging

import numpy as np
import pytest

from stagecraft.data import conversations, documents, readers, shards
from stagecraft.errors import UserError
from stagecraft.text import chat, tokenizer_json

ASKED = [f"What is {n} + 1?" for n in range(12)]
DEMONSTRATIONS = [{"prompt": p, "completion": f"It is {len(p)}."} for p in ASKED]
DEMONSTRATIONS += [DEMONSTRATIONS[0] | {"completion": "Long. " * 40}]
DEMONSTRATIONS[3]["input"] = "what nothing reads"
PAIRS = [{"prompt": p, "chosen": "It is.", "rejected": "No. " * 3} for p in ASKED]
PAIRS += [PAIRS[0] | {"rejected": "It is."}, PAIRS[1] | {"rejected": "No. " * 40}]
PAIRS[2]["margin"] = 0.1
RANKINGS = [{"prompt": p, "ranked": ["It is.", "No.", "So."]} for p in ASKED] + PAIRS
JUDGED = [d | {"label": n % 2 == 0} for n, d in enumerate(DEMONSTRATIONS)]
PROMPTS = [{"prompt": p, "answer": n, "of": [1.5]} for n, p in enumerate(ASKED)]
BAD = [{"prompt": 3, "completion": "a", "chosen": "b", "label": None}]

CASES = {
    "demonstrations": ("language_model", DEMONSTRATIONS, dict(format="demonstrations")),
    "padded": (
        "language_model",
        DEMONSTRATIONS,
        dict(format="demonstrations", packing="none", too_long="cut"),
    ),
    "pairs": ("preference", PAIRS, {}),
    "rankings": ("reward", RANKINGS, dict(too_long="cut")),
    "judgements": ("unpaired_preference", JUDGED, {}),
    "prompts": ("policy", PROMPTS, dict(max_new_tokens=8)),
}


def whole(made):
    """Returns everything that a stage is given, as values that can be compared."""
    batches = [made.dataset.batch_at(step) for step in range(4)]
    batches += list(made.heldout.epoch(4))
    return {
        "batches": [{k: v.tolist() for k, v in b.items()} for b in batches],
        "types": [{k: (v.dtype, v.shape) for k, v in b.items()} for b in batches],
        "rows": (made.dataset.rows, made.dataset.tokens, made.heldout.rows),
        "report": made.dataset.report,
        "reading": made.reading,
        "samples": list(made.samples),
        "prompts": list(made.prompts),
        "records": list(made.records),
        "asked": list(made.asked),
    }


@pytest.fixture
def rendering(monkeypatch):
    """Counts the records that are rendered."""
    count = []
    render = conversations._Renderer.__call__

    def counting(self, item):
        count.append(item[0])
        return render(self, item)

    monkeypatch.setattr(conversations._Renderer, "__call__", counting)
    return count


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", ["refuse", "drop"])
def test_from_the_cache_as_at_first(build, rendering, caplog, name, bad):
    kind, records, settings = CASES[name]
    settings = dict(length=48, heldout_share=0.3, max_loss=0.9, bad=bad) | settings
    settings = {k: v for k, v in settings.items() if name != "prompts" or k != "length"}
    records = records + BAD * (bad == "drop")
    caplog.set_level(logging.INFO, logger="stagecraft.data")
    made = []
    for _ in range(2):
        readers._log_once.cache_clear()
        caplog.clear()
        made.append(whole(build(kind, records, **settings)))
        said = [m for m in caplog.messages if "from the cache" not in m]
        made[-1]["said"] = said
    assert len(rendering) == len(set(rendering)) > 0  # each record once
    assert any("records of" in line for line in made[0]["said"])
    for key in made[0]:
        assert made[0][key] == made[1][key], key


@pytest.mark.parametrize("name", CASES)
def test_rows_on_disk_are_those_in_memory(build, monkeypatch, name):
    kind, records, settings = CASES[name]
    settings = dict(length=48, heldout_share=0.3, max_loss=0.9) | settings
    settings = {k: v for k, v in settings.items() if name != "prompts" or k != "length"}
    memory = build(kind, records, **settings)
    assert isinstance(memory.dataset.parts[0][0], dict)
    monkeypatch.setattr(documents, "_FEW", 0)
    disk = build(kind, records, **settings)
    assert not isinstance(disk.dataset.parts[0][0], dict)
    assert whole(disk) == whole(memory)


def test_what_decides_the_rows_alone_is_not_rendered_anew(build, rendering):
    kind, records, settings = CASES["demonstrations"]
    for more in ({}, dict(length=40), dict(heldout_share=0.4), dict(packing="none")):
        build(kind, records, max_loss=0.9, **settings, **more)
    assert len(rendering) == len(records)
    for number, more in enumerate((dict(turns="last"), dict(fields="prompt=prompt"))):
        build(kind, records, max_loss=0.9, **settings, **more)
        assert len(rendering) == (2 + number) * len(records)
    build(kind, records[1:], max_loss=0.9, **settings)
    assert len(rendering) == 4 * len(records) - 1


def test_a_refusal_is_the_same_and_leaves_nothing(build, tmp_path):
    kind, records, settings = CASES["demonstrations"]
    said = []
    for _ in range(2):
        with pytest.raises(UserError) as error:
            build(kind, records + BAD, **settings)
        said.append(str(error.value))
    assert said[0] == said[1] and "data.jsonl:14" in said[0]
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    build(kind, records, max_loss=0.9, **settings)
    for _ in range(2):  # of the rows, which no cache holds
        with pytest.raises(
            UserError, match=r"data.jsonl:13: 1 of .* longer than data.length=64"
        ):
            build(kind, records, too_long="refuse", length=64, **settings)


def test_places_are_named_as_the_file_is_now(build, tmp_path, rendering):
    kind, records, settings = CASES["demonstrations"]
    settings = settings | dict(bad="drop", max_loss=0.9)
    build(kind, records + BAD, **settings)
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "data.jsonl").rename(moved / "other.jsonl")
    count = len(rendering)
    again = build(kind, [], files=str(moved / "other.jsonl"), **settings)
    assert len(rendering) == count
    assert f"(first {moved / 'other.jsonl'}:14)" in again.reading["said"][0]


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_entry_is_made_again_with_a_line(
    build, tmp_path, rendering, caplog, how
):
    kind, records, _ = CASES["pairs"]
    settings = dict(length=48, heldout_share=0.3, max_loss=0.9)
    first = whole(build(kind, records, **settings))
    [mask] = (tmp_path / "cache").glob("*/mask-00000.bin")
    data = bytearray(mask.read_bytes())
    data[3] ^= 255
    mask.write_bytes(data if how == "flip" else data[:-2])
    if how == "gone":
        mask.unlink()
    again = whole(build(kind, records, **settings))
    assert again == first and len(rendering) == 2 * (len(records) - 1)
    lines = [m for m in caplog.messages if "made again" in m]
    assert len(lines) == 1 and str(mask) in lines[0]


def test_a_full_disk_is_one_line(build, monkeypatch, tmp_path):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards._File, "write", full)
    kind, records, settings = CASES["demonstrations"]
    with pytest.raises(UserError, match="No space left on device.*free space") as error:
        build(kind, records, **settings)
    assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_the_moment_of_a_template_is_part_of_the_key(build, tokenizer, rendering):
    class Dated:
        """The tokenizer as a template that reads the clock would keep it."""

        def __init__(self, moment):
            self.files = tokenizer.files | {tokenizer_json.MOMENT: moment}

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    kind, records, settings = CASES["demonstrations"]
    function = build.func
    for count, moment in ((1, b"2024-01-01"), (1, b"2024-01-01"), (2, b"2024-01-02")):
        function(Dated(moment), build.args[1], kind, records, max_loss=0.9, **settings)
        assert len(rendering) == count * len(records)


def test_what_is_said_meanwhile_is_listened_to():
    with chat.listening() as one, chat.listening() as two:
        chat.say("x")
    assert one == two == {"x"}
    with chat.listening() as later:
        pass
    assert not later and not chat._listeners


def test_bytes_beside_documents_survive_several_shards(tmp_path):
    values = [b"", b"a", b"bc" * 9, b""] * 3
    pairs = (([n, n], {"b": value, "n": n}) for n, value in enumerate(values))
    shards.write(
        tmp_path / "s",
        pairs,
        tokenizer_digest="0" * 64,
        vocab_size=99,
        columns=("b", "n"),
        shard_tokens=5,
    )
    read = shards.Shards(tmp_path / "s").verify()
    assert len(read.manifest["shards"]) > 2
    assert [read.bytes_of("b", n).tobytes() for n in range(12)] == values
    assert read.bytes_of("b", 2, 1, 3).tobytes() == b"cb"
    assert read.column("n").tolist() == list(range(12))


def test_masks_are_read_from_any_place(build, tmp_path):
    kind, records, settings = CASES["demonstrations"]
    build(kind, records, max_loss=0.9, **settings)
    [folder] = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    one = documents.Rendered([(shards.Shards(folder), [])], tuple)
    ids, mask = one.piece(0)
    assert mask.any() and not mask.all() and mask.sum() == one.learned()[0]
    for start in range(len(ids)):
        for stop in range(start, len(ids) + 2):
            some, part = one.piece(0, start, stop)
            assert some.tolist() == ids[start:stop].tolist()
            assert part.tolist() == mask[start:stop].tolist()
    assert one.learned(5).tolist() == [
        int(one.piece(n)[1][:5].sum()) for n in range(len(one))
    ]
    assert np.all(one.learned(10**6) == one.learned())
