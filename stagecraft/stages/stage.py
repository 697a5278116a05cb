"""The shape every stage has: a handful of pure functions over one state.

Law: frozen models act in `prepare`, only the trained model acts in `update`. So an
update is always batch -> loss -> gradient, a prepared batch saved to disk replays any
bug, and no frozen tree ever enters a gradient.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stagecraft import sharding
from stagecraft.models import lora
from stagecraft.models.config import ModelConfig
from stagecraft.models.transformer import ScalarModel, Transformer


class Stage(NamedTuple):
    """A stage is a handful of pure functions.

    Attributes:
        init: (key) -> State, every array sharded from the start.
        prepare: (state, raw, key) -> batch. Frozen models act here. A stage with
            `ahead` also takes what that returned for this batch and key, or None.
        update: (state, batch) -> (state, {metric: number}); jitted, state donated.
        evaluate: (state, raw, key) -> {metric: Mean or Max} of a raw held-out batch,
            still to be merged with those of other batches; of the weights that are
            saved, which is their average where the state has one.
        work: (raw, batch=None) -> tokens one step runs through a model, from the shapes
            alone (padding costs as much as text), of a prepared batch where it is given
            and else the most: "trained" forward and backward, "scored" forward only,
            "sampled", and "scalar_" before those of reward and value models; and
            "length", of a row.
        programs: (raw) -> {name: Program}: what the devices run in a step on a raw
            batch of these shapes; arrays or shapes will do. These are the functions
            that `prepare` and `update` call, before jit; a stage that samples has the
            longest completions that it may have to hold.
        frozen: what `State.model` is an adapter of: a module, or a dict of them; None
            where a model is trained whole. `lora.join(frozen, state.model)` is the
            model. It is never donated, and frozen models may share its buffers.
        ahead: (state, raw, key) -> a rollout that the model of now samples for a later
            batch, with its key; not waited for. None where a stage samples none ahead.
    """

    init: Callable[[jax.Array], "State"]
    prepare: Callable[..., dict]
    update: Callable[["State", dict], tuple["State", dict]]
    evaluate: Callable[["State", dict, jax.Array], dict]
    work: Callable[..., dict[str, int]]
    programs: Callable[[dict], dict[str, "Program"]]
    frozen: Any = None
    ahead: Callable[["State", dict, jax.Array], Any] | None = None


class State(NamedTuple):
    """What a stage carries from step to step, and what a checkpoint holds.

    Attributes:
        step: i32[], updates done.
        model: the trained parameters; one module or `lora.Adapter`, or a dict of them.
        opt_state: the optimizer's state, sharded like the parameters.
        extra: {name: array or tree} for the rest: PPO's KL coefficient, a moving
            reference, "ema" for the average of the weights.
    """

    step: jax.Array
    model: Any
    opt_state: Any
    extra: dict[str, Any]


def averaged(state: State) -> State:
    """Returns the state with its average of the weights, if it has one, as the model.

    That is what is saved, and what all that comes after training looks at.
    """
    return state._replace(model=state.extra.get("ema", state.model))


class Context(NamedTuple):
    """What a stage is built from in addition to its config.

    Attributes:
        mesh: the mesh.
        model_config: shape of a model trained from scratch.
        parents: {role: model}: "start", "reference", "reward", "value" (a judge is
            among the verifiers). Shapes with
            shardings are enough for everything but training.
        stop_ids: the tokens that end a completion.
        verifiers: a `signals.verifiers.Verifiers`, or None.
        dataset: the `data.Dataset` trained on, or None.
        unseen_ids: ids of pieces that the parent never saw, because it was trained on
            bare text and this stage learns chat turns.
        rollout_mesh: the mesh that rollouts are sampled on; None for `mesh`.
        sole_roles: roles whose model plays no other: what is trained from it may take
            its arrays.
    """

    mesh: Mesh
    model_config: ModelConfig | None = None
    parents: dict[str, Any] = {}
    stop_ids: tuple[int, ...] = ()
    verifiers: Any = None
    dataset: Any = None
    unseen_ids: tuple[int, ...] = ()
    rollout_mesh: Mesh | None = None
    sole_roles: tuple[str, ...] = ()


class Program(NamedTuple):
    """A function that the devices run, with the shapes it runs on.

    Attributes:
        function: a pure function, not jitted.
        arguments: its arguments as `jax.ShapeDtypeStruct`s with shardings.
        placement: shardings of what it returns, a tree or a prefix of one; None leaves
            them to the compiler.
        donate: positions of the arguments whose buffers the result may take.
        mesh: the mesh that it runs on, where that is not the stage's.
    """

    function: Callable
    arguments: tuple
    placement: Any = None
    donate: tuple[int, ...] = ()
    mesh: Mesh | None = None

    def lower(self):
        """Returns the lowered program: `compile` it, or read its text and its cost."""
        jitted = jit(self.function, self.placement, self.donate)
        with self._its_mesh():
            return jitted.lower(*self.arguments)

    def results(self):
        """Returns the shapes, with shardings, of what the function returns."""
        with self._its_mesh():
            shapes = jax.eval_shape(_on_devices(self.function), *self.arguments)
        return sharding.with_shardings(shapes, self.placement)

    def _its_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()


def jit(function, placement=None, donate=()):
    """`jax.jit` as the stages use it; arguments as in `Program`.

    What is given in the host's memory is copied to the devices first.
    """
    function = _on_devices(function)
    return jax.jit(function, out_shardings=placement, donate_argnums=donate)


def _on_devices(function):
    @functools.wraps(function)
    def moved(*arguments):
        return function(*in_device_memory(arguments))

    return moved


def in_host_memory(tree: Any) -> Any:
    """Returns arrays, or shapes, in the host's memory, each device's part apart.

    Single numbers stay where they are.
    """

    def move(x):
        if not x.ndim:
            return x
        placement = x.sharding.with_memory_kind(sharding.HOST)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement)
        return jax.device_put(x, placement)

    return jax.tree.map(move, tree)


def in_device_memory(tree: Any) -> Any:
    """Copies what lies in the host's memory to the devices; for a traced function."""

    def move(x):
        away = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if away else x

    return jax.tree.map(move, tree)


