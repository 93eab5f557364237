"""The RL learner: one Ray Train worker's loop, and the objective it optimises.

    next_batch(rank) ─> e = base(x), once, no gradient ─> policy(e), reference(e) ─> objective ─> ZeRO-3 step
         ^                    └─> value head (ppo, ArCHer's token baseline), soft Q (etpo) ──^        │
         └────────────────────────────── publish(v+1, policy buckets, metrics) <──────────────────────┘

Of the model, only the policy trains, or with ``rl.actor_free`` the Q that makes it. The reference is a frozen copy of
the policy's layers, and both read the same e; the LM head and the world model are never evaluated here. Legend: B
sequences, T positions, N of them scored, K actions.
"""

import copy
import functools
import pickle
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cola_ray.algorithms import etpo
from cola_ray.algorithms.advantages import beyond_noise, discounted_sum_to_go, within_noise
from cola_ray.algorithms.archer import polyak_
from cola_ray.algorithms.gradients import NonFiniteError
from cola_ray.algorithms.policy_loss import (
    adapted_kl_coef,
    clipped_policy_gradient,
    entropy,
    exact_kl,
    kl_estimate,
    kl_penalties,
    truncated_importance_weights,
)
from cola_ray.experience import Batch
from cola_ray.learner.engine import ZeroEngine, last_checkpoint, save_checkpoint
from cola_ray.learner.policies import Policy, SoftQPolicy, export, make_policy
from cola_ray.learner.soft_q import SoftQLearner, last_positions, one_step_targets
from cola_ray.learner.value import ValueLearner
from cola_ray.model.modeling_cola import QHead, action_log_probs
from cola_ray.runs.saved import Described
from cola_ray.settings.config import Config, RLConfig
from cola_ray.weights import Broadcast, Bucket, Channel, Manifest, WeightSender


class BatchSource(Protocol):
    """What the learner needs of the controller."""

    def begin(self, version: int, buckets: list[Bucket], state: Mapping[str, Any] | None) -> None:
        """The learner holds ``version``, new or from a checkpoint with that state; hand out batches from there on."""
        ...

    def next_batch(self, rank: int, version: int) -> Batch | None:
        """This rank's share of the batch to train version ``version`` on; None when the run is over."""
        ...

    def offer(self, version: int, manifest: Manifest) -> Channel:
        """Announce a broadcast; the caller sends over the channel that is returned, then publishes."""
        ...

    def publish(self, version: int, buckets: list[Bucket], metrics: dict[str, float]) -> None:
        """Hand over new weights; may return before workers hold them."""
        ...

    def checkpoint(self, rank: int, version: int) -> dict[str, Any] | None:
        """All that a checkpoint of ``version`` is made of beside the learner's own; what the critic saved is a file.

        Every rank asks, and waits until ``version`` is with all workers; the first one is told.
        """
        ...

    def fail(self, reason: str) -> None:
        """Training cannot go on, and trying again would not help."""
        ...


