"""The training step of one run, and the program that executes it on a mesh, for one run or for several cells at once.

`train_step` knows nothing of cells: `make_step` maps it over a leading cell axis of state, hparams and batch, while the
frozen parameters are shared. Steps and learning rate are run-time values, so a grid compiles one program.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medcg_jax.axes import BATCH_AXES
from medcg_jax.config import TrainConfig
from medcg_jax.mesh import batch_sharding
from medcg_jax.train.losses import token_loss
from medcg_jax.train.optim import Hparams, Optimizer, hparams_from, last_name, learning_rate, narrow, widen

Batch = dict[str, jax.Array]


@partial(jax.tree_util.register_dataclass, data_fields=("step", "params", "opt_state"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes. With several cells, every array has a leading cell axis.

    step: int32[] updates made. params: the trainable parameters, in the optimizer's `param_dtype`. opt_state: optax's.
    """

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState


def train_step(
    state: TrainState,
    frozen: nnx.State,
    hparams: Hparams,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    loss_fn: Callable = token_loss,
    accumulation_steps: int = 1,
    compute_dtype: str = "float32",
    param_specs=None,
) -> tuple[TrainState, Batch]:
    """(the state after one update, metrics); a run whose `step` has reached `total_steps` keeps its state bit for bit.

    metrics: float32[] `loss` (mean over the supervised tokens), `grad_norm` (before clipping), `lr`; int32[] `step`
      (updates made, including this one), `tokens` and `samples` (in the batch, without padding); bool[] `active`.
    loss_fn: (model, batch) -> (sum, weight), as `losses.token_loss`.
    accumulation_steps: number of microbatches; sums are weighted by tokens, so the result does not depend on it.
    param_specs: PartitionSpec of each trainable parameter, which constrains its gradient; None: no constraint.
    """

    def sums(params, microbatch):
        cast = partial(_cast, dtype=jnp.dtype(compute_dtype))
        return loss_fn(nnx.merge(graphdef, cast(params), cast(frozen)), microbatch)

    grad_fn = jax.value_and_grad(sums, has_aux=True)
    # Updates are computed in float32, whatever dtype the state is stored in.
    params, opt_state = widen((state.params, state.opt_state))
    (total, weight), grads = _accumulate(grad_fn, params, batch, accumulation_steps)
    # Encoding refuses records without a supervised token; a batch of padding must not divide by 0.
    # A factor, not a division of every number: it goes into the passes of whatever reads the gradients.
    share = 1.0 / jnp.maximum(weight, 1.0)
    grads = jax.tree.map(lambda g: g * share, grads)
    if param_specs is not None:
        grads = jax.tree.map(jax.lax.with_sharding_constraint, grads, param_specs)
    rate = learning_rate(state.step, hparams)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
    active = state.step < hparams["total_steps"]
    narrowed = narrow((params, opt_state), (state.params, state.opt_state), hparams["seed"], state.step)
    new = TrainState(state.step + 1, *narrowed)
    state = jax.tree.map(lambda after, before: jnp.where(active, after, before), new, state)
    metrics = {
        "loss": total / jnp.maximum(weight, 1.0),
        "grad_norm": optax.global_norm(grads),
        "lr": rate,
        "step": state.step,
        "tokens": (batch["segment_ids"] != 0).sum(dtype=jnp.int32),
        "samples": batch["segment_ids"].max(axis=-1).sum(dtype=jnp.int32),
        "active": active,
    }
    return state, metrics


def _cast(params, dtype):
    return jax.tree.map(lambda w: w.astype(dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w, params)


def _accumulate(grad_fn, params, batch: Batch, num_microbatches: int):
    """((sum of losses, sum of weights), gradient of the sum) over the microbatches of a batch."""
    if num_microbatches == 1:
        return grad_fn(params, batch)

    def split(x):
        # Microbatch i has rows i, i + num_microbatches, ...: rows stay on their devices.
        x = jnp.moveaxis(x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]), 1, 0)
        mesh = jax.sharding.get_abstract_mesh()
        return x if mesh.empty else jax.lax.with_sharding_constraint(x, PartitionSpec(None, BATCH_AXES))

    def add(carry, microbatch):
        return jax.tree.map(jnp.add, carry, grad_fn(params, microbatch)), None

    zero = jnp.zeros((), jnp.float32)
    start = ((zero, zero), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, start, jax.tree.map(split, batch))[0]


