"""The weights of whole models: matrices by name, pooled figures, folders and stages."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from stagecraft import sharding, storage, tree
from stagecraft.anatomy import changes, stored, weights
from stagecraft.checkpoint import Checkpoints
from stagecraft.errors import UserError
from stagecraft.lineage import StageRecord
from stagecraft.models import huggingface, locate, lora, saved
from stagecraft.models.transformer import Transformer
from tests import tiny


def random_tree(seed=0):
    random = np.random.default_rng(seed)
    shapes = {
        "embed": (10, 4),
        "layers/attention/query": (3, 4, 2, 2),  # [L, D, H, C]
        "layers/attention/out": (3, 2, 2, 4),
        "layers/attention/query_norm/scale": (3, 2),
        "layers/ff/down": (3, 6, 4),
        "norm/scale": (4,),
    }
    return {k: random.normal(size=v).astype(np.float32) for k, v in shapes.items()}


@pytest.fixture(scope="module")
def trees():
    before, noise = random_tree(), random_tree(1)
    after = {k: x + np.float32(0.1) * noise[k] for k, x in before.items()}
    after["norm/scale"] = before["norm/scale"]
    return before, after


def opened(parameters, layers=3):
    return stored.of_tree(parameters, tiny.config(layers=layers), "a")


def lines(before, after, **options):
    one, other = opened(before), opened(after)
    options = {"draws": 0} | options
    return [
        weights.compare(one.matrices[n], other.matrices[n], **options)
        for n in weights.shared(one, other)
    ]


def flat(*leaves):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])


def relative(before, after):
    return np.linalg.norm(after - before) / np.linalg.norm(before)


def test_pooled_figures_are_those_of_all_weights(trees):
    before, after = trees
    a, b = (flat(*t.values()) for t in trees)
    row = weights.pooled(lines(before, after, draws=2))
    assert row["relative_change"] == pytest.approx(relative(a, b), rel=1e-6)
    assert row["unchanged_exact"] == pytest.approx(4 / a.size)  # the last norm
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert row["cosine"] == pytest.approx(cosine, rel=1e-6)
    along = (b - a) @ a / np.linalg.norm(b - a) / np.linalg.norm(a)
    assert row["along"] == pytest.approx(along, rel=1e-5)
    assert row["weights"] == a.size and row["matrices"] == 14
    for null in row["null"]["isotropic"]:
        assert null["relative_change"] == pytest.approx(row["relative_change"], rel=0.3)


def test_figures_by_kind_and_by_layer(trees):
    before, after = trees
    rows = lines(before, after)
    kinds = weights.by(rows, "kind")
    assert set(kinds) == {"embed", "query", "output", "norm", "down"}
    q, q2 = (t["layers/attention/query"] for t in trees)
    expected = relative(flat(q), flat(q2))
    assert kinds["query"]["relative_change"] == pytest.approx(expected, rel=1e-6)
    norms = [
        flat(t["layers/attention/query_norm/scale"], t["norm/scale"]) for t in trees
    ]
    assert kinds["norm"]["relative_change"] == pytest.approx(relative(*norms), rel=1e-6)
    assert "effective_rank" not in kinds["norm"]
    layers = weights.by([r for r in rows if r["kind"] == "down"], "layer")
    for layer in range(3):
        a, b = (flat(t["layers/ff/down"][layer]) for t in trees)
        assert layers[layer]["relative_change"] == pytest.approx(
            relative(a, b), rel=1e-6
        )


def test_a_summary_has_the_null_beside_what_is_unchanged(trees):
    one, other = map(opened, trees)
    short = weights.summary(one, other)
    assert short["by_layer"].keys() == {"query", "output", "norm", "down"}
    assert len(short["by_layer"]["down"]) == 3
    assert short["null"]["relative_change"] == pytest.approx(
        short["relative_change"], rel=0.3
    )
    assert short["by_kind"]["query"]["full_rank"] == 4
    assert 0 < short["by_kind"]["query"]["effective_rank"] <= 4


def test_heads_fold_into_their_own_side():
    """Rank one as [out, in], and not when the heads are folded the other way."""
    random = np.random.default_rng(3)
    wide = np.outer(random.normal(size=8), random.normal(size=6)).astype(np.float32)
    after = {
        "layers/attention/query": wide.reshape(1, 8, 2, 3),
        "layers/attention/out": np.ascontiguousarray(wide.T).reshape(1, 2, 3, 8),
    }
    zero = {name: 0 * x for name, x in after.items()}
    one, other = opened(zero, 1), opened(after, 1)
    name = "layers/0/attention/query"
    np.testing.assert_array_equal(other.matrices[name].read(), wide.T)
    name = "layers/0/attention/out"
    np.testing.assert_array_equal(other.matrices[name].read(), wide)
    for name in weights.shared(one, other):
        row = weights.compare(one.matrices[name], other.matrices[name], draws=1)
        assert row["effective_rank"] == pytest.approx(1, abs=1e-5)
        assert row["full_rank"] == 6
        assert row["relative_change"] is None  # from nothing: no relative size


def test_experts_and_biases_have_names_of_their_own():
    config = tiny.config(
        layers=3, experts=2, expert_width=6, sparse=(False, True, False)
    )
    parameters = {
        "layers/dense/ff/up": np.ones((2, 4, 6), np.float32),
        "layers/dense/ff/up_bias": np.ones((2, 6), np.float32),
        "layers/sparse/experts/down": np.ones((1, 2, 6, 4), np.float32),
        "layers/sparse/experts/router": np.ones((1, 4, 2), np.float32),
    }
    matrices = stored.of_tree(parameters, config).matrices
    shapes = {name: m.shape for name, m in matrices.items()}
    assert shapes == {
        "layers/0/ff/up": (6, 4),
        "layers/2/ff/up": (6, 4),
        "layers/0/ff/up_bias": (6,),
        "layers/2/ff/up_bias": (6,),
        "layers/1/experts/0/down": (4, 6),
        "layers/1/experts/1/down": (4, 6),
        "layers/1/experts/router": (2, 4),
    }
    assert matrices["layers/1/experts/1/down"].kind == "expert_down"
    assert matrices["layers/1/experts/router"].kind == "router"


def test_the_body_of_a_scalar_model_is_compared():
    body = random_tree()
    scalar = {f"body/{name}": x for name, x in body.items()}
    one, other = opened(body), opened(scalar | {"head": np.ones(4, np.float32)})
    assert set(weights.shared(one, other)) == set(one.matrices)
    assert set(other.matrices) - set(one.matrices) == {"head"}


def test_amounts_of_layers_are_equal_or_not():
    assert weights.gini([3, 3, 3, 3]) == 0
    assert weights.gini([0, 0, 0, 5]) == pytest.approx(0.75)
    assert weights.gini([0, 0]) == 0
    x = np.random.default_rng(0).random(9)
    pairs = np.mean([abs(a - b) for a in x for b in x])
    assert weights.gini(x) == pytest.approx(pairs / 2 / x.mean())


# -- stages and folders ----------------------------------------------------------------


@functools.cache
def transformer(seed=0, **changes):
    config = tiny.config(layers=2, **changes)
    return jax.jit(lambda key: Transformer(config, key))(jax.random.key(seed))


def moved(model, seed, scale=0.01):
    random = np.random.default_rng(seed)

    def one(x):
        noise = scale * random.normal(size=x.shape)
        return jax.numpy.asarray(np.asarray(x) + noise.astype(np.float32))

    return jax.tree.map(one, model)


def write_stage(root, name, model, parent, *, finished=True):
    checkpoints = Checkpoints(root / name / "checkpoints")
    checkpoints.save(3, model, {"step": 3}, {})
    checkpoints.close()
    record = StageRecord("language_model", parent, finished, **saved.describe(model))
    record.write(root / name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four stages: pretrain, sft, two seeds of dpo from it; ppo goes on."""
    root = tmp_path_factory.mktemp("run")
    models = {"pretrain": transformer()}
    parents = {
        "pretrain": "",
        "sft": "pretrain",
        "dpo_seed0": "sft",
        "dpo_seed1": "sft",
    }
    for seed, (name, parent) in enumerate(parents.items()):
        if parent:
            models[name] = moved(models[parent], seed)
        write_stage(root, name, models[name], parent)
    write_stage(root, "ppo", models["sft"], "sft", finished=False)
    kinds = dict.fromkeys(parents, "language_model") | {"ppo": "policy"}
    starts = parents | {"ppo": "sft"}
    stages = {n: {"kind": k, "start_from": starts[n]} for n, k in kinds.items()}
    storage.write_json(root / "config.json", {"stages": stages})
    rows = [{"step": s, "learning_rate": 0.1} for s in (1, 10)]
    lines = "".join(storage.to_json(row) + "\n" for row in rows)
    (root / "sft" / "metrics.jsonl").write_text(lines)
    return root, models


