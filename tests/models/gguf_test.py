"""Models in GGUF files: what is read, and what is refused in a line."""

import jax
import numpy as np
import pytest
from gguf import RopeScalingType

from stagecraft import exchange, tree
from stagecraft.errors import UserError
from stagecraft.models import gguf as reader
from stagecraft.models import locate
from stagecraft.models.language import Language
from stagecraft.models.transformer import Transformer
from stagecraft.run import open_run
from stagecraft.text import tokenizer as tokenizers
from tests import tiny
from tests.models import gguf_files
from tests.text import families

MESSAGES = [{"role": "user", "content": "Who <|im_end|> are you?"}]
SIZES = dict(layers=2, family="llama", qk_norm=False)
CUT = "Größe 🦊 isn't 12345,\n\n  東京 <think> e\u0301"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer's folder."""
    return families.folder(tmp_path_factory.mktemp("tokenizer"), "chatml", "bytes")


@pytest.fixture(scope="module")
def model(folder):
    size = tokenizers.load(folder).vocab_size
    config = tiny.config(vocab_size=size, tied=False, **SIZES)
    return Transformer(config, jax.random.key(3))


@pytest.fixture
def write(tmp_path, model, folder):
    """Writes the model as a GGUF file; see `gguf_files.write`."""

    def write(name="it.gguf", tokenizer=folder, **settings):
        return gguf_files.write(tmp_path / name, model, tokenizer, **settings)

    return write


def load(path):
    with jax.set_mesh(tiny.single()):
        return locate.locate(f"gguf:{path}").load(tiny.single())


def test_a_model_is_read_as_it_was_written(write, model):
    path = write()
    there = locate.locate(f"gguf:{path}")
    got, want = tree.named(load(path)), tree.named(model)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert there.outward and there.info()["model"]["max_length"] == 64
    there.examine(tiny.single(), module="transformer")
    assert len(there.id()) == 64 and there.seen_from("run/a") == f"gguf:{path}"
    assert locate.locate(there.seen_from("run/a")).folder == path


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen2", dict(qk_norm=False, qkv_bias=True)), ("qwen3", dict(qk_norm=True))],
)
def test_other_architectures_have_their_rows_in_order(tmp_path, family, settings):
    config = tiny.config(family=family, layers=2, **settings)
    model = Transformer(config, jax.random.key(5))
    path = gguf_files.write(tmp_path / "it.gguf", model, None)
    got, want = tree.named(load(path)), tree.named(model)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_a_file_is_imported_as_a_run(write, tmp_path, model, folder):
    exchange.import_folder(f"gguf:{write()}", tmp_path / "run")
    run = open_run(tmp_path / "run")
    with jax.set_mesh(run.mesh()):
        got, want = run.language("base", 8), Language(model, tokenizers.load(folder))
        asked = [got.encode(MESSAGES, chat_format=run.chat_format("base"))]
        assert asked == [want.encode(MESSAGES, chat_format=True)]
    for name, array in tree.named(got.model).items():
        np.testing.assert_array_equal(array, tree.named(model)[name])
    entry = run.lineage().stages["base"]
    assert entry.start_from.startswith("gguf:") and entry.parents["start_from"]["id"]


def test_blocks_are_dequantised(write, model):
    got, want = tree.named(load(write(quantised="F16"))), tree.named(model)
    for name in want:
        half = want[name].astype(np.float16) if "norm" not in name else want[name]
        np.testing.assert_array_equal(got[name], half.astype(np.float32), err_msg=name)
    got = tree.named(load(write("q.gguf", quantised="Q8_0")))
    for name in want:
        error = np.abs(got[name] - want[name]).max()
        assert error <= np.abs(want[name]).max() / 127 and (error > 0) == (
            "norm" not in name
        )


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_a_tokenizer_is_that_of_its_folder(write, tmp_path, name):
    own = families.folder(tmp_path / "own", name, "bytes")
    path = tmp_path / "it.gguf"
    one = tokenizers.load(own)
    config = tiny.config(vocab_size=one.vocab_size, **SIZES)

    def cut(writer):  # the pattern that the folder's tokenizer has
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "llama-bpe"

    gguf_files.write(path, Transformer(config, jax.random.key(0)), own, change=cut)
    other = tokenizers.load(f"gguf:{path}")
    assert other.encode(CUT) == one.encode(CUT)
    assert other.decode(other.encode(CUT)) == CUT
    for field in ("bos", "eos", "stops", "control_ids", "vocab_size", "named_bos"):
        assert getattr(other, field) == getattr(one, field)
    assert other.template.text(MESSAGES, None) == one.template.text(MESSAGES, None)
    tokenizers.keep(other, tmp_path / "kept")
    again = tokenizers.load(tmp_path / "kept")
    assert again.digest == other.digest and again.encode(CUT) == other.encode(CUT)


