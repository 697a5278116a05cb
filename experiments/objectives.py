r"""Any objective from the quickstart's SFT model, on the same pairs or prompts.

    make quickstart                                      # the SFT and reward models
    stagecraft run --config=objectives:name=simpo,seeds=3 \
        --workdir=runs/simpo
    stagecraft run --config=objectives:name=dpo+ipo+kto --workdir=runs/a
    stagecraft run --config=objectives:name=all --workdir=runs/zoo
    stagecraft compare runs/zoo

base=DIR names another finished run of the quickstart; base=none trains its SFT and
reward models within this run, as `tiny` does. Every arm (a variant that is compared
with others) takes the steps, batch and learning rate of the quickstart's DPO or PPO, so
that arms differ in their objective alone; settings of the objective itself are those of
its paper where this world bears them. seeds=N trains each arm N times, on other samples
or in another order; share=0.5 takes half the steps.

The measured tables are in docs/results.md.
"""

import json
from pathlib import Path

from experiments import common, quickstart
from stagecraft import defaults, losses
from stagecraft.errors import UserError

# Arms over the comparisons: what differs from the quickstart's DPO. Every pair loss is
# an arm of its own name, but for the second name of DPO and for "sft", an arm over
# demonstrations.
PAIRS = {
    name: dict(objective=name)
    for name in losses.PAIRS
    if name not in ("sigmoid", "sft")
} | {
    "sigmoid_norm": dict(objective="sigmoid_norm", objective_args=dict(beta=2.0)),
    "simpo": dict(objective="simpo", objective_args=dict(beta=2.5, gamma=1.375)),
    "alphapo": dict(
        objective="alphapo", objective_args=dict(beta=2.5, gamma=0.25, alpha=0.25)
    ),
    "cdpo": dict(objective_args=dict(label_smoothing=0.1)),
    "robust": dict(objective="robust", objective_args=dict(label_smoothing=0.1)),
    "dpo_forward_kl": dict(f_divergence="forward_kl"),
    "dpo_js": dict(f_divergence="js"),
    "dpo_alpha": dict(f_divergence="alpha", alpha=0.5),
    "dpo_reference_free": dict(reference_free=True),
    "sft_on_chosen": dict(objective="sft"),
    "rpo": dict(objective="sigmoid,sft", objective_weights=(1.0, 0.5)),
    "mpo": dict(objective="sigmoid,bco_pair,sft", objective_weights=(0.8, 0.2, 1.0)),
    "ld_dpo": dict(ld_alpha=0.5),
    "wpo": dict(weighting="wpo"),
    "tr_dpo": dict(sync_every=16, sync_alpha=0.6),
}
# Arms over single completions: both sides of each pair, judged.
UNPAIRED = {
    "kto": dict(objective="kto"),
    "bco": dict(objective="bco"),
    "apo_zero_unpaired": dict(objective="apo_zero_unpaired"),
}
# Arms over prompts with a critic: what differs from the quickstart's PPO. One without a
# KL penalty, one at a higher rate and one of more steps tell apart what pushing too
# hard may mean.
PPO = {
    "ppo": dict(),
    "ppo_no_kl": dict(kl_coef=0.0),
    "ppo_fast": dict(optimizer=dict(lr=4e-4)),
    "ppo_long": dict(),  # quickstart.HARD times the steps: ppo_hard with a KL penalty
    "ppo_placement_b": dict(score_placement="B"),
    "ppo_adaptive_kl": dict(kl_target=3.0, kl_horizon=2000.0),
    "ppo_k2_in_loss": dict(kl_placement="loss", kl_estimator="k2"),
    "ppo_k3_in_loss": dict(kl_placement="loss", kl_estimator="k3"),
    "ppo_dual_clip": dict(objective_args=dict(dual_clip=3.0)),
    "ppo_no_value_clip": dict(value_clip=0.0),
    "ppo_whitened_rewards": dict(whiten_rewards=True),
    "ppo_bootstrap": dict(bootstrap_truncated=True),
    "ppo_entropy": dict(
        objective="ppo_policy,entropy_bonus", objective_weights=(1.0, 0.01)
    ),
    "ppo_ptx": dict(data=dict(ptx="world:text.jsonl", ptx_rows=16)),
    "ppo_own_critic_optimizer": dict(
        value_optimizer=dict(name="adamw", lr=3e-4, warmup_steps=0), value_lr_scale=1.0
    ),
}
# Arms over prompts without a critic: G samples a prompt are each other's baseline.
GROUPS = {
    "grpo": dict(aggregation="grpo", kl_coef=0.04),
    "bnpo": dict(aggregation="bnpo"),
    "dapo": dict(
        objective_args=dict(clip=0.2, clip_high=0.28),
        mask_truncated=True,
        overlong_cache=8,
        oversample=2,
    ),
    "dr_grpo": dict(aggregation="dr_grpo", scale_rewards="none"),
    "gspo": dict(objective="gspo", aggregation="grpo"),
    "cispo": dict(objective="cispo"),
    "sapo": dict(objective="sapo"),
    "rloo": dict(
        objective="rloo_policy",
        advantage="leave_one_out",
        aggregation="grpo",
        kl_coef=0.05,
        kl_placement="reward",
        kl_estimator="k1",
    ),
    "reinforce_plus_plus": dict(
        advantage="returns", kl_coef=0.05, kl_placement="reward", kl_estimator="k1"
    ),
    "reinforce_plus_plus_baseline": dict(
        advantage="returns_baseline", kl_coef=0.05, kl_estimator="k2"
    ),
    "reinforce": dict(objective="reinforce", minibatches=1, epochs=1),
}
# Arms that sample pairs as they learn.
ONLINE = {
    "online_dpo": dict(),
    "online_ipo": dict(objective="ipo_sum"),
}
# Arms that are graphs of their own: see `_graph`.
GRAPHS = ("best_of_n", "rejection_sampling", "iterative_dpo", "dpo_soft_labels")
# Arms over demonstrations, from the pretrained model, and over comparisons of a reward
# model: stages that come before the ones above.
DEMONSTRATIONS = {
    "sft": dict(),
    # Without pretraining's text mixed in, no row of SFT names a held-out entity.
    "sft_no_replay": dict(data=dict(replay="", replay_share=0.0)),
    "sft_dft": dict(objective="dft"),
    "sft_z_loss": dict(objective="next_token,z_loss", objective_weights=(1.0, 1e-4)),
    "sft_packed": dict(data=dict(packing="bfd")),
    "sft_muon": dict(optimizer=dict(name="muon", lr=5e-3)),
    "sft_lion": dict(optimizer=dict(name="lion", lr=1e-4)),
    "sft_adafactor": dict(optimizer=dict(name="adafactor", lr=1e-3)),
    "sft_wsd_ema": dict(optimizer=dict(schedule="wsd"), ema_decay=0.95),
}
REWARD = {
    "reward": dict(),
    "reward_centered": dict(objective_args=dict(centering=0.01)),
    "reward_ranked": dict(objective="bradley_terry_ranked"),
}
KINDS = {
    "pairs": PAIRS,
    "unpaired": UNPAIRED,
    "critic": PPO,
    "groups": GROUPS,
    "online": ONLINE,
    "graphs": dict.fromkeys(GRAPHS),
    "demonstrations": DEMONSTRATIONS,
    "reward_models": REWARD,
}
NAMES = tuple(name for arms in KINDS.values() for name in arms)