OPTIMIZER = "optimizer"  # its name in `offload`, beside roles
OFFLOADED = ("reference", "reward")  # roles whose models may wait in the host's memory


def place_parents(config, names, models):
    """Returns {role: model}, those of `offload` moved to the host's memory.

    A model that plays several roles is one object in all of them.

    Args:
        config: the stage's resolved config.
        names: {"ROLE_from": name of a stage or folder}.
        models: {name: model or its shapes}.
    """
    roles = [f"{role}_from" for role in OFFLOADED if role in config.get("offload", ())]
    away = {names[role] for role in roles if role in names}
    models = {
        name: in_host_memory(model) if name in away else model
        for name, model in models.items()
    }
    return {role.removesuffix("_from"): models[name] for role, name in names.items()}


class Trained(NamedTuple):
    """Trainable part of a parent model: all of it, or an adapter on it.

    Attributes:
        frozen: the parent, where an adapter is trained; else None.
        init: (key) -> the parameters before the first step: a copy of the parent's, or
            a fresh adapter.
        abstract: the same parameters as shapes with shardings.
    """

    frozen: Any
    init: Callable[[jax.Array], Any]
    abstract: Any


def trained(config, context, role="start", *, scalar=False):
    """Returns the part of a parent that a stage trains, by its `lora` keys.

    Args:
        config: the stage's resolved config.
        context: the stage's `Context`.
        role: the parent's, a `Transformer` or a `ScalarModel`; the stage's to keep, and
            not to change unless it is among `context.sole_roles`.
        scalar: whether the model has a scalar head: a new one on a `Transformer`.
    """
    parent, mesh = context.parents[role], context.mesh
    if config.lora.rank:
        settings = lora.Settings(**config.lora)
        # A target that the model lacks is refused by the first of these.
        shapes = lora.abstract(settings, parent, mesh, scalar=scalar)
        init = lora.init_fn(settings, parent, mesh, scalar=scalar)
        return Trained(parent, init, shapes)
    copy = (lambda: parent) if role in context.sole_roles else make_copy(parent, mesh)
    if not scalar or isinstance(parent, ScalarModel):
        return Trained(None, lambda key: copy(), abstract(parent, mesh))

    def with_head(key, body):
        return ScalarModel(body, key)

    make = sharding.init_sharded(with_head, mesh, donate=(1,))
    shapes = sharding.abstract(with_head, mesh, jax.random.key(0), parent)
    return Trained(None, lambda key: make(key, copy()), shapes)


def fresh(model_config, mesh):
    """Returns a `Transformer` trained from scratch, as `Trained`."""

    def make(key):
        return Transformer(model_config, key)

    shapes = sharding.abstract(make, mesh, jax.random.key(0))
    return Trained(None, sharding.init_sharded(make, mesh), shapes)


def make_copy(module, mesh):
    """Returns () -> a fresh copy of a parent's parameters, sharded alike.

    The child's state is donated at every update, the parent may go on as a frozen
    reference: they must not share buffers.
    """
    placement = sharding.shardings(module, mesh)
    copy = jit(lambda m: jax.tree.map(jnp.copy, m), placement)
    return lambda: copy(module)