@dataclasses.dataclass(frozen=True)
class Program:
    """A step on a mesh. Call: `state, metrics = program(state, frozen, hparams, batch)`; `state` is donated.

    With `num_cells` 1 there is no cell axis. With more, state, hparams, batch and metrics have a leading axis of that
    length; its indices are the slots of runs.
    """

    mesh: Mesh
    num_cells: int
    graphdef: nnx.GraphDef
    jitted: Any
    jitted_start: Any
    jitted_start_run: Any
    jitted_put: Any
    state_shardings: TrainState
    run_shardings: TrainState
    frozen_shardings: nnx.State
    batch_sharding: NamedSharding
    hparams_sharding: NamedSharding

    def __call__(self, state: TrainState, frozen, hparams: Hparams, batch: Batch) -> tuple[TrainState, Batch]:
        with jax.set_mesh(self.mesh):
            return self.jitted(state, frozen, hparams, batch)

    def start(self, params) -> TrainState:
        """A fresh state: in every slot a copy of these trainable parameters of one run (a copy, as it is donated)."""
        with jax.set_mesh(self.mesh):
            return self.jitted_start(params)

    def start_run(self, params) -> TrainState:
        """A fresh state of one run, for `put`."""
        with jax.set_mesh(self.mesh):
            return self.jitted_start_run(params)

    def put(self, state: TrainState, slot: int, run_state: TrainState) -> TrainState:
        """`state` (donated) with `run_state`, sharded as `abstract_run`, in a slot."""
        if self.num_cells == 1:
            return run_state
        with jax.set_mesh(self.mesh):
            return self.jitted_put(state, run_state, np.int32(slot))

    def take(self, state: TrainState, slot: int) -> TrainState:
        """The state of the run in a slot, without the cell axis, on the devices that hold the slot.

        `cell` is the outermost mesh axis: a group of devices holds num_cells / mesh.shape["cell"] neighbouring slots.
        Nothing moves between groups.
        """
        if self.num_cells == 1:
            return state
        groups = self.mesh.shape["cell"]
        per_group = self.num_cells // groups
        group = slot // per_group
        devices = self.mesh.devices[group : group + 1]
        mesh = Mesh(devices, self.mesh.axis_names, axis_types=self.mesh.axis_types) if groups > 1 else self.mesh

        def on_group(x):
            """The shards on the group's devices as an array of its slots; nothing is copied."""
            shards = [shard.data for shard in x.addressable_shards if shard.device in set(devices.flat)]
            shape, sharding = (per_group, *x.shape[1:]), NamedSharding(mesh, x.sharding.spec)
            return jax.make_array_from_single_device_arrays(shape, sharding, shards)

        local = jax.tree.map(on_group, state) if groups > 1 else state
        shardings = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*x.sharding.spec[1:])), state)
        return jax.device_put(_take(local, np.int32(slot % per_group)), shardings)

    def put_hparams(self, hparams: Hparams) -> dict[str, jax.Array]:
        """Hyper-parameters on the mesh."""
        return jax.device_put(hparams, self.hparams_sharding)

    def abstract_state(self, params) -> TrainState:
        """The state's shapes, dtypes and shardings, for these (abstract) trainable parameters of one run."""
        return with_shardings(jax.eval_shape(self.jitted_start, params), self.state_shardings)

    def abstract_run(self, params) -> TrainState:
        """The same for one run's state, which is replicated over the cell axis."""
        return with_shardings(jax.eval_shape(self.jitted_start_run, params), self.run_shardings)

    def compile(
        self, params, frozen, batch: dict[str, jax.ShapeDtypeStruct | np.ndarray], compiler_options: dict | None = None
    ):
        """(jax.stages.Lowered, jax.stages.Compiled, seconds to lower, seconds to compile); allocates nothing.

        params, frozen: abstract parameters of one run. batch: shapes and dtypes of the global batch of one run.
        """
        lead = (self.num_cells,) if self.num_cells > 1 else ()

        def shape(x, sharding):
            return jax.ShapeDtypeStruct(lead + tuple(x.shape), x.dtype, sharding=sharding)

        args = (
            self.abstract_state(params),
            with_shardings(frozen, self.frozen_shardings),
            {name: shape(x, self.hparams_sharding) for name, x in hparams_from(TrainConfig(steps=1), 1).items()},
            {name: shape(x, self.batch_sharding) for name, x in batch.items()},
        )
        with jax.set_mesh(self.mesh):
            began = time.perf_counter()
            lowered = self.jitted.lower(*args)
            lowered_at = time.perf_counter()
            compiled = lowered.compile(compiler_options)
        return lowered, compiled, lowered_at - began, time.perf_counter() - lowered_at


