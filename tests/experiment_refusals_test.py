"""What an experiment refuses before anything is compiled or written, kind by kind."""

import jax
import pytest

from stagecraft import defaults, experiment, run, schema, storage
from stagecraft.errors import UserError
from stagecraft.lineage import StageRecord
from tests.graphs import graph

SETTINGS = [
    *(
        (
            "group_policy",
            dict(group_size=1, advantage=advantage),
            f"group_size=1: advantage='{advantage}' compares .* expected 2 or more",
        )
        for advantage in ("group", "leave_one_out", "returns_baseline")
    ),
    ("group_policy", dict(advantage="grup"), "advantage='grup': .* mean 'group'"),
    ("group_policy", dict(scale_rewards="grp"), "scale_rewards='grp': expected one"),
    ("group_policy", dict(aggregation="drgrpo"), "aggregation='drgrpo': .*'dr_grpo'"),
    ("group_policy", dict(oversample=0), "oversample=0: expected more than 0"),
    (
        "group_policy",
        dict(overlong_cache=33),
        "overlong_cache=33: expected from 0 .* to sampling.max_new",
    ),
    *(
        (
            kind,
            dict(kl_coef=0.1, kl_placement="loss", kl_estimator="k1"),
            "kl_estimator='k1' with kl_placement='loss': .* gradient .* is zero",
        )
        for kind in ("policy", "group_policy")
    ),
    *(
        (
            kind,
            dict(kl_coef=0.1, kl_placement="loss", kl_estimator="k4"),
            "kl_estimator='k4': expected one of 'k2', 'k3'",
        )
        for kind in ("policy", "group_policy")
    ),
    (
        "policy",
        dict(kl_estimator="k2"),
        "kl_estimator='k2' with kl_placement='reward': expected 'k1' or 'k3'",
    ),
    *(
        (
            "group_policy",
            dict(kl_coef=0.1, kl_placement="reward", kl_estimator=estimator),
            f"kl_estimator='{estimator}' with kl_placement='reward': expected 'k1'",
        )
        for estimator in ("k2", "k3")
    ),
    ("policy", dict(kl_estimator="k9"), "kl_estimator='k9': expected .* 'k1', 'k3'"),
    ("policy", dict(kl_placement="lss"), "kl_placement='lss': .* mean 'loss'"),
    ("policy", dict(kl_coef=-0.1), "kl_coef=-0.1: expected 0 or more"),
    (
        "group_policy",
        dict(kl_coef=0.1, kl_estimator="k2", kl_bias_correction=True),
        "kl_bias_correction=True: is for kl_estimator='k3', got 'k2'",
    ),
    ("policy", dict(score_placement="C"), "score_placement='C': expected .* 'A', 'B'"),
    ("policy", dict(value_optimizer=dict(name="adamm")), "optimizer.name must be"),
    (
        "policy",
        dict(data=dict(ptx="none.txt", ptx_rows=6), minibatches=2, micro_batches=2),
        "ptx_rows=6: expected a multiple of minibatches . micro_batches .* = 4",
    ),
    (
        "policy",
        dict(data=dict(ptx="none.txt")),
        "ptx_rows=0 with data.ptx='none.txt': set both",
    ),
    ("policy", dict(data=dict(ptx_rows=4)), "ptx_rows=4 with data.ptx='': set both"),
    *(
        (kind, dict(devices=-1, rollout_mesh=rollout_mesh) | changes, says)
        for kind, rollout_mesh, changes, says in (
            (
                "policy",
                dict(devices=8),
                {},
                "stages.it.rollout_mesh.devices=8: .* to 7",
            ),
            (
                "policy",
                dict(devices=-1),
                {},
                "rollout_mesh.devices=-1: expected from 0",
            ),
            (
                "group_policy",
                dict(devices=4, data=3),
                {},
                "stages.it.rollout_mesh: data=3, .* needs 3 devices, but 4 are",
            ),
            (
                "policy",
                dict(devices=6),
                dict(batch_size=8),
                "rollout_mesh: 8 prompts do not divide over data . fsdp = 6 devices",
            ),
            (
                "policy",
                dict(devices=6, tensor=6),
                {},
                "rollout_mesh: model.heads: .* does not divide over mesh.tensor = 6",
            ),
            (
                "group_policy",
                dict(devices=4),
                dict(staleness=1, objective="gspo", aggregation="grpo"),
                "staleness=1: gspo has one loss a completion",
            ),
        )
    ),
    ("policy", dict(staleness=-1), "staleness=-1: expected 0 or more"),
    ("policy", dict(importance_cap=0.0), "importance_cap=0.0: expected more than 0"),
    ("preference", dict(weighting="wpoo"), "weighting='wpoo': .* mean 'wpo'"),
    ("reward", dict(ema_decay=1.0), r"ema_decay=1.0: expected from 0 \(off\) to below"),
    ("preference", dict(ld_alpha=1.5), "ld_alpha=1.5: expected from 0 to 1"),
    ("preference", dict(offload=("reward",)), "offload='reward'"),
    ("preference", dict(offload=("reference",), sync_every=4), "that moves"),
    ("preference", dict(offload=("reference",), lora=dict(rank=2)), "what the adapter"),
    ("preference", dict(sync_every=-1), "sync_every=-1: expected 0 or more"),
    ("preference", dict(sync_alpha=0.0), "sync_alpha=0.0: expected above 0, up to 1"),
    ("policy", dict(verifiers=""), "reward_from: is empty, and so is verifiers"),
    ("policy", dict(verifiers="json:lods"), "verifiers='json:lods': cannot import it"),
    ("group_policy", dict(verifiers="numbr"), "verifiers='numbr': .* mean 'number'"),
    (
        "group_policy",
        dict(verifiers="code"),
        "verifiers='code': a model's code is never",
    ),
    (
        "selection",
        dict(verifiers="regex"),
        "regex': needs verifier_args.pattern, a text",
    ),
    (
        "policy",
        dict(verifiers="number,length", verifier_args=dict(mst=4)),
        "stages.it.verifier_args.mst: no verifier .* did you mean 'most'",
    ),
    (
        "policy",
        dict(verifiers="length", verifier_args=dict(most="4")),
        "verifier_args.most='4': expected a whole number, got str",
    ),
    (
        "online_preference",
        dict(reward_weights=(1.0, 2.0)),
        r"reward_weights=\(1.0, 2.0\): expected one for each of the 1 rewards",
    ),
    ("selection", dict(keep="bst"), "keep='bst': .* mean 'best'"),
    ("selection", dict(samples=0), "samples=0: expected more than 0"),
    ("comparisons", dict(soft_labels=True), "soft_labels=True: needs rater='reward'"),
    ("comparisons", dict(rater="reward"), "rater='reward' and reward_from go together"),
    ("online_preference", dict(sampling=dict(temperature=0.0)), "expected more than 0"),
    *(
        (kind, dict(sampling={key: value}), f"sampling.{key}={value}: .* whole distri")
        for kind in ("policy", "group_policy", "online_preference")
        for key, value in (("top_k", 5), ("top_p", 0.9))
    ),
    *(
        (
            kind,
            dict(lora=dict(rank=2, dropout=0.1)),
            "lora.dropout=0.1: .* compares log-probabilities .* expected 0",
        )
        for kind in (
            *("policy", "group_policy", "online_preference"),
            *("preference", "unpaired_preference"),
        )
    ),
]