def test_how_text_is_cut_is_read_from_its_name(write):
    """Digits apart, in threes, or as a word; composed or not."""

    def pieces(pre):
        def change(writer):
            writer.kv_data[0]["tokenizer.ggml.pre"].value = pre

        tokenizer = tokenizers.load(write(f"{pre}.gguf", change=change))
        inner = tokenizer._inner
        text = "it'S 1234 e\u0301"
        if inner.normalizer is not None:
            text = inner.normalizer.normalize_str(text)
        return [piece for piece, _ in inner.pre_tokenizer.pre_tokenize_str(text)]

    e, accent, composed = "Ġe", "Ìģ", "ĠÃ©"
    assert pieces("gpt-2") == ["it", "'", "S", "Ġ1234", e, accent]
    assert pieces("smollm") == ["it", "'", "S", "Ġ", *"1234", e, accent]
    assert pieces("llama-bpe") == ["it", "'S", "Ġ", "123", "4", e, accent]
    assert pieces("qwen2") == ["it", "'S", "Ġ", *"1234", composed]


def value(key, new):
    def change(writer):
        entries = writer.kv_data[0]
        if new is None:
            del entries[key]
        else:
            entries[key].value = new

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (value("general.architecture", "mamba"), "architecture='mamba' is not read"),
        (value("llama.block_count", None), "has no llama.block_count in its metadata"),
        (value("llama.block_count", 3), "lacks model.layers.2..*, which its metadata"),
        (value("llama.rope.dimension_count", 4), "rope.dimension_count=4: heads that"),
        (
            lambda w: w.add_expert_count(4),
            "llama.expert_count=4: a setting that is not",
        ),
        (
            lambda w: w.add_rope_scaling_type(RopeScalingType.YARN),
            "rope.scaling.type='yarn' is not",
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)),
            "holds rope_freqs.weight, frequencies",
        ),
        (
            lambda w: w.add_tensor("odd.weight", np.ones(4, np.float32)),
            "holds .*odd.weight, which no llama of its metadata has",
        ),
    ],
)
def test_a_model_that_is_not_known_is_one_line(write, change, says):
    path = write(change=change)
    with pytest.raises(UserError, match=says) as error:
        locate.locate(f"gguf:{path}").examine(tiny.single())
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (value("tokenizer.ggml.model", None), "has no tokenizer.ggml.model"),
        (value("tokenizer.ggml.model", "llama"), "model='llama' is not read from"),
        (value("tokenizer.ggml.pre", "falcon"), "pre='falcon': how its text is cut is"),
        (value("tokenizer.ggml.pre", None), "pre='': how its text is cut is not known"),
        (value("tokenizer.ggml.merges", None), "has no tokenizer.ggml.merges"),
        (value("tokenizer.ggml.merges", ["a"]), "merges: expected pairs"),
        (value("tokenizer.ggml.eos_token_id", 9999), "=9999 is no id of its"),
        (value("tokenizer.ggml.tokens", ["a", "a"]), "holds a token twice"),
        (value("tokenizer.ggml.token_type", [1, 1]), "has 2 entries for"),
        (value("tokenizer.ggml.eos_token_id", None), "which token ends a text"),
        (value("tokenizer.ggml.add_bos_token", True), "no tokenizer.ggml.bos_token_id"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_one_line(write, change, says):
    path = write(change=change)
    with pytest.raises(UserError, match=says) as error:
        tokenizers.load(f"gguf:{path}")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_files_that_are_none_or_cut_short_are_one_line(write, tmp_path):
    whole = write().read_bytes()
    for name, data, says in (
        ("none.gguf", None, "no such file"),
        ("empty.gguf", b"", "not a GGUF file"),
        ("other.gguf", b"PK" + whole[2:], "not a GGUF file"),
        ("head.gguf", whole[:100], "damaged or cut short"),
        ("tokens.gguf", whole[:3000], "damaged or cut short"),
        ("weights.gguf", whole[:-5000], "damaged or cut short"),
        ("version.gguf", whole[:4] + b"\x63" + whole[5:], "damaged or cut short"),
    ):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: {says}") as error:
            locate.locate(f"gguf:{path}").info()
        assert "\n" not in str(error.value)


def test_rows_of_queries_and_keys_come_back():
    array = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(24, 5)

    class Tensor:
        data, tensor_type = gguf_files.permuted(array, 3), 0

    got = reader.Quantised(None, array.shape, Tensor, heads=3).open()
    np.testing.assert_array_equal(got, array)
    assert not np.array_equal(Tensor.data, array)
