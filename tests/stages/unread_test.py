"""Every key does something: it is read where it is set, or it is refused."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from stagecraft import defaults, experiment, optim, schema
from stagecraft.errors import UserError
from stagecraft.signals.verifiers import Verifier, Verifiers
from stagecraft.stages.kinds import KINDS
from stagecraft.stages.stage import Context
from tests.conftest import load_experiment, single_device
from tests.graphs import graph
from tests.stages import cases
from tests.stages.policy_options_test import WORDS, odd, ptx

# Keys that a stage's own functions need not read, and who does.
ELSEWHERE = {
    "kind": "the table of kinds",
    "start_from": "the graph",
    "reference_from": "the graph",
    "reward_from": "the graph",
    "value_from": "the graph",
    "judge_from": "the graph",
    "judge": "the run, which makes the judge; refused without one",
    "verifiers": "the run, which imports them",
    "seed": "the run, which makes the random key",
    "batch_size": "the builders of data",
    "data": "the builders of data, see tests/data/unread_keys_test.py",
    **{key: "how, not what" for key in defaults.KEYS_WITHOUT_EFFECT},
}
# Another value than the default for every key that some config leaves unread.
OTHER = {
    "kl_horizon": 500.0,
    "importance_cap": 1.5,
    "sync_alpha": 0.5,
    "alpha": 0.25,
    "missing_eos_score": -3.0,
    "scale_rewards": "none",
    "normalize_advantages": True,
    "discount": 0.9,
    "kl_bias_correction": True,
    "kl_placement": "reward",
    "kl_estimator": "k2",
    "value_optimizer": dict(lr=1e-3),
    "lora": dict(alpha=8.0),
}


class Watched:
    """A config that remembers which of its keys were read."""

    def __init__(self, config, read, path=""):
        self._config, self._read, self._path = config, read, path

    def __getitem__(self, key):
        value = self._config[key]
        if isinstance(value, ConfigDict):
            return Watched(value, self._read, f"{self._path}{key}.")
        self._read.add(f"{self._path}{key}")
        return value

    def __getattr__(self, key):
        try:
            return self[key]
        except KeyError as error:
            raise AttributeError(key) from error

    def get(self, key, default=None):
        return self[key] if key in self._config else default

    def keys(self):
        return self._config.keys()

    def __iter__(self):
        return iter(self._config)

    def __contains__(self, key):
        return key in self._config


def keys_read(config, looked_for=None):
    """The keys that building a stage and tracing all its programs reads.

    Programs whose keys are not looked for any more are left out.
    """
    kind, mesh, read = KINDS[config.kind], cases.single(), set()
    known = cases.models(mesh)
    known |= {"start": known["policy"], "value": known["reward"]}
    roles = {role: known[role] for role in kind.roles if role != "judge"}
    verifiers = None
    if kind.samples and not config.reward_from:
        roles.pop("reward")
        verifiers = Verifiers([Verifier("odd", odd)], [], WORDS)
    context = Context(mesh, cases.CONFIG, roles, (cases.STOP,), verifiers)
    rows = config.batch_size * config.get("oversample", 1)
    raw = cases.BATCH[config.kind](rows=rows)
    if config.objective == "bradley_terry_ranked":
        raw["present"] = np.ones((rows, 2), bool)
    if config.data.get("ptx"):
        raw |= ptx(rows=config.data.ptx_rows)
    with jax.set_mesh(mesh):
        made = kind.make(Watched(config, read), context)
        made.work(raw)
        for program in made.programs(raw).values():
            if looked_for is None or looked_for - read:
                jax.eval_shape(program.function, *program.arguments)
    return read


def flat(config):
    return dict(schema.flat(config.to_dict()))


def owner(key):
    """Returns whether a key is read elsewhere."""
    return not {key.split(".")[0], key.split(".")[-1]}.isdisjoint(ELSEWHERE)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_key_that_is_not_read_is_refused_when_it_is_set(kind):
    config = defaults.stage(kind, batch_size=8, steps=20)
    unread = {k for k in flat(config) if not owner(k)} - keys_read(config)
    tops = {key.split(".")[0] for key in unread}
    assert tops <= OTHER.keys()
    for key in tops:
        with pytest.raises(UserError, match=f"stages.it.{key}.* changes nothing with"):
            experiment.resolve(graph(kind, **{key: OTHER[key]}))


EXPERIMENTS = (
    "quickstart:tiny",
    "objectives:tiny,name=all+demonstrations+reward_models",
)


@functools.cache
def stages():
    """{experiment/stage: config} of what the experiments train, each kind of arm."""
    found = {}
    for name in EXPERIMENTS:
        module, arg = name.split(":")
        config = load_experiment(module).get_config(arg)
        resolved = experiment.resolve(single_device(config))
        trained = {k: s for k, s in resolved.stages.items() if KINDS[s.kind].trains}
        found |= {f"{module}/{k}": s for k, s in trained.items()}
    return found


def test_experiments_set_no_key_in_vain():
    for name, config in stages().items():
        default = flat(defaults.stage(config.kind))
        given = {k for k, v in flat(config).items() if v != default.get(k)}
        given = {k for k in given if not owner(k)}
        assert given <= keys_read(config, given), name


def settings(**changes):
    return defaults.stage("reward", optimizer=changes).optimizer


def directions(config):
    """Three steps' directions for a matrix and a vector, as one array."""
    rng = np.random.default_rng(0)
    axes = {"layers/ff/up": ("embed", "ff"), "norm": ("embed",)}
    shapes = {"layers/ff/up": (4, 6), "norm": (4,)}

    def tree():
        return {
            k: nnx.Param(jax.numpy.asarray(rng.normal(size=shape), "float32"), axes=a)
            for (k, a), shape in zip(axes.items(), shapes.values(), strict=True)
        }

    tx, model = optim.make(config, steps=20).tx, tree()
    state, found = tx.init(model), []
    for _ in range(3):
        move, state = jax.jit(tx.update)(tree(), state, model)
        found += [np.ravel(x) for x in jax.tree.leaves(move)]
    return np.concatenate(found)


