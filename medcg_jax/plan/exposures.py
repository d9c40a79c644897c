"""What a simulated step waits for, collective by collective, and the flag, mesh or policy that would hide each."""

from medcg_jax.plan.rules import Layout
from medcg_jax.plan.simulate import Exposure, Simulation

# The longest exposures that are named.
LONGEST = 5
WINDOWED = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
PIPELINED = "xla_gpu_enable_pipelined_"


def describe(simulation: Simulation, layout: Layout, *, device: str, full_effort: bool) -> dict:
    """The simulation as JSON: seconds of its parts, exposed seconds by kind and by loop, and the longest exposures.

    device: `jax.Device.device_kind`. full_effort: the program was compiled as for a real run.
    """
    longest = sorted(simulation.exposures, key=lambda exposure: -exposure.exposed_s)[:LONGEST]
    return {
        "step_s": simulation.step_s,
        "busy_s": simulation.busy_s,
        "collectives_s": simulation.collectives_s,
        "exposed_s": simulation.exposed_s,
        "copies_s": simulation.copies_s,
        "exposed_by_kind": simulation.exposed_by(lambda exposure: exposure.start.collective.kind),
        "exposed_by_loop": simulation.exposed_by(
            lambda exposure: f"{exposure.loop} x {exposure.trips}" if exposure.loop else ""
        ),
        "longest": [
            {
                "name": exposure.start.name,
                "kind": exposure.start.collective.kind,
                "axes": sorted(layout.joined(exposure.start.collective)),
                "payload_bytes": exposure.start.collective.payload_bytes,
                "trips": exposure.trips,
                "is_async": exposure.start.is_async,
                "alone_s": exposure.seconds,
                "beside_s": exposure.beside_s,
                "exposed_s": exposure.exposed_s,
                "loop": exposure.loop,
                "operation": exposure.start.operation,
                "remedy": remedy(exposure, simulation, layout, device=device, full_effort=full_effort),
            }
            for exposure in longest
            if exposure.exposed_s
        ],
    }


def remedy(exposure: Exposure, simulation: Simulation, layout: Layout, *, device: str, full_effort: bool) -> str:
    """What would hide an exposure: a flag of XLA, another mesh, or another batch."""
    collective, is_tpu = exposure.start.collective, device.startswith("TPU")
    axes = layout.joined(collective)
    if is_tpu and not full_effort and not exposure.start.is_async:
        return "--full_effort: at least effort nothing runs beside a collective; a run's compiler hides most of them"
    if exposure.crosses:
        return "a larger train.batch_size, which puts more work beside the same bytes over the network, or a smaller mesh.data"
    is_sum = collective.kind in ("reduce-scatter", "all-reduce")
    if is_tpu and is_sum and exposure.loop and not exposure.start.is_async and not device.startswith("TPU v5 lite"):
        return "--config.mesh.sparse_cores=true: sparse cores, which a v5e has not, sum it beside computations"
    if simulation.links_s > simulation.busy_s:
        return (
            f"a larger train.batch_size: the links are busy for {simulation.links_s * 1e3:,.1f} ms, longer than all "
            f"computations, {simulation.busy_s * 1e3:,.1f}, so no flag hides all of it"
        )
    if axes == {"tensor"} and collective.kind == "all-reduce":
        return "a smaller mesh.tensor: the next product waits for this sum of activations"
    if not exposure.loop:
        return "a smaller mesh.fsdp: it stands outside of the layers' loops, where little can run beside it"
    if is_tpu and not exposure.start.is_async:
        return f"a smaller mesh.fsdp, or permutes beside the product where {WINDOWED} (MiB) makes libtpu choose them"
    if not is_tpu:
        return (
            f"{PIPELINED}{collective.kind.replace('-', '_')} with xla_gpu_enable_while_loop_double_buffering, which a run "
            f"sets; else a larger train.batch_size"
        )
    return "a larger train.batch_size: what runs beside it is shorter than it is"
