"""Grafts of real models on answers: divergences by numpy, and a layer that did it."""

import jax
import numpy as np
import pytest

from stagecraft import storage, tree
from stagecraft.anatomy import causes, grafts, lens
from stagecraft.anatomy.texts import NEW_TOKENS, Texts, read_prompts
from stagecraft.errors import UserError
from stagecraft.models.transformer import Transformer
from stagecraft.report import anatomy_page
from tests import tiny
from tests.command_line import stagecraft


@pytest.fixture(scope="module")
def models():
    """A, and B which differs from it in the second layer's down projection alone."""
    config = tiny.config(layers=2)
    a = jax.jit(lambda key: Transformer(config, key))(jax.random.key(0))
    name = "layers/ff/down"

    def moved(one, array):
        if one != name:
            return array
        out = np.array(array)
        noise = np.random.default_rng(0).normal(size=out[1].shape)
        out[1] += 0.2 * noise.astype(np.float32)
        return jax.numpy.asarray(out)

    return a, tree.map_names(moved, a)


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(1)
    rows = [
        (random.integers(1, 64, n).tolist(), random.integers(1, 64, m).tolist())
        for n, m in ((3, 9), (5, 4), (2, 10), (4, 8)) * 3
    ]
    return Texts.of(rows), rows


@pytest.fixture(scope="module")
def found(models, texts):
    return causes.compare(*models, texts[0], texts[0])


def logits(model, row):
    ids = np.asarray([[*row[0], *row[1]]], np.int32)
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    return np.asarray(model.logits(ids, positions, np.ones_like(ids)))[0]


def test_the_divergence_is_that_of_the_answers_tokens(models, texts, found):
    a, b = models
    rows = []
    for row in texts[1]:
        predicts = slice(len(row[0]) - 1, -1)
        one, other = (logits(m, row)[predicts] for m in (b, a))
        rows.append(lens.kl(one, other).mean())
    assert found["divergence"] == pytest.approx(np.mean(rows), rel=1e-4)
    error = np.std(rows, ddof=1) / len(rows) ** 0.5
    assert found["standard_error"] == pytest.approx(error, rel=1e-3)


def test_the_layer_and_the_kind_that_changed_did_it(found):
    for key, player in (("layers", "layer 1"), ("kinds", "down")):
        for name, row in found[key]["players"].items():
            expected = float(name == player)
            for figure in ("sufficiency", "necessity", "shapley", "norm_share"):
                assert row[figure] == pytest.approx(expected, abs=1e-5)
    assert found["path"]["said"]["values"][-1] > 0
    said = dict(
        zip(
            found["path"]["said"]["steps"], found["path"]["said"]["values"], strict=True
        )
    )
    assert said[1.0] == pytest.approx(0, abs=1e-6)
    assert said[0.0] == pytest.approx(found["divergence"], rel=1e-5)


def test_directions_of_the_stream_add_up_to_all_of_them(models, found):
    subspaces = found["subspaces"]
    assert subspaces["full"] == pytest.approx(1, abs=1e-4)
    assert subspaces["directions"] == [1, 2, 4, 8, 16]
    for name in ("logits", "change", "random"):
        energy = subspaces[f"{name}_energy"]
        assert energy == sorted(energy) and 0 < energy[0] < energy[-1] < 1
    # Its own first directions hold more of a change than any others do.
    assert subspaces["change_energy"][2] > subspaces["random_energy"][2]
    share = [k / 32 for k in subspaces["directions"]]
    assert subspaces["random_energy"] == pytest.approx(share, abs=0.12)
    gains = found["gains"]
    assert gains["layers/0/ff/down"] is None and gains["embed"] is None
    change = np.subtract(
        *(
            np.asarray(tree.named(m)["layers/ff/down"], np.float64)[1]
            for m in models[::-1]
        )
    )
    assert gains["layers/1/ff/down"] == pytest.approx(1, abs=0.5)
    assert change.any()


def test_the_last_layer_says_what_the_model_says(models, texts, found):
    for model in ("before", "after"):
        for kind in ("linear", "logit"):
            values = found["lenses"][model][kind]
            assert len(values) == 2 and values[-1] < 1e-4 < values[0]
    few = Texts.of(texts[1][:2])
    assert causes.lenses(*models, few, texts[0])["before"]["linear"] is None
    streams = np.asarray(causes._streams(models[0], texts[0].batch))
    expected = models[0].hidden(
        *(texts[0].batch[k] for k in ("ids", "positions", "segments"))
    )
    np.testing.assert_allclose(models[0].norm(streams[-1]), expected, atol=1e-5)


def test_the_page_says_which_part_did_it(found):
    shown = anatomy_page._causes(
        {"sft": found, "dpo": {"refused": "too little"}},
        {n: {"name": n, "index": 0} for n in ("sft", "dpo")},
    )
    first = shown[0]["tables"][0]
    assert (
        first["title"] == "sft: layer 1 did 100% of it with 100% of the squared change"
    )
    assert not any(row["broken"] for row in first["rows"])
    assert shown[1]["refused"] == "too little"


def test_prompts_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b"}\n{"prompt": "c"}\n')
    assert read_prompts(str(path)) == ["a b", "c"]
    assert len(grafts.STEPS) == 11


def test_stages_of_a_run_answer_in_their_own_form(tiny_run, tmp_path, monkeypatch):
    """Marks of turns are new to a stage whose parent read bare text."""
    seen = {}

    def compare(before, after, own, said, *, new_tokens):
        length = np.asarray(said.batch["mask"]).sum(axis=1)
        assert 0 < length.min() <= length.max() <= NEW_TOKENS
        ids = [{*np.asarray(t.batch["ids"])[0].tolist()} for t in (own, said)]
        seen[len(seen)] = (new_tokens, *ids)
        return {"asked": len(length)}

    monkeypatch.setattr(causes, "compare", compare)
    files = str(tiny_run / "world" / "prompts.jsonl")
    found = causes.of_run(tiny_run, files, stages=["sft", "dpo"], to=tmp_path)
    assert set(found) == {"sft", "dpo"} and len(seen) == 2
    assert storage.read_json(tmp_path / causes.TABLES) == found
    (marks, bare, turn), (none, *turns) = seen.values()
    user = marks[1]
    assert len(marks) == 4 and none == ()
    assert user not in bare and all(user in ids for ids in (turn, *turns))
    with pytest.raises(UserError, match="no stage reward that writes text"):
        causes.of_run(tiny_run, files, stages=["reward"], to=tmp_path)


def test_the_command_writes_the_page_of_a_run(tiny_run, tmp_path):
    flags = ["--stages=sft", "--spectra=top", "--draws=1", f"--to={tmp_path}"]
    status, out, error = stagecraft("anatomy", f"--workdir={tiny_run}", *flags)
    assert status == 0, error
    assert str(tmp_path / "anatomy.html") in out and "noise" in out
    assert "against pretrain" in (tmp_path / "anatomy.html").read_text()
