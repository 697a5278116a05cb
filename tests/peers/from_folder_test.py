"""From a Hugging Face folder to one: a whole run of ours beside TRL on the same folder.

TRL reads the model, the tokenizer and its chat template from the folder, and the
conversations in the order in which our run takes them; the ids of each conversation
are transformers' own. Twenty SGD steps of all weights, or of the same fresh adapter,
must lose the same, and the folders that come out must hold the same model.
"""

import json
import zlib

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
import trl

from stagecraft import defaults, exchange, experiment, metrics, run
from stagecraft.data import stage_data
from stagecraft.models import huggingface, lora
from stagecraft.models import peft as folders
from stagecraft.stages import kinds
from stagecraft.text import tokenizer as tokenizers
from tests.peers import bridge, lora_test

pytestmark = pytest.mark.peers

C = bridge.CONFIG
ROWS, LENGTH = 4, 32
LORA = dict(rank=4, alpha=16.0, targets="all")
TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<bot>' -}}
{%- generation -%}{{- message['content'] + '<end>' -}}{%- endgeneration -%}
{%- else -%}{{- '<user>' + message['content'] -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<bot>' -}}{%- endif -%}
"""
KINDS = {
    "language_model": (trl.SFTTrainer, trl.SFTConfig),
    "preference": (trl.DPOTrainer, trl.DPOConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
}


def tokenizer():
    """Words, the marks of a template, and the template."""
    made = bridge.tokenizer(
        # Two words make way for the marks.
        bridge.ModelConfig(**vars(C) | {"vocab_size": C.vocab_size - 2})
    )
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    made.chat_template = TEMPLATE
    return made


def folder_of(kind, seed, path):
    peer = bridge.make_peer(C, seed, scalar=kind == "reward")
    peer.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def records(rng):
    """Questions with one or two answers, as words."""

    def say(low, high):
        return " ".join(f"w{i}" for i in rng.integers(3, 60, rng.integers(low, high)))

    return [
        {"prompt": say(3, 8), "chosen": say(2, 10), "rejected": say(2, 10)}
        for _ in range(ROWS * bridge.BATCHES)
    ]


def turns(record, answer):
    return [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record[answer]},
    ]


def configured(kind, folder, path, adapter):
    """The experiment: one stage from the folder."""
    c = defaults.experiment()
    c.mesh.data = 1
    data = dict(files=str(path), length=LENGTH)
    if kind == "language_model":
        data |= dict(format="demonstrations", packing="none")
    lr = {"language_model": 0.1, "preference": 0.1, "reward": 0.02}[kind]
    c.stages.child = defaults.stage(
        kind,
        **dict(start_from=f"hf:{folder}", steps=bridge.STEPS, batch_size=ROWS),
        **dict(data=data, every=dict(log=1), lora=LORA if adapter else {}),
        optimizer=dict(
            dict(bridge.SGD, lr=lr), schedule="constant", warmup_steps=0, clip_norm=0.0
        ),
    )
    return c


def in_our_order(c, root, kind, data, theirs):
    """The records as our run takes them, found again by transformers' ids of them."""
    full = experiment.resolve(c)
    stage = full.stages.child
    own = tokenizers.load(str(stage.start_from).removeprefix("hf:"))
    dataset = stage_data.build(stage, own, root, full, kinds.of(stage).data).dataset
    iterator = dataset.iterator()

    def ids(record, answer):
        made = theirs.apply_chat_template(turns(record, answer), return_dict=True)
        return tuple(made["input_ids"])

    pair = kind != "language_model"
    known = {
        (ids(r, "chosen"), *([ids(r, "rejected")] if pair else [])): r for r in data
    }
    found = []
    for _ in range(bridge.STEPS):
        batch = next(iterator)
        for row, seen in zip(batch["ids"], batch["segments"], strict=True):
            sides = zip(row, seen, strict=True) if pair else [(row, seen)]
            found.append(known[tuple(tuple(x[s > 0].tolist()) for x, s in sides)])
    return found


def trained(kind, folder, rows, out, lr, adapter):
    """TRL's trainer after its steps."""
    trainer_class, config_class = KINDS[kind]
    settings = {}
    if kind == "language_model":
        rows = [{"messages": turns(r, "chosen")} for r in rows]
        settings = dict(assistant_only_loss=True, max_length=None)
    elif kind == "preference":
        rows = [
            {
                "prompt": turns(r, "chosen")[:1],
                "chosen": turns(r, "chosen")[1:],
                "rejected": turns(r, "rejected")[1:],
            }
            for r in rows
        ]
        settings = dict(beta=0.1, max_length=None)
    else:
        rows = [{k: turns(r, k) for k in ("chosen", "rejected")} for r in rows]
    model = opened(kind, folder)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    elif kind == "preference":
        settings["ref_model"] = opened(kind, folder)
    reference = {k: settings.pop(k) for k in ("ref_model",) if k in settings}
    trainer = bridge.recording(trainer_class)(
        model=model,
        args=bridge.arguments(
            *(config_class, out, dict(bridge.SGD, lr=lr)), rows=ROWS, **settings
        ),
        train_dataset=bridge.datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        **reference,
    )
    trainer.train()
    return trainer


def opened(kind, folder):
    name = {"reward": "AutoModelForSequenceClassification"}.get(
        kind, "AutoModelForCausalLM"
    )
    found = getattr(transformers, name).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    return found.eval()


def first_adapter(c, folder, path):
    """The adapter that our run starts from, as a PEFT folder."""
    shared = bridge.single()
    stage = c.stages.child
    key = jax.random.fold_in(jax.random.key(c.seed), zlib.crc32(b"child"))
    with jax.set_mesh(shared):
        base = huggingface.load(folder, shared)
        made = lora.init_fn(
            lora.Settings(**stage.lora), base, shared, scalar=stage.kind == "reward"
        )
        adapter = made(jax.random.split(key)[0])
        config = getattr(base, "body", base).config
        folders.save(adapter, config, path, shared, base=folder)
    return path


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps(kind, adapter, parity_rng, parity_seed, tmp_path):
    folder = folder_of(kind, parity_seed, tmp_path / "base")
    data = records(parity_rng)
    path = tmp_path / "data.jsonl"
    key = "completion" if kind == "language_model" else "chosen"
    lines = [{"prompt": r["prompt"], key: r["chosen"]} for r in data]
    if kind != "language_model":
        lines = data
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    c = configured(kind, folder, path, adapter)
    begun = first_adapter(c, folder, tmp_path / "first") if adapter else None
    rows = in_our_order(
        *(c, tmp_path, kind, data),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    lr = c.stages.child.optimizer.lr
    trainer = trained(kind, folder, rows, tmp_path / "trl", lr, begun)
    root = tmp_path / "run"
    run.run(c, root)
    told = metrics.read(root / "child" / "metrics.jsonl")
    losses = [row["loss"] for row in told if "loss" in row]
    assert len(losses) == len(trainer.losses) == bridge.STEPS
    np.testing.assert_allclose(losses, trainer.losses, atol=1e-4)
    assert np.ptp(losses) > 1e-2
    leaves(root, trainer.model, kind, folder, adapter, parity_rng)
    back = transformers.AutoTokenizer.from_pretrained(root / "out")
    assert back.chat_template == TEMPLATE


def leaves(root, final, kind, folder, adapter, rng):
    """Our run's child, exported, is the peer's model: whole, and as an adapter.

    Args:
        root: the work directory; the exports lie in its out and adapter.
        final: the peer's model as it ends, transformers' or PEFT's.
        kind: as of `opened`.
        folder: the model that both began with.
        adapter: whether our run trained one.
        rng: draws the ids that are asked.
    """
    exchange.export(root, "child", root / "out")
    ours, start = opened(kind, root / "out"), opened(kind, folder)
    says_what_ours_says(ours, root, rng)
    if isinstance(final, peft.PeftModel):
        final = final.merge_and_unload()
    same(final, ours, 1e-4, moved_from=start)
    if adapter:
        exchange.export(root, "child", root / "adapter", adapter=True)
        again = peft.PeftModel.from_pretrained(start, root / "adapter").eval()
        says_what_ours_says(again, root, rng)
        same(again.merge_and_unload(), ours, 1e-5)


def same(one, other, tolerance, moved_from=None):
    """Two models of transformers hold the same weights."""
    theirs, moved = other.state_dict(), 0.0
    start = moved_from.state_dict() if moved_from is not None else {}
    for name, value in one.state_dict().items():
        torch.testing.assert_close(
            value, theirs[name], atol=tolerance, rtol=0, msg=lambda m, n=name: n + m
        )
        if name in start:
            moved = max(moved, float((value - start[name]).abs().max()))
    assert moved_from is None or moved > 30 * tolerance


def says_what_ours_says(model, root, rng, tolerance=1e-4):
    """A model of transformers, or PEFT's, has the logits of the run's own child."""
    shared = bridge.single()
    ids = rng.integers(3, model.config.vocab_size, (4, 12))
    with jax.set_mesh(shared):
        own = run.open_run(root).model("child", shared)
        expected = lora_test.ours(own, ids)
    # Theirs have no constant in a scalar head.
    expected = expected - float(getattr(own, "bias", np.zeros(()))[...])
    found = lora_test.theirs(model, ids)
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)
    assert expected.std() > 0.1
