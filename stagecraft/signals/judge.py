"""A language model as a judge: rater="judge", and `judge_from` as a reward.

It is asked by a template (`signals.template`) and answers by how probable its labels
are, whole labels of any number of tokens. A pair is asked about in both orders
(RLAIF, Lee et al. 2023, arxiv.org/abs/2309.00267); a single answer gets a score, whose
expectation is a reward (d-RLAIF there). The raw log-probabilities stay with a verdict.
A question that could not be answered has a reason and no number.
"""

import copy
import functools
import math
from typing import Protocol

import numpy as np

from stagecraft import schema
from stagecraft.errors import UserError
from stagecraft.lineage import StageRecord
from stagecraft.models.language import Language
from stagecraft.signals import endpoint, labels, protocol, template
from stagecraft.signals.protocol import IDENTICAL, Verdict, same_text
from stagecraft.signals.template import Answered
from stagecraft.text import tokenizer as tokenizers
from stagecraft.text.chat import generation_prompt

READS = ("judge",)
TOO_LONG, LOW_MASS, NOT_FINITE = "too_long", "low_mass", "not_finite"


class Asked(Protocol):
    """A model that answers questions: in this process, or behind an endpoint.

    Attributes:
        identity: hash of the model, or of its address and name.
    """

    identity: str

    def check(self, asks: template.Template) -> None:
        """Refuses labels that it cannot tell apart, in one line."""

    def answer(
        self, asks: template.Template, questions: list, thinks: int
    ) -> list[Answered]:
        """Returns an answer to each question.

        Args:
            asks: the template.
            questions: (prompt, answers in the order of their places).
            thinks: tokens of a rationale before the label; 0 for none.
        """
        ...


class LocalModel:
    """A model in this process.

    Args:
        language: a `models.language.Language`.
        chat: whether it was trained on turns of a chat.
        lineage: id of the stage or folder that it is from.
    """

    def __init__(self, language, chat, lineage):
        self.language, self.chat = language, chat
        self.identity = protocol.identity(
            model=lineage, tokenizer=language.tokenizer.digest, chat=chat
        )

    def check(self, asks):
        """Refuses labels one of which begins with the tokens of another."""
        self._labels(asks)

    def answer(self, asks, questions, thinks):
        """Returns an `Answered` to each question; arguments as of `Asked`."""
        if not questions:
            return []
        whole, rows = self._labels(asks), []
        for prompt, answers in questions:
            asked = asks.ask(prompt, answers, reasoned=bool(thinks))
            rows.append(self._ids(asks, asked))
        said, written = [""] * len(rows), [0] * len(rows)
        if thinks:
            rows, said, written = self._reasoned(asks, rows, thinks)
        limit = self.language.model.config.max_length - max(map(len, whole))
        rows = [row if len(row) <= limit else [] for row in rows]
        table = self.language.continuation_logps(rows, whole)
        return [
            _answered(logps, row, rationale, len(row) + count)
            for logps, row, rationale, count in zip(
                table, rows, said, written, strict=True
            )
        ]

    def _ids(self, asks, asked):
        tokenizer = self.language.tokenizer
        if (asks.render or ("chat" if self.chat else "text")) == "text":
            return self.language.encode(asked.bare(), chat_format=False)
        ids = generation_prompt(asked.messages(), tokenizer)
        return [*ids, *(tokenizer.encode(asked.lead) if asked.lead else ())]

    def _reasoned(self, asks, rows, thinks):
        """Returns rows that end in a rationale and the lead, the rationales, tokens."""
        language = self.language
        lead = language.tokenizer.encode("\n" + asks.answer)
        room = language.model.config.max_length - thinks
        fit = [i for i, row in enumerate(rows) if len(row) <= room]
        stops = language.stop_ids(chat_format=self.chat)
        settings = dict(max_new_tokens=thinks, temperature=0.0, stop_ids=stops)
        sampled = language.sample_ids([rows[i] for i in fit], **settings)
        # Without room for a rationale there is no answer either.
        out, said, counts = [[]] * len(rows), [""] * len(rows), [0] * len(rows)
        for i, (ids, ended, _) in zip(fit, sampled, strict=True):
            words = ids[:-1] if ended else ids
            said[i] = language.tokenizer.decode(words)
            if asks.answer and asks.answer in said[i]:
                # It went on to a label by itself: that one is read below.
                said[i] = said[i].partition(asks.answer)[0].rstrip()
                words = language.tokenizer.encode(said[i])
            out[i], counts[i] = [*rows[i], *words, *lead], len(ids)
        return out, said, counts

    def _labels(self, asks):
        ids = [self.language.tokenizer.encode(label) for label in asks.labels]
        for one, label in zip(ids, asks.labels, strict=True):
            for other, longer in zip(ids, asks.labels, strict=True):
                if longer != label and other[: len(one)] == one:
                    raise UserError(
                        f"{asks.name}: labels: {label!r} is the beginning of "
                        f"{longer!r} to this judge's tokenizer, so that they cannot be "
                        "told apart; end each with a mark, as in '1)' and '10)'"
                    )
        return ids