def refused(key, value, **beside):
    config = graph("reward", optimizer=beside | {key: value})
    says = f"it.optimizer.{key}={value}: changes nothing with optimizer"
    with pytest.raises(UserError, match=says):
        experiment.resolve(config)


@pytest.mark.parametrize("name", optim.DIRECTIONS)
def test_a_setting_of_a_direction_changes_it_or_is_refused(name):
    base = dict(name=name, weight_decay=0.0)
    other = dict(b1=0.2, b2=0.5, eps=1.0, momentum=0.3, update_rms=0.5)
    before, unread = directions(settings(**base)), optim.unread(settings(**base))
    for key, value in other.items():
        after = directions(settings(**base, **{key: value}))
        assert np.array_equal(before, after) == (key in unread), key
        if key in unread:
            refused(key, value, **base)


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_a_setting_of_a_schedule_changes_it_or_is_refused(schedule):
    def rates(**changes):
        made = optim.make(settings(schedule=schedule, **changes), steps=20)
        return [float(made.schedule(step)) for step in range(20)]

    unread = optim.unread(settings(schedule=schedule))
    for key, value in dict(end_ratio=0.6, decay_share=0.4).items():
        assert (rates() == rates(**{key: value})) == (key in unread), key
        if key in unread:
            refused(key, value, schedule=schedule)


@pytest.mark.parametrize(
    ("kind", "setting", "says"),
    [
        ("policy", dict(judge=dict(template="score")), "judge.template"),
        ("policy", dict(judge_from="base", judge=dict(clamp=0.2)), "judge.clamp"),
        ("policy", dict(judge_from="base", judge=dict(tries=2)), "judge.tries"),
        ("group_policy", dict(judge=dict(min_mass=0.5)), "judge.min_mass"),
        ("online_preference", dict(judge=dict(timeout=1.0)), "judge.timeout"),
        ("comparisons", dict(judge=dict(combine="probability")), "judge.combine"),
        ("comparisons", dict(planted=dict(first=1.0)), "planted.first"),
        (
            "comparisons",
            dict(rater="judge", judge_from="base", judge=dict(model="x")),
            "judge.model",
        ),
        (
            "comparisons",
            dict(rater="judge", judge=dict(url="http://127.0.0.1:1", batch_size=2)),
            "judge.batch_size",
        ),
    ],
)
def test_a_setting_of_a_judge_that_is_not_asked_is_refused(kind, setting, says):
    with pytest.raises(UserError, match=f"stages.it.{says}=.* changes nothing with"):
        experiment.resolve(graph(kind, **setting))
