"""The queue between rollouts and learner: each step's batches wait here, in order, until the learner takes them."""

from collections.abc import Sequence

from cola_ray.batch import Batch
from cola_ray.loop.supervisor import Supervisor

_BETWEEN_STEPS = "the learner, which saves or goes on to its next step"


def _training(step: int) -> str:
    return f"the learner's step {step}"


class BatchQueue:
    """One batch per rank for each step that is ready but not yet trained on; also decides when training ends.

    Args:
        last_version: training ends when the learner holds this version.
    """

    def __init__(self, last_version: int, supervisor: Supervisor) -> None:
        self.last_version, self.supervisor = last_version, supervisor
        self.steps: dict[int, tuple[Sequence[Batch], dict[str, float]]] = {}  # batches, metrics of their rollouts
        self.last_taken = -1

    def start(self, version: int) -> None:
        """Empty the queue; the learner holds ``version`` and asks for its step next."""
        self.supervisor.arrived(_training(self.last_taken))
        self.supervisor.arrived(_BETWEEN_STEPS)
        self.steps, self.last_taken = {}, version - 1

    async def put(self, step: int, batches: Sequence[Batch], metrics: dict[str, float]) -> None:
        self.steps[step] = batches, metrics
        await self.supervisor.notify()

    async def get(self, rank: int, step: int) -> Batch | None:
        """This rank's batch of ``step``; None when training is over. Raises RuntimeError when the run has failed."""
        if rank == 0:
            self.supervisor.arrived(_BETWEEN_STEPS)
        with self.supervisor.waiting_for(f"groups of step {step}"):
            await self.supervisor.until(lambda: step in self.steps or step >= self.last_version)
        if step >= self.last_version:
            return None
        self.last_taken = max(self.last_taken, step)
        self.supervisor.expect(_training(step))
        return self.steps[step][0][rank]

    def trained(self, step: int) -> None:
        """The learner has trained on this step."""
        self.supervisor.arrived(_training(step))

    def published(self) -> None:
        """The learner has published; it now saves or asks for its next step."""
        self.supervisor.expect(_BETWEEN_STEPS)

    def over(self, rank: int) -> None:
        """A rank was told that training is over; the first rank makes the driver say so."""
        if rank == 0:
            self.supervisor.expect(_BETWEEN_STEPS)
            self.supervisor.doing("saving checkpoint and model")

    def remove(self, step: int) -> dict[str, float]:
        """Forget a step that was trained on; returns the metrics of its rollouts."""
        return self.steps.pop(step, ((), {}))[1]

    async def stop(self) -> int:
        """End training after the learner's current step. Returns the version that it then holds."""
        self.last_version = min(self.last_version, self.last_taken + 1)
        await self.supervisor.notify()
        return self.last_version
