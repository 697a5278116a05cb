"""The figures of a run: measured on finished stages, checked against its claims.

WORKDIR/summary.json holds nested dicts of floats, STAGE.FIGURE. With an embedded world
they are measured on entities and prompts that no stage trained on; without one they are
the last eval_ metrics of each stage.
"""

import difflib
import operator
import re
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from stagecraft import defaults, metrics, storage, worlds
from stagecraft.anatomy import behaviour, cost, weights
from stagecraft.errors import UserError
from stagecraft.models import scores
from stagecraft.models.language import Language
from stagecraft.report import page

ROWS = 128  # held-out prompts answered at once


def conclude(current, *, changed, started):
    """Measures what is finished, writes summary.json, prompt.json and report.html.

    Args:
        current: a `run.Run`, inside its mesh.
        changed: whether any stage ran; if none did and the files are there, they are
            left alone.
        started: time.perf_counter() when the run began.

    Returns:
        the summary.
    """
    path = current.root / "summary.json"
    kept = storage.read_json(path)
    if kept and not changed:
        show(kept)
        return kept
    found = measure(current)
    found["weights"] = _weights(current)
    found["cost"] = _cost(current)
    prompt = current.config.measure.prompt or _world_prompt(current)
    if prompt and behaviour.speaking_stages(current):
        answers = behaviour.through_stages(current, prompt)
        storage.write_json(
            current.root / "prompt.json", {"prompt": prompt, "answers": answers}
        )
    found["seconds"] = _seconds(current, started)
    found["bounds"] = judge(found, current.config.measure.claims)
    storage.write_json(path, found)
    page.write(current.root)
    show(found)
    Console().print(f"report: {current.root / 'report.html'}", highlight=False)
    return found


def measure(current):
    """{stage: {figure: float}} of every finished stage."""
    found = {name: _last_eval(current, name) for name in _finished(current)}
    if current.config.world.name:
        for name, figures in _in_world(current).items():
            found[name] |= figures
    return found


def _finished(current):
    return [n for n in current.stages if current.finished(n)]


def _last_eval(current, name):
    """The stage's last eval_ metrics, under their own names."""
    rows = metrics.read(current.root / name / "metrics.jsonl")
    rows = [r for r in rows if any(k.startswith("eval_") for k in r)]
    last = rows[-1] if rows else {}
    return {k: v for k, v in last.items() if k.startswith("eval_")}


# -- in a world ------------------------------------------------------------------------


def _in_world(current):
    config = current.config
    world = worlds.get(config.world.name)
    roles = world.split(config.seed, config.world.size)
    held = getattr(roles, config.measure.split)
    everyone = (*roles.train, *roles.dev, *roles.test)
    prompts = world.probes.heldout_prompts(config.seed, held, config.measure.split)
    found, drawn, second, bases = {}, {}, {}, {}

    def spoken(base):
        """A base model, and its samples; it may come from another run."""
        if base not in bases:
            bases[base] = _language(current, base)
        if base not in drawn:
            drawn[base] = _sample(bases[base], prompts, seed=1)
        return bases[base], drawn[base]

    for name in behaviour.speaking_stages(current):
        language = _language(current, name)
        figures = {"cloze_accuracy": world.probes.cloze_accuracy(language, everyone)}
        if current.chat_format(name):
            accuracy = world.probes.fact_accuracy(language, held)
            figures["heldout_accuracy"] = accuracy.pop("all")
            figures["heldout_accuracy_by"] = accuracy
            seen = world.probes.fact_accuracy(language, roles.train)
            figures["seen_accuracy"] = seen["all"]
            samples = drawn[name] = _sample(language, prompts, seed=1)
            figures |= world.probes.sample_figures(prompts, samples["answers"])
            figures |= talk(samples["ids"], samples["logps"])
            base = _base(current, name)
            if base:
                figures |= _against(world, prompts, samples, *spoken(base))
        else:
            figures["copy_probability"] = world.probes.copy_probability(language, held)
            figures["answer_rate"] = world.probes.answer_rate(language, everyone)
        found[name] = figures
    for name in _finished(current):
        if config.stages[name].kind != "reward":
            continue
        base = config.stages[name].start_from
        while base in config.stages and config.stages[base].kind == "reward":
            base = config.stages[base].start_from
        if base not in drawn:
            continue
        if base not in second:
            second[base] = _sample(spoken(base)[0], prompts, seed=2)
        model = current.load(name)
        one, two = drawn[base], second[base]
        found[name] = _pairs(model, world, prompts, one, two, config.seed)
        for other in found.keys() & drawn.keys():
            if (_base(current, other) or other) == base:
                score = np.mean(_scores(model, drawn[other]))
                found[other]["reward_mean"] = float(score)
    return found


def _language(current, name):
    return Language(current.load(name), current.tokenizer, batch_size=ROWS)


