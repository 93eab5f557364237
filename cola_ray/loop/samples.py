"""Which of a run's completions are kept to be read, and what is told of them.

    a step's groups, as far as workers sent texts along ────────────────────┐
    a step's episodes ──> due? those of the first samples.prompts seeds ────┤
    held-out answers ──> those of the first samples.prompts ────────────────┴──> Samples ──> the driver, which writes

What is told here was made anyway: no completion is generated for it, and nothing that is learnt from depends on it.
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
    """Tells the driver of one run's samples."""

    def __init__(self, config: Config, supervisor: Supervisor) -> None:
        self.config, self.settings, self.supervisor = config, config.samples, supervisor

    def of_groups(self, step: int, groups: Sequence[Group], advantages: dict[int, list[float | None]]) -> None:
        """A step's completions, those that came with their texts.

        Args:
            advantages: of the scored completions of those groups that are learnt from, by position; empty where the
                learner makes them, None of one that is not in the loss.
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
            sequences: of the episodes, where they are learnt from; by default as they were played.
            advantages: of the episodes; empty where each sequence has its own, or nothing is known of any.
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
            whole = (replace(piece, reward=episode.total_reward) for piece in pieces)  # not as it is learnt from
            made += [_sample(step + 1, "train", group, sibling, piece, weight) for piece in whole]
        self.supervisor.samples(made)

    def of_evaluation(self, version: int, answers: Sequence[Answer], bare_base: bool) -> None:
        """Held-out answers of a version, as far as workers brought them along."""
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
    """The bare base chose tokens; what the table of actions holds beside them was passed over."""
    return replace(sample, actions=None, log_probs=None)
