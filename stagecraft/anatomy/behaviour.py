"""What finished stages answer: one prompt put through all of them."""

import jax

from stagecraft.anatomy import roles
from stagecraft.errors import UserError
from stagecraft.models.language import Language


def speaking_stages(current):
    """Finished stages whose model writes text, in the order of the graph."""
    return [
        name
        for name in current.stages
        if roles.speaks(current.config.stages[name].kind) and current.finished(name)
    ]


def through_stages(
    current, prompt, *, temperature=0.0, samples=1, max_new_tokens=48, seed=0
):
    """Answers one prompt with every finished stage.

    Args:
        current: a `run.Run`.
        prompt: a text; a base model continues it bare, the others answer it as a turn.
        temperature, samples, max_new_tokens, seed: of the sampling.

    Returns:
        {stage: [{"text", "ended", "temperature"}]}.
    """
    names = speaking_stages(current)
    if not names:
        raise UserError(
            f"{current.root}: no finished stage yet; run it: stagecraft run "
            f"--config=... --workdir={current.root}"
        )
    answers = {}
    mesh = current.mesh()
    with jax.set_mesh(mesh):
        for name in names:
            language = Language(
                current.load(name, mesh),
                current.tokenizer,
                batch_size=whole_rows(samples, mesh),
            )
            completions = language.complete(
                [prompt] * samples,
                chat=current.chat_format(name),
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed,
            )
            answers[name] = [
                {"temperature": temperature, "text": text, "ended": ended}
                for text, ended in completions
            ]
    return answers


def whole_rows(least, mesh):
    """The smallest number of rows, `least` or more, that divides over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-least // shards) * shards
