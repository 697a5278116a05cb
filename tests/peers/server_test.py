"""lm-evaluation-harness asks a served model as it asks one in this process."""

import jax
import numpy as np
import pytest

from stagecraft.anatomy import evaluate
from stagecraft.models.config import ModelConfig
from stagecraft.models.language import Language
from stagecraft.models.transformer import Transformer
from stagecraft.text import tokenizer as tokenizers
from tests import tiny
from tests.peers.lm_eval_test import answers, export, write_tasks
from tests.serve.live import Live
from tests.text import families

pytestmark = pytest.mark.peers

# Long enough that nothing is cut: the harness keeps one token of an endpoint's context.
CONTEXT = 1024


@pytest.fixture(scope="module", params=["llama3", "chatml"])
def served(request, tmp_path_factory):
    """A server of an exported model, its folder, and the family's name."""
    folder, name = tmp_path_factory.mktemp("served"), request.param
    tokenizer = tokenizers.load(families.folder(folder / "tokenizer", name, "bytes"))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ff_width=56,
        max_length=CONTEXT,
        qk_norm=False,
        init_std=0.3,
    )
    model = Transformer(config, jax.random.key(3))
    export(model, tokenizer, folder / "model")
    live = Live(Language(model, tokenizer, batch_size=4))
    yield live, folder / "model", name
    live.close()


@pytest.mark.parametrize("settings", [{}, {"apply_chat_template": True}])
def test_answers_are_those_of_the_model_in_this_process(
    served, settings, tmp_path, parity_rng
):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    evaluate._quiet()
    live, folder, name = served
    write_tasks(tmp_path / "tasks", parity_rng, name)
    with jax.set_mesh(tiny.single()):
        ours = evaluate.model(live.language)
        want, wanted = answers(ours, tmp_path / "tasks", **settings)
    asked = LocalCompletionsAPI(
        base_url=f"{live.url}/completions",
        model="tiny",
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        max_length=CONTEXT,
        add_bos_token=live.language.tokenizer.bos is not None and not settings,
        batch_size=3,
        num_concurrent=2,
    )
    found, metrics = answers(asked, tmp_path / "tasks", **settings)
    for task in ("free", "begun"):
        assert found[task] == want[task]
    assert any(text[0][0] for text in found["free"])
    for mine, other in zip(found["choices"], want["choices"], strict=True):
        for ((logp, best),), ((other_logp, other_best),) in zip(
            mine, other, strict=True
        ):
            assert float(logp) == pytest.approx(float(other_logp), abs=1e-3)
            assert best == other_best
    if settings:  # without bos: the template brings it, and a rolling text has none
        return
    mine, other = (np.array(x["rolling"], float).ravel() for x in (found, want))
    np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-3)
    for task, values in wanted.items():
        for metric, cell in values.items():
            got = metrics[task][metric]["value"]
            assert got == pytest.approx(cell["value"], rel=1e-4), (task, metric)