def get_config(arg=""):
    arg = common.parse_arg(arg, tiny=False, name="dpo", seeds=1, base="", share=1.0)
    base = arg.base or ("none" if arg.tiny else "runs/quickstart")
    recipe = quickstart.get_config("tiny" if arg.tiny else "")
    for stage in (recipe.stages.dpo, recipe.stages.ppo):
        stage.steps = max(round(stage.steps * arg.share), 1)
    names = _names(arg.name)
    c = defaults.experiment()
    for key in ("world", "tokenizer", "model"):
        c[key] = recipe[key]
    if base == "none":
        for name in ("pretrain", "sft", "comparisons", "reward"):
            c.stages[name] = recipe.stages[name]
        places = {k: k for k in c.stages} | {"pairs": "stage:comparisons"}
    else:
        places = finished(c, base)
    for name in names:
        for seed in range(arg.seeds):
            label = name if arg.seeds == 1 else f"{name}_seed{seed}"
            before = set(c.stages)
            _add(c, label, name, recipe.stages, places)
            for added in set(c.stages) - before:
                c.stages[added].seed = seed
    return common.tiny(c) if arg.tiny else c


def _names(text):
    """The arms of "dpo+ipo", of a group as in "pairs+groups", or of "all"."""
    names = []
    for name in text.split("+"):
        if name == "all":
            names += [n for n in NAMES if n not in DEMONSTRATIONS | REWARD]
        elif name in KINDS:
            names += KINDS[name]
        elif name in NAMES:
            names.append(name)
        else:
            raise UserError(common.unknown("name", name, (*NAMES, *KINDS, "all")))
    return list(dict.fromkeys(names))


