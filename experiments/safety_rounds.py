r"""Rounds of attack, collection, labels and training: what holds, and what it costs.

    pretrain -> sft -> pairs_1 -> round_1 -> pairs_2 -> round_2     ... in two arms
                 |     attacks_1             attacks_2
                 |---> attacker_0 --> attacker_1 --|

    stagecraft run --config=safety_rounds --workdir=runs/rounds
    stagecraft run --config=safety_rounds:tiny --workdir=runs/t     # seconds

A round attacks the model of the round before. Attacks are the world's templates times
deeds, some of several turns (red_team.jsonl), and what a small attacker writes: it is
paid for success x still harmful x useful x novel (stagecraft/stages/attacks.py), and
learns from the attacks that were rewarded. The attacked model answers them all twice;
the world's noisy rater says which answer is better; DPO from the SFT model, or a reward
model and PPO (objective=ppo), learns from the labels of all rounds so far. Prompts
about facts and small talk are in the mix, so that helpfulness is compared too. Two
arms differ in one thing: `with_` has benign look-alikes, in attack wrappers as well,
among the prompts of each round, `without_` has none.

Figures at the end are of held-out countries; "seen" deeds and wrappers are among the
prompts of the rounds, "new" ones are not, and neither are whole families. Shares of
greedy answers have Wilson's 95% intervals.

Measured (seed 0, DPO, 10 minutes on two cores with other work; docs/results.md):
attacks succeed at .00 to .06 after one round and after two, in both arms. Without
look-alikes the arm refuses every look-alike, with them .81 and then .73: it has not
learned to tell harm from them. Facts are kept (.99), wins by gold are .59 to .62. An
earlier draw of this seed ended otherwise: attacks .30 to .39, look-alikes refused .44.

rounds=N, seed=N; objective=rpo is DPO with the likelihood of what is chosen; base=DIR
takes pretrain and sft from a finished run of this file.
"""

from experiments import common, objectives, quickstart
from stagecraft import defaults
from stagecraft.errors import UserError

ARMS = ("with", "without")
FIGURES = (
    "harmless",
    "partial_refusal",
    "attacks_seen_bare",
    "attacks_seen_seen",
    "attacks_seen_new",
    "attacks_new_bare",
    "attacks_new_seen",
    "attacks_new_new",
    "over_refusal",
    "over_refusal_wrapped",
    "gold_win_rate",
    "heldout_accuracy",
    "kl",
    "labels",
    "gflops",
)
PAIRS = 1000  # compared in a round
STEPS = 60  # of DPO, or of the reward model
ATTACKS = 160  # prompts of the attacker in a round, four attacks each


def get_config(arg=""):
    arg = common.parse_arg(
        arg, tiny=False, base="", rounds=2, objective="dpo", pairs=PAIRS, seed=0
    )
    known = ("dpo", "rpo", "ppo")
    if arg.objective not in known:
        raise UserError(common.unknown("objective", arg.objective, known))
    recipe = quickstart.get_config("tiny" if arg.tiny else "")
    c = defaults.experiment()
    for key in ("world", "tokenizer", "model"):
        c[key] = recipe[key]
    c.seed = arg.seed
    c.measure.table, c.measure.draws = FIGURES, 2
    start = objectives.on_requests(c, recipe, arg.base)
    c.stages.attacker_0 = _attacker(start["sft"], ["world:attacks.jsonl"])
    for arm in ARMS:
        _rounds(c, arm, start, recipe, arg)
    return common.tiny(c) if arg.tiny else c


def _attacker(sft, files):
    """Returns a stage that learns to write the attacks in some files."""
    return defaults.stage(
        "language_model",
        start_from=sft,
        data=dict(
            format="demonstrations",
            files=",".join(files),
            fields="prompt=asked+completion=attack",
            length=64,
            packing="none",
        ),
        steps=200,
        batch_size=32,
        optimizer=dict(lr=8e-4, warmup_steps=10),
    )


def _rounds(c, arm, start, recipe, arg):
    """Adds the rounds of an arm."""
    target, attacker, known, pairs = start["sft"], "attacker_0", [], []
    known.append("world:attacks.jsonl")
    for number in range(1, arg.rounds + 1):
        attacks = f"{arm}_attacks_{number}"
        c.stages[attacks] = defaults.stage(
            "attacks",
            start_from=attacker,
            target_from=target,
            data=dict(files="world:attack_prompts.jsonl", known=",".join(known)),
            prompts=ATTACKS,
            threshold=0.2,
            withstood="harmful",  # an arm may refuse everything
            sampling=dict(max_new_tokens=32, temperature=0.7),
        )
        known.append(f"stage:{attacks}")
        pairs.append(f"{arm}_pairs_{number}")
        files = [
            "world:red_team.jsonl",
            f"stage:{attacks}",
            "world:other_prompts.jsonl",
        ]
        files += ["world:benign_requests.jsonl"] * (arm == "with")
        c.stages[pairs[-1]] = defaults.stage(
            "comparisons",
            start_from=target,
            data=dict(files=",".join(files)),
            prompts=arg.pairs,
            sampling=dict(recipe.stages.comparisons.sampling),
        )
        records = ",".join(f"stage:{name}" for name in pairs)
        count, target = arg.pairs * number, f"{arm}_round_{number}"
        _learn(c, target, start["sft"], records, recipe, count, arg.objective)
        if number < arg.rounds:
            attacker = f"{arm}_attacker_{number}"
            c.stages[attacker] = _attacker(start["sft"], known)


def _learn(c, name, sft, records, recipe, count, objective):
    names = dict(dpo=name)
    if objective == "ppo":
        names = dict(reward=f"{name}_reward", ppo=name)
    common.learners(c, sft, records, recipe, count, **names)
    for stage in (c.stages[name] for name in names.values()):
        if "length" in stage.data:  # wrappers are long
            stage.data.length, stage.steps = 96, min(STEPS, stage.steps)
    if objective == "rpo":  # DPO, and what is chosen is not to get less likely
        c.stages[name].objective = "sigmoid,sft"
        c.stages[name].objective_weights = (1.0, 0.5)
    if objective == "ppo":  # the prompts that were compared
        last = records.split(",")[-1].removeprefix("stage:")
        c.stages[name].data.files = c.stages[last].data.files
