"""Which of a run's completions are kept for people to read, and what is recorded about them.

    a step's groups, as far as workers sent texts along ────────────────────┐
    a step's episodes ──> due? those of the first samples.prompts seeds ────┤
    held-out answers ──> those of the first samples.prompts ────────────────┴──> Samples ──> the driver, which writes

All of it was generated anyway: no completion is made for samples, and training does not depend on them.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from cola_ray.batch import Group
from cola_ray.experience import Answer, Episode, Trajectory
from cola_ray.loop.supervisor import Supervisor
from cola_ray.runs.samples import Kind, Sample
from cola_ray.settings.config import Config


class Samples:
    """Sends one run's samples to the driver."""

    def __init__(self, config: Config, supervisor: Supervisor) -> None:
        self.config, self.settings, self.supervisor = config, config.samples, supervisor

    def of_groups(self, step: int, groups: Sequence[Group], advantages: dict[int, list[float | None]]) -> None:
        """A step's completions, as far as they came with their texts.

        Args:
            advantages: of the scored completions of each group that is learnt from, by position; None for a completion
                that is not in the loss. Empty if the learner computes advantages.
        """
        made = []
        for group in groups:
            of_group = iter(advantages.get(group.position, ()))
            for sibling, one in enumerate(group.read):
                weight = None if one.failure else next(of_group, None)
                made.append(_sample(step + 1, "train", group.position, sibling, one, weight))
        self.supervisor.samples(made)

    def of_episodes(
        self,
        step: int,
        episodes: Sequence[Episode],
        sequences: Iterable[Sequence[Trajectory]] = (),
        advantages: Sequence[float] = (),
    ) -> None:
        """A step's episodes, each of which may be several sequences.

        Args:
            sequences: the episodes' sequences if they are learnt from; by default as they were played.
            advantages: of the episodes; empty if each sequence has its own, or none are known.
        """
        if not self.settings.due(step + 1, self.config.rl.max_steps):
            return
        size, made = self.config.rl.group_size, list[Sample]()
        weights = itertools.chain(advantages, itertools.repeat(None))
        of_each = sequences or (episode.as_trajectories() for episode in episodes)
        for episode, pieces, weight in itertools.islice(
            zip(episodes, of_each, weights, strict=False), self.settings.prompts * size
        ):
            group, sibling = divmod(episode.position, size)
            whole = (replace(piece, reward=episode.total_reward) for piece in pieces)  # not the reward learnt from
            made += [_sample(step + 1, "train", group, sibling, piece, weight) for piece in whole]
        self.supervisor.samples(made)

    def of_evaluation(self, version: int, answers: Sequence[Answer], bare_base: bool) -> None:
        """A version's held-out answers, as far as workers sent them."""
        kind: Kind = "base" if bare_base else "eval"
        made = [
            _sample(version, kind, number, 0, one, None)
            for number, answer in enumerate(answers)
            for one in answer.sequences
        ]
        chosen = not (bare_base and self.config.rl.action_space == "latent")
        self.supervisor.samples(made if chosen else [_without_actions(sample) for sample in made])


def _sample(step: int, kind: Kind, group: int, sibling: int, made: Trajectory, advantage: float | None) -> Sample:
    weights = made.advantages
    if weights is None and advantage is not None:
        weights = np.full(len(made.actions), advantage, np.float32)
    return Sample(
        step, kind, group, sibling, made.prompt_ids, made.token_ids, made.text if made.action_mask is None else "",
        None if made.failure else float(made.reward), made.failure, made.truncated, made.action_mask, made.actions,
        made.rollout_log_probs, made.versions, weights, made.parts,
    )  # fmt: skip


def _without_actions(sample: Sample) -> Sample:
    """The bare base chose tokens: the actions recorded beside them were not used."""
    return replace(sample, actions=None, log_probs=None)
