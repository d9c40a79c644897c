"""Axis names: the logical axes of parameters and activations, the mesh axes, and the one table between them.

Logical and mesh names differ in every word, since JAX would silently accept a mesh axis for a logical one.
"""

from jax.sharding import PartitionSpec

MESH_AXES = ("cell", "data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axes it is split over (None: replicated). `layer` is the leading axis of stacked blocks.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layer": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "norm": None,
    "patch": None,
    "pos": None,
    "rank": None,
    # The rank in those halves of adapters whose other axis is not split by fsdp.
    "rank_parts": "fsdp",
    "vision_embed": "fsdp",
    "vision_mlp": "tensor",
    "vision_heads": "tensor",
    # Width of an embedding table whose rows are not split; lookups are small enough for every device to hold a slice.
    "table_embed": ("fsdp", "tensor"),
    # What a lookup in such a table gives, before slices of the width are exchanged for rows.
    "lookup_batch": "data",
    "lookup_embed": "fsdp",
    "act_batch": BATCH_AXES,
    "act_len": None,
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
}


def spec(*names: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: replicated).

    Example: `spec("embed", "mlp") == PartitionSpec("fsdp", "tensor")`.

    Raises:
      ValueError: a name is not in `RULES`, or two axes of one array would be split over the same mesh axis.
    """
    mesh_axes: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} is unknown; known axes: {', '.join(sorted(RULES))}")
        axes = None if name is None else RULES[name]
        flat = {axes} if isinstance(axes, str) else set(axes or ())
        if flat & used:
            raise ValueError(f"axes {names} would split over mesh axis {sorted(flat & used)} twice")
        used |= flat
        mesh_axes.append(axes)
    return PartitionSpec(*mesh_axes)
