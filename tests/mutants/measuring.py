"""Mistakes in what is reported of finished stages: draws, intervals, scores."""

from tests.mutants.mutant import in_file

_FIGURES = in_file(
    "stagecraft/anatomy/sampled.py",
    "tests/anatomy/world_figures_test.py",
    (
        "policy and base share their random numbers",
        'f"{seed}/{where}/{draw}"',
        'f"{seed}/{draw}"',
    ),
    (
        "answers have no habits",
        'row = habits(samples["answers"])',
        "row = {}",
    ),
    (
        "every draw is the same",
        'f"{seed}/{where}/{draw}"',
        'f"{seed}/{where}"',
    ),
    (
        "a stage of another run has the seed of one's own",
        'where = f"outside/{Path(name).name}" if "/" in name else name',
        "where = Path(name).name",
    ),
    (
        "one draw whatever is asked for",
        "draws = draws or self.run.config.measure.draws",
        "draws = draws or 1",
    ),
    (
        "a policy is scored by any reward model of its base",
        'if "reward" in roles.of(stage.kind).roles and stage.reward_from:',
        'if "reward" not in roles.of(stage.kind).roles and stage.reward_from:',
    ),
)

_TIME = in_file(
    "stagecraft/report/compare.py",
    "tests/report/compare_test.py -k time",
    ("time has a verdict", "not figures.figure(key).time", "True"),
)

_CHAT = in_file(
    "stagecraft/report/chat.py",
    "tests/report/chat_test.py -k default",
    ("the last stage is talked to", "_depth(run.config, stage)", "0"),
)

_HUB_DATA = in_file(
    "stagecraft/data/files.py",
    "tests/hub_test.py -k data",
    ("a model is taken for data", 'kind="dataset"', 'kind="model"'),
)

_WORLD_FIGURES = in_file(
    "stagecraft/anatomy/world_figures.py",
    "tests/anatomy/world_figures_test.py",
    (
        "a reward model without an order is NaN",
        "np.isfinite(table).any()",
        "True",
    ),
)

_STATISTICS = in_file(
    "stagecraft/anatomy/statistics.py",
    "tests/anatomy/statistics_test.py",
    (
        "an interval may be tighter than the measuring",
        "halves = [_half(*error_of_mean(errors))] if errors else []",
        "halves = []",
    ),
    (
        "the error of a mean is that of a sum",
        "return total / len(errors), freedom",
        "return total, freedom",
    ),
    (
        "the base's draws are certain",
        "float(np.hypot(*parts))",
        "parts[1]",
    ),
    (
        "the jackknife forgets its factor",
        "(size - 1) * np.var(without)",
        "np.var(without)",
    ),
)

_SHOWN = in_file(
    "stagecraft/report/compare.py",
    "tests/report/compare_test.py",
    (
        "a verdict on one seed",
        "min(len(ones), len(others)) < 2",
        "False",
    ),
)

_WORLD = in_file(
    "stagecraft/worlds/countries/scorer.py",
    "tests/worlds/scorer_test.py",
    (
        "refusing and then helping is paid",
        "RIGHT if only_refuses(text) else COMPLY",
        "RIGHT if refuses(text) else COMPLY",
    ),
)

_STORED = in_file(
    "stagecraft/storage.py",
    "tests/storage_test.py",
    (
        "NaN in JSON",
        "not math.isfinite(value)",
        "False",
    ),
)

_SELECTION = in_file(
    "stagecraft/stages/selection.py",
    "tests/stages/selection_test.py",
    (
        "answers that were cut off have no reward",
        "rewards += [score for score in scores if score is not None]",
        "rewards += [scores[row] for row in fit]",
    ),
)

_HELDOUT_FIGURES = in_file(
    "stagecraft/anatomy/heldout_figures.py",
    "tests/anatomy/heldout_figures_test.py",
    (
        "a verifier that abstains gives 0",
        "np.where(np.isfinite(column), column, np.nan)",
        "np.nan_to_num(column)",
    ),
    (
        "ties are lost",
        "0.5 + 0.5 * np.sign(ones[both] - others[both])",
        "ones[both] > others[both]",
    ),
    (
        "more prompts than asked for",
        "len(found) < limit",
        "True",
    ),
    (
        "prompts without room for an answer",
        "len(ids) <= room",
        "True",
    ),
)

_VERDICT = in_file(
    "stagecraft/report/verdict.py",
    "tests/report/page_test.py",
    (
        "time counts as a result",
        'not row["time"]',
        "True",
    ),
    (
        "failed bounds are not the first",
        '(row["holds"] is not False, row["time"])',
        'row["time"]',
    ),
)

_EDGES = in_file(
    "stagecraft/runs.py",
    "tests/report/page_test.py",
    (
        "records are no edge",
        'f"stage:{name}" in map(str.strip, parts)',
        "False",
    ),
)

MUTANTS = (
    *(_FIGURES + _WORLD_FIGURES + _HELDOUT_FIGURES + _STATISTICS + _SHOWN),
    *(_WORLD + _STORED + _SELECTION + _VERDICT + _EDGES),
    *(_TIME + _CHAT + _HUB_DATA),
)
