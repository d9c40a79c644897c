"""What a simulated step waits for, collective by collective, and the flag, mesh or policy that would hide each."""

from collections import Counter

from medcg_jax.plan.rules import Layout
from medcg_jax.plan.simulate import Exposure, Simulation

# The longest exposures that are named.
LONGEST = 5


def describe(simulation: Simulation, layout: Layout, *, device: str, full_effort: bool) -> dict:
    """The simulation as JSON: seconds of its parts, exposed seconds by kind and by loop, and the longest exposures.

    device: `jax.Device.device_kind`. full_effort: the program was compiled as for a real run.
    """
    loops = Counter({exposure.loop: exposure.trips for exposure in simulation.exposures})
    by_loop = simulation.exposed_by(lambda exposure: f"{exposure.loop} x {exposure.trips}" if exposure.loop else "")
    longest = sorted(simulation.exposures, key=lambda exposure: -exposure.exposed_s)[:LONGEST]
    return {
        "step_s": simulation.step_s,
        "busy_s": simulation.busy_s,
        "collectives_s": simulation.collectives_s,
        "exposed_s": simulation.exposed_s,
        "copies_s": simulation.copies_s,
        "exposed_by_kind": simulation.exposed_by(lambda exposure: exposure.start.collective.kind),
        "exposed_by_loop": by_loop,
        "num_loops": len(loops),
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
                "remedy": remedy(exposure, layout, device=device, full_effort=full_effort),
            }
            for exposure in longest
            if exposure.exposed_s
        ],
    }


def remedy(exposure: Exposure, layout: Layout, *, device: str, full_effort: bool) -> str:
    return ""
