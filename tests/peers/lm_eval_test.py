"""Local tasks, answered by us and by the harness's own Hugging Face backend.

The model is exported and opened there; every answer to every request must be the same.
"""

import json

import jax
import lm_eval
import numpy as np
import pytest
import yaml

from stagecraft import sharding
from stagecraft.anatomy import evaluate
from stagecraft.errors import UserError
from stagecraft.models import huggingface
from stagecraft.models.config import ModelConfig
from stagecraft.models.language import Language
from stagecraft.models.transformer import Transformer
from stagecraft.text import tokenizer as tokenizers
from tests.text import families

pytestmark = pytest.mark.peers

CONTEXT = 64
DOCUMENTS = 10
# Of harmless settings: what all tasks have in common.
SHARED = {
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "test",
    "doc_to_text": "Q: {{question}}\nA:",
}
ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [ACCURACY],
    },
    "free": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        # In no control token: theirs looks for it in those too, and ours does not.
        "generation_kwargs": {"until": [":", "\n"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
    "begun": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "gen_prefix": "It is",
        "generation_kwargs": {"until": [], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def write_tasks(folder, rng, name):
    """YAML files over one file of random documents."""
    folder.mkdir()
    rows = []
    for _ in range(DOCUMENTS):
        choices = [" " + families.words(rng, name) + "!" for _ in range(3)]
        row = {"question": families.words(rng, name), "choices": choices}
        row["answer"] = int(rng.integers(3))
        row["text"] = families.words(rng, name, most=60) + "."
        rows.append(row)
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for task, settings in TASKS.items():
        config = {"task": task, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        text = yaml.safe_dump(SHARED | settings | config)
        (folder / f"{task}.yaml").write_text(text, encoding="utf-8")


def export(model, tokenizer, folder):
    ids = dict(
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.pad,
    )

    def extra(temporary):
        for path, data in tokenizer.files.items():
            (temporary / path).write_bytes(data)

    stops = {"eos_token_id": sorted(tokenizer.stops)}
    huggingface.save(model, folder, ids=ids, generation=ids | stops, extra=extra)


def answers(model, tasks, **settings):
    """{task: [what the model answered to each request]} and {task: metrics}."""
    specs, manager = evaluate._tasks([str(tasks)])
    got = lm_eval.simple_evaluate(
        model=model,
        tasks=specs,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        **settings,
    )
    samples = {
        task: [one["resps"] for one in sorted(rows, key=lambda row: row["doc_id"])]
        for task, rows in got["samples"].items()
    }
    return samples, {k: evaluate.metrics(v) for k, v in got["results"].items()}


@pytest.mark.parametrize("name, kind", [("llama3", "bytes"), ("chatml", "bytes")])
@pytest.mark.parametrize("settings", ["plain", "shots", "chat"])
def test_answers_are_those_of_its_own_backend(
    name, kind, settings, tmp_path, parity_rng
):
    from lm_eval.models.huggingface import HFLM

    evaluate._quiet()
    tokenizer = tokenizers.load(families.folder(tmp_path / "tokenizer", name, kind))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ff_width=56,
        max_length=CONTEXT if settings == "plain" else 4 * CONTEXT,
        qk_norm=False,
        init_std=0.3,
    )
    model = Transformer(config, jax.random.key(int(parity_rng.integers(2**31))))
    export(model, tokenizer, tmp_path / "model")
    write_tasks(tmp_path / "tasks", parity_rng, name)
    how = {
        "plain": {},
        "shots": {"num_fewshot": 2},
        "chat": {"apply_chat_template": True},
    }[settings]
    theirs = HFLM(
        pretrained=str(tmp_path / "model"),
        device="cpu",
        dtype="float32",
        batch_size=3,
    )
    want, wanted = answers(theirs, tmp_path / "tasks", **how)
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
        ours = evaluate.model(Language(model, tokenizer, batch_size=4))
        found, metrics = answers(ours, tmp_path / "tasks", **how)
    for task in ("free", "begun"):
        assert found[task] == want[task]
    assert any(text[0][0] for text in found["free"])
    for mine, other in zip(found["choices"], want["choices"], strict=True):
        for ((logp, best),), ((other_logp, other_best),) in zip(
            mine, other, strict=True
        ):
            assert float(logp) == pytest.approx(float(other_logp), abs=1e-3)
            assert best == other_best
    mine, other = (np.array(x["rolling"], float).ravel() for x in (found, want))
    np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-3)
    for task, values in wanted.items():
        for metric, cell in values.items():
            got = metrics[task][metric]["value"]
            assert got == pytest.approx(cell["value"], rel=1e-4), (task, metric)


def test_a_task_that_runs_code_is_refused(tmp_path, parity_rng):
    write_tasks(tmp_path / "tasks", parity_rng, "llama3")
    path = tmp_path / "tasks" / "free.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(found | {"unsafe_code": True}), encoding="utf-8")
    with pytest.raises(UserError, match="--tasks=free: runs what the model writes"):
        evaluate._tasks([str(tmp_path / "tasks")])