def from_sft(arg):
    """Begins an experiment on the quickstart's world with its SFT model.

    Args:
        arg: an object with tiny, base (a finished quickstart, or "" to train that much
            of one first) and seed. With a base the world and the models are its own,
            and the seed is that of the stages; see `seeded`.

    Returns:
        the config, the quickstart's, the name of the SFT model.
    """
    recipe = quickstart.get_config("tiny" if arg.tiny else "")
    c = defaults.experiment()
    for key in ("world", "tokenizer", "model"):
        c[key] = recipe[key]
    if arg.base:
        return c, recipe, finished(c, arg.base)["sft"]
    c.stages.pretrain, c.stages.sft = recipe.stages.pretrain, recipe.stages.sft
    c.seed = arg.seed
    return c, recipe, "sft"


def on_requests(c, recipe, base=""):
    """Adds a world with requests, attacks and beliefs, pretraining and SFT on it.

    Args:
        c: an experiment with the quickstart's world, tokenizer and model.
        recipe: the quickstart's config.
        base: a finished run that began like this, to take its models; or "".

    Returns:
        {"pretrain" and "sft": the name of the stage}.
    """
    texts = "world:text.jsonl,world:request_text.jsonl"
    c.world.requests, c.model.max_length, c.tokenizer.files = True, 160, texts
    if base:
        finished(c, base)
        return {name: str(Path(base) / name) for name in ("pretrain", "sft")}
    pretrain = c.stages.pretrain = recipe.stages.pretrain
    pretrain.data.files, pretrain.data.shares = texts, (0.75, 0.25)
    pretrain.steps = 550
    c.stages.sft = defaults.stage(
        "language_model",
        start_from="pretrain",
        data=dict(
            format="demonstrations",
            files="world:request_demonstrations.jsonl",
            replay=texts,
            replay_share=0.25,
            length=64,
            packing="none",
        ),
        steps=250,
        batch_size=32,
        optimizer=dict(lr=4e-4, warmup_steps=10),
    )
    return {"pretrain": "pretrain", "sft": "sft"}


def seeded(c, arg):
    """Ends what `from_sft` began: seeds its stages where there is a base, and cuts it
    down where it is to be tiny."""
    for stage in c.stages.values():
        stage.seed = arg.seed if arg.base else 0
    return common.tiny(c) if arg.tiny else c


def finished(c, base):
    """Where the models and pairs of a finished quickstart lie; the same world again."""
    base = Path(base)
    path = base / "config.json"
    if not path.exists():
        raise UserError(
            f"base={base}: no run here (no config.json); run make quickstart first, "
            "name another with base=DIR, or train all of it here with base=none"
        )
    stored = json.loads(path.read_text(encoding="utf-8"))
    c.seed, c.world.size = stored["seed"], stored["world"]["size"]
    c.model.update(stored["model"])
    c.tokenizer.path = str(base / "tokenizer")
    c.tokenizer.vocab_size = stored["tokenizer"]["vocab_size"]
    places = {n: str(base / n) for n in ("pretrain", "sft", "comparisons", "reward")}
    return places | {"pairs": str(base / "comparisons" / "records.jsonl")}


