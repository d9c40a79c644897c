"""Whether training waits for its data: one line when it does, another only when it gets worse."""

# Share of the time that devices stand still for the loader from which a run is told, and what is worse than before.
LOADER_BOUND_FRAC = 0.1
WORSE_BY_FRAC = 0.1
# Steps that are looked at first: reading starts cold.
FROM_STEPS = 10


class LoaderWatch:
    def __init__(self):
        self._waited_s = self._seconds = 0.0
        self._steps, self._said_frac = 0, 0.0

    def look(self, waited_s: float, seconds: float, steps: int) -> str | None:
        """The line to say after so many more steps in so many seconds, `waited_s` of them for data; None: nothing."""
        self._waited_s, self._seconds = self._waited_s + waited_s, self._seconds + seconds
        self._steps += steps
        if self._steps < FROM_STEPS or not self._seconds:
            return None
        share = self._waited_s / self._seconds
        if share < max(LOADER_BOUND_FRAC, self._said_frac and self._said_frac + WORSE_BY_FRAC):
            return None
        self._said_frac = share
        return (
            f"the devices waited for data {share:.0%} of the last {self._steps} steps: images are decoded once by "
            "`medcg data prepare` (data.source=prepared), and otherwise more CPU cores give the loader more threads"
        )
