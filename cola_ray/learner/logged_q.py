"""Learns a Q of latent actions from logged answers, for MCTS-Q: one Ray Train worker's loop.

    predictions: prompt, response, actions, reward ─> frozen base ─> e ─> Q(e, .) ─> (Q(e, a) - y)^2 ─> Adam
                                                                     └──> Qbar(e, .), copied every so many steps

The head is small, and whole on every rank. A step's answers are a pure function of (seed, step).
Legend: B answers, T positions, L actions of an answer, K actions to choose from.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cola_ray.algorithms.advantages import over_spread
from cola_ray.algorithms.double_q import double_q_values
from cola_ray.algorithms.etpo import soft_targets
from cola_ray.algorithms.gradients import NonFiniteError
from cola_ray.algorithms.heads import HeadLearner
from cola_ray.batch import collate
from cola_ray.experience import Trajectory
from cola_ray.learner import supervised
from cola_ray.learner.engine import Report, last_checkpoint
from cola_ray.learner.micro_batch import Encoded, MicroBatch
from cola_ray.learner.sharding import fill
from cola_ray.model.conversion import opened
from cola_ray.model.modeling_cola import CoLAForCausalLM, QHead
from cola_ray.model.tensors import empty
from cola_ray.packing import pack
from cola_ray.settings.config import Config
from cola_ray.settings.training import Q_STAGE
from cola_ray.tasks.logged import LoggedAnswer, logged
from cola_ray.tasks.rows import open_rows, read_rows

HELD_OUT = 512  # most answers held out; the last ones of the log


def train_loop(config: Config, report: Report) -> None:
    """Run on every rank; writes ``output_dir/model/q.safetensors``. ``report`` is a collective."""
    output, device = Path(config.output_dir), torch.device("cuda" if config.cluster.use_gpu else "cpu")
    report.doing("reading the logged answers")
    log = load_log(config.data.path)
    held_out = min(HELD_OUT, len(log) // 10)
    train, rest = log[: len(log) - held_out], log[len(log) - held_out :]
    report.doing("opening the model")
    shape, tensors = opened(config.model.path)
    model = empty(CoLAForCausalLM, shape, getattr(torch, config.model.dtype))
    del model.idm, model.policy, model.codebook, model.world_model, model.lm_head
    fill(model, tensors, whole=("model.",), device=device)
    learner = LoggedQLearner(config, model.to(device).requires_grad_(False), device)
    stage, checkpoint = QStage(config, learner, train, rest), last_checkpoint(output)
    first = learner.load(checkpoint.folder) if checkpoint else 0
    report.doing("the first step")
    supervised.train(config, stage, report, first_step=first)
    if torch.distributed.get_rank() == 0:
        target = output / "model"
        target.mkdir(parents=True, exist_ok=True)
        learner.online.save(target / "q.safetensors")
    torch.distributed.barrier()


class QStage:
    """The :class:`~cola_ray.learner.supervised.Stage` of logged answers."""

    name, measure_every = Q_STAGE, 25

    def __init__(
        self, config: Config, learner: "LoggedQLearner", train: Sequence[Trajectory], heldout: Sequence[Trajectory]
    ) -> None:
        self.config, self.learner, self.train, self.heldout = config, learner, train, heldout
        self.peak_lr = config.q.lr

    def step(self, number: int, lr: float) -> dict[str, Any]:
        wanted = supervised.drawn(self.config, number, len(self.train))
        return {**self.learner.step([self.train[i] for i in wanted], lr, number)}

    def measure(self) -> dict[str, Any]:
        if not self.heldout:
            return {}
        return {f"q/heldout_{name}": value for name, value in self.learner.measure(self.heldout).items()}

    def save(self, folder: Path, step: int) -> None:
        self.learner.save(folder, step)


def load_log(path: str) -> list[Trajectory]:
    """Answers that `cola_ray evaluate` logged, shuffled once.

    Answers without recorded actions, or that the verifier could not score, are left out.

    Raises:
        ValueError: the rows are not predictions, or there are none; names the first row and field that is wrong.
    """
    rows = open_rows(path, "data.path")
    wanted = ("prompt_ids", "token_ids", "actions", "rewards")
    missing = [name for name in wanted if name not in rows.column_names]
    if missing:
        raise ValueError(f"data.path = {path!r}: no columns {', '.join(missing)}; give a folder that evaluate.py left, "
                         "e.g. outputs/evaluate-.../predictions/sample")  # fmt: skip
    answers = itertools.chain(*read_rows(rows, path, "data.path", logged))
    found = [_trajectory(answer) for answer in answers]
    if not found:
        raise ValueError(f"data.path = {path!r}: no answer with recorded actions in it; give sampled answers")
    np.random.default_rng(0).shuffle(found)  # type: ignore[arg-type]  # a list is shuffled in place too
    return found


def _trajectory(answer: LoggedAnswer) -> Trajectory:
    taken = np.asarray(answer.actions, np.int64)
    nothing, version = np.zeros(len(taken), np.float32), np.zeros(len(taken), np.int64)
    return Trajectory(
        np.asarray(answer.prompt_ids, np.int64), np.asarray(answer.token_ids, np.int64), taken, nothing, version,
        answer.reward, truncated=False, text="", action_mask=taken >= 0,
    )  # fmt: skip


class LoggedQLearner(HeadLearner):
    """Online head, target head and Adam. ``torch.distributed`` must be initialised.

    Args:
        model: frozen; only its base is used.
    """

    def __init__(self, config: Config, model: CoLAForCausalLM, device: torch.device) -> None:
        if lasting := model.config.lasting:
            raise ValueError(f"model.path: its actions last ({lasting}), and Q learns token by token; "
                             "use a model whose actions give one token each")  # fmt: skip
        torch.manual_seed(config.seed)
        head = QHead(model.config.hidden_size, model.config.num_actions).to(device)
        super().__init__(head, lr=config.q.lr, grad_clip=config.rl.grad_clip, with_target=True)
        self.config, self.model, self.device = config, model, device

    def step(self, answers: Sequence[Trajectory], lr: float, number: int) -> dict[str, float]:
        """One gradient step on the mean squared error over all actions of all ranks' answers; all ranks call.

        Raises:
            NonFiniteError: on every rank; Q is untouched.
        """
        batches, num_actions = self._mine(answers)
        sums = torch.zeros(3, device=self.device)

        def losses() -> Iterator[Tensor]:
            for encoded in batches:
                taken, goals = self._taken_and_goals(encoded)
                error = (taken - goals).square().sum()
                yield error / num_actions
                sums.add_(torch.stack([error, taken.sum(), goals.sum()]).detach())

        self.accumulate(losses())
        torch.distributed.all_reduce(sums)
        loss, taken_mean, goal_mean = (sums / num_actions).tolist()
        if not np.isfinite(loss):
            raise NonFiniteError(f"q/loss is {loss}; is there a reward that is not finite in data.path?")
        due = (number + 1) % self.config.q.copy_every == 0
        self.descend(lr=lr, tau=1.0 if due else 0.0)
        return {"q/loss": loss, "q/taken": taken_mean, "q/target": goal_mean}

    @torch.no_grad()
    def measure(self, answers: Sequence[Trajectory]) -> dict[str, float]:
        """On held-out answers: the loss, and the correlation between an action's value and the answer's reward."""
        batches, num_actions = self._mine(answers)
        of_actions = []
        for encoded in batches:
            taken, goals = self._taken_and_goals(encoded)
            rewards = encoded.batch.advantages[encoded.batch.action_mask]
            of_actions.append(torch.stack([taken, rewards, (taken - goals).square()]).double())
        values, rewards, errors = torch.cat(of_actions, 1)
        means = self._mean(torch.stack([values, rewards, errors]), num_actions)
        v, r = values - means[0], rewards - means[1]
        products = self._mean(torch.stack([v * r, v * v, r * r, values.square(), rewards.square()]), num_actions)
        correlation = products[0]
        for deviation, largest in zip(products[1:3].sqrt(), products[3:].sqrt(), strict=True):
            correlation = over_spread(correlation, deviation, largest)
        return {"loss": float(means[2]), "correlation": float(correlation)}

    @staticmethod
    def _mean(columns: Tensor, num_actions: int) -> Tensor:
        """Mean over actions of all ranks' (C, N) columns: (C,)."""
        sums = columns.sum(1)
        torch.distributed.all_reduce(sums)
        return sums / num_actions

    def _mine(self, answers: Sequence[Trajectory]) -> tuple[list[Encoded], int]:
        """This rank's micro-batches, and the number of actions of all ranks."""
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        rewards = [answer.reward for answer in answers]
        pad = self.model.config.pad_token_id or 0
        batch = collate(pack(answers), rewards, ranks, pad, 0, self.config.rl.micro_batch_tokens)[rank]
        cut = [MicroBatch.cut(batch, *one, self.device) for one in batch.micro_batches]
        with torch.no_grad():
            encoded = [Encoded(one, self.model.encode(one.input_ids, one.attention_mask), one.rewards) for one in cut]
        return encoded, batch.num_actions_global

    def _taken_and_goals(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """(N,) each: Q of the actions taken, and its targets."""
        q, batch = self.online(encoded.hidden_states), encoded.batch
        with torch.no_grad():
            values = double_q_values(q, self.target(encoded.hidden_states))
            nothing = values.new_zeros(len(values))  # the value after the last action
            discounts = self.config.q.gamma * batch.discounts
            goals = soft_targets(encoded.rewards, discounts, values, nothing, batch.action_mask)
        mask = batch.action_mask
        return q[mask].gather(-1, batch.actions[mask][:, None])[:, 0], goals[mask]

    def save(self, folder: Path, step: int) -> None:
        if torch.distributed.get_rank() == 0:
            torch.save({**self.state_dict(), "step": step}, folder / "q.pt")

    def load(self, folder: Path) -> int:
        """Returns the step to continue from."""
        saved = torch.load(folder / "q.pt", map_location=self.device, weights_only=True)
        self.load_state_dict(saved)
        return int(saved["step"])