def _answered(logps, row, rationale, tokens):
    if not row:
        return Answered(reason=TOO_LONG)
    if not np.isfinite(logps).all():
        return Answered(reason=NOT_FINITE, tokens=tokens)
    return Answered(tuple(map(float, logps)), "", (), rationale, tokens)


def of_source(source, model, rows, lineage) -> LocalModel:
    """Returns a model as a judge, with the tokenizer that it was trained with.

    Args:
        source: its `models.locate.Source`.
        model: its `Transformer`, on the mesh in use.
        rows: questions at once; they divide over the mesh.
        lineage: its id; "" for that of the source.
    """
    tokenizer = tokenizers.load(source.tokenizer())
    if source.outward:
        chat = tokenizer.template is not None
    else:
        chat = StageRecord.read_finished(source.folder).format != "text"
    language = Language(model, tokenizer, batch_size=rows)
    return LocalModel(language, chat, lineage or source.id())


class Judge:
    """Rates pairs, and groups of K, by a model's labels.

    Args:
        asked: an `Asked`.
        config: the group `judge` of a stage's config.
        default: the template where the config names none.
    """

    def __init__(self, asked, config, default="pairwise"):
        self.asked, self.config = asked, config
        self.template = template.read(config.template or default)
        asked.check(self.template)
        self.identity = protocol.identity(
            rater="judge",
            model=asked.identity,
            template=self.template._replace(name=""),
            combine=config.combine,
            orders=config.orders,
            clamp=config.clamp,
            min_mass=config.min_mass,
            rationale_tokens=config.rationale_tokens,
        )

    def under(self, principle):
        """Returns the same judge with a text in its template's place {principle}."""
        other = copy.copy(self)
        other.template = self.template._replace(principle=principle)
        return other

    def answer(self, questions):
        """Returns the `Answered` of questions; a mass below the least is a failure."""
        thinks = self.config.rationale_tokens
        answers = self.asked.answer(self.template, questions, thinks)
        least = self.config.min_mass
        return [
            one._replace(reason=LOW_MASS)
            if not one.reason and labels.mass(one.logps) < least
            else one
            for one in answers
        ]

    def rate(self, prompts, pairs):
        """Returns a verdict for each pair, from its orders; its evidence is raw."""
        fit = [i for i, pair in enumerate(pairs) if not same_text(pair)]
        questions, orders = [], self.config.orders
        for i in fit:
            first, second = (text for text, _ in pairs[i])
            asked = [(prompts[i], (first, second)), (prompts[i], (second, first))]
            questions += asked[:orders]
        answers = self.answer(questions)
        verdicts = [Verdict(reason=IDENTICAL)] * len(pairs)
        for place, i in enumerate(fit):
            part = answers[orders * place : orders * (place + 1)]
            verdicts[i] = self._verdict(part)
        return verdicts

    def best(self, prompts, groups):
        """Returns for each group of K texts [probability that each is best], or None.

        The group is asked about in K orders, so that each answer is in each place.

        Returns:
            list of (list of floats or None, reason).
        """
        count, questions = self.template.places, []
        for prompt, group in zip(prompts, groups, strict=True):
            turns = [
                [group[(r + s) % count] for s in range(count)] for r in range(count)
            ]
            questions += [(prompt, turn) for turn in turns]
        answers, out = self.answer(questions), []
        for start in range(0, len(answers), count):
            part = answers[start : start + count]
            reason = next((one.reason for one in part if one.reason), "")
            logps = [one.logps for one in part]
            out.append((None if reason else labels.of_group(logps), reason))
        return out

    def _verdict(self, answers):
        evidence = _evidence(answers)
        if reason := next((one.reason for one in answers if one.reason), ""):
            return Verdict(reason=reason, evidence=evidence)
        probability = labels.of_pair(evidence["logps"], self.config.combine)
        probability = labels.clamped(probability, self.config.clamp)
        return Verdict(probability, evidence=evidence)


def _evidence(answers):
    """Returns JSON values of what a judge answered: by order, then by label."""
    evidence = {
        "logps": [list(one.logps) or None for one in answers],
        "mass": [labels.mass(one.logps) if one.logps else None for one in answers],
        "tokens": sum(one.tokens for one in answers),
    }
    if any(one.bounded for one in answers):
        evidence["bounded"] = [list(one.bounded) for one in answers]
    if any(one.rationale for one in answers):
        evidence["rationales"] = [one.rationale for one in answers]
    return evidence


