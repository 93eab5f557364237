"""Episodes of an environment as a source of batches: rows go into replay, the critic fits, the actor gets batches.

    tickets ──> workers.play_episodes ──> rows ──> replay shards <── critic.fit: 50 steps of (s, u, r, s')
                                                      │                  ^
                                                      │ sample           │ features of s, u~
                                                      v                  │
                                   states s ──> workers.speak ──> fresh utterances u~ ──> advantages A(s, u~)
                                                                                               │
                                          learner <── next_batch: u~'s actions, weighted by A ┘

One iteration makes one step of the learner (ArCHer, Zhou et al. 2024, algorithm 1). The policy does not change within
an iteration, so one fresh utterance for each sampled state serves both V's targets and the actor. While the critic
warms up, the policy is not updated.

``archer_soft`` generates no fresh utterances. The learner gets replayed utterances with their advantages, and reports
their soft advantages, from which V's targets of the next iteration are made:

    replay ── sample ──> (s, u) ── critic.advantages ──> next_batch: soft Q, then the policy
                          └─────> critic.fit <── learnt: soft advantages of u ──┘

``chai`` leaves the policy unchanged: the critic chooses among several of its utterances (Verma et al. 2022).
``filtered_bc`` clones the best of all episodes played. ``grpo``, ``rloo`` and ``gigpo`` compare episodes of one
environment seed, ``gigpo`` also their turns; ``ppo`` has its own value head in the learner. These four need neither
replay nor critic.
"""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from cola_ray.algorithms import gigpo
from cola_ray.algorithms.advantages import Outcomes, all_alike, centred
from cola_ray.batch import Batch, Tally
from cola_ray.experience import Episode, Ticket, Trajectory
from cola_ray.loop.batches import BatchMaker, Metrics
from cola_ray.loop.evaluation import HeldOut, returned
from cola_ray.loop.replay_client import ReplayClient
from cola_ray.loop.samples import Samples
from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.workers import WorkerGroup
from cola_ray.packing import pack
from cola_ray.replay.service import Shards
from cola_ray.replay.transitions import SOFT, as_rows, as_trajectories, fresh_rows, with_soft_advantages
from cola_ray.settings.config import Config

Array = np.ndarray


class CriticClient(Protocol):
    """The interface of the critic: an actor in a run."""

    async def fit(self, fresh: pa.Table) -> Metrics: ...

    async def checkpoint(self) -> str: ...

    async def restore(self, file: str) -> None: ...

    async def assess(self, rows: pa.Table) -> Metrics: ...

    async def advantages(self, fresh: pa.Table) -> Array: ...

    async def advantages_and_td_errors(self, rows: pa.Table) -> Array:
        """Advantages of played utterances, and V's temporal-difference errors after them, (2, rows)."""
        ...

    async def target_weights(self) -> dict[str, Array]:
        """The heads' weights, for players that choose utterances by them."""
        ...


@dataclass(frozen=True)
class Played:
    """One step's episodes, including those in which the environment failed."""

    episodes: Sequence[Episode]
    seconds: float

    @property
    def whole(self) -> list[Episode]:
        """The episodes without a failure of their environment."""
        return [episode for episode in self.episodes if not episode.failure]


