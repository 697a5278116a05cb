"""A judge over HTTP is the judge in this process, asked of one model."""

import numpy as np
import pytest

from stagecraft import defaults
from stagecraft.signals.endpoint import Endpoint
from stagecraft.signals.judge import Judge, LocalModel
from tests.models import numpy_decoder
from tests.serve.live import Live, language

PROMPTS = ["Capital?", "Größe 🦊"]
PAIRS = [
    (("Paris.", True), ("It is Rome <|end|>", True)),
    (("x", True), ("<|user|> y", False)),
]
TEXT = """
question = "{prompt}? one {first} two {second}"
answer = "so"
labels = [" (1)", " (two)"]
"""


@pytest.fixture(scope="module")
def live():
    server = Live(language())
    yield server
    server.close()


def judges(live, tmp_path, api, text):
    """The same judge in this process, and over HTTP."""
    (tmp_path / "asks.toml").write_text(text)
    own = defaults.judge()
    own.update(dict(template=str(tmp_path / "asks.toml"), min_mass=0.0))
    local = LocalModel(live.language, api == "chat", "id")
    yield Judge(local, own)
    own.update(dict(url=live.url, model="tiny", api=api, parallel=4))
    yield Judge(Endpoint(own, tmp_path), own)


def check(local, remote):
    want, got = (rater.rate(PROMPTS, PAIRS) for rater in (local, remote))
    for here, there in zip(want, got, strict=True):
        assert len(here.evidence["logps"]) == 2  # both orders
        assert "bounded" not in there.evidence
        np.testing.assert_allclose(
            there.evidence["logps"], here.evidence["logps"], atol=1e-4
        )
        assert there.probability == pytest.approx(here.probability, abs=1e-4)
    assert want[0].evidence["logps"][0] != want[0].evidence["logps"][1]


def test_labels_of_several_tokens_by_an_echo(live, tmp_path):
    check(*judges(live, tmp_path, "completions", TEXT))


def test_labels_of_one_token_by_the_likeliest_of_a_chat(live, tmp_path):
    t, best = live.language.tokenizer, None
    for prompt, pair in zip(PROMPTS, PAIRS, strict=True):
        for (one, _), (two, _) in (pair, pair[::-1]):
            text = f"{prompt}? one {one} two {two}"
            ids = [t.bos, t.user, *t.encode(text), t.assistant]
            row = numpy_decoder.logits(live.language.model, ids)[-1]
            near = set(np.argsort(-row)[:20].tolist())
            best = near if best is None else best & near
    labels = [chr(i) for i in best if chr(i).isalnum() and i < 128]
    text = TEXT.replace(" (1)", labels[0]).replace(" (two)", labels[1])
    check(*judges(live, tmp_path, "chat", text.replace('"so"', '""')))