def test_a_checkpoint_is_read_matrix_by_matrix(run):
    root, models = run
    weights_ = stored.weights_of(locate.locate(str(root / "sft")))
    expected = stored.of_tree(models["sft"], models["sft"].config).matrices
    assert list(weights_.matrices) == list(expected)
    for name, one in weights_.matrices.items():
        np.testing.assert_array_equal(one.read(), expected[name].read())
        assert one[:5] == expected[name][:5] and one.read().shape == one.shape


@pytest.mark.parametrize(
    "changes",
    [{}, {"family": "gpt2"}],
    ids=["qwen3", "gpt2"],
)
def test_a_folder_has_the_same_matrices(tmp_path, changes):
    """GPT-2's are stored the other way round, its queries, keys and values as one."""
    if changes.pop("family", ""):
        changes = dict(
            **{"norm": "layer", "positions": "learned", "gated": False},
            **{"qkv_bias": True, "out_bias": True, "ff_bias": True, "qk_norm": False},
            **{"kv_heads": 4, "activation": "gelu_tanh", "ff_width": 128},
        )
    model = transformer(**changes)
    dtype, stored_as = ("bfloat16", "BF16") if changes else ("float32", "F32")
    huggingface.save(model, tmp_path / "folder", dtype=dtype)
    found = stored.weights_of(locate.locate(f"hf:{tmp_path / 'folder'}")).matrices
    expected = stored.of_tree(model, model.config).matrices
    assert found.keys() == expected.keys()
    for name, one in found.items():
        array = expected[name].read()
        if stored_as == "BF16":
            array = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(one.read(), array)
        assert (one.kind, one.layer, one.dtype) == (*expected[name][1:3], stored_as)


