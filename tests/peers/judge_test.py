"""A judge's labels and transformers' probabilities of them, on the same prompts."""

import jax
import numpy as np
import pytest
import torch
import transformers

from stagecraft import defaults, sharding
from stagecraft.models import locate
from stagecraft.models.config import ModelConfig
from stagecraft.models.transformer import Transformer
from stagecraft.signals import judge, template
from stagecraft.text import tokenizer as tokenizers
from tests.peers.lm_eval_test import export
from tests.text import families

pytestmark = pytest.mark.peers

PROMPTS = ["the cat", "What is the capital of France?", "a"]
PAIRS = [
    (("Paris is it.", True), ("It may be that it is Rome, or not.", True)),
    (("x", True), ("a b c d e f g", False)),
    (("yes", True), ("no", True)),
]


def theirs(folder, rows):
    """Summed log-probabilities of (prompt ids, label ids), padded on the left."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    longest = max(len(a) + len(b) for a, b in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, label) in enumerate(rows):
        whole = [*prompt, *label]
        ids[i, longest - len(whole) :] = torch.tensor(whole)
        mask[i, longest - len(whole) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    logps = logits.log_softmax(-1)
    return [
        sum(
            float(logps[i, longest - len(label) + k - 1, token])
            for k, token in enumerate(label)
        )
        for i, (_, label) in enumerate(rows)
    ]


@pytest.mark.parametrize("name", ["chatml", "llama3"])
@pytest.mark.parametrize("labels", [("A", "B"), (" (A)", " (B), or so")])
def test_labels_are_as_likely_as_to_transformers(name, labels, tmp_path, parity_rng):
    tokenizer = tokenizers.load(families.folder(tmp_path / "t", name, "bytes"))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ff_width=56,
        max_length=512,
        qk_norm=False,
        init_std=0.3,
    )
    model = Transformer(config, jax.random.key(int(parity_rng.integers(2**31))))
    folder = tmp_path / "model"
    export(model, tokenizer, folder)
    own = defaults.judge()
    own.min_mass = 0.0
    own.template = str(tmp_path / "asks.toml")
    shipped = (template.FOLDER / "pairwise.toml").read_text()
    listed = ", ".join(f'"{one}"' for one in labels)
    (tmp_path / "asks.toml").write_text(shipped.replace('" A", " B"', listed))
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
        source = locate.locate(f"hf:{folder}")
        asked = judge.of_source(source, model, 4, "")
        rater = judge.Judge(asked, own)
        verdicts = rater.rate(PROMPTS, PAIRS)
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for prompt, pair in zip(PROMPTS, PAIRS, strict=True):
        for order in (pair, pair[::-1]):
            question = rater.template.ask(prompt, [text for text, _ in order])
            text = peer.apply_chat_template(
                question.messages(), add_generation_prompt=True, tokenize=False
            )
            ids = peer(text, add_special_tokens=False).input_ids
            ids += peer(question.lead, add_special_tokens=False).input_ids
            for said in rater.template.labels:
                rows.append((ids, peer(said, add_special_tokens=False).input_ids))
    assert (max(len(said) for _, said in rows) > 1) == (len(labels[0]) > 1)
    want = np.array(theirs(folder, rows)).reshape(len(PAIRS), 2, 2)
    got = np.array([verdict.evidence["logps"] for verdict in verdicts])
    np.testing.assert_allclose(got, want, atol=1e-4)
    for verdict, sides in zip(verdicts, want, strict=True):
        q = ((sides[0, 0] - sides[0, 1]) - (sides[1, 0] - sides[1, 1])) / 2
        assert verdict.probability == pytest.approx(1 / (1 + np.exp(-q)), abs=1e-4)