def _base(current, name):
    """The SFT model a stage is compared with: the nearest one above it.

    It is the first language_model stage on the way up `start_from`, through whatever
    rounds of preference or policy training lie between: a stage of this run, or the
    folder of another run's. None where there is none that answers in turns.
    """
    stages = current.config.stages
    parent = stages[name].start_from
    while parent:
        if parent in stages:
            kind, above = stages[parent].kind, stages[parent].start_from
        else:
            folder = current.folder(parent)
            info = storage.read_json(folder / "stage.json", {})
            if not info.get("finished"):
                return None
            kind, above = info["kind"], info["start_from"]
            if "/" not in above:  # a name in that run, where it may be gone by now
                beside = folder.parent / above
                above = str(beside) if above and beside.exists() else ""
        if kind == "language_model":
            return parent if current.chat_format(parent) else None
        parent = above
    return None


def talk(ids, logps):
    """Length and entropy of sampled answers.

    Args:
        ids: token ids of each answer, the end token included where it was said.
        logps: log-probability of each whole answer, at the sampling temperature 1.

    Returns:
        length: mean tokens; entropy: nats a token. The mean of -log p over the
        model's own samples is an unbiased estimate of the entropy of its answers, and
        is shared out over their tokens.

    >>> talk([[5, 6], [7, 8, 9, 10]], [-1.0, -2.0])
    {'length': 3.0, 'entropy': 0.5}
    """
    tokens = sum(map(len, ids))
    nats = 0.0 - float(np.sum(logps))
    return {
        "length": tokens / len(ids),
        "entropy": nats / tokens if tokens else 0.0,
    }


def _sample(language, prompts, seed):
    """One answer a prompt at temperature 1: ids, texts, log-probabilities."""
    rows = [language.encode(p, chat_format=True) for p in prompts]
    stops = language.stop_ids(chat_format=True)
    got = language.sample_ids(
        rows, seed=seed, max_new_tokens=34, temperature=1.0, stop_ids=stops
    )
    return {
        "prompts": rows,
        # The stop token is part of what was said, and of its probability.
        "ids": [ids for ids, _, _ in got],
        "answers": [
            (language.tokenizer.decode(ids[:-1] if ended else ids), ended)
            for ids, ended, _ in got
        ],
        "logps": [logp for _, _, logp in got],
    }


def _against(world, prompts, samples, language, others):
    """Win rate over the base model's samples, and the KL from it: nats a sequence."""
    rows = list(zip(samples["prompts"], samples["ids"], strict=True))
    reference = language.logprob_ids(rows)
    return {
        "gold_win_rate": world.probes.win_rate(
            prompts, samples["answers"], others["answers"]
        ),
        "kl": float(np.mean(np.subtract(samples["logps"], reference))),
    }


def _scores(model, samples):
    rows = [p + a for p, a in zip(samples["prompts"], samples["ids"], strict=True)]
    return scores.of_rows(model, rows)


def _pairs(model, world, prompts, one, two, seed):
    """How well the reward model, and the noisy labels, order two answers a prompt."""
    answers = one["answers"], two["answers"]
    difference = np.subtract(_scores(model, one), _scores(model, two))
    rng = np.random.default_rng([seed, 9])
    labels = [
        {0: 1, 1: -1, None: 0}[world.rate(p, pair, rng)]
        for p, pair in zip(prompts, zip(*answers, strict=True), strict=True)
    ]
    order = world.probes.pair_order
    return {
        "pair_accuracy": order(prompts, *answers, difference),
        "label_accuracy": order(prompts, *answers, labels),
    }


def _world_prompt(current):
    name = current.config.world.name
    return worlds.get(name).single_prompt if name else ""


# -- weights, cost, seconds ------------------------------------------------------------


def _weights(current):
    found = {}
    for name in _finished(current):
        stage = current.config.stages[name]
        parent = stage.start_from
        known = parent in current.config.stages and current.finished(parent)
        if stage.kind not in defaults.RECORDS and known:
            found[name] = weights.compare(current.load(parent), current.load(name))
    return found


def _cost(current):
    """FLOPs of each stage, and their share of pretraining's."""
    flops = {}
    for name in _finished(current):
        info = storage.read_json(current.root / name / "stage.json")
        if info.get("model"):
            flops[name] = cost.stage_flops(
                info["tokens"], info["model"], adapter="lora" in info
            )
    roots = [
        n
        for n in flops
        if current.config.stages[n].kind == "language_model"
        and current.config.stages[n].data.format == "text"
        and not current.config.stages[n].start_from
    ]
    total = sum(flops[n] for n in roots)
    return {
        n: {"flops": f} | ({"share": cost.share(f, total)} if total else {})
        for n, f in flops.items()
    }


