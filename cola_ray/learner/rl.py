"""One rank's step of RL.

    Batch ─cut─> MicroBatches ─> base(x) = e, once, no gradient
                                     │
      value head (ppo, archer's token baseline), soft Q (etpo, archer_soft, control variates): learn, give advantages
                                     v
                     policy(e), reference(e) ─> objective ─> backward    } for each of rl.num_minibatches,
                                     ZeRO-3 step <── its micro-batches   } rl.updates_per_batch times
                                     │
              metrics over all ranks, version + 1, buckets of the policy's weights

Of the model, only the policy trains; with ``rl.actor_free`` only the Q that makes it (``actor_free.py``). The reference
is a frozen copy of the policy's layers, and both read the same e; the LM head and the world model are not evaluated
here. The loop around the step is in ``train_loop.py``. Legend: B sequences, T positions, N of them scored, K actions.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cola_ray.algorithms.advantages import within_noise
from cola_ray.algorithms.aggregation import loss_weights
from cola_ray.algorithms.importance import effective_sample_size
from cola_ray.algorithms.policy_loss import adapted_kl_coef
from cola_ray.algorithms.schedules import lr_factor
from cola_ray.batch import Batch
from cola_ray.learner import sums
from cola_ray.learner.actor_free import ActorFreeUpdate
from cola_ray.learner.engine import ZeroEngine, placement
from cola_ray.learner.micro_batch import (
    ActionValues,
    Advantages,
    Distributions,
    Encoded,
    Frozen,
    MicroBatch,
    Ready,
    Rewards,
)
from cola_ray.learner.mini_batches import Rows
from cola_ray.learner.objective import before_updates, policy_objective, score
from cola_ray.learner.path_q import PathQLearner, in_order
from cola_ray.learner.policies import Policy, SoftQPolicy, forward
from cola_ray.learner.soft_q import SoftQLearner
from cola_ray.learner.surrogate import surrogate
from cola_ray.learner.value import ValueLearner, level_of
from cola_ray.settings.config import Config
from cola_ray.weights import Broadcast, Bucket, Channel, Manifest, WeightSender

_PLACE = ("version", "trained_steps", "kl_coef")
"""What a learner's checkpoint holds besides weights and optimizers."""


class RLLearner:
    """One rank: a ZeRO-3 engine over the policy, and the step on a batch.

    Args:
        policy: the initial one, in ``config.model.dtype``; taken over.
    """

    def __init__(self, config: Config, policy: Policy) -> None:
        self.config, self.policy = config, policy
        rl = config.rl
        shares = rl.share_prompts and policy.shares_prompts
        target = ActorFreeUpdate.target_of(policy) if isinstance(policy, SoftQPolicy) else None
        self.zero = ZeroEngine(
            policy,
            policy.trained,
            lr=rl.lr,
            betas=rl.adam_betas,
            grad_clip=rl.grad_clip,
            **placement(config),
        )
        self.update: PolicyUpdate | ActorFreeUpdate
        if isinstance(policy, SoftQPolicy) and target is not None:
            self.update = ActorFreeUpdate(rl, policy, self.zero, target, shares)
        else:
            heads = _heads(config, policy.width, policy.num_actions, self.zero.device)
            self.update = PolicyUpdate(config, self.zero, *heads, shares)
        self.sender = WeightSender()
        self.broadcast = Broadcast()
        self.version, self.trained_steps, self.kl_coef = 0, 0, rl.kl_coef
        self.of_sequences: np.ndarray | None = None  # numbers per sequence for the critic, from the last step, if any

    def step(self, batch: Batch) -> dict[str, float]:
        """Train on this rank's share of a batch; returns metrics, most of them reduced over ranks.

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite; the weights are those before the optimizer step.
        """
        rl, started = self.config.rl, time.perf_counter()
        lr, grad_norm, kl_coef = 0.0, 0.0, self.kl_coef
        if batch.trains:
            self.trained_steps += 1
            lr = learning_rate(self.config, self.update.lr, self.trained_steps - 1)
            found, grad_norm = self.update.improve(batch, lr, kl_coef)
        else:
            found = self.update.measure(batch, kl_coef)
        self.version += 1
        soft_q = self.update.heads.get("soft_q")
        if isinstance(soft_q, PathQLearner) and soft_q.of_utterances is not None:
            self.of_sequences = in_order(batch, soft_q.of_utterances)
        metrics = _with_sample_size(_explained(sums.means(found, batch.num_actions_global)))
        if rl.kl_target and batch.trains:
            self.kl_coef = adapted_kl_coef(kl_coef, metrics["policy/kl"], rl.kl_target)
        seconds = time.perf_counter() - started
        tokens = batch.num_tokens_global
        return metrics | {
            "policy/grad_norm": grad_norm,
            "policy/lr": lr,
            "policy/kl_coef": kl_coef,
            "learner/tokens_per_second": tokens / seconds,
            "learner/computed_share": batch.computed_share(self.update.shares_prompts),
            "learner/trained_parameters": float(self.zero.trained_parameters()),
            "memory/optimizer_mb": self.zero.optimizer_mb(),
            "time/learn": seconds,
        }

    def manifest(self) -> Manifest:
        return self.zero.manifest(self.policy.published())

    def buckets(self, channel: Channel | None = None) -> list[Bucket]:
        """The policy's weights as buckets of the current version; an empty list on ranks above 0. All ranks call.

        Args:
            channel: on rank 0, where to broadcast the weights as well; the buckets then serve workers that start later.
        """
        tensors = self.zero.stream(self.policy.published())
        if self.zero.rank:
            for _ in tensors:
                pass
            return []
        if channel is not None:
            self.broadcast.join(channel, 0, self.zero.device)
            tensors = self.broadcast.send(tensors)
        return list(self.sender.buckets(self.version, tensors))

    def save(self, folder: Path) -> None:
        """Save this rank's shard of the policy, and the heads; all draws follow from the version."""
        level = self.update.level if isinstance(self.update, PolicyUpdate) else None
        self.zero.save(folder, {name: getattr(self, name) for name in _PLACE} | {"level": level})
        if self.zero.rank == 0:
            for name, head in self.update.heads.items():
                torch.save(head.state_dict(), folder / f"{name}.pt")

    def load(self, folder: Path) -> None:
        notes = self.zero.load(folder)
        for name, head in self.update.heads.items():
            head.load_state_dict(torch.load(folder / f"{name}.pt", map_location=self.zero.device, weights_only=True))
        for name in _PLACE:
            setattr(self, name, notes[name])
        if isinstance(self.update, PolicyUpdate):
            self.update.level = notes["level"]