def abstract(modules, mesh):
    """Returns modules as shapes with the shardings of their axes, on the devices."""
    return sharding.with_shardings(modules, sharding.shardings(modules, mesh))


def abstract_frozen(modules, mesh):
    """Returns frozen modules as shapes, in the host's memory where they lie there."""
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(modules)}
    shapes = abstract(modules, mesh)
    return in_host_memory(shapes) if sharding.HOST in kinds else shapes


def abstract_rows(raw, mesh):
    """Returns a raw batch as shapes, its rows split over the devices."""
    arrays = {k: v for k, v in raw.items() if k != "index"}
    return sharding.with_shardings(arrays, sharding.batch_sharding(mesh))


def abstract_key():
    """Returns a random key as a shape."""
    return jax.eval_shape(lambda: jax.random.key(0))


def split_index(raw, mesh):
    """Puts a raw batch on the mesh; its row numbers stay on the host.

    Args:
        raw: {name: array}, rows first, perhaps with "index" i32[B].
        mesh: the mesh.

    Returns:
        {name: array} without "index"; the index, or None.
    """
    arrays = {k: v for k, v in raw.items() if k != "index"}
    return sharding.shard_batch(arrays, mesh), raw.get("index")


class Beginning(NamedTuple):
    """The state before the first step, real and as shapes.

    Attributes:
        init: (key) -> State.
        abstract: the state as shapes with shardings.
        frozen: what the trained parameters are adapters of, or None.
        abstract_frozen: the same as shapes with shardings.
    """

    init: Callable[[jax.Array], State]
    abstract: State
    frozen: Any
    abstract_frozen: Any

    def abstract_model(self, trained=None):
        """Returns the model as shapes; or one with these trained parameters."""
        trained = self.abstract.model if trained is None else trained
        return lora.join(self.abstract_frozen, trained)


def begin(config, parts, optimizer, mesh, *, reference=None, change=None, **scalars):
    """Returns how a stage begins, and the shapes of its state.

    Args:
        config: the stage's resolved config: lora, ema_decay, offload.
        parts: a `Trained`, or {part: Trained} for a model of several parts.
        optimizer: an `optim.Optimizer`, or one for each part of the model.
        mesh: the mesh.
        reference: the parent to carry a copy of as a reference that moves; under an
            adapter it is the policy's own, which changes nothing yet.
        change: (model) -> None, changes the joined model in place before the first
            step.
        **scalars: numbers to carry.

    Returns:
        a `Beginning`.
    """
    several = isinstance(parts, dict)
    frozen = {k: p.frozen for k, p in parts.items()} if several else parts.frozen
    frozen = frozen if config.lora.rank else None
    drops = bool(config.lora.rank and config.lora.dropout)
    moves = reference is not None

    def carry(model, reference, key):
        extra = {k: jnp.asarray(v, jnp.float32) for k, v in scalars.items()}
        if drops:
            extra["dropout"] = jax.random.key_data(jax.random.fold_in(key, 2))
        if config.ema_decay > 0:
            extra["ema"] = jax.tree.map(jnp.copy, model)
        if moves:
            extra["reference"] = jax.tree.map(jnp.copy, reference)
        step = jnp.zeros((), jnp.int32)
        opt_state = (
            {part: one.tx.init(model[part]) for part, one in optimizer.items()}
            if isinstance(optimizer, dict)
            else optimizer.tx.init(model)
        )
        return State(step, model, opt_state, extra)

    # The parameters are the state's own, unless its reference is made of them too.
    donate = () if moves and frozen is not None else (0,)
    place = sharding.init_sharded(carry, mesh, donate)

    def init(key):
        if not several:
            model = parts.init(key)
        else:
            # From one key, adapters of the same shape would start alike.
            count = len(parts)
            keys = [key] * count if frozen is None else jax.random.split(key, count)
            own_keys = dict(zip(parts, keys, strict=True))
            model = {part: one.init(own_keys[part]) for part, one in parts.items()}
        if change is not None:
            change(lora.join(frozen, model))
        return _offload(place(model, _reference(model), key))

    def _offload(state):
        if OPTIMIZER not in config.offload:
            return state
        return state._replace(opt_state=in_host_memory(state.opt_state))

    def _reference(model):
        return (reference if frozen is None else model) if moves else None

    shapes = {k: p.abstract for k, p in parts.items()} if several else parts.abstract
    state = sharding.abstract(
        carry, mesh, shapes, _reference(shapes), jax.random.key(0)
    )
    base = None if frozen is None else abstract(frozen, mesh)
    return Beginning(init, _offload(state), frozen, base)