def policy_objective(
    logits: Tensor,
    batch: dict[str, Tensor],
    old_log_probs: Tensor | None,
    *,
    rl: RLConfig,
    kl_coef: float,
    temperature: float,
    top_k: int,
    q: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the policy minimises, a sum over the masked-in actions: the clipped surrogate with its penalties, or ETPO's.

    Each action is weighed by ``min(pi_old / pi_rollout, importance_cap)``, for rollouts that an older version or
    another engine's arithmetic drew; the ratio that is clipped is against ``pi_old``, the learner's own at the start
    of the batch. An action that ``top_k`` leaves out now, or left out then, has no probability to compare: it weighs 0
    and is counted.

    With ``control`` (N, K) in the batch, an advantage loses the control's value of the action taken and the loss its
    mean under the policy, exactly: the expected gradient is the same, since ``E[c(a) grad log pi(a)] = grad E[c(a)]``.

    Args:
        logits: (N, K), at the positions of ``scored_mask``, which has those of ``action_mask`` at least.
        batch: tensors of :class:`Batch` fields (B, T), ``scored_mask`` (B, T), and ``reference_logits`` (N, K), None
            where nothing asks for them; with ``kl_penalties`` (B, T) where the batch is used more than once, all 0
            where the advantages hold them; with ``deviation``, a scalar, where they were divided by it; with
            ``aliases`` (N, K) where ratios are to be of tokens, and ``old_marginals`` (B, T) beside ``old_log_probs``.
        old_log_probs: (B, T) at the start of the batch's updates, -inf where ``top_k`` left the action out; None on the
            first, where they are the current.
        kl_coef: in force; it may be adapted from step to step.
        temperature, top_k: of the rollouts; scores are those of the distribution sampled from.
        q: (N, K), ETPO's; then advantages and rollouts' log-probabilities do not count.

    Returns:
        loss sum (scalar) and metric sums over actions.
    """
    mask = batch["action_mask"]
    policy, reference = _distributions(logits, batch["reference_logits"], temperature, top_k)
    log_probs, ref_log_probs, kl = _of_actions(policy, reference, batch)
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    possible = mask & log_probs.isfinite() & old.isfinite()
    left_out = mask & ~possible
    log_probs, ref_log_probs, old = (one.masked_fill(~possible, 0.0) for one in (log_probs, ref_log_probs, old))
    said, old_said = log_probs, old
    if batch.get("aliases") is not None:
        said = _marginals(policy, batch, possible)
        old_said = said.detach() if old_log_probs is None else batch["old_marginals"]
    with torch.set_grad_enabled(bool(rl.entropy_coef)):
        spread = _placed(entropy(policy), batch)
    weights, clipped = possible.to(log_probs.dtype), torch.zeros((), device=logits.device)
    if q is not None:
        loss = _placed(etpo.actor_loss(policy, reference, q, kl_coef), batch)[mask].sum()
    else:
        if rl.importance_cap:
            capped = truncated_importance_weights(old, batch["rollout_log_probs"], rl.importance_cap)
            weights = capped.masked_fill(~possible, 0.0)
        charged = _charged(log_probs.detach(), ref_log_probs, kl.detach(), batch, rl)
        advantages = batch["advantages"] - kl_coef * charged
        control = batch.get("control")
        if control is not None:
            advantages = advantages - _placed(_taken(control, batch), batch)
        loss, clipped = clipped_policy_gradient(
            said, old_said, weights * advantages, possible, rl.clip_low, rl.clip_high
        )
        if control is not None:
            loss = loss - _placed((policy.exp() * control).sum(-1), batch)[mask].sum()
        if rl.kl_estimator == "exact":
            # In the reward, the other half is in advantages: what divides them divides this.
            whole = kl_coef / batch["deviation"] if rl.kl_in == "reward" and "deviation" in batch else kl_coef
            loss = loss + (whole * kl[mask]).sum()
        elif rl.kl_in == "loss":
            loss = loss + kl_coef * kl_estimate(log_probs, ref_log_probs, rl.kl_estimator)[possible].sum()
    if rl.entropy_coef:
        loss = loss - rl.entropy_coef * spread[mask].sum()
    with torch.no_grad():
        mismatch = (old - batch["rollout_log_probs"]).abs().masked_fill(~possible, 0.0)
        metrics = {
            "policy/loss": loss.detach(),
            "policy/clip_fraction": clipped.float(),
            "policy/entropy": spread[mask].sum(),
            "policy/left_out": left_out.float().sum(),
            "policy/importance_weight": weights[mask].sum(),
            "policy/importance_capped": ((weights >= rl.importance_cap) & mask).float().sum() * bool(rl.importance_cap),
            "policy/rollout_mismatch": mismatch.sum(),
            "policy/rollout_mismatch_max": mismatch.max(),
        }
        if batch["reference_logits"] is not None:
            metrics["policy/kl"] = kl[mask].sum()
    return loss, metrics


def _charged(
    log_probs: Tensor, ref_log_probs: Tensor, divergences: Tensor, batch: dict[str, Tensor], rl: RLConfig
) -> Tensor:
    """KL that each action's advantage answers for, (B, T): the penalties from it on, discounted (CoLA's RL stage)."""
    if rl.kl_in == "loss":
        return torch.zeros_like(batch["advantages"])
    penalties = batch.get("kl_penalties")
    if penalties is None:
        penalties = kl_penalties(
            log_probs, ref_log_probs, divergences, batch["action_mask"], batch["discounts"], rl.kl_estimator
        )
    return discounted_sum_to_go(penalties, batch["action_mask"], batch["discounts"])


def _distributions(
    logits: Tensor, reference_logits: Tensor | None, temperature: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all actions, (N, K): of the policy as it is sampled from, and of the whole reference.

    Where there is none, the policy stands for it, at no distance.
    """

    def scored(of: Tensor, kept: int) -> Tensor:
        rows = of.shape[:-1]
        heat, limit = torch.full(rows, temperature, device=of.device), torch.full(rows, kept, device=of.device)
        return action_log_probs(of.to(torch.promote_types(of.dtype, torch.float32)), heat, limit)

    policy = scored(logits, top_k)
    return policy, policy.detach() if reference_logits is None else scored(reference_logits, 0)


