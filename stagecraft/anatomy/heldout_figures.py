"""The figures of finished stages on a user's own data: answers to held-out prompts.

Prompts are those that stages hold out, in WORKDIR/STAGE/heldout.jsonl; every stage that
answers in turns answers the same ones. The run's own reward model and verifiers score
the answers; what is a figure of a world too has the same name and meaning. An answer
that the first verifier pays 1 or more is right: of several draws, `attempts` tells how
often.
"""

import itertools
import json
import logging
from typing import NamedTuple

import numpy as np

from stagecraft import storage
from stagecraft.anatomy import attempts, behaviour, sampled, statistics
from stagecraft.data import conversations
from stagecraft.errors import UserError
from stagecraft.models import locate
from stagecraft.models.language import Language
from stagecraft.signals import verifiers

FILE = "heldout.jsonl"
# Tokens of an answer, where no stage samples.
ANSWER = 64
# Answers to other prompts, put to each one as guesses.
GUESSES = 64

_log = logging.getLogger("stagecraft")


class Asked(NamedTuple):
    """A held-out prompt.

    Attributes:
        record: what it was read from, with its "prompt": a text or messages.
        stages: names of the stages that hold it out.
    """

    record: dict
    stages: tuple[str, ...]


def write(folder, asked: list[dict]) -> None:
    """Writes the records of a stage's held-out prompts, each prompt once."""
    distinct = {conversations.prompt_key(one["prompt"]): one for one in asked}
    lines = [json.dumps(one, ensure_ascii=False) for one in distinct.values()]
    storage.write_text(folder / FILE, "".join(f"{line}\n" for line in lines))


def prompts(run) -> list[Asked]:
    """Returns at most `measure.prompts` held-out prompts, of all stages in turn.

    Prompts for which some stage's model has no room are left out.
    """
    limit, length, asked = run.config.measure.prompts, _answer(run), {}
    room = _context(run) - max(length, behaviour.NEW_TOKENS)
    language = Language(None, run.tokenizer)
    files = [(name, _read(run.root / name / FILE)) for name in run.stages]
    for group in itertools.zip_longest(*(records for _, records in files)):
        for (name, _), record in zip(files, group, strict=True):
            if record is None:
                continue
            key = conversations.prompt_key(record["prompt"])
            if key in asked:
                one = asked[key]
                asked[key] = Asked(one.record | record, (*one.stages, name))
            elif len(asked) < limit:
                ids = language.encode(record["prompt"], chat_format=True)
                if len(ids) <= room:
                    asked[key] = Asked(record, (name,))
    return list(asked.values())


def _read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _context(run):
    """Returns the tokens that every model which writes text holds."""
    names = behaviour.speaking_stages(run)
    return min((locate.context(name, run.config) for name in names), default=0)


def _answer(run):
    """Returns the most tokens of an answer: as many as a stage samples, if one does."""
    limits = [
        stage.sampling.max_new_tokens
        for stage in run.config.stages.values()
        if "sampling" in stage
    ]
    return min(max(limits, default=ANSWER), _context(run) // 2)


def measure(run, asked: list[Asked]) -> dict[str, dict]:
    """Measures {stage: {figure: value}} of the finished stages that answer in turns.

    Args:
        run: a `runs.Run`, inside its mesh.
        asked: what `prompts` returned.
    """
    texts = [one.record["prompt"] for one in asked]
    rows = min(sampled.ROWS, len(texts))
    answers = sampled.Answers(run, texts, _answer(run), rows)
    functions = {
        name: verifiers.find(stage.verifiers, stage.verifier_args)
        for name, stage in run.config.stages.items()
        if stage.get("verifiers") and any(name in one.stages for one in asked)
    }
    return {
        name: _figures(run, name, answers, functions, asked)
        for name in behaviour.speaking_stages(run)
        if run.chat_format(name)
    }


def _figures(run, name, answers, functions, asked):
    base, reward = sampled.sft_model(run, name), sampled.reward_stage(run, name)
    draws = answers.of(name)
    rewards = [_rewards(answers, one, reward, functions, asked) for one in draws]
    rows = []
    for draw, by_source in zip(draws, rewards, strict=True):
        row = answers.shared_figures(draw, base, reward)
        for source, values in by_source.items():
            if source and np.isfinite(values).any():
                row[f"verifier_{source}"] = float(np.mean(values[np.isfinite(values)]))
        rows.append(row)
    names = [key for key in rows[0] if all(key in row for row in rows)]
    figures = {key: statistics.over_draws([row[key] for row in rows]) for key in names}
    if solved := next((name for name in rewards[0] if name), ""):
        right = np.array([by_source[solved] >= 1 for by_source in rewards]).T
        chances = _chances(draws[0], functions, asked, solved)
        figures |= attempts.figures(right, chances)
    if base and rewards[0]:
        others = [
            _total(_rewards(answers, one, reward, functions, asked))
            for one in answers.of(base)
        ]
        table = [[_wins(_total(one), other) for other in others] for one in rewards]
        if np.isfinite(table).all():
            figures["reward_win_rate"] = statistics.over_both(np.array(table))
    by = {"reward_mean_by": reward} if reward else {}
    return by | sampled.over_draws(figures, len(draws), len(asked))


def _chances(draw, functions, asked, solved):
    """Returns how often an answer to another prompt would be right, f[B].

    Such an answer has the form and the spread of the model's own, but cannot know the
    prompt.
    """
    prompts = len(asked)
    shifts = sorted({*np.linspace(1, prompts - 1, GUESSES).astype(int).tolist()} - {0})
    hits = np.zeros(prompts)
    for shift in shifts:
        order = [(i + shift) % prompts for i in range(prompts)]
        others = {key: [draw[key][i] for i in order] for key in ("answers", "ids")}
        hits += _verified(others, functions, asked)[solved] >= 1
    return hits / max(len(shifts), 1)


def _rewards(answers, draw, reward, functions, asked):
    """Returns rewards of one draw: {verifier, "" for the reward model: f64[B]}.

    NaN where a source gives none.
    """
    rewards = {}
    if reward:
        rewards[""] = np.array(answers.rewards(reward, draw), float)
    return rewards | _verified(draw, functions, asked)


def _verified(draw, functions, asked):
    """Returns the verifiers' rewards of one draw: {verifier: f64[B]}."""
    rewards = {}
    for stage, scorers in list(functions.items()):
        rows = [i for i, one in enumerate(asked) if stage in one.stages]
        try:
            columns = verifiers.scores_of(
                scorers,
                [asked[i].record for i in rows],
                [draw["answers"][i][0] for i in rows],
                [draw["answers"][i][1] for i in rows],
                [draw["ids"][i] for i in rows],
            )
        except UserError as error:
            _log.warning("held-out answers are not scored: %s", error)
            del functions[stage]  # said once
            continue
        for scorer, column in zip(scorers, columns, strict=True):
            values = np.full(len(asked), np.nan)
            values[rows] = np.where(np.isfinite(column), column, np.nan)
            rewards[scorer.name] = values
    return rewards


def _total(rewards):
    """Returns the reward that answers win by: the model's, or the verifiers' sum."""
    if "" in rewards:
        return rewards[""]
    columns = np.array(list(rewards.values()))
    empty = np.isnan(columns).all(axis=0)
    return np.where(empty, np.nan, np.nansum(columns, axis=0))


def _wins(ones, others):
    """Returns the share of prompts where `ones` are higher, ties half; NaN for none."""
    both = np.isfinite(ones) & np.isfinite(others)
    if not both.any():
        return np.nan
    return float(np.mean(0.5 + 0.5 * np.sign(ones[both] - others[both])))
