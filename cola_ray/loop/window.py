"""Training on groups as they finish: ``rl.window``.

    step s begins ──> its tickets, a call each ──> finished ──┬─ the first prompts_per_step of them ──> step t
                                                  ^           └─ the others wait for step t + 1, ...
          t + 1, ... (steps that are ahead) ──────┘

A step is made not of its own groups but of the first finished ones, oldest first. So the longest completions of a step
do not hold up the learner: they are trained on up to ``window`` steps later, and groups that later steps have finished
take their places. ``max_staleness - window`` steps are generated ahead, so ``max_staleness`` bounds the same thing as
without a window: how many versions lie between an action and the version that trains on it. Every prompt is trained on
once; the last step takes what is left.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cola_ray.batch import Group
from cola_ray.experience import Ticket
from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.workers import WorkerGroup
from cola_ray.settings.rl import RLConfig

Left = Mapping[str, Sequence[int]]
"""``owed``: positions that past steps left for later ones; ``early``: positions of later steps already trained on."""


class Window:
    """The groups of one run that are being generated or wait for their step.

    Args:
        ticket: of a position of the run; step s has the positions from ``s * prompts_per_step`` on.
    """

    def __init__(
        self, rl: RLConfig, workers: WorkerGroup, supervisor: Supervisor, ticket: Callable[[int], Ticket]
    ) -> None:
        self.rl, self.workers, self.supervisor, self.ticket = rl, workers, supervisor, ticket
        self.pending: dict[int, asyncio.Task | None] = {}  # position -> the task generating it
        self.finished: dict[int, Group] = {}
        self.next_step = 0  # the step that takes groups next
        self.early: set[int] = set()  # positions of later steps that were trained on
        self.owed: list[int] = []  # positions of steps before a restart, to be issued again
        self.left: dict[int, Left] = {0: {"owed": [], "early": []}}  # version -> what it begins with

    async def collect(self, step: int) -> list[Group]:
        """Issue this step's tickets, and return the groups that it trains on, in order of their positions."""
        size = self.rl.prompts_per_step
        wanted = [*self.owed, *range(step * size, (step + 1) * size)]
        self.owed = []
        tickets = [self.ticket(position) for position in wanted if position not in self.early]
        self.pending.update({ticket.position: None for ticket in tickets})
        issued = await self.workers.generate_each(tickets, self._finished, "generate_groups", self.rl.group_size)
        self.pending.update(issued)
        await self.supervisor.until(lambda: self.next_step == step and self._is_complete(step))
        chosen = sorted(self.finished)[:size]
        groups = [self.finished.pop(position) for position in chosen]
        self.early = {one for one in (*self.early, *chosen) if one >= (step + 1) * size}
        self.next_step = step + 1
        self.left[step + 1] = {"owed": self._left_by(step), "early": sorted(self.early)}
        await self.supervisor.notify()  # the next step may take its groups now
        return groups

    def _is_complete(self, step: int) -> bool:
        """Whether there are enough groups, and none that this step must take is still missing."""
        size = self.rl.prompts_per_step
        late = any(position < (step - self.rl.window + 1) * size for position in self.pending)
        return len(self.finished) >= size and not late

    def _left_by(self, step: int) -> list[int]:
        """Positions of this step and earlier ones that no step has trained on."""
        end = (step + 1) * self.rl.prompts_per_step
        return sorted(position for position in (*self.pending, *self.finished) if position < end)

    def num_left(self, step: int) -> int:
        """The number of groups of this step and earlier ones that are left for later steps."""
        return len(self.left[step + 1]["owed"])

    async def _finished(self, group: Group) -> None:
        self.pending.pop(group.position)
        self.finished[group.position] = group
        await self.supervisor.notify()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state(self, version: int) -> Left:
        """Positions that the steps before ``version`` left out, and later ones that they have trained on."""
        self.left = {one: left for one, left in self.left.items() if one >= version}
        return self.left[version]

    async def stop(self) -> None:
        """Cancel the groups being generated."""
        await self.supervisor.cancel(*self.pending.values())

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Return to the beginning of the step from ``state["version"]``; None: to the beginning of the run."""
        left: Left = {"owed": [], "early": []} if state is None else state["window"]
        self.pending, self.finished = {}, {}
        self.next_step = 0 if state is None else state["version"]
        self.owed, self.early, self.left = list(left["owed"]), set(left["early"]), {self.next_step: left}