class Scorer:
    """Scores single answers by a judge: a reward beside those of verifiers.

    Called as a `signals.verifiers.Verifier` is. A reward is 2 (E - 1) / (K - 1) - 1,
    with E the expected score of labels that stand for 1 to K; with a template of G
    places, the probability that a text is the best of the G to its prompt.

    Args:
        make: () -> `Judge` with a template of one place or of G; called once, when it
            is first needed.
        max_failed: share of failures beyond which a UserError ends the run.
    """

    name = "judge"

    def __init__(self, make, max_failed):
        self._make, self.failures = make, protocol.Failures("judge", max_failed)

    @functools.cached_property
    def judge(self):
        """The `Judge`."""
        return self._make()

    def check(self, names):
        """Refuses nothing: prompts and completions are always there."""

    def __call__(self, lists, fixed):
        """Returns a reward for each completion, infinity where it has none."""
        texts = [
            one if isinstance(one, str) else one[0]["content"]
            for one in lists["completions"]
        ]
        return [
            math.inf if reward is None else reward
            for reward in self.rewards(lists["prompts"], texts)
        ]

    def rewards(self, prompts, texts):
        """Returns a reward of -1 to 1 for each text, None where there is none."""
        if (count := self.judge.template.places) > 1:
            return self._compared(prompts[::count], texts, count)
        questions = [(p, (text,)) for p, text in zip(prompts, texts, strict=True)]
        answers = self.judge.answer(questions)
        self.failures.see([one.reason for one in answers])
        count = len(self.judge.template.labels)
        return [
            None
            if one.reason
            else labels.as_reward(labels.expectation(one.logps), count)
            for one in answers
        ]

    def _compared(self, prompts, texts, count):
        """Returns the rewards of texts, those of one prompt next to each other."""
        groups = [texts[i : i + count] for i in range(0, len(texts), count)]
        out, rewards = self.judge.best(prompts, groups), []
        self.failures.see([reason for _, reason in out])
        for shares, _ in out:
            rewards += shares or [None] * count
        return rewards


def scorer(config, asked, folder) -> Scorer | None:
    """Returns the judge that rewards a stage's completions; None where there is none.

    Args:
        config: the stage's config.
        asked: () -> `LocalModel`, or None for an endpoint.
        folder: where an endpoint's answers are kept.
    """
    own = config.judge
    if asked is None and not own.url:
        return None

    def make():
        return Judge(asked() if asked else endpoint.Endpoint(own, folder), own, "score")

    return Scorer(make, own.max_failed)


def check(where, config, world):
    """Refuses a judge that is nowhere, or in two places, and impossible settings."""
    check_settings(where, config, (2,))
    if not (config.judge_from or config.judge.url):
        raise UserError(
            f"{where}.rater='judge': needs judge_from (a stage, a finished one's folder"
            " or hf:FOLDER), or judge.url (an endpoint)"
        )


def check_settings(where, config, places, *, default="", principle=False):
    """Refuses impossible keys of the group `judge`.

    Args:
        where: the stage in the config, for messages.
        config: the stage's config.
        places: how many answers its template may hold.
        default: the template where the config names none; "" for that of the places.
        principle: whether its template has a place {principle}.
    """
    own = config.judge
    if config.judge_from and own.url:
        raise UserError(
            f"{where}: judge_from={config.judge_from!r} and judge.url={own.url!r}: one "
            "judge or the other"
        )
    schema.choice(f"{where}.judge.combine", own.combine, labels.COMBINE)
    schema.choice(f"{where}.judge.orders", own.orders, (1, 2))
    for key, most in (("clamp", 0.5), ("min_mass", 1.0), ("max_failed", 1.0)):
        if not 0 <= own[key] <= most:
            raise UserError(
                f"{where}.judge.{key}={own[key]}: expected from 0 to {most:g}"
            )
    schema.positive(f"{where}.judge.batch_size", own.batch_size)
    schema.positive(f"{where}.judge.rationale_tokens", own.rationale_tokens, zero=True)
    default = default or ("score" if 1 in places else "pairwise")
    asks = template.read(own.template or default, f"{where}.judge.template")
    if asks.places not in places:
        raise UserError(
            f"{asks.name}: has places for {asks.places} answers; expected "
            f"{' or '.join(map(str, places))}"
        )
    if (asks.principle is not None) != principle:
        needs = "needs" if principle else "has"
        raise UserError(
            f"{asks.name}: {needs} a place {{principle}}, which goes together with "
            "rater='constitution'"
        )
    if own.rationale_tokens and not asks.rationale:
        raise UserError(
            f"{where}.judge.rationale_tokens={own.rationale_tokens}: {asks.name} has "
            "no `rationale` to begin one"
        )
    if own.url:
        endpoint.check(f"{where}.judge", own, asks)


def make(config, sources, rng):
    """Returns the judge that the stage's config describes."""
    asked = sources.judge or endpoint.Endpoint(config.judge, sources.folder)
    return Judge(asked, config.judge)
