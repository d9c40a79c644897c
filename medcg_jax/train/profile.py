"""A trace of a few steps, as xprof and TensorBoard's profiler read it."""

from pathlib import Path

import jax


class StepTrace:
    """Traces the steps `first` to `last` (numbered as in the metrics, both included) below `directory`.

    What a run has done before is waited for first, so that the trace holds these steps alone. Of a run that goes on
    inside the range only the steps left are traced.
    """

    def __init__(self, directory: Path, first: int, last: int):
        self._directory, self._first, self._last = directory, first, last
        self._tracing = False

    def before(self, step: int, running) -> None:
        """To be called before `step` draws its data. running: arrays that the steps before it will have made."""
        if not self._tracing and self._first <= step <= self._last:
            jax.block_until_ready(running)
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, step: int, running) -> None:
        """To be called when `step` is handed to the devices. running: arrays that it will have made."""
        if self._tracing and step >= self._last:
            jax.block_until_ready(running)
            self.close()

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