def _add(c, label, name, recipe, places):
    """Adds one arm's stages; the one that carries its name comes last."""
    dpo, ppo = recipe.dpo, recipe.ppo
    trained = dict(steps=dpo.steps, batch_size=dpo.batch_size, optimizer=dpo.optimizer)
    pairs = (
        dict(start_from=places["sft"], data=dict(files=places["pairs"], length=64))
        | trained
    )
    sampled = dict(
        start_from=places["sft"],
        reward_from=places["reward"],
        data=dict(files="world:prompts.jsonl"),
        sampling=dict(ppo.sampling),
        optimizer=ppo.optimizer,
        steps=ppo.steps,
    )
    if name in PAIRS:
        own = dict(objective_args=dict(beta=0.1)) if _takes_beta(name) else {}
        c.stages[label] = _stage("preference", pairs | own, PAIRS[name])
    elif name in UNPAIRED:
        c.stages[label] = _stage("unpaired_preference", pairs, UNPAIRED[name])
    elif name in PPO:
        c.stages[label] = _stage("policy", ppo.to_dict() | sampled, PPO[name])
        if name == "ppo_long":
            c.stages[label].steps = quickstart.HARD * ppo.steps
    elif name in GROUPS:
        group = 4
        settings = dict(
            group_size=group,
            batch_size=ppo.batch_size // group,
            epochs=ppo.epochs,
            minibatches=ppo.minibatches,
            missing_eos_penalty=1.0,
        )
        c.stages[label] = _stage("group_policy", sampled | settings, GROUPS[name])
    elif name in ONLINE:
        settings = dict(batch_size=ppo.batch_size // 2, steps=2 * ppo.steps)
        settings |= dict(objective_args=dict(beta=0.1), optimizer=dpo.optimizer)
        c.stages[label] = _stage("online_preference", sampled | settings, ONLINE[name])
    elif name in DEMONSTRATIONS:
        sft = recipe.sft.to_dict() | dict(start_from=places["pretrain"])
        c.stages[label] = _stage("language_model", sft, DEMONSTRATIONS[name])
    elif name in REWARD:
        reward = recipe.reward.to_dict() | dict(start_from=places["sft"])
        reward["data"] |= dict(files=places["pairs"])
        c.stages[label] = _stage("reward", reward, REWARD[name])
    else:
        _graph(c, label, name, pairs, recipe, places)


def _graph(c, label, name, pairs, recipe, places):
    """Arms of several stages: sample, rate, then train on the records."""
    asked = dict(
        reward_from=places["reward"],
        data=dict(files="world:prompts.jsonl"),
        sampling=dict(recipe.ppo.sampling),
    )
    if name in ("best_of_n", "rejection_sampling"):
        keep = dict(keep="best") if name == "best_of_n" else dict(keep="above")
        c.stages[f"{label}_samples"] = defaults.stage(
            "selection", start_from=places["sft"], prompts=1000, **keep, **asked
        )
        tuned = dict(pairs, start_from=places["sft"])
        tuned["data"] = dict(
            format="demonstrations",
            files=f"stage:{label}_samples",
            length=64,
            packing="none",
        )
        c.stages[label] = defaults.stage("language_model", **tuned)
        return
    judged = dict(asked, rater="reward", soft_labels=name == "dpo_soft_labels")
    rounds, start = (2 if name == "iterative_dpo" else 1), places["sft"]
    for number in range(rounds):
        last = number == rounds - 1
        records = f"{label}_pairs{number + 1}"
        c.stages[records] = defaults.stage(
            "comparisons", start_from=start, prompts=2000, **judged
        )
        data = dict(files=f"stage:{records}", length=64)
        name_ = label if last else f"{label}_round{number + 1}"
        steps = max(pairs["steps"] // rounds, 1)
        settings = pairs | dict(start_from=start, data=data, steps=steps)
        c.stages[name_] = defaults.stage("preference", **settings)
        start = name_


def _stage(kind, settings, changes):
    """A stage from settings with an arm's changes merged into them."""
    settings = {k: v for k, v in settings.items() if k != "kind"}
    for key, value in changes.items():
        old = settings.get(key)
        merged = hasattr(old, "items") and hasattr(value, "items")
        settings[key] = {**old, **value} if merged else value
    return defaults.stage(kind, **settings)


def _takes_beta(name):
    return name not in ("simpo", "alphapo", "sigmoid_norm")