def test_an_adapter_is_merged_matrix_by_matrix(tmp_path):
    base = transformer()
    write_stage(tmp_path, "base", base, "")
    settings = lora.Settings(2, 4.0, "all", 0.0, False, embeddings=True)
    adapter = moved(lora.init(settings, base, jax.random.key(1)), 5, 0.1)
    lineage = {
        "stages": {"base": {"kind": "", "start_from": "", "parents": {}, "id": "x"}}
    }
    storage.write_json(tmp_path / "lineage.json", lineage)
    checkpoints = Checkpoints(tmp_path / "sft" / "checkpoints")
    checkpoints.save(1, adapter, {"step": 1}, {})
    checkpoints.close()
    record = {
        **{"kind": "language_model", "start_from": "base", "finished": True},
        **{"lora": vars(settings), "base": {"name": "../base", "id": "x"}},
        **saved.describe(base),
    }
    StageRecord.from_json(record).write(tmp_path / "sft")
    with jax.set_mesh(sharding.make_mesh()):  # as within a run on several devices
        found = stored.weights_of(locate.locate(str(tmp_path / "sft"))).matrices
    expected = stored.of_tree(lora.merge(base, adapter), base.config).matrices
    assert found.keys() == expected.keys()
    for name, one in found.items():
        np.testing.assert_allclose(one.read(), expected[name].read(), atol=2e-6)


def test_a_run_is_compared_stage_by_stage(run, tmp_path):
    root, models = run
    found = changes.of_run(root, to=tmp_path, draws=1)
    pairs = [(c["stage"], c["against"], c["role"]) for c in found["comparisons"]]
    assert pairs == [
        ("sft", "pretrain", "parent"),
        ("dpo_seed0", "sft", "parent"),
        ("dpo_seed0", "pretrain", "pretraining"),
        ("dpo_seed1", "sft", "parent"),
        ("dpo_seed1", "pretrain", "pretraining"),
    ]
    first = found["comparisons"][0]
    a, b = (flat(*tree.named(models[n]).values()) for n in ("pretrain", "sft"))
    assert first["relative_change"] == pytest.approx(relative(a, b), rel=1e-6)
    expected = np.linalg.norm(b - a) / a.size**0.5 / (10 * 0.1)
    assert first["directedness"] == pytest.approx(expected, rel=1e-6)
    assert found["notes"] == ["ppo is not finished and left out."]
    one = found["matrices"][1]
    assert {
        "kind",
        "layer",
        "name",
        "relative_change",
        "rank",
        "effective_rank",
    } <= set(one)
    low, mean, high = one["null"]["isotropic"]["effective_rank"]
    assert low == mean == high
    rows = {tuple(r["stages"]): r for r in found["between"]}
    assert len(rows) == 3 and abs(rows["dpo_seed0", "dpo_seed1"]["cosine"]) < 0.05
    assert storage.read_json(tmp_path / changes.TABLES) == dict(found)
    assert "same in bf16" in found._repr_html_()