def learning_rate(config: Config, peak: float, step: int) -> float:
    """The learning rate of the ``step``-th step, counted from 0."""
    rl = config.rl
    return peak * lr_factor(rl.lr_scheduler_type, step, config.num_trained_steps, rl.warmup_steps, rl.min_lr_ratio)


class PolicyUpdate:
    """The optimizer steps of a policy on one batch.

    Args:
        value: its advantages replace the outcome's.
        soft_q: ETPO's or archer_soft's, which the policy follows; or a control variate.
        shares_prompts: compute a prompt once for all of its rows in a micro-batch.
    """

    def __init__(
        self, config: Config, zero: ZeroEngine, value: ValueLearner | None, soft_q: SoftQLearner | None,
        shares_prompts: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.zero, self.value, self.soft_q = config, zero, value, soft_q
        self.shares_prompts = shares_prompts
        self.lr, algorithm = config.rl.lr, config.algorithm
        self.surrogate, self.follows_q = surrogate(algorithm, config.rl), algorithm.soft_q
        self.follows_rewards = algorithm.bellman_residual
        self.level: float | None = None  # of tbrm's values, from the first batch

    @property
    def heads(self) -> dict[str, ValueLearner | SoftQLearner]:
        """The networks beside the policy, by the name under which they are saved."""
        heads = {"value": self.value, "soft_q": self.soft_q}
        return {name: head for name, head in heads.items() if head is not None}

    @torch.no_grad()
    def measure(self, batch: Batch, kl_coef: float) -> dict[str, Tensor]:
        """Metric sums only: no gradient, so that the optimizer's moments stay as the training steps left them.

        Exception: a Q that a critic learns from is trained while the critic warms up.
        """
        found: dict[str, Tensor] = {}
        ready = [*self._cut(batch)]
        if isinstance(self.soft_q, PathQLearner):
            with torch.enable_grad():
                ready, found = self._prepare(ready, batch.num_actions_global, kl_coef)
        if self.value is not None:
            looked = [self._look(one)[0] for one in ready]
            advantages, _, found = self.value.advantages(self._charged(looked, kl_coef), batch.num_actions_global)
            ready = [replace(one, old=None) for one in self._following(looked, advantages)]
        for one in ready:
            sums.add(found, self._objective(one, kl_coef)[1])
        return found

    def improve(self, batch: Batch, lr: float, kl_coef: float) -> tuple[dict[str, Tensor], float]:
        """``rl.updates_per_batch`` passes, one optimizer step per mini-batch; value head or Q first. All ranks call.

        Returns:
            metric sums of the first pass, whose policy is (nearly) the one that made the batch; but clipped actions are
            counted over all passes, since none are clipped in the first step. And the mean norm of the gradients.

        Raises:
            NonFiniteError: loss or gradient is not finite; the weights are those before the optimizer step.
        """
        updates = self.config.rl.updates_per_batch
        ready, found = [*self._cut(batch)], dict[str, Tensor]()
        if self.follows_rewards and self.level is None:
            self.level = level_of([(one.batch.rewards, one.batch) for one in ready], batch.num_actions_global)
        if updates > 1 or batch.mini_batches or self.heads:
            ready, found = self._prepare(ready, batch.num_actions_global, kl_coef)
        grad_norms = list[float]()
        for update in range(updates):
            for part, micro_batches in self._parts(batch, ready, update):
                for index, one in enumerate(micro_batches):
                    loss, metrics = self._objective(one, kl_coef)
                    metrics["policy/clip_fraction"] = metrics["policy/clip_fraction"] / updates
                    last = index == len(part.micro_batches) - 1
                    self.zero.backward(loss / part.num_actions_global, last=last)
                    clipped = {"policy/clip_fraction": metrics["policy/clip_fraction"]}
                    sums.add(found, metrics if update == 0 else clipped)
                grad_norms.append(self.zero.step(lr))
        return found, sum(grad_norms) / len(grad_norms)

    def _parts(self, batch: Batch, ready: list[Ready], update: int) -> Iterator[tuple[Batch, Iterator[Ready]]]:
        """Each mini-batch of a pass, with its micro-batches."""
        if not batch.mini_batches:
            is_last = update == self.config.rl.updates_per_batch - 1
            # In the last pass a micro-batch's states are not needed again.
            yield batch, (ready.pop(0) if is_last else ready[index] for index in range(len(batch.micro_batches)))
            return
        rows = Rows(ready)
        for mini_batch in batch.mini_batches[update]:
            part = batch.part(mini_batch)
            made = zip(part.micro_batches, self._cut(part), strict=True)
            yield part, (rows.known(mini_batch.rows[start:stop], one) for (start, stop, _), one in made)

    def _cut(self, batch: Batch) -> Iterator[Ready]:
        """The batch's micro-batches, as they were collated."""
        score_last = self.soft_q is not None or self.follows_rewards  # these also need the value after a cut
        for cut in batch.micro_batches:
            one = MicroBatch.cut(batch, *cut, self.zero.device, score_last, self.shares_prompts)
            yield Ready(one, Frozen(one.hidden_states), Advantages(one.advantages), self._weights(one, batch))

    def _weights(self, one: MicroBatch, batch: Batch) -> Tensor | None:
        rl, every = self.config.rl, self.config.model.action_every
        mode = "seq-mean-token-sum" if self.follows_rewards else rl.loss_agg_mode  # one residual per sequence
        longest = -(-self.config.rollout.max_new_tokens // every)  # the most actions of a completion
        return loss_weights(one.action_mask, mode, batch.num_actions_global, batch.num_sequences_global, longest)

    def _prepare(self, ready: list[Ready], num_actions: int, kl_coef: float) -> tuple[list[Ready], dict[str, Tensor]]:
        """Score the batch with the current policy, and let the heads learn from it; returns the heads' metric sums."""
        looked = [self._look(one) for one in ready]
        ready, distributions = [one for one, _ in looked], [of for _, of in looked if of is not None]
        if self.value is not None:
            encoded = self._charged(ready, kl_coef)
            self.value.start(encoded, num_actions)
            advantages, returns, found = self.value.advantages(encoded, num_actions)
            self.value.fit(encoded, returns, num_actions)
            return self._following(ready, advantages), found
        if self.soft_q is not None:
            encoded, controls = [_encoded(one) for one in ready], self.config.rl.control_variate
            self.soft_q.start(encoded, num_actions)
            if controls:  # before learning from this batch: a control variate must not know it
                made = [self.soft_q.control(*pair) for pair in zip(encoded, distributions, strict=True)]
                ready = [replace(one, follows=replace(one.follows, control=control))
                         for one, control in zip(ready, made, strict=True)]  # fmt: skip
            return ready, self.soft_q.fit(encoded, distributions, num_actions, 0.0 if controls else kl_coef)
        return ready, {}

    @torch.no_grad()
    def _look(self, one: Ready) -> tuple[Ready, Distributions | None]:
        """Score with the policy before the batch's first update; also its distributions if a Q learns from them."""
        rollout, q_learns = self.config.rollout, self.soft_q is not None
        logits, frozen = forward(self.zero.engine, one.batch, one.frozen)
        scores = score(
            logits, frozen.reference_logits, one.batch, rollout.temperature, rollout.top_k, rollout.top_p,
            every=q_learns or frozen.aliases is not None,
        )  # fmt: skip
        old = before_updates(scores, one.batch, frozen.aliases, self.config.rl)
        return replace(one, frozen=frozen, old=old), scores.every if q_learns else None

    def _charged(self, ready: Sequence[Ready], kl_coef: float) -> list[Encoded]:
        """Input of a value head, which learns to expect the KL penalties if they are part of the reward."""
        if self.config.rl.kl_in == "loss":
            return [_encoded(one) for one in ready]
        penalties = (one.old.kl_penalties for one in ready if one.old is not None)
        return [_encoded(one, one.batch.rewards - kl_coef * of) for one, of in zip(ready, penalties, strict=True)]

    def _following(self, ready: Sequence[Ready], advantages: Sequence[Advantages]) -> list[Ready]:
        """Use a value head's advantages, which include the penalties charged to its rewards."""
        charged = self.config.rl.kl_in == "reward"
        return [replace(one, follows=replace(of, hold_kl=charged)) for one, of in zip(ready, advantages, strict=True)]

    def _objective(self, one: Ready, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss sum and metric sums."""
        rl, rollout = self.config.rl, self.config.rollout
        logits, frozen = forward(self.zero.engine, one.batch, one.frozen)
        follows: Advantages | ActionValues | Rewards = one.follows
        if self.follows_rewards:
            follows = Rewards(one.batch.rewards, one.batch.discounts, self.level or 0.0)
        if self.soft_q is not None and self.follows_q:
            follows = ActionValues(self.soft_q.q(_encoded(replace(one, frozen=frozen))))
        loss, metrics = policy_objective(
            logits, one.batch, frozen, follows, one.old, surrogate=self.surrogate, rl=rl, kl_coef=kl_coef,
            temperature=rollout.temperature, top_k=rollout.top_k, top_p=rollout.top_p, loss_weights=one.loss_weights,
        )  # fmt: skip
        if isinstance(self.soft_q, PathQLearner):  # replay does not store the engines' distributions
            metrics = {name: of_all for name, of_all in metrics.items() if "rollout_mismatch" not in name}
        return loss, metrics


def _encoded(one: Ready, rewards: Tensor | None = None) -> Encoded:
    assert one.frozen.hidden_states is not None, "heads read e; make_policy keeps the reference where one learns"
    return Encoded(one.batch, one.frozen.hidden_states, one.batch.rewards if rewards is None else rewards)


def _heads(
    config: Config, width: int, num_actions: int, device: torch.device
) -> tuple[ValueLearner | None, SoftQLearner | None]:
    """The networks that learn beside the policy.

    A value head: PPO's, over the whole episode; or ArCHer's baseline within an utterance, whose advantage is its only
    reward. A soft Q: ETPO's, archer_soft's, or the control variate of an algorithm whose rewards are its advantages.
    """
    rl = config.rl
    shared: Mapping[str, Any] = {"lr": rl.value_lr, "grad_clip": rl.grad_clip, "steps": rl.value_steps,
                                 "seed": config.seed}  # fmt: skip
    value = soft_q = None
    if config.algorithm.value_head:
        value = ValueLearner(
            width, device, decay=rl.gae_lambda, whiten=True, cliprange=rl.cliprange_value, gae_level=rl.gae_level,
            **shared,
        )  # fmt: skip
    elif rl.algorithm == "archer" and config.critic.token_baseline:
        value = ValueLearner(width, device, decay=1.0, whiten=False, cliprange=rl.cliprange_value, **shared)
    if config.algorithm.soft_q or rl.control_variate:
        learner = PathQLearner if config.algorithm.critic else SoftQLearner
        soft_q = learner(width, num_actions, device, tau=rl.target_tau, **shared)
    return value, soft_q


def _with_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """Replace the weights' mean square by the effective sample size; no weights if no policy trains."""
    if "policy/importance_weight_squared" not in metrics:
        return metrics
    mean_square = metrics.pop("policy/importance_weight_squared")
    size = effective_sample_size(metrics["policy/importance_weight"], mean_square)
    return metrics | {"policy/effective_sample_size": size}


def _explained(metrics: dict[str, float]) -> dict[str, float]:
    """Replace a value head's sums by the explained share of the returns' variance; 0 if there is no variance."""
    if "value/error" not in metrics:
        return metrics
    variance = torch.tensor(metrics.pop("value/returns_deviation"))
    unexplained = metrics.pop("value/error")
    noise = bool(within_noise(variance.sqrt(), torch.tensor(abs(metrics["value/returns"]))))
    return metrics | {"value/explained_variance": 0.0 if noise else 1.0 - unexplained / float(variance)}
