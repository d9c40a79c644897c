"""The platform to compile for, and sharding constraints on activations, both from the mesh in context.

That is the mesh of `jax.set_mesh`; without one nothing is constrained, and the platform is the default backend's. So
the same model traces for this machine, for 8 simulated devices, and for a pod that is not there.
"""

import jax

from medcg_jax.axes import spec


def current_mesh():
    """The abstract mesh in context, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh is None or mesh.empty else mesh


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in context, else of the default backend."""
    mesh = current_mesh()
    kind = None if mesh is None else getattr(mesh.abstract_device, "device_kind", None)
    if kind is None:
        return jax.default_backend()
    kind = kind.lower()
    return "tpu" if kind.startswith("tpu") else "cpu" if kind.startswith("cpu") else "gpu"


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, laid out over the mesh in context as its axes' logical names say (no mesh: x as it is)."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, spec(*names))
