"""Online preference optimization: the policy's own two answers, ranked as it learns.

Each step samples two completions a prompt from the current policy, lets the rewards
say which is better, and takes one step of a pair loss on them (Guo et al. 2024,
arxiv.org/abs/2402.04792). The reference stays where training began.
"""

import functools

import jax
import jax.numpy as jnp

from stagecraft import losses, masked, optim
from stagecraft.metrics import section
from stagecraft.models import lora
from stagecraft.stages import rollout, stage
from stagecraft.stages.preference import make_objective, make_reference_score


def make(config, model_config, mesh, parents, *, stop_ids, verifiers=None):
    """Builds the stage.

    Args:
        config: the stage's resolved config.
        model_config: a `ModelConfig`.
        mesh: the mesh.
        parents: {"start": Transformer, "reference": Transformer} and perhaps "reward":
            ScalarModel.
        stop_ids: the tokens that end a turn.
        verifiers: a `signals.verifier.Verifiers`, or None.

    Returns:
        a `Stage`; raw batches are prompt_ids i32[B, P], prompt_mask bool[B, P], index
        i32[B]; prepared ones are those of `preference`.
    """
    del model_config
    optimizer = optim.make(config.optimizer, steps=config.steps)
    decay = config.ema_decay
    goal, needs = make_objective(config)
    score = make_reference_score(config)
    reference = parents["reference"]
    trained = stage.trained(config, parents["start"], mesh)
    rolls = rollout.make(
        *(config, mesh, parents.get("reward"), verifiers),
        stop_ids=stop_ids,
        samples=2,
    )

    def init(key):
        return stage.begin(
            *(trained.born(key), optimizer, mesh),
            ema=decay > 0,
            dropout=stage.dropout(config, key),
        )

    rank = jax.jit(
        functools.partial(
            _rank, config=config, names=rolls.names, weights=rolls.weights
        )
    )

    def prepare(state, raw, key):
        raw, index = stage.placed(raw, mesh)
        with section("update"):
            jax.block_until_ready(state.model)
        policy = lora.join(trained.frozen, state.model)
        drawn = rolls.sample(policy, raw, key)
        with section("score"):
            batch, told = rank(drawn, rolls.score(drawn, index))
            if "ref_logps" in needs:
                batch["ref_logps"] = score(reference, batch)
            return jax.block_until_ready(batch | {"metrics": told})

    def work(raw):
        prompts, prompt = raw["prompt_ids"].shape
        length = prompt + config.sampling.max_new_tokens
        tokens = 2 * prompts * length
        return {
            "trained": tokens,
            "scored": ("ref_logps" in needs) * tokens,
            "scalar_scored": ("reward" in parents) * tokens,
            "sampled": tokens,
            "length": length,
        }

    step = stage.make_step(goal, optimizer, micro_batches=config.micro_batches)

    def update(state, batch, frozen):
        told = batch["metrics"]
        pairs = {k: v for k, v in batch.items() if k != "metrics"}
        model, opt_state, metrics = step(
            *(state, pairs, state.step, frozen), stage.dropout_key(state)
        )
        state = stage.advance(state, model, opt_state, ema_decay=decay)
        return state, masked.compute(metrics | told)

    return stage.Stage(
        init=init,
        prepare=prepare,
        update=stage.jit_update(update, trained.frozen),
        evaluate=stage.make_evaluate(goal, trained.frozen),
        work=work,
        frozen=trained.frozen,
    )


def _rank(drawn, rewards, *, config, names, weights):
    """Two completions a prompt as pairs, the better first (the first of equals)."""
    scores, scored = rollout.total(rewards, weights)
    paid = losses.missing_eos(
        scores, drawn["ended"], penalty=config.missing_eos_penalty
    )
    paid, both = paid.reshape(-1, 2), scored.reshape(-1, 2).all(axis=1)
    first = (paid[:, 0] >= paid[:, 1])[:, None]
    order = jnp.where(first, jnp.array([[0, 1]]), jnp.array([[1, 0]]))  # [B, 2]
    prompt = drawn["ids"].shape[1] - drawn["mask"].shape[1]
    arrays = {k: drawn[k] for k in ("ids", "segments", "positions")}
    arrays["mask"] = jnp.pad(
        drawn["mask"] & jnp.repeat(both, 2)[:, None], ((0, 0), (prompt, 0))
    )
    pairs = {
        k: jnp.take_along_axis(v.reshape(-1, 2, v.shape[-1]), order[:, :, None], axis=1)
        for k, v in arrays.items()
    }
    of, ended = masked.Mean.of, drawn["ended"].astype(jnp.float32)
    told = {
        "objective/scores": of(paid.reshape(-1), scored),
        "objective/scores_margin": of(jnp.abs(paid[:, 0] - paid[:, 1]), both),
        "val/contain_eos_token": of(ended),
    }
    told |= rollout.source_metrics(rewards, names)
    return pairs, told | rollout.completion_metrics(drawn["mask"], drawn["ended"])
