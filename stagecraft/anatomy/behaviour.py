"""What finished stages answer: one prompt put through all of them."""

import jax

from stagecraft.anatomy import roles
from stagecraft.errors import UserError
from stagecraft.models import locate
from stagecraft.models.language import Language
from stagecraft.stages import kinds

NEW_TOKENS = 48  # of an answer to the single prompt


def speaking_stages(run):
    """Returns the finished stages whose model writes text, in the graph's order."""
    return [
        name
        for name in run.stages
        if roles.of(run.config.stages[name].kind).speaks and run.finished(name)
    ]


def check_prompt(run, prompt):
    """Refuses a prompt that some stage of a run will not have room to answer."""
    for name in run.stages:
        kind = kinds.of(run.config.stages[name])
        if not kind.speaks:
            continue
        chat = kind.format(run.config.stages[name]) == "chat"
        length = len(Language(None, run.tokenizer).encode(prompt, chat_format=chat))
        limit = locate.context(name, run.config)
        if length + NEW_TOKENS > limit:
            raise UserError(
                f"measure.prompt: its {length} tokens and {NEW_TOKENS} of an answer do "
                f"not fit into the {limit} that the model of stage {name} holds; "
                "shorten it"
            )


def as_text(prompt: str | list[dict]) -> str:
    """Returns a prompt as people read it: messages one below the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in prompt)


def through_stages(
    run, prompt, *, temperature=0.0, samples=1, max_new_tokens=NEW_TOKENS, seed=0
):
    """Answers one prompt with every finished stage.

    Args:
        run: a `runs.Run`.
        prompt: a text or messages; a base model continues the bare text, the others
            answer it as a turn.
        temperature, samples, max_new_tokens, seed: of the sampling.

    Returns:
        {stage: [{"text", "ended", "temperature"}]}.
    """
    names = speaking_stages(run)
    if not names:
        raise UserError(
            f"{run.root}: no finished stage yet; run it: stagecraft run "
            f"--config=... --workdir={run.root}"
        )
    answers = {}
    with jax.set_mesh(run.mesh()):
        for name in names:
            language = run.language(name, samples)
            chat = run.chat_format(name)
            completions = language.complete(
                [prompt if chat else as_text(prompt)] * samples,
                chat=chat,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed,
            )
            answers[name] = [
                {"temperature": temperature, "text": text, "ended": ended}
                for text, ended in completions
            ]
    return answers