# Keys that change nothing beside another: the keys set, the one refused, and why.
WITHOUT_EFFECT = [
    ("policy", dict(kl_target=1.0, kl_coef=0.0), "kl_target=1.0", "kl_coef=0.0"),
    ("policy", dict(kl_placement="loss", kl_coef=0.0), "kl_placement", "kl_coef=0.0"),
    ("policy", dict(kl_horizon=50.0), "kl_horizon=50.0", "kl_target=0.0"),
    ("policy", dict(staleness=1), "staleness=1", "rollout_mesh.devices=0"),
    (
        "group_policy",
        dict(rollout_mesh=dict(tensor=2)),
        *("rollout_mesh.tensor=2", "rollout_mesh.devices=0"),
    ),
    ("policy", dict(importance_cap=3.0), "importance_cap=3.0", "staleness=0"),
    ("policy", dict(missing_eos_score=-3.0), "missing_eos_score", "replace_missing"),
    (
        "policy",
        dict(missing_eos_penalty=2.0, replace_missing_eos=True),
        *("missing_eos_penalty=2.0", "replace_missing_eos=True"),
    ),
    ("policy", dict(ptx_coef=0.5), "ptx_coef=0.5", "data.ptx=''"),
    ("policy", dict(data=dict(ptx_length=32)), "data.ptx_length=32", "data.ptx=''"),
    (
        "policy",
        dict(value_lr_scale=3.0, value_optimizer=dict(name="adamw")),
        *("value_lr_scale=3.0", "value_optimizer.name='adamw'"),
    ),
    (
        "policy",
        dict(value_optimizer=dict(lr=1e-3)),
        *("value_optimizer.lr=0.001", "value_optimizer.name=''"),
    ),
    (
        "policy",
        dict(value_optimizer=dict(name="sgd", b1=0.5)),
        *("value_optimizer.b1=0.5", "value_optimizer.name='sgd'"),
    ),
    *(
        (
            "group_policy",
            dict(scale_rewards="none", advantage=advantage),
            *("scale_rewards='none'", f"advantage='{advantage}'"),
        )
        for advantage in ("leave_one_out", "returns", "returns_baseline")
    ),
    *(
        (
            "group_policy",
            dict(normalize_advantages=True, advantage=advantage),
            *("normalize_advantages=True", f"advantage='{advantage}'"),
        )
        for advantage in ("group", "returns", "returns_baseline")
    ),
    *(
        (
            "group_policy",
            dict(discount=0.9, advantage=advantage),
            *("discount=0.9", f"advantage='{advantage}'"),
        )
        for advantage in ("group", "leave_one_out")
    ),
    (
        "group_policy",
        dict(
            kl_bias_correction=True,
            kl_placement="reward",
            kl_estimator="k1",
            kl_coef=0.1,
        ),
        *("kl_bias_correction=True", "kl_placement='reward'"),
    ),
    ("group_policy", dict(kl_bias_correction=True), "kl_bias_corr", "kl_coef=0.0"),
    ("group_policy", dict(kl_estimator="k2"), "kl_estimator='k2'", "kl_coef=0.0"),
    ("group_policy", dict(reference_from="base"), "reference_from", "no reference"),
    *(
        ("preference", dict(objective="simpo") | changes, next(iter(changes)), "simpo")
        for changes in (dict(reference_from="base"), dict(sync_every=4))
    ),
    ("preference", dict(sync_alpha=0.5), "sync_alpha=0.5", "sync_every=0"),
    ("unpaired_preference", dict(sync_alpha=0.5), "sync_alpha=0.5", "sync_every=0"),
    ("online_preference", dict(alpha=0.25), "alpha=0.25", "f_divergence='reverse_kl'"),
    ("preference", dict(objective="sft", ld_alpha=0.5), "ld_alpha=0.5", "no loss of"),
    ("selection", dict(threshold=1.0), "threshold=1.0", "keep='best'"),
    ("reward", dict(lora=dict(alpha=8.0)), "lora.alpha=8.0", "lora.rank=0"),
    ("language_model", dict(lora=dict(dropout=0.1)), "lora.dropout", "lora.rank=0"),
    ("reward", dict(optimizer=dict(momentum=0.9)), "optimizer.momentum", "adamw"),
    ("reward", dict(optimizer=dict(decay_share=0.5)), "optimizer.decay", "'cosine'"),
]