class Episodes:
    """A :class:`~cola_ray.loop.batches.Source` of episodes, one per ticket.

    Args:
        workers: have ``play_episodes``, ``speak`` and ``evaluate``, see rollout/agent_worker.py.
        critic: of utterances; used only by ``archer``, ``archer_soft`` and ``chai``.
    """

    def __init__(
        self, config: Config, workers: WorkerGroup, supervisor: Supervisor, shards: Shards, critic: CriticClient
    ) -> None:
        self.config, self.workers, self.supervisor = config, workers, supervisor
        self.replay = ReplayClient(shards, supervisor)
        self.batches = BatchMaker(config, workers, self.replay)
        self.samples = Samples(config, supervisor)
        self.held_out = HeldOut(config.rl, workers, supervisor, returned, self._players_critic, self.samples)
        self.critic = critic
        self.critic_fitted, self.critic_restarts = False, 0.0
        self.largest_reward, self.diverged = 0.0, False
        # With critic.actor_states "played", archer's actor learns from these: episodes and their rows, by iteration.
        self.recent = deque[tuple[Sequence[Episode], pa.Table]](maxlen=config.critic.reuse)
        # archer_soft: rows that the learner has, by step; and the last rows for which it reported soft advantages.
        self.asked, self.told = dict[int, pa.Table](), list[pa.Table]()

    def check(self) -> None:
        """Nothing to check: an environment makes an episode from any seed."""

    async def state(self, version: int) -> dict[str, Any]:
        told = self.told  # read now: the critic takes a while to answer
        state = {"critic": await self.critic.checkpoint(), "fitted": self.critic_fitted, "recent": list(self.recent)}
        return state | ({"told": told} if told else {})

    async def restore(self, state: Mapping[str, Any] | None) -> None:
        await self.critic.restore(state["critic"] if state else "")
        self.critic_fitted = bool(state and state["fitted"])
        self.recent.clear()
        self.recent.extend(state["recent"] if state else ())
        self.asked, self.told = {}, state.get("told", []) if state else []

    # --- rollouts ---------------------------------------------------------------------------------------------------

    async def collect(self, step: int) -> Played:
        started = time.perf_counter()
        played = await self.workers.generate(self.tickets(step), "play_episodes", *await self._players_critic())
        seconds = time.perf_counter() - started
        self.batches.check_failures([e.failure for e in played if e.failure], len(played), "episodes")
        made = Played(played, seconds)
        if not made.whole:
            raise RuntimeError("a step has no episode that its environment saw to the end")
        return made

    def tickets(self, step: int) -> list[Ticket]:
        """``prompts_per_step`` environment seeds, each played ``group_size`` times."""
        rl = self.config.rl
        first = step * rl.prompts_per_step
        return [
            Ticket((first + seed) * rl.group_size + sibling, first + seed)
            for seed in range(rl.prompts_per_step)
            for sibling in range(rl.group_size)
        ]

    async def _players_critic(self) -> tuple[Any, ...]:
        """The critic's heads, once fitted, if players choose by them."""
        chooses = self.config.rl.algorithm == "chai" or self.config.critic.chooses
        return (await self.critic.target_weights(),) if chooses and self.critic_fitted else ()

    # --- batches ----------------------------------------------------------------------------------------------------

    async def to_batches(self, rollouts: Played, step: int) -> tuple[list[Batch], Metrics]:
        episodes = rollouts.whole
        metrics = self._measure(episodes, step, rollouts.seconds)
        said = sum(len(turn.token_ids) for episode in rollouts.episodes for turn in episode.turns)
        metrics["rollout/tokens_per_second"] = said / rollouts.seconds
        if not self.batches.algorithm.replays:
            batches, more = await self._whole_episodes(episodes, step)
            return batches, metrics | more
        kept = self._clipped(episodes)
        self.largest_reward = max(self.largest_reward, *(abs(turn.reward) for one in kept for turn in one.turns))
        rows = as_rows(kept, self.workers.facts["feature_width"])
        if self.critic_fitted:
            metrics |= await self.critic.assess(rows)
        await self.replay.store(rows)
        batches, more = await self._of_turns(episodes, rows, step)
        return batches, metrics | more

    async def _of_turns(self, episodes: Sequence[Episode], played: pa.Table, step: int) -> tuple[list[Batch], Metrics]:
        algorithm = self.batches.algorithm
        if algorithm.critic and not algorithm.soft_q:
            return await self._archer(episodes, played, step)
        self.samples.of_episodes(step, episodes)
        return await (self._archer_soft(step) if algorithm.critic else self._filtered_bc(step))

    async def _archer(self, episodes: Sequence[Episode], played: pa.Table, step: int) -> tuple[list[Batch], Metrics]:
        """REINFORCE on fresh utterances in replayed states, weighted by the critic's advantage (section 3.3).

        Or on the utterances of the episodes just played, which are equally fresh if the same policy spoke in them.
        """
        started = time.perf_counter()
        rows = await self.replay.sample(self.config.critic.fresh_states, step)
        trajectories, fresh = await self._speak(rows, step)
        spoken = time.perf_counter()
        metrics = await self._fit_critic(fresh)
        metrics |= {"time/fresh": spoken - started, "time/critic": time.perf_counter() - spoken}
        if self.config.critic.actor_states == "played":
            self.recent.append((episodes, played))
            weighed = await self._weigh_what_was_played(metrics)
            self.samples.of_episodes(step, episodes, weighed[-len(episodes) :])
            trajectories = [one for of_episode in weighed for one in of_episode]
            advantages = np.zeros(len(trajectories))  # each sequence has the advantages of its own turns
        else:
            self.samples.of_episodes(step, episodes)
            advantages = _centred(await self.critic.advantages(fresh), metrics)
        trains = self.config.rl.algorithm != "chai" and step >= self.config.critic.warmup_iterations
        batches = self._batches_that(trains, trajectories, advantages.tolist(), step)
        return batches, metrics | await self.replay.size()

    async def _archer_soft(self, step: int) -> tuple[list[Batch], Metrics]:
        """Replayed utterances, of any policy, with their advantages (algorithms/archer_soft.py).

        While the critic warms up, only the learner's Q learns. Until it reports soft advantages, V follows Q of the
        utterances.
        """
        rows = await self.replay.sample(self.config.critic.fresh_states, step)
        (soft,) = self.told or [with_soft_advantages(rows, np.zeros(len(rows)))]
        started = time.perf_counter()
        metrics = await self._fit_critic(soft)
        metrics["time/critic"] = time.perf_counter() - started
        advantages = await self.critic.advantages(rows)
        metrics |= _moments("critic/advantage", advantages) | _moments("critic/soft_advantage", soft[SOFT].to_numpy())
        metrics["replay/age"] = float(step - np.mean(rows["version"].to_numpy()))
        self.asked[step] = rows
        batches = self.batches.collate(pack(as_trajectories(rows)), advantages.tolist(), step)
        trains = step >= self.config.critic.warmup_iterations
        return [replace(batch, trains=trains) for batch in batches], metrics | await self.replay.size()

    def learnt(self, step: int, of_sequences: Array) -> None:
        self.told = [with_soft_advantages(self.asked.pop(step), of_sequences)]

    async def _filtered_bc(self, step: int) -> tuple[list[Batch], Metrics]:
        """Log-likelihood of turns from the best ``replay.kept_share`` of all episodes in replay.

        While all episodes have the same return, none is best, and the policy is left unchanged.
        """
        count, share = self.config.critic.fresh_states, self.config.replay.kept_share
        rows, cutoff = await self.replay.sample_best(count, share, step)
        trajectories = as_trajectories(rows)
        trains = not all_alike(torch.from_numpy(await self.replay.shards.returns()))
        batches = self._batches_that(trains, trajectories, [1.0] * len(trajectories), step)
        return batches, {"replay/cutoff": cutoff} | await self.replay.size()

    async def _whole_episodes(self, episodes: Sequence[Episode], step: int) -> tuple[list[Batch], Metrics]:
        """Rewards of each turn for PPO and ETPO; otherwise returns compared within the same environment seed."""
        groups: dict[int, list[Episode]] = {}
        for episode in episodes:
            groups.setdefault(episode.position // self.config.rl.group_size, []).append(episode)
        ordered, metrics = [episode for group in groups.values() for episode in group], Metrics()
        taught = [self._clipped(group) for group in groups.values()]
        if self.batches.algorithm.turns:
            sequences, metrics = self._compare_turns(taught)
            weights = [0.0] * len(ordered)  # each sequence has the advantages of its own turns
        else:
            returns = [[episode.total_reward for episode in group] for group in taught]
            outcomes = [Outcomes(torch.tensor(of_group, dtype=torch.float64)) for of_group in returns]
            weights = [advantage for of_group in self.batches.advantages(outcomes) for advantage in of_group]
            gamma = self.config.critic.gamma if self.batches.compare is None else 1.0  # of whole returns, undiscounted
            sequences = [one.as_trajectories(gamma) for group in taught for one in group]
        self.samples.of_episodes(step, ordered, sequences, weights if self.batches.compare else ())
        trajectories, advantages, positions = list[Trajectory](), list[float](), list[int]()
        for episode, pieces, advantage in zip(ordered, sequences, weights, strict=True):
            trajectories += pieces
            advantages += [advantage] * len(pieces)
            positions += [episode.position] * len(pieces)
        versions = [int(one.versions[0]) for one in trajectories]
        batches, more = await self.batches.train_on(pack(trajectories), advantages, positions, versions, step)
        return batches, metrics | more

    def _clipped(self, episodes: Sequence[Episode]) -> list[Episode]:
        """The episodes with rewards clipped as they are for learning."""
        if self.config.rl.reward_clip_range is None:
            return [*episodes]
        return [episode.with_rewards(self.batches.clipped) for episode in episodes]

    def _compare_turns(self, groups: Sequence[Sequence[Episode]]) -> tuple[list[list[Trajectory]], Metrics]:
        """Sequences of each episode; each turn has its advantage over others of its seed and of its state."""
        rl, gamma = self.config.rl, self.config.critic.gamma
        turns = [[_turn_rewards(episode, rl.anchor_state == "transcript") for episode in group] for group in groups]
        found = gigpo.advantages(turns, gamma, rl.step_advantage_w, rl.scale_rewards)
        sizes = np.array([len(numbers) for numbers in gigpo.same_state(turns)])
        episodes = (episode for group in groups for episode in group)
        weighed = zip(episodes, found, strict=True)
        return [episode.as_trajectories(gamma, own.tolist()) for episode, own in weighed], {
            "agent/anchor_turns": float(sizes.mean()),
            "agent/compared": float(sizes[sizes > 1].sum() / sizes.sum()),
        }

    def _batches_that(
        self, trains: bool, trajectories: Sequence[Trajectory], advantages: Sequence[float], step: int
    ) -> list[Batch]:
        """One batch per rank; if the policy is left unchanged, with as few sequences as can be measured."""
        if not trains:
            count = self.config.cluster.learner_ranks
            trajectories, advantages = trajectories[:count], advantages[:count]
        return [replace(batch, trains=trains) for batch in self.batches.collate(pack(trajectories), advantages, step)]

    # --- the critic -------------------------------------------------------------------------------------------------

    async def _speak(self, rows: pa.Table, draw: int) -> tuple[list[Trajectory], pa.Table]:
        """A fresh utterance for each row's state, in the rows' order, and the critic's rows for them."""
        states = list(enumerate(rows["state_ids"].to_pylist()))
        spoken = await self.workers.dispatch(states, "speak", draw)
        trajectories = [trajectory for trajectory, _ in spoken]
        return trajectories, fresh_rows(rows, trajectories, [utterance for _, utterance in spoken])

    async def _fit_critic(self, fresh: pa.Table) -> Metrics:
        """Fit the critic, and report if it had to be restarted."""
        metrics = await self.critic.fit(fresh)
        if metrics["critic/restarts"] > self.critic_restarts:
            self.supervisor.say(
                f"the critic was started again from its last save; it has made {metrics['critic/steps']:.0f} steps"
            )
        self.critic_fitted, self.critic_restarts = True, metrics["critic/restarts"]
        self._say_if_diverged(metrics["critic/v"])
        return metrics

    def _say_if_diverged(self, value: float) -> None:
        """Say once if values are further from 0 than any return of these rewards: they follow their own errors."""
        gamma, soft = self.config.critic.gamma, self.batches.algorithm.soft_q
        most = self.largest_reward / (1 - gamma) if gamma < 1 else math.inf
        if abs(value) > most and not self.diverged:
            self.diverged = True
            self.supervisor.say(
                f"critic/v = {value:.3g}: no return of rewards up to {self.largest_reward:.3g} is beyond {most:.3g}, "
                f"so the critic diverges; stop the run, and {'raise rl.kl_coef' if soft else 'lower critic.lr'}"
            )

    async def _weigh_what_was_played(self, metrics: Metrics) -> list[list[Trajectory]]:
        """Sequences of each recent episode; each turn has its own advantage."""
        episodes = [episode for some, _ in self.recent for episode in some]
        rows = pa.concat_tables(rows for _, rows in self.recent)
        expected, drawn = await self.critic.advantages_and_td_errors(rows)
        share = self.config.critic.td_share
        advantages = (1 - share) * expected + share * drawn
        centred = _centred(advantages, metrics)
        if not self.config.critic.chooses:  # chosen utterances beat the policy's mean, which is to be learnt
            advantages = centred
        ends = np.cumsum([len(episode.turns) for episode in episodes])[:-1]
        of_episodes = zip(episodes, np.split(advantages, ends), strict=True)
        return [episode.as_trajectories(0.0, own.tolist()) for episode, own in of_episodes]

    def _measure(self, episodes: Sequence[Episode], step: int, seconds: float) -> Metrics:
        turns = [turn for episode in episodes for turn in episode.turns]
        returns = [episode.total_reward for episode in episodes]
        lengths = [len(turn.token_ids) for turn in turns]
        actions, versions = Tally.of([turn.actions for turn in turns]), Tally.of([turn.versions for turn in turns])
        measured = self.batches.measured(lengths, actions, versions, returns, step)
        clipped = self.batches.clipped_share([turn.reward for turn in turns])
        return self.batches.counted(seconds) | measured | clipped | _of_environment(episodes) | {
            "agent/episodes": float((step + 1) * self.config.rl.prompts_per_step * self.config.rl.group_size),
            "agent/turns": len(turns) / len(episodes),
            "agent/terminated": float(np.mean([episode.terminated for episode in episodes])),
        } | self._of_programs(episodes)  # fmt: skip

    def _of_programs(self, episodes: Sequence[Episode]) -> Metrics:
        if self.config.task.name != "program":
            return {}
        return {"agent/retokenised": float(np.mean([episode.retokenised for episode in episodes]))}


def _of_environment(episodes: Sequence[Episode]) -> Metrics:
    """Means of the environments' metrics, each over the episodes that have it."""
    names = dict.fromkeys(name for episode in episodes for name in episode.metrics)
    return {
        f"agent/{name}": float(np.mean([one.metrics[name] for one in episodes if name in one.metrics]))
        for name in names
    }


def _turn_rewards(episode: Episode, whole_state: bool) -> gigpo.TurnRewards:
    states = [turn.state_ids for turn in episode.turns]
    if not whole_state:  # where an agent program began a new conversation, the whole state is the observation
        states = [seen if len(seen) else state for seen, state in zip(episode.observations, states, strict=True)]
    rewards = [turn.reward for turn in episode.turns]
    return gigpo.TurnRewards(rewards, [ids.tobytes() for ids in states], episode.answers)


def _moments(name: str, of_each: Array) -> Metrics:
    return {f"{name}_mean": float(of_each.mean()), f"{name}_std": float(of_each.std())}


def _centred(advantages: Array, metrics: Metrics) -> Array:
    """Advantages less their mean. The true mean is 0, so what is left is the critics' error. Sets two metrics."""
    metrics |= _moments("critic/advantage", advantages)
    return centred(torch.from_numpy(advantages)).numpy()
