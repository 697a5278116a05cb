"""A reward model as a judge of texts, for stages that write records."""

from stagecraft.models import scores
from stagecraft.text import chat


class RewardModel:
    """Scores answers to prompts.

    Args:
        model: a `ScalarModel`.
        tokenizer: a `text.tokenizer.Tokenizer`.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, prompts, answers):
        """Scores, list of float; answers are (text, ended)."""
        rows = [
            self._ids(prompt, *answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return scores.of_rows(self.model, rows)

    def _ids(self, prompt, text, ended):
        answer = {"role": "assistant", "content": text, "ended": ended}
        return chat.render([*chat.as_messages(prompt), answer], self.tokenizer)[0]