@pytest.mark.parametrize(("kind", "changes", "key", "because"), WITHOUT_EFFECT)
def test_a_key_that_changes_nothing_is_refused(kind, changes, key, because):
    says = f"^stages.it.{key}.*: changes nothing with .*{because}.*; change that, or "
    with pytest.raises(UserError, match=says) as error:
        experiment.resolve(graph(kind, **changes))
    assert "\n" not in str(error.value)


def test_half_precision_without_loss_scaling_is_not_trained():
    c = graph("reward")
    c.model.dtype = "float16"
    with pytest.raises(UserError, match="model.dtype='float16': .* use 'bfloat16'"):
        experiment.resolve(c)
    c.model.dtype = "bfloat16"
    experiment.resolve(c)


STRETCHED = {
    "dynamic": dict(rope_arguments=(2.0, 48)),
    "longrope": dict(rope_arguments=((1.0,) * 16, (2.0,) * 16, 48, 1.0)),
}


@pytest.mark.parametrize("scaling", STRETCHED)
@pytest.mark.parametrize("kind", ["policy", "group_policy", "online_preference"])
def test_a_model_that_scores_otherwise_than_it_samples(kind, scaling, tmp_path):
    """Wavelengths move with the length: refused where a completion may get there."""
    model = dict(rope_scaling=scaling, head_dim=32, **STRETCHED[scaling])

    def resolve(parent="base", **changes):
        c = graph(kind, **(dict(start_from=parent) | changes))
        if parent == "base":
            c.model.update(model)
        return experiment.resolve(c)

    says = f"stages.it.start_from: .*rope_scaling='{scaling}'.* beyond 48 tokens"
    with pytest.raises(UserError, match=says) as error:
        resolve()
    assert "\n" not in str(error.value)
    # Up to that length it is scored as it is sampled.
    short = dict(data=dict(prompt_length=16), sampling=dict(max_new_tokens=32))
    resolve(**short)
    with pytest.raises(UserError, match="up to 49 is not scored as it was sampled"):
        resolve(data=dict(prompt_length=17), sampling=dict(max_new_tokens=32))
    # A finished stage of another run says what its model is.
    folder = finished(tmp_path / "other" / "sft", model)
    with pytest.raises(UserError, match=says):
        resolve(parent=folder)
    resolve(parent=folder, **short)