def _seconds(current, started):
    """Wall seconds by stage and in total; a resumed stage counts both its runs."""
    found, before = {}, 0.0
    for name in _finished(current):
        info = storage.read_json(current.root / name / "stage.json")
        found[name] = info["seconds"]["total"]
        before += found[name] - info.get("seconds_this_time", found[name])
        if name not in current.ran:
            before += info.get("seconds_this_time", found[name])
    here = time.perf_counter() - started
    found["rest"] = here - sum(v for k, v in found.items()) + before
    return {k: round(v, 2) for k, v in found.items()} | {
        "total": round(here + before, 2)
    }


# -- claims ----------------------------------------------------------------------------

_SIGNS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_SHOWN = {"<=": "≤", ">=": "≥"}


_CLAIM = re.compile(r"\S+ (<=|>=|<|>) \S+( [-+*] \S+)?")


def check_claim(claim):
    """Refuses a claim `judge` could not read."""
    if not _CLAIM.fullmatch(claim):
        raise UserError(
            f"measure.claims: {claim!r}: expected 'KEY SIGN VALUE' as in "
            "'sft.cloze_accuracy >= 0.93' or 'ppo.gold_mean > sft.gold_mean + 0.4'"
        )


def judge(found, claims):
    """Checks claims such as "ppo.gold_mean > sft.gold_mean + 0.4".

    Args:
        found: the summary.
        claims: texts "KEY SIGN VALUE", the value a number, a key, KEY + NUMBER, KEY -
            NUMBER or NUMBER * KEY.

    Returns:
        {key: {"must", "short", "holds"}}, `short` with numbers in place of keys; a
        claim about a stage that was not run is left out, one about a figure that no
        stage has does not hold, and `short` says which it is.

    >>> judge({"a": {"x": 2.0}, "b": {"x": 1.0}}, ["a.x > b.x + 0.5"])
    {'a.x': {'must': '> b.x + 0.5', 'short': '> 1.5', 'holds': True}}
    """
    out = {}
    for claim in claims:
        key, sign, *value = claim.split()
        left, right = _lookup(found, key), _value(found, value)
        if left is None or right is None:
            missing = _unknown(found, [key, *value])
            if missing:
                out[key] = {"must": claim, "short": missing, "holds": False}
            continue
        must = f"{_SHOWN.get(sign, sign)} {' '.join(value)}"
        short = f"{_SHOWN.get(sign, sign)} {right:.3g}"
        holds = bool(_SIGNS[sign](left, right))
        if key in out:
            must = f"{out[key]['must']}, {must}"
            short = f"{out[key]['short']}, {short}"
            holds = holds and out[key]["holds"]
        out[key] = {"must": must, "short": short, "holds": holds}
    return out


def _unknown(found, words):
    """What a claim about a stage that ran names and nobody measured, in a line."""
    for word in words:
        stage, _, figure = word.partition(".")
        if stage in found and figure and _lookup(found, word) is None:
            near = difflib.get_close_matches(figure, found[stage], n=1)
            hint = f"; did you mean {stage}.{near[0]}?" if near else ""
            return f"no figure {word}{hint}"
    return ""


def _value(found, words):
    terms = [_number(found, w) for w in words[::2]]
    if any(t is None for t in terms):
        return None
    if len(terms) == 1:
        return terms[0]
    one, two = terms
    return {"+": one + two, "-": one - two, "*": one * two}[words[1]]


def _number(found, word):
    try:
        return float(word)
    except ValueError:
        return _lookup(found, word)


def _lookup(found, key):
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    return found


# -- the table -------------------------------------------------------------------------


def show(found):
    """Prints the headline figures as a table: stages down, figures across groups."""
    console = Console(highlight=False)
    bounds = found.get("bounds", {})
    if bounds:
        table = Table(title="claims", title_justify="left")
        for column in ("figure", "is", "must be", ""):
            table.add_column(column, justify="right" if column == "is" else "left")
        for key, bound in bounds.items():
            value = _lookup(found, key)
            mark = "holds" if bound["holds"] else "[red]DOES NOT HOLD[/red]"
            must = bound["must"] if value is not None else bound["short"]
            shown = "–" if value is None else f"{value:.3f}"
            table.add_row(key, shown, must, mark)
        console.print(table)
    rest = Table(title="figures by stage", title_justify="left")
    rest.add_column("stage", no_wrap=True)
    rest.add_column("figures", overflow="fold")
    for name, figures in found.items():
        if name in ("bounds", "weights", "cost", "seconds"):
            continue
        told = [f"{k} {v:.3f}" for k, v in figures.items() if isinstance(v, float)]
        rest.add_row(name, ", ".join(told))
    costs = [
        f"{k} {v['share']:.1%}"
        for k, v in found.get("cost", {}).items()
        if "share" in v
    ]
    if costs:
        rest.add_row("cost", ", ".join(costs) + " of pretraining's FLOPs")
    changes = [
        f"{k} {v['relative_change']:.3f}" for k, v in found.get("weights", {}).items()
    ]
    if changes:
        rest.add_row("weights", ", ".join(changes) + " relative change")
    rest.add_row("seconds", f"{found['seconds']['total']:.0f} in total")
    console.print(rest)