@jax.jit
def _take(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def init_state(params, *, optimizer: Optimizer) -> TrainState:
    """The state before the first step of one run; its parameters have the optimizer's `param_dtype`."""
    # Copies, since the state is donated and the caller keeps its arrays.
    params = jax.tree.map(lambda w: jnp.array(w, optimizer.param_dtype, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_step(
    mesh: Mesh,
    graphdef: nnx.GraphDef,
    param_shardings,
    frozen_shardings,
    optimizer: Optimizer,
    *,
    num_cells: int = 1,
    loss_fn: Callable = token_loss,
    accumulation_steps: int = 1,
    compute_dtype: str = "float32",
) -> Program:
    """The program that trains one run, or `num_cells` cells at once, on `mesh`.

    param_shardings, frozen_shardings: NamedSharding of each trainable and frozen parameter of one run.

    Raises:
      ValueError: the cells cannot be split over the mesh's cell axis.
    """
    groups = mesh.shape["cell"]
    if num_cells % groups:
        raise ValueError(f"{num_cells} cells over mesh.cell={groups}: expected a multiple of {groups}")
    specs = jax.tree.map(lambda s: s.spec, param_shardings)
    options = {"accumulation_steps": accumulation_steps, "compute_dtype": compute_dtype, "param_specs": specs}
    step: Callable = partial(train_step, graphdef=graphdef, optimizer=optimizer, loss_fn=loss_fn, **options)
    many = num_cells > 1

    def placed(spec=()):
        return NamedSharding(mesh, PartitionSpec(*(("cell",) if many else ()), *spec))

    state_shardings = _state_shardings(optimizer, param_shardings, placed)
    run_shardings = _state_shardings(
        optimizer, param_shardings, lambda spec=(): NamedSharding(mesh, PartitionSpec(*spec))
    )
    batch = batch_sharding(mesh, cells=many)

    def cells(state, frozen, hparams, batch):
        mapped = jax.vmap(step, in_axes=(0, None, 0, 0), spmd_axis_name="cell")
        return mapped(state, _replicate_tables(frozen), hparams, batch)

    def start(params):
        state = init_state(params, optimizer=optimizer)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_cells, *x.shape)), state) if many else state

    def put(state, run_state, slot):
        here = jnp.arange(num_cells) == slot
        return jax.tree.map(lambda x, new: jnp.where(here.reshape(-1, *[1] * new.ndim), new, x), state, run_state)

    jitted = jax.jit(
        cells if many else step,
        in_shardings=(state_shardings, frozen_shardings, placed(), batch),
        out_shardings=(state_shardings, placed()),
        donate_argnums=0,
    )
    jitted_start = jax.jit(start, out_shardings=state_shardings)
    jitted_start_run = jax.jit(partial(init_state, optimizer=optimizer), out_shardings=run_shardings)
    jitted_put = jax.jit(
        put, in_shardings=(state_shardings, run_shardings, None), out_shardings=state_shardings, donate_argnums=0
    )
    programs: tuple[Any, ...] = (jitted, jitted_start, jitted_start_run, jitted_put)
    shardings: tuple[Any, ...] = (state_shardings, run_shardings, frozen_shardings, batch, placed())
    return Program(mesh, num_cells, graphdef, *programs, *shardings)


def _replicate_tables(frozen):
    """`frozen` with whole embedding tables on every device: with a split table, XLA would reshard the lookups of all
    cells across cells."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: jax.lax.with_sharding_constraint(w, PartitionSpec()) if last_name(path) == "table" else w,
        frozen,
    )


def _state_shardings(optimizer, param_shardings, placed) -> TrainState:
    """NamedSharding of each array of a state: moments are sharded like their parameters, counts are replicated.

    placed: PartitionSpec of one run's array (default: replicated) -> NamedSharding of the state's array.
    """
    params = jax.tree.map(lambda s: placed(s.spec), param_shardings)
    scalars = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), param_shardings)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, s: placed(s.spec),
        jax.eval_shape(optimizer.init, scalars),
        param_shardings,
        transform_non_params=lambda _: placed(),
    )
    return TrainState(placed(), params, opt_state)


def with_shardings(shapes, shardings):
    """A tree of `jax.ShapeDtypeStruct`s with these shardings, to compile for or to restore onto."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