def _of_actions(policy: Tensor, reference: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the actions taken, under both, and the exact KL of their states; (B, T).

    0 where masked; the policy's is -inf where its truncation leaves the action out.
    """
    mask = batch["action_mask"]
    log_probs, ref_log_probs = (
        _placed(_taken(one, batch), batch).masked_fill(~mask, 0.0) for one in (policy, reference)
    )
    return log_probs, ref_log_probs, _placed(exact_kl(policy, reference), batch)


def _marginals(policy: Tensor, batch: dict[str, Tensor], possible: Tensor) -> Tensor:
    """Log-probabilities of what was said, (B, T): summed over all actions that say it, which ``aliases`` (N, K) tells.

    What follows depends on the token alone, so ``E[A grad log sum_z pi(z)]`` is the same gradient as
    ``E[A grad log pi(a)]``, without the variance of which of them was drawn.

    Args:
        possible: (B, T), where the action taken has a probability; 0 elsewhere.
    """
    # The action taken did say it, whatever this engine's rounding finds.
    saying = batch["aliases"].scatter(-1, batch["actions"][batch["scored_mask"]][:, None], True)
    summed = policy.masked_fill(~saying, float("-inf"))
    # A row without any would have the gradient of log 0, which no mask behind it takes away.
    summed = summed.masked_fill(~possible[batch["scored_mask"]][:, None], 0.0).logsumexp(-1)
    return _placed(summed, batch).masked_fill(~possible, 0.0)


def _taken(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(N, K) -> (N,), of the actions taken."""
    return values.gather(-1, batch["actions"][batch["scored_mask"]][:, None])[:, 0]


def _placed(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(N,) -> (B, T), 0 at positions that are not scored."""
    scored = batch["scored_mask"]
    return torch.zeros(scored.shape, dtype=values.dtype, device=values.device).masked_scatter(scored, values)


_FOUND = ("hidden_states", "reference_logits", "aliases")
"""What a forward pass leaves in a micro-batch beside logits, for the next one."""
_PLACE = ("version", "trained_steps", "kl_coef")
"""What a checkpoint holds of a learner beside weights and optimizers."""


class RLLearner:
    """One rank: a ZeRO-3 engine over the policy, and the step on a batch.

    Args:
        policy: as it starts, in ``config.model.dtype``; taken over.
    """

    def __init__(self, config: Config, policy: Policy) -> None:
        self.config, self.policy = config, policy
        rl = config.rl
        self.target_q: QHead | None = None
        if isinstance(policy, SoftQPolicy):  # whole on every rank; what it is a copy of will be partitioned
            self.target_q = copy.deepcopy(policy.q).float().requires_grad_(False)
        self.zero = ZeroEngine(
            policy,
            policy.trained,
            lr=rl.lr,
            betas=rl.adam_betas,
            grad_clip=rl.grad_clip,
            bfloat16=config.model.dtype == "bfloat16",
        )
        if self.target_q is not None:
            self.target_q.to(self.zero.device)
        self.value = _value_learner(config, policy.width, self.zero.device)
        self.soft_q = _soft_q_learner(config, policy.width, policy.num_actions, self.zero.device)
        self.sender = WeightSender()
        self.broadcast = Broadcast()
        self.version, self.trained_steps, self.kl_coef = 0, 0, rl.kl_coef

    def step(self, batch: Batch) -> dict[str, float]:
        """Train on this rank's share of a batch; returns metrics reduced over ranks.

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite; the weights are those before the optimizer step.
        """
        rl = self.config.rl
        started = time.perf_counter()
        pieces = [tensors_of(batch, *cut, self.zero.device) for cut in batch.micro_batches]
        if rl.algorithm == "etpo" or self.soft_q is not None:  # which want the value after a cut, too
            for piece in pieces:
                piece["scored_mask"] = piece["action_mask"] | last_positions(piece["attention_mask"])
        lr, grad_norm, kl_coef = 0.0, 0.0, self.kl_coef
        if not batch.trains:
            sums = self._measure(pieces, batch.num_actions_global)
        else:
            self.trained_steps += 1
            improve, lr = (self._improve_policy, rl.lr) if self.target_q is None else (self._fit_q, rl.value_lr)
            lr *= min(1.0, self.trained_steps / max(rl.warmup_steps, 1))
            sums, grad_norm = improve(pieces, batch.num_actions_global, lr)
        self.version += 1
        reduced = _reduce(sums, batch.num_actions_global)
        if self.value is not None:
            reduced["value/explained_variance"] = _explained(reduced)
        if rl.kl_target and batch.trains:
            self.kl_coef = adapted_kl_coef(kl_coef, reduced["policy/kl"], rl.kl_target)
        seconds = time.perf_counter() - started
        tokens, computed = batch.num_tokens_global, batch.computed_positions * self.zero.world_size
        return reduced | {
            "policy/grad_norm": grad_norm,
            "policy/lr": lr,
            "policy/kl_coef": kl_coef,
            "learner/tokens_per_second": tokens / seconds,
            "learner/padding_share": 1.0 - tokens / computed,
            "learner/trained_parameters": float(self.zero.trained_parameters()),
            "memory/optimizer_mb": self.zero.optimizer_mb(),
            "time/learn": seconds,
        }

    @torch.no_grad()
    def _measure(self, pieces: list[dict[str, Tensor]], num_actions: int) -> dict[str, Tensor]:
        """Metric sums alone: no gradient, so that the optimizer's moments stay what the steps that train made them."""
        sums: dict[str, Tensor] = {}
        if self.value is not None:
            for piece in pieces:
                self._score(piece)
            self._charge_kl(pieces)
            sums = self.value.advantages(pieces, num_actions)
        for piece in pieces:
            _add(sums, self._objective(piece, None)[1])
        return sums

    def _improve_policy(
        self, pieces: list[dict[str, Tensor]], num_actions: int, lr: float
    ) -> tuple[dict[str, Tensor], float]:
        """``updates_per_batch`` optimizer steps, value head or Q first; returns metric sums and the mean gradient norm.

        Metrics are of the first step, whose policy made the batch, or the next to it; but of all steps what is clipped,
        since nothing is in the first.
        """
        rl = self.config.rl
        old: list[Tensor | None] = [None] * len(pieces)
        sums: dict[str, Tensor] = {}
        if rl.updates_per_batch > 1 or self.value is not None or self.soft_q is not None:
            with torch.no_grad():
                old = [self._score(piece) for piece in pieces]
        if self.value is not None:
            self._charge_kl(pieces)
            self.value.start(pieces, num_actions)
            sums = self.value.advantages(pieces, num_actions)
            self.value.fit(pieces, num_actions)
        if self.soft_q is not None:
            self.soft_q.start(pieces, num_actions)
            if rl.control_variate:  # before this batch has been learnt from: a control must not know it
                self._control(pieces)
            sums = self.soft_q.fit(pieces, num_actions, 0.0 if rl.control_variate else self.kl_coef)
        grad_norms = list[float]()
        for update in range(rl.updates_per_batch):
            for index, piece in enumerate(pieces):
                loss, metrics = self._objective(piece, old[index])
                metrics["policy/clip_fraction"] = metrics["policy/clip_fraction"] / rl.updates_per_batch
                self.zero.backward(loss / num_actions, last=index == len(pieces) - 1)
                if rl.updates_per_batch == 1:
                    pieces[index] = {}  # its states are not needed again
                clipped = {"policy/clip_fraction": metrics["policy/clip_fraction"]}
                _add(sums, metrics if update == 0 else clipped)
            grad_norms.append(self.zero.step(lr))
        return sums, sum(grad_norms) / len(grad_norms)

    def _objective(self, piece: dict[str, Tensor], old_log_probs: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a micro-batch, or Q's where there is no actor: loss sum and metric sums."""
        if self.target_q is not None:
            return self._q_error(piece, self.target_q)
        rollout = self.config.rollout
        logits = self._logits(piece)
        return policy_objective(
            logits,
            piece,
            old_log_probs,
            rl=self.config.rl,
            kl_coef=self.kl_coef,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            q=self.soft_q.q(piece) if self.soft_q and self.config.rl.algorithm == "etpo" else None,
        )

    def _fit_q(self, pieces: list[dict[str, Tensor]], num_actions: int, lr: float) -> tuple[dict[str, Tensor], float]:
        """``value_steps`` optimizer steps on ``mean (Q(e, a) - r - g V(next))^2``; metrics are those of the first."""
        assert self.target_q is not None
        sums: dict[str, Tensor] = {}
        for step in range(self.config.rl.value_steps):
            for index, piece in enumerate(pieces):
                error, metrics = self._objective(piece, None)
                self.zero.backward(error / num_actions, last=index == len(pieces) - 1)
                if step == 0:
                    _add(sums, metrics)
            grad_norm = self.zero.step(lr)
            fitted = [tensor.float().clone() for _, tensor in self.zero.stream(self.policy.published())]
            polyak_(self.target_q.parameters(), fitted, self.config.rl.target_tau)
        return sums, grad_norm

    def _q_error(self, piece: dict[str, Tensor], target: QHead) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed over actions, with metric sums."""
        q, mask, beta = self._logits(piece), piece["action_mask"], self.kl_coef
        reference = piece["reference"] = piece["reference_logits"].log_softmax(-1)
        goals = one_step_targets(target, piece, beta)[mask]
        taken = _placed(_taken(q, piece), piece)[mask]
        error = beyond_noise(taken - goals, goals).square().sum()
        with torch.no_grad():
            policy = etpo.best_log_probs(q, reference, beta)
            return error, {
                "q/taken": taken.sum(), "q/target": goals.sum(), "q/error": error.detach(),
                "policy/kl": _placed(exact_kl(policy, reference), piece)[mask].sum(),
                "policy/entropy": _placed(entropy(policy), piece)[mask].sum(),
            }  # fmt: skip

    def _logits(self, piece: dict[str, Tensor]) -> Tensor:
        """Of the policy, (N, K). Leaves in ``piece`` what later updates on the same batch need again."""
        given = ("input_ids", "attention_mask", "scored_mask", *_FOUND)
        logits, *found = self.zero(*(piece.get(name) for name in given))
        piece |= dict(zip(_FOUND, found, strict=True))
        return logits

    def _score(self, piece: dict[str, Tensor]) -> Tensor:
        """As :func:`_of_actions`, of the actions taken, (B, T); leaves ``kl_penalties`` in ``piece``."""
        rollout = self.config.rollout
        logits = self._logits(piece)
        policy, reference = _distributions(logits, piece["reference_logits"], rollout.temperature, rollout.top_k)
        log_probs, ref_log_probs, kl = _of_actions(policy, reference, piece)
        possible = piece["action_mask"] & log_probs.isfinite()
        piece["kl_penalties"] = kl_penalties(
            log_probs.masked_fill(~possible, 0.0), ref_log_probs.masked_fill(~possible, 0.0), kl, piece["action_mask"],
            piece["discounts"], self.config.rl.kl_estimator,
        )  # fmt: skip
        if self.soft_q is not None:
            piece |= {"policy": policy, "reference": reference}
        if piece["aliases"] is not None:
            piece["old_marginals"] = _marginals(policy, piece, possible)
        return log_probs

    def _charge_kl(self, pieces: Sequence[dict[str, Tensor]]) -> None:
        """Penalties become rewards where a value head learns to expect them."""
        if self.config.rl.kl_in == "reward":
            for piece in pieces:
                piece["rewards"] = piece["rewards"] - self.kl_coef * piece["kl_penalties"]
                piece["kl_penalties"] = torch.zeros_like(piece["kl_penalties"])

    def _control(self, pieces: Sequence[dict[str, Tensor]]) -> None:
        """``control``: what Q expects of each action beyond the policy's mean, (N, K)."""
        assert self.soft_q is not None
        for piece in pieces:
            q = self.soft_q.q(piece)
            piece["control"] = q - etpo.soft_values(q, piece["policy"], piece["reference"], 0.0)[..., None]

    def manifest(self) -> Manifest:
        return self.zero.manifest(self.policy.published())

    def buckets(self, channel: Channel | None = None) -> list[Bucket]:
        """The policy's weights under the current version; on ranks above 0 an empty list. All ranks call.

        Args:
            channel: on rank 0, where to broadcast them as well; the buckets then serve workers that come later.
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
        """This rank's shard of the policy, and the heads beside it; every draw follows from the version."""
        self.zero.save(folder, {name: getattr(self, name) for name in _PLACE})
        if self.zero.rank == 0:
            for name, head in self._heads():
                torch.save(head.state_dict(), folder / f"{name}.pt")

    def load(self, folder: Path) -> None:
        notes = self.zero.load(folder)
        for name, head in self._heads():
            head.load_state_dict(torch.load(folder / f"{name}.pt", map_location=self.zero.device, weights_only=True))
        for name in _PLACE:
            setattr(self, name, notes[name])

    def _heads(self) -> list[tuple[str, ValueLearner | SoftQLearner | QHead]]:
        """What there is beside the policy, by the name that it is saved under."""
        heads = {"value": self.value, "soft_q": self.soft_q, "target_q": self.target_q}
        return [(name, head) for name, head in heads.items() if head is not None]


def _value_learner(config: Config, width: int, device: torch.device) -> ValueLearner | None:
    """PPO's, over the whole episode; or ArCHer's baseline within an utterance, whose advantage is all its reward."""
    rl = config.rl
    if rl.algorithm == "ppo":
        decay, whiten = rl.gae_lambda, True
    elif rl.algorithm == "archer" and config.critic.token_baseline:
        decay, whiten = 1.0, False
    else:
        return None
    return ValueLearner(
        width, device, lr=rl.value_lr, grad_clip=rl.grad_clip, decay=decay, whiten=whiten, steps=rl.value_steps,
        seed=config.seed,
    )  # fmt: skip


def _soft_q_learner(config: Config, width: int, num_actions: int, device: torch.device) -> SoftQLearner | None:
    """ETPO's, or the control variate of an algorithm whose rewards are its advantages."""
    rl = config.rl
    if rl.actor_free or (rl.algorithm != "etpo" and not rl.control_variate):
        return None
    return SoftQLearner(
        width, num_actions, device, lr=rl.value_lr, tau=rl.target_tau, grad_clip=rl.grad_clip, steps=rl.value_steps,
        seed=config.seed,
    )  # fmt: skip


def train_loop(
    config: Config,
    model_path: str,
    source: BatchSource,
) -> None:
    """Train until the source has no more batches, from the run's last checkpoint on. Runs on every rank."""
    learner, output = RLLearner(config, make_policy(config, model_path)), Path(config.output_dir)
    is_first = learner.zero.rank == 0
    checkpoint = last_checkpoint(output)
    if checkpoint is not None:
        learner.load(checkpoint.folder)
    buckets = learner.buckets()
    if is_first:
        source.begin(learner.version, buckets, _services_of(checkpoint.folder) if checkpoint else None)
    torch.distributed.barrier()
    saved = learner.version
    metrics: dict[str, float] = {}
    while True:
        started = time.perf_counter()
        batch = source.next_batch(learner.zero.rank, learner.version)
        waited = time.perf_counter() - started
        if batch is not None:
            try:
                metrics = learner.step(batch) | {"time/wait": waited}
            except NonFiniteError as error:
                source.fail(f"step {learner.version}: {error}")
                raise
            started = time.perf_counter()
            channel = None
            if is_first and config.cluster.weight_transport == "nccl":
                channel = source.offer(learner.version, learner.manifest())
            buckets = learner.buckets(channel)
            metrics["time/gather"] = time.perf_counter() - started
            metrics["learner/zero_stage"] = float(learner.zero.zero_stage)
            if is_first:
                source.publish(learner.version, buckets, metrics)
        if learner.version > saved and (batch is None or learner.version % config.rl.save_every == 0):
            save_checkpoint(output, learner.version, functools.partial(_save, learner, source), source.fail)
            saved = learner.version
        if batch is None:
            break
    tensors = {name: tensor.cpu().clone() for name, tensor in learner.zero.stream(learner.policy.published())}
    if is_first:
        beta = config.rl.kl_coef if config.rl.actor_free else 0.0
        export(model_path, tensors, output / "model", beta)


_SERVICES = "services.pkl"


def _save(learner: RLLearner, source: BatchSource, folder: Path) -> Described:
    """The learner's part of a checkpoint, and beside it what controller, replay and critic were at its version."""
    state = source.checkpoint(learner.zero.rank, learner.version)  # may take longer than ranks wait for each other
    learner.save(folder)
    if state is None:
        return {}
    if state.get("critic"):
        state["critic"] = shutil.copy(state["critic"], folder)
    (folder / _SERVICES).write_bytes(pickle.dumps(state))
    rows = enumerate(shard["files"] for shard in state["shards"])
    return {f"replay/{shard}/{name}": what for shard, files in rows for name, what in files.items()}


def _services_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = pickle.loads((folder / _SERVICES).read_bytes())
    if state.get("critic"):
        state["critic"] = str(folder / Path(state["critic"]).name)
    return state


def tensors_of(batch: Batch, start: int, stop: int, width: int, device: torch.device) -> dict[str, Tensor]:
    """A micro-batch on the device."""
    names = ["input_ids", "attention_mask", "actions", "action_mask", "rollout_log_probs", "advantages", "rewards",
             "discounts"]  # fmt: skip
    if batch.hidden_states is not None:
        names.append("hidden_states")
    # A copy: arrays from Ray's object store are read-only.
    piece = {name: torch.tensor(getattr(batch, name)[start:stop, :width], device=device) for name in names}
    if "hidden_states" in piece and piece["hidden_states"].dtype is torch.int16:  # NumPy has no bfloat16
        piece["hidden_states"] = piece["hidden_states"].view(torch.bfloat16)
    piece["scored_mask"] = piece["action_mask"]
    return piece


def _add(sums: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """A micro-batch's metric sums to those of the ones before; of maxima, the greater."""
    for name, value in found.items():
        known = sums.get(name, torch.zeros_like(value))
        sums[name] = torch.maximum(known, value) if name.endswith("_max") else known + value.detach()


def _explained(metrics: dict[str, float]) -> float:
    """Share of the returns' variance that values explain; 0 where returns do not vary. Takes its own sums out."""
    variance = torch.tensor(metrics.pop("value/returns_deviation"))
    unexplained = metrics.pop("value/error")
    if bool(within_noise(variance.sqrt(), torch.tensor(abs(metrics["value/returns"])))):
        return 0.0
    return 1.0 - unexplained / float(variance)


def _reduce(sums: dict[str, Tensor], num_actions: int) -> dict[str, float]:
    out = {}
    for name, value in sums.items():
        is_max = name.endswith("_max")
        total = value.detach().clone().double()
        torch.distributed.all_reduce(
            total, torch.distributed.ReduceOp.MAX if is_max else torch.distributed.ReduceOp.SUM
        )
        out[name] = float(total) if is_max else float(total) / num_actions
    return out
