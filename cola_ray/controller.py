"""The controller: hands prompts out, collects groups, feeds the learner, spreads new weights.

                    admit (slots free)                    finish
    train problems ───────────────────> workers.generate ────────> ready groups ──┐ take
         cursor          ^                                                        v
                         │ release: all workers hold v+1                   next_batch(rank)
                         └──────────── publish(v+1) <─── learner trains <─────────┘

Who waits for what:
    produce       waits for free slots; freed by publish (and by dropped groups)
    next_batch    waits for a step's worth of ready groups; ready through produce
    publish       waits for every worker to load the weights; then frees the slots and evaluates when due

The class is plain asyncio; the driver makes it a Ray actor and hands in the workers. A failure anywhere in
``produce`` is raised in the learner's next call: nothing waits on something that is dead.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import torch

from cola_ray.algorithms.advantages import group_normalised, leave_one_out
from cola_ray.algorithms.latent_actions import usage
from cola_ray.config import Config
from cola_ray.experience import Batch, Group, collate
from cola_ray.weights import Bucket
from cola_ray.work_buffer import WorkBuffer

ADVANTAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"grpo": group_normalised, "rloo": leave_one_out}

WorkerCall = Callable[..., Awaitable[Any]]
"""``call(worker, method, *args)``: the driver binds it to a Ray actor call."""


class Controller:
    """One run's state between workers and learner.

    Args:
        config: the run's.
        workers: handles, opaque here.
        call: how to call a method of a worker.
        facts: what a worker told about the task and the tokenizer.
    """

    def __init__(self, config: Config, workers: Sequence[Any], call: WorkerCall, facts: dict[str, Any]) -> None:
        rl = config.rl
        self.config, self.workers, self.call = config, list(workers), call
        self.num_train, self.num_heldout = facts["num_train"], facts["num_heldout"]
        self.pad_token_id = facts["pad_token_id"]
        self.buffer = WorkBuffer(rl.prompts_per_step, rl.max_staleness)
        self.cursor = 0  # problems handed out so far
        self.version = 0
        self.ready: list[Group] = []
        self.step_batches: dict[int, list[Batch]] = {}  # version -> a batch a rank
        self.rollout_metrics: dict[int, dict[str, float]] = {}
        self.events: list[dict[str, Any]] = []  # for the driver, in order
        self.changed = asyncio.Condition()
        self.failure: BaseException | None = None
        self.producer: asyncio.Task | None = None

    # --- the driver's side --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Evaluate the start policy and the bare base, then begin to hand prompts out."""
        if self.version == 0:
            base = await self._greedy_accuracy(bare_base=True)
            start = await self._greedy_accuracy(bare_base=False)
            self._event(0, {"eval/base_accuracy": base, "eval/accuracy": start})
        self._start_producer()

    async def drain(self) -> list[dict[str, Any]]:
        """Events since the last call: ``{"step": version, "metrics": {...}}``."""
        events, self.events = self.events, []
        return events

    # --- the learner's side -------------------------------------------------------------------------------------

    async def next_batch(self, rank: int, version: int) -> Batch | None:
        """This rank's share of the batch that version ``version`` is to train on; None when the run is over."""
        if version >= self.config.rl.max_steps:
            return None
        async with self.changed:
            await self.changed.wait_for(lambda: version in self.step_batches or self.failure is not None)
        if self.failure is not None:
            raise RuntimeError(f"rollouts failed: {self.failure}") from self.failure
        return self.step_batches[version][rank]

    async def publish(self, version: int, buckets: Sequence[Bucket], metrics: dict[str, float]) -> None:
        """Load ``buckets`` into every worker; then, and only then, free the slots that were trained on."""
        started = time.perf_counter()
        await self._update_workers(version, buckets)
        merged = {**self.rollout_metrics.pop(version - 1, {}), **metrics, "time/sync": time.perf_counter() - started}
        self.step_batches.pop(version - 1, None)
        await self._evaluate_if_due(version, merged)
        merged["time/step"] = merged["time/rollout"] + merged["time/learn"] + merged["time/sync"]
        self._event(version, merged)
        await self.buffer.release()

    async def state(self) -> dict[str, int]:
        """The cursor of the next prompt that no trained batch holds."""
        return {"cursor": self.version * self.config.rl.prompts_per_step, "version": self.version}

    async def restore(self, state: dict[str, int], buckets: Sequence[Bucket]) -> None:
        """Forget what is under way, hand ``buckets`` to the workers, go on from ``state``'s cursor."""
        if self.producer is not None:
            self.producer.cancel()
            await asyncio.gather(self.producer, return_exceptions=True)
        rl = self.config.rl
        self.buffer = WorkBuffer(rl.prompts_per_step, rl.max_staleness)
        self.ready, self.step_batches, self.rollout_metrics, self.failure = [], {}, {}, None
        self.cursor = state["cursor"]
        await self._update_workers(state["version"], buckets)
        self._start_producer()

    # --- the loop -----------------------------------------------------------------------------------------------

    def _start_producer(self) -> None:
        self.producer = asyncio.get_running_loop().create_task(self._produce())

    async def _produce(self) -> None:
        try:
            while self.cursor < self.config.rl.max_steps * self.config.rl.prompts_per_step:
                await self._produce_step()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever a worker raised is the learner's to see
            async with self.changed:
                self.failure = error
                self.changed.notify_all()

    async def _produce_step(self) -> None:
        """Admit, generate, score and collate one step's groups."""
        wanted = self.config.rl.prompts_per_step
        await self.buffer.admit(wanted)
        started = time.perf_counter()
        target = self.cursor // wanted
        groups: list[Group] = []
        while len(groups) < wanted:
            indices = [self._problem(self.cursor + offset) for offset in range(wanted - len(groups))]
            round_number = self.cursor // self.num_train
            found = await self._generate(indices, round_number)
            kept = [group for group in found if group.trajectories]
            if not kept:
                raise RuntimeError("every prompt is longer than rollout.max_prompt_tokens; raise it")
            groups += kept
            if len(groups) < wanted:
                self.cursor += len(found) - len(kept)
        self.cursor = (target + 1) * wanted
        self.buffer.finish(wanted)
        seconds = time.perf_counter() - started
        batches = self._collate(groups)
        self.rollout_metrics[target] = self._measure(groups, seconds)
        self.buffer.take(wanted)
        async with self.changed:
            self.step_batches[target] = batches
            self.changed.notify_all()

    async def _generate(self, indices: Sequence[int], round_number: int) -> list[Group]:
        """Deal the problems out evenly; a group stays whole, so that its prompt is computed once."""
        shares = [list(indices[i :: len(self.workers)]) for i in range(len(self.workers))]
        pending = [
            self.call(worker, "generate_groups", share, round_number)
            for worker, share in zip(self.workers, shares, strict=True)
            if share
        ]
        results = await asyncio.gather(*pending)
        by_index = {group.problem_index: group for share in results for group in share}
        return [by_index[index] for index in indices]

    def _problem(self, position: int) -> int:
        """Which training problem is handed out at ``position``: a new permutation every epoch."""
        epoch, offset = divmod(position, self.num_train)
        order = np.random.default_rng((self.config.seed, epoch)).permutation(self.num_train)
        return int(order[offset])

    def _collate(self, groups: Sequence[Group]) -> list[Batch]:
        rewards = torch.tensor(np.stack([group.rewards for group in groups]))
        if not bool(torch.isfinite(rewards).all()):
            raise RuntimeError(f"a reward is not finite: {rewards[~torch.isfinite(rewards)][:3].tolist()}")
        advantages = ADVANTAGES[self.config.rl.algorithm](rewards).flatten().tolist()
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        return collate(trajectories, advantages, self.config.cluster.learner_ranks, self.pad_token_id, self.version)

    def _measure(self, groups: Sequence[Group], seconds: float) -> dict[str, float]:
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        rewards = np.array([trajectory.reward for trajectory in trajectories])
        lengths = np.array([len(trajectory.token_ids) for trajectory in trajectories])
        actions = np.concatenate([trajectory.actions for trajectory in trajectories])
        staleness = self.version - np.concatenate([trajectory.versions for trajectory in trajectories])
        counts = torch.from_numpy(np.bincount(actions, minlength=self.config.model.num_actions))
        return {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/zero_variance_groups": float(np.mean([group.rewards.std() == 0 for group in groups])),
            "rollout/response_length": float(lengths.mean()),
            "rollout/truncated": float(np.mean([trajectory.truncated for trajectory in trajectories])),
            "rollout/tokens_per_second": float(lengths.sum() / seconds),
            "staleness/mean": float(staleness.mean()),
            "time/rollout": seconds,
            **usage(counts),
        }

    async def _update_workers(self, version: int, buckets: Sequence[Bucket]) -> None:
        held = await asyncio.gather(*(self.call(w, "update_weights", version, *buckets) for w in self.workers))
        if any(reported != version for reported in held):
            raise RuntimeError(f"workers hold versions {held} after version {version} was published")
        self.version = version

    async def _evaluate_if_due(self, version: int, metrics: dict[str, float]) -> None:
        rl = self.config.rl
        if version == rl.max_steps or (rl.eval_every and version % rl.eval_every == 0):
            started = time.perf_counter()
            metrics["eval/accuracy"] = await self._greedy_accuracy(bare_base=False)
            metrics["time/eval"] = time.perf_counter() - started

    async def _greedy_accuracy(self, bare_base: bool) -> float:
        """Share of held-out problems with full reward under greedy decoding."""
        indices = list(range(min(self.config.rl.eval_problems, self.num_heldout)))
        shares = [indices[i :: len(self.workers)] for i in range(len(self.workers))]
        results = await asyncio.gather(
            *(
                self.call(w, "evaluate", share, bare_base)
                for w, share in zip(self.workers, shares, strict=True)
                if share
            )
        )
        return float(np.mean([reward >= 1.0 for share in results for reward in share]))

    def _event(self, step: int, metrics: dict[str, float]) -> None:
        self.events.append({"step": step, "metrics": metrics})