def test_what_was_compared_is_not_computed_again(run, tmp_path, monkeypatch):
    root, _ = run
    options = {"stages": ["sft"], "to": tmp_path, "draws": 1, "depth": "none"}
    whole = dict(changes.of_run(root, **options))
    path = tmp_path / changes.LINES
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:5]) + kept[5][:30])  # as a killed process leaves it
    count = []
    real = weights.compare
    monkeypatch.setattr(
        weights, "compare", lambda *a, **k: count.append(0) or real(*a, **k)
    )
    assert dict(changes.of_run(root, **options)) == whole
    assert len(count) == len(whole["matrices"]) - 5
    changes.of_run(root, **options)
    assert len(count) == len(whole["matrices"]) - 5
    changes.of_run(root, **options | {"seed": 1})
    assert len(count) == 2 * len(whole["matrices"]) - 5


def test_a_stage_that_began_there_too_is_a_null(run, tmp_path):
    root, _ = run
    options = {"stages": ["dpo_seed0", "sft"], "to": tmp_path, "depth": "none"}
    found = changes.of_run(root, nulls=["dpo_seed1"], **options)
    nulls = {(c["stage"], c["role"]): set(c["null"]) for c in found["comparisons"]}
    assert nulls["dpo_seed0", "parent"] == {"isotropic", "dpo_seed1"}
    assert nulls["dpo_seed0", "pretraining"] == nulls["sft", "parent"] == {"isotropic"}
    own = changes.of_run(root, **options | {"stages": ["dpo_seed1"]})["comparisons"][0]
    null = found["comparisons"][0]["null"]["dpo_seed1"]["relative_change"]
    assert null == [own["relative_change"]] * 3
    with pytest.raises(UserError, match="--null=pretrain: started from no parent"):
        changes.of_run(root, nulls=["pretrain"], **options)


@pytest.mark.parametrize("depth", ["top", "none"])
def test_less_of_the_spectra_is_the_same_of_what_is_left(run, tmp_path, depth):
    root, _ = run
    one, two = (
        changes.of_run(root, stages=["sft"], to=tmp_path / d, depth=d, draws=0)
        for d in ("all", depth)
    )
    for whole, less in zip(one["matrices"], two["matrices"], strict=True):
        assert ("rank" in less) == ("nss" in less) == False  # noqa: E712
        assert ("rotation_write" in less) == (
            depth == "top" and len(less["shape"]) == 2
        )
        for key in less.keys() - {"null"}:
            near = pytest.approx(whole[key], rel=1e-6, abs=1e-9)
            assert less[key] == (near if isinstance(less[key], float) else whole[key])


def test_what_cannot_be_compared_is_one_line(run, tmp_path):
    root, models = run
    to = {"to": tmp_path / "out"}
    with pytest.raises(UserError, match="--stages"):
        changes.of_run(root, stages=["spt"], **to)
    with pytest.raises(UserError, match="not finished; run it again"):
        changes.of_run(root, stages=["ppo"], **to)
    with pytest.raises(UserError, match="no run here"):
        changes.of_run(tmp_path, **to)
    with pytest.raises(UserError, match="--spectra"):
        changes.of_run(root, depth="al", **to)
    before, wide = tmp_path / "before", tmp_path / "wide"
    huggingface.save(models["sft"], before)
    huggingface.save(transformer(ff_width=96), wide)
    with pytest.raises(UserError, match=r"its ff_width is 96, that of .* is 64"):
        changes.of_pair(f"hf:{before}", f"hf:{wide}", **to)
    huggingface.save(transformer(9), tmp_path / "apart")
    with pytest.raises(UserError, match="shares no lineage with"):
        changes.of_pair(f"hf:{before}", f"hf:{tmp_path / 'apart'}", **to)
    found = changes.of_pair(f"hf:{before}", str(root / "dpo_seed0"), **to, draws=0)
    assert found["comparisons"][0]["role"] == "before"
    assert found["notes"] == []
