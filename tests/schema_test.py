"""Configs refuse what they do not know, in one line with the nearest name."""

import math

import pytest
from ml_collections import ConfigDict

from stagecraft import defaults, schema
from stagecraft.errors import UserError
from stagecraft.models.config import ModelConfig
from stagecraft.signals import protocol


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stepz": 1}, "stepz: unknown key; did you mean 'steps'"),
        ({"optimizer": {"lrr": 1}}, r"optimizer\.lrr: unknown key; did you mean 'lr'"),
        ({"steps": "many"}, "steps='many': expected a whole number, got str"),
        ({"steps": 1.5}, r"steps=1\.5: expected a whole number, got float"),
        ({"steps": True}, "expected a whole number, got bool"),
        ({"optimizer": 3}, r"optimizer=3: expected a group of keys"),
        ({"data": {"buckets": 4}}, r"data\.buckets=4: expected a tuple"),
    ],
)
def test_refusals(changes, says):
    with pytest.raises(UserError, match=says) as error:
        defaults.stage("language_model", **changes)
    assert "\n" not in str(error.value)


def test_what_fits_is_taken():
    stage = defaults.stage(
        "preference", optimizer=dict(lr=1), data=dict(buckets=[8, 16]), objective=len
    )
    assert stage.optimizer.lr == 1.0 and isinstance(stage.optimizer.lr, float)
    assert stage.data.buckets == (8, 16)
    assert stage.objective is len
    assert schema.plain(stage)["objective"] == "builtins:len"


def test_an_unknown_kind_lists_the_known():
    with pytest.raises(UserError, match="there are language_model, reward"):
        defaults.stage("rewards")


def test_difference_finds_the_first_key():
    one = schema.plain(ConfigDict(dict(a=1, b=dict(c=(1, 2)))))
    two = schema.plain(ConfigDict(dict(a=1, b=dict(c=(1, 3)))))
    assert schema.difference(one, two) == "b.c: [1, 2] -> [1, 3]"
    assert schema.difference(one, one) == ""


def test_objects_are_imported_by_name():
    assert schema.imported("rater", "math:gcd") is math.gcd
    assert schema.imported("rater", math.gcd) is math.gcd


def test_a_function_of_a_file_is_found_from_any_folder(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "neighbour_of_rewards.py").write_text("BONUS = 2\n")
    (folder / "math.py").write_text(
        "import neighbour_of_rewards\n"
        "def score(completions, **kw):\n    return [neighbour_of_rewards.BONUS]\n"
    )
    score = schema.imported("verifiers", f"{folder}/math.py:score")
    assert score(["a"]) == [2] and schema.imported("rater", "math:gcd") is math.gcd
    monkeypatch.chdir(folder)
    assert schema.imported("verifiers", "math.py:score") is score  # run once
    assert "BONUS" in protocol.source(score)


@pytest.mark.parametrize(
    ("text", "function", "says"),
    [
        (None, "f", r"cannot import it \(no such file\); expected"),
        ("def score(): pass", "scores", r"has no 'scores'\); did you mean 'score'\?"),
        ("import no_such", "f", "cannot import it .No module named 'no_such'"),
        ("raise RuntimeError('no\\nway')", "f", "it raised RuntimeError: no way"),
        ("def f(:", "f", "it raised SyntaxError: "),
    ],
)
def test_a_file_without_the_function_is_one_line(tmp_path, text, function, says):
    path = tmp_path / "rewards.py"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        schema.imported("verifiers", f"{path}:{function}")
    assert "\n" not in str(error.value) and f"verifiers='{path}:" in str(error.value)


@pytest.mark.parametrize("spec", ["math", "math:gdc", "no_such_module:f", ":f", ""])
def test_a_name_that_cannot_be_imported_is_refused(spec):
    says = f"rater={spec!r}: cannot import it .*; .*expected 'package.module:function'"
    with pytest.raises(UserError, match=says):
        schema.imported("rater", spec)


def test_the_decoders_keys_are_the_fields_of_its_config():
    config = ModelConfig(vocab_size=7, **defaults.model())
    assert config == ModelConfig(vocab_size=7) and config.max_length == 256
