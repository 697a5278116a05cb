"""Mistakes in what a judge is asked, and in what is made of its answers."""

from tests.mutants.mutant import in_file

_LABELS = in_file(
    "stagecraft/signals/labels.py",
    "tests/signals/judge_test.py",
    (
        "the second order is not turned round",
        "slots * np.array([1.0, -1.0])[: len(slots)]",
        "slots * np.array([1.0, 1.0])[: len(slots)]",
    ),
    (
        "the mean of logits is of probabilities",
        "if combine == 'logit':",
        "if combine != 'logit':",
        {"within": "of_pair"},
    ),
    (
        "the bias is the sum over both orders",
        "return float(_difference(logps).mean())",
        "return float(_difference(logps).sum())",
    ),
    (
        "scores count from 0",
        "np.arange(1, len(table) + 1)",
        "np.arange(len(table))",
    ),
    (
        "answers of a group turn the wrong way",
        "(np.arange(count)[None] - np.arange(count)[:, None]) % count",
        "(np.arange(count)[None] + np.arange(count)[:, None]) % count",
    ),
    (
        "a clamp of one side",
        "min(max(probability, clamp), 1 - clamp)",
        "max(probability, clamp)",
    ),
)

_LEDGER = (
    *in_file(
        "stagecraft/stages/comparisons.py",
        "tests/stages/comparisons_test.py",
        (
            "a judge attends to both orders at once",
            "tokens * (tokens / orders + 1) / 2",
            "tokens * (tokens + 1) / 2",
        ),
    ),
    *in_file(
        "stagecraft/anatomy/cost.py",
        "tests/anatomy/cost_test.py",
        (
            "a judge costs what the model costs that it judges",
            "forward_flops(judge, tokens, context)",
            "forward_flops(model, tokens, context)",
        ),
        (
            "half of a row is attended to, twice",
            "4 * c.heads * c.head_dim * seen",
            "2 * c.heads * c.head_dim * seen",
            "tests/anatomy/cost_test.py -k xla",
        ),
    ),
)

_JUDGE = in_file(
    "stagecraft/signals/judge.py",
    "tests/signals/judge_test.py",
    (
        "one order twice",
        "asked = [(prompts[i], (first, second)), (prompts[i], (second, first))]",
        "asked = [(prompts[i], (first, second)), (prompts[i], (first, second))]",
    ),
    (
        "a failure is a tie",
        "return Verdict(reason=reason, evidence=evidence)",
        "return Verdict(0.5, evidence=evidence)",
    ),
    (
        "a failed score is 0",
        "math.inf if reward is None else reward",
        "0.0 if reward is None else reward",
    ),
    (
        "any mass of the labels will do",
        "labels.mass(one.logps) < least",
        "labels.mass(one.logps) < 0",
    ),
    (
        "a label may begin another",
        "if longer != label and other[: len(one)] == one:",
        "if longer != label and other == one:",
    ),
    (
        "the stop token of a rationale stays",
        "words = ids[:-1] if ended else ids",
        "words = ids",
        "tests/signals/judge_test.py -k rationale",
        "the tiny judge's rationale of a few tokens does not end by itself",
    ),
    (
        "a judge concludes twice",
        "if asks.answer and asks.answer in said[i]:",
        "if False:",
        "tests/signals/judge_test.py -k rationale",
    ),
    (
        "the template does not decide the identity",
        "template=self.template._replace(name=''),",
        "",
    ),
)

_SAMPLING = in_file(
    "stagecraft/models/sampling.py",
    "tests/signals/judge_test.py",
    (
        "positions of a label's tokens one too far",
        "positions = (lengths + step)[:, None]",
        "positions = (lengths + step + 1)[:, None]",
        {"within": "continuation_logps"},
    ),
    (
        "padding of a short label counts",
        "jnp.where(mask[:, 1:].T[:, None, :], later, 0.0)",
        "later",
        {"within": "continuation_logps"},
    ),
    (
        "labels repeated, not tiled",
        "token = jnp.tile(tokens[:, step], rows)",
        "token = jnp.repeat(tokens[:, step], rows)",
        {"within": "continuation_logps"},
    ),
)

_ENDPOINT = in_file(
    "stagecraft/signals/endpoint.py",
    "tests/signals/endpoint_test.py",
    (
        "a label that is not reported is impossible",
        "float(np.logaddexp.reduce(several)) if several else least",
        "float(np.logaddexp.reduce(several)) if several else -1e9",
    ),
    (
        "the key is part of the identity",
        "url=config.url, model=config.model, api=config.api",
        "url=config.url, model=config.model, api=config.api, key=self._key",
    ),
    (
        "a failure is kept for good",
        "if not answer.reason:",
        "if True:",
    ),
    (
        "refusals are asked again",
        "return REFUSED",
        "return UNAVAILABLE",
    ),
    (
        "NaN is read as JSON",
        "json.loads(body, parse_constant=refuse)",
        "json.loads(body)",
        "tests/signals/endpoint_test.py -k junk",
        "`_logp` refuses what is not finite too",
    ),
    (
        "replies of any size",
        "reply.read(MOST_BYTES + 1)",
        "reply.read(MOST_BYTES)",
    ),
    (
        "the deadline is of each read",
        "timer.start()",
        "",
    ),
)

_PERSUASION = in_file(
    "stagecraft/anatomy/bias.py",
    "tests/judging_test.py",
    (
        "answers to pleading count among the others",
        "plain = [row for row in rows if not row.persuades]",
        "plain = list(rows)",
    ),
    (
        "who was wrong before was persuaded",
        "[_picks(row) != row.gold for row in pleaded if row.pair in right]",
        "[_picks(row) != row.gold for row in pleaded]",
    ),
)

_BIAS = in_file(
    "stagecraft/anatomy/bias.py",
    "tests/anatomy/bias_test.py",
    (
        "a conflict is an agreement",
        "firsts[:, 0] == firsts[:, 1]",
        "firsts[:, 0] != firsts[:, 1]",
    ),
    (
        "a corrected rate without the specificity",
        "theta = (p + q0 - 1) / scale",
        "theta = p / scale",
    ),
    (
        "the shorter wins",
        "_picks(row) == (_longer(row) < 0)",
        "_picks(row) == (_longer(row) > 0)",
    ),
)

_PLANTED = in_file(
    "stagecraft/signals/planted.py",
    "tests/signals/planted_test.py",
    (
        "who contradicts is preferred",
        "c.agreement * (agrees[0] - agrees[1])",
        "c.agreement * (agrees[1] - agrees[0])",
    ),
    (
        "length by single words",
        "c.length * (len(one[0].split()) - len(two[0].split())) / 10",
        "c.length * (len(one[0].split()) - len(two[0].split()))",
    ),
)

MUTANTS = _LEDGER + _PERSUASION + _LABELS + _JUDGE + _SAMPLING + _ENDPOINT + _BIAS
MUTANTS += _PLANTED