def finished(folder, model):
    """The record of a finished stage with a model of these fields; its folder."""
    fields = dict(defaults.model(), vocab_size=64, family="llama") | model
    StageRecord(
        "language_model", "", finished=True, module="transformer", model=fields
    ).write(folder)
    return str(folder)


@pytest.mark.parametrize(("kind", "changes", "says"), SETTINGS)
def test_settings(kind, changes, says):
    with pytest.raises(UserError, match=says) as error:
        experiment.resolve(graph(kind, **changes))
    assert "\n" not in str(error.value)


def test_losses_of_sequences_are_means_of_sequences():
    settings = dict(objective="gspo", aggregation="grpo")
    experiment.resolve(graph("group_policy", **settings))


def test_a_single_sample_is_enough_for_returns():
    experiment.resolve(graph("group_policy", group_size=1, advantage="returns"))


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (
            "group_policy",
            dict(batch_size=4, group_size=8),
            "oversample=1: 4 rows at once do not divide over data . fsdp = 8 devices",
        ),
        (
            "policy",
            dict(data=dict(ptx="none.txt", ptx_rows=12)),
            "data.ptx_rows=12: expected a multiple of .* = 8",
        ),
        ("preference", dict(batch_size=12), "batch_size=12: 12 rows at once do not"),
        ("policy", dict(minibatches=16), "batch_size=64: 4 rows at once do not divide"),
    ],
)
def test_rows_that_do_not_divide_over_the_devices(kind, changes, says):
    with pytest.raises(UserError, match=f"stages.it.{says}"):
        experiment.resolve(graph(kind, devices=8, **changes))


def test_rollouts_apart_take_one_process(monkeypatch):
    c = graph("policy", devices=-1, rollout_mesh=dict(devices=4))
    experiment.resolve(c)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="devices=4: takes a run of one process, .* 2;"):
        experiment.resolve(c)


def test_nothing_is_compiled_or_written(tmp_path):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event)
    )
    folder = tmp_path / "run"
    c = graph("preference", objective_args=dict(beta=0.0))
    with pytest.raises(UserError, match="must be above 0"):
        run.run(c, folder)
    assert not folder.exists()
    assert not [e for e in compiled if "backend_compile" in e]


def test_a_run_from_before_a_key_existed_goes_on(tmp_path):
    c = graph("preference")
    c.world.name = ""
    stored = schema.plain(experiment.resolve(c))
    for key in ("f_divergence", "alpha", "reference_free"):
        del stored["stages"]["it"][key]
    storage.write_json(tmp_path / "config.json", stored)
    with pytest.raises(UserError, match="tokenizer: set tokenizer.path"):
        run.run(c, tmp_path)  # past the comparison of configs, and no further
    c.stages.it.f_divergence = "js"
    with pytest.raises(UserError, match="stages.it.f_divergence: reverse_kl -> js"):
        run.run(c, tmp_path)
