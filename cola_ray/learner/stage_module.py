"""The loss of each stage of pre-training, as one module, so that ZeRO-3 sees one forward.

    base        -log P(x_t+1 | x_1..t)                                      a plain base
    actions     -log P(x_t+1 | e_t, a_t), a_t a straight-through Gumbel sample of the IDM   + entropy_coef sum p log p
    policy      -log pi(a_t | e_1..t), a_t the IDM's greedy action
    fta_idm     -log P(x_t+1 | e_t, a_t), only the base trains, a_t the IDM's greedy action
    fta_policy  the same, a_t sampled from the policy

If an action lasts n tokens (``model.action_every``), the IDM's logits of a span are pooled, ``u_s = mean of u_{t+1}
over the span's t``, and the action drawn or taken from u_s is the action at each of its positions
(algorithms/spans.py). The policy learns at the spans' first positions, where it will be evaluated. Terms of the relaxed
actions count a span once for each of its tokens, as the cross-entropy does; counts of actions count decisions.

With ``model.learnt_ends``, the stage actions adds ``- switch_cost sum (p_t - m) . (p_{t-1} - m)``, where m is the mean
of p: what a change of the action costs, beyond changes by chance. The policy learns ``-log pi(a_t | e_1..t, a_{t-1})``,
and with it when actions end.

Source: Jia et al. 2025, stages 1 and 2; departures are named where they are made.
Legend: B rows, T positions, N of them masked in, K actions.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from cola_ray.algorithms.latent_actions import negative_entropy, straight_through_gumbel, usage_imbalance
from cola_ray.algorithms.spans import Spans
from cola_ray.learner.pieces import HeadLoss, cross_entropies
from cola_ray.model import families
from cola_ray.model.modeling_cola import CoLAForCausalLM, gumbel_noise, held_or_new, sample_actions
from cola_ray.settings.config import Config
from cola_ray.settings.training import PretrainStage

TRAINED: dict[PretrainStage, tuple[str, ...]] = {
    "base": ("model.",),
    "actions": ("model.idm.", "model.codebook.", "model.world_model."),
    "policy": ("model.policy.",),
    "fta_idm": ("model.model.", "model.lm_head."),
    "fta_policy": ("model.model.", "model.lm_head."),
}
"""The parameters that a stage trains: name prefixes inside :class:`StageModule`."""

MEASURED_STATES = 32  # states per rank on which all K actions are tried, for the reachable-tokens metric


class StageModule(nn.Module):
    """A stage's loss on packed rows, so that ZeRO-3 sees one forward."""

    def __init__(self, model: CoLAForCausalLM | PreTrainedModel, stage: PretrainStage, config: Config) -> None:
        super().__init__()
        self.model: Any = model  # a CoLA model, or a plain base in the stage base
        self.stage, self.settings = stage, config.pretrain
        self.every = int(getattr(model.config, "action_every", 1))
        self.learnt_ends = bool(getattr(model.config, "learnt_ends", False))
        weight: Any = model.lm_head.weight
        self.head_loss = HeadLoss(weight)
        self.own_logits = stage == "base" and not families.has_plain_head(model.config.to_dict())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        loss_mask: Tensor,
        noise_seed: Tensor,
        measure: bool,
        mean_usage: Tensor | None = None,
        reach: bool = False,
        e: Tensor | None = None,
        labels: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss *sum* over masked-in positions (in the stage policy, over spans), and metric sums.

        Args:
            input_ids, position_ids, loss_mask: (B, T).
            noise_seed: (B,) int64.
            measure: in the stage actions, whether to compute the bare base's loss, too.
            mean_usage: (K,), the relaxed actions' mean over the step's batch; None if no rank has more than one
                micro-batch: then all ranks compute it together.
            reach: in the stage actions, whether to try all actions on some states.
            e: in the stages actions and policy, the result of :meth:`states`, if known.
            labels: in the stage policy, the result of :meth:`labels`, if known.
            steps: (B, T), steps of responses, by which spans are counted; None: steps of texts, ``position_ids``.
        """
        tokens = input_ids[:, 1:]
        mask = loss_mask[:, :-1]
        if self.stage == "base":
            loss = self._base_loss(input_ids, position_ids, tokens, mask)
            return loss, {"loss": loss.detach()}
        if e is None:
            with torch.set_grad_enabled(self.stage.startswith("fta") and torch.is_grad_enabled()):
                e = self.model.encode(input_ids, position_ids=position_ids)
        spans = self._spans(mask, position_ids, steps)
        if self.stage == "actions":
            return self._actions_loss(e, position_ids, tokens, mask, spans, noise_seed, measure, mean_usage, reach)
        if self.stage == "policy":
            wanted = self._taken(e, position_ids, mask, spans) if labels is None else labels[:, 1:][mask]
            held = spans.held(wanted) if self.learnt_ends else None
            logits = self.model.policy(e[:, :-1], position_ids=position_ids[:, :-1], scored=spans.starts, held=held)
            loss = F.cross_entropy(logits, wanted, reduction="sum")
            return loss, {"loss": loss.detach(), "counts": self._counts(wanted)}
        with torch.no_grad():
            if self.stage == "fta_idm":
                actions = self._taken(e, position_ids, mask, spans)
            else:
                actions = self._sampled_actions(e, position_ids, noise_seed)[spans.starts]
        held = spans.spread(actions)
        loss = self.head_loss(self.model.world_model_states(e[:, :-1][mask], held), tokens[mask])
        return loss, {"loss": loss.detach(), "counts": self._counts(actions)}

    def _base_loss(self, input_ids: Tensor, position_ids: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        # With use_cache, transformers would not detect packed rows, and would attend across documents.
        given = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if self.own_logits:
            logits = self.model(**given).logits[:, :-1]
            return cross_entropies(logits[mask], tokens[mask])
        states = self.model.model(**given).last_hidden_state[:, :-1]
        loss: Tensor = self.head_loss(states[mask], tokens[mask])
        return loss

    @torch.no_grad()
    def states(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """e of the frozen base, (B, T, H)."""
        e: Tensor = self.model.encode(input_ids, position_ids=position_ids)
        return e

    @torch.no_grad()
    def labels(self, e: Tensor, position_ids: Tensor) -> Tensor:
        """For each token the IDM's greedy action that led to it, (B, T) int64; the first token's is meaningless."""
        labels: Tensor = self.model.inverse_dynamics_logits(e, position_ids=position_ids).argmax(-1)
        return labels

    def _spans(self, mask: Tensor, position_ids: Tensor, steps: Tensor | None) -> Spans:
        """Spans of the N masked-in positions (B, T - 1)."""
        steps = position_ids if steps is None else steps
        return Spans.of(mask, position_ids[:, :-1], steps[:, :-1], self.every)

    @torch.no_grad()
    def _taken(self, e: Tensor, position_ids: Tensor, mask: Tensor, spans: Spans) -> Tensor:
        """The IDM's greedy action of each span, (S,) int64."""
        logits = self.model.inverse_dynamics_logits(e, position_ids=position_ids)[:, 1:][mask]
        taken: Tensor = spans.pooled(logits).argmax(-1)
        return taken

    @property
    def needs_mean_usage(self) -> bool:
        """Whether the loss contains the batch's mean of the relaxed actions."""
        settings = self.settings
        return self.stage == "actions" and bool(settings.balance_coef or (self.learnt_ends and settings.switch_cost))

    @torch.no_grad()
    def usage(
        self, input_ids: Tensor, position_ids: Tensor, loss_mask: Tensor, noise_seed: Tensor, e: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """In the stage actions: the relaxed actions' sum over masked-in positions, (K,)."""
        if e is None:
            e = self.states(input_ids, position_ids)
        mask = loss_mask[:, :-1]
        spans = self._spans(mask, position_ids, steps)
        return spans.spread(self._drawn(e, position_ids, mask, spans, noise_seed)[1]).sum(0)

    def _drawn(
        self, e: Tensor, position_ids: Tensor, mask: Tensor, spans: Spans, noise_seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Actions of the spans of the N masked-in positions, one-hot and relaxed, (S, K) each."""
        logits = spans.pooled(self.model.inverse_dynamics_logits(e, position_ids=position_ids)[:, 1:][mask])
        seeds = noise_seed[:, None].expand(mask.shape)[spans.starts]
        index = torch.arange(mask.shape[1], device=e.device).expand(mask.shape)[spans.starts]
        noise = gumbel_noise(seeds, index, logits.shape[-1])
        return straight_through_gumbel(logits, noise.float(), self.settings.gumbel_tau)

    def _actions_loss(
        self,
        e: Tensor,
        position_ids: Tensor,
        tokens: Tensor,
        mask: Tensor,
        spans: Spans,
        noise_seed: Tensor,
        measure: bool,
        mean_usage: Tensor | None,
        reach: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``CE(logits_t, x_{t+1}) + entropy_coef * sum p log p`` (paper), plus the optional balance term (ours)."""
        settings = self.settings
        drawn, of_spans = self._drawn(e, position_ids, mask, spans, noise_seed)
        one_hot, relaxed = spans.spread(drawn), spans.spread(of_spans)
        states, targets = e[:, :-1][mask], tokens[mask]
        cross_entropy = self.head_loss(self.model.world_model_states(states, one_hot), targets)
        loss = cross_entropy + settings.entropy_coef * negative_entropy(relaxed).sum()
        if self.needs_mean_usage:
            mean = mean_over_ranks(relaxed) if mean_usage is None else mean_usage
            loss = loss + settings.balance_coef * usage_imbalance(relaxed, mean)
            if self.learnt_ends:
                loss = loss - settings.switch_cost * spans.persistence(relaxed, mean)
        actions = drawn.argmax(-1)
        sums = {"loss": cross_entropy.detach(), "counts": self._counts(actions)}
        if self.learnt_ends:
            changed = spans.follows & (spans.held(actions) != actions)
            sums |= {"changes": changed.sum(), "pairs": spans.follows.sum()}
        with torch.no_grad():
            if measure:
                sums["base_loss"] = self.head_loss(states, targets)
            if reach:
                some = slice(MEASURED_STATES)
                sums |= self._reachable(states[some], targets[some], spans.owner[some])
        return loss, sums

    def _reachable(self, states: Tensor, targets: Tensor, owner: Tensor) -> dict[str, Tensor]:
        """Over all K actions in each state: number of distinct next tokens; whether one action gives a whole span."""
        num_actions = self.model.config.num_actions
        tried = states[:, None].expand(-1, num_actions, -1)
        actions = torch.arange(num_actions, device=states.device).expand(len(states), -1)
        tokens = self.model.world_model_logits(tried, actions).argmax(-1)  # (S, K)
        ordered = tokens.sort(-1).values
        distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)
        num_spans = int(owner[-1]) + 1 if len(owner) else 0
        wrong = torch.zeros(num_spans, num_actions, device=states.device)
        wrong.index_add_(0, owner, (tokens != targets[:, None]).float())
        return {
            "reachable": distinct.float().sum(),
            "covered": (wrong == 0).any(-1).float().sum(),
            "states": torch.tensor(float(len(states)), device=states.device),
            "spans": torch.tensor(float(num_spans), device=states.device),
        }

    def _sampled_actions(self, e: Tensor, position_ids: Tensor, noise_seed: Tensor) -> Tensor:
        if self.learnt_ends:
            raise ValueError("pretrain.stages: fta_policy draws all actions of a text at once, and in this model "
                             "(learnt_ends) each depends on the last; leave fta_policy out")  # fmt: skip
        logits = self.model.policy_logits(e, position_ids=position_ids)[:, :-1]
        batch, steps, num_actions = logits.shape
        rows = batch * steps
        index = torch.arange(steps, device=e.device).repeat(batch)
        seeds = noise_seed.repeat_interleave(steps)
        flat = logits.reshape(rows, num_actions)
        actions, _ = sample_actions(flat, torch.ones(rows, device=e.device), None, seeds, index, None)
        return actions.view(batch, steps)

    def _counts(self, actions: Tensor) -> Tensor:
        return torch.bincount(actions, minlength=self.model.config.num_actions).float()

    @torch.no_grad()
    def correct(self, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> Tensor:
        """Is greedy decoding right? (B,) bool.

        Greedy decoding gives the reference answer if and only if, with that answer as input, every argmax is its next
        token; so one forward pass tells, without generating.
        """
        if self.stage == "base":
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        else:
            e = self.model.encode(input_ids, attention_mask)
            new, ends = self.model.policy.heads(e, attention_mask)
            actions = new.argmax(-1)
            if ends is not None:
                actions = _greedy(new, ends, answer_mask)
            if self.every > 1:  # held from the answer's first token on
                places = torch.arange(actions.shape[1], device=actions.device).expand(actions.shape)
                steps = places - answer_mask.int().argmax(1, keepdim=True)
                actions = actions.gather(1, (places - steps.remainder(self.every)).clamp_min(0))
            logits = self.model.world_model_logits(e, actions)
        right = logits[:, :-1].argmax(-1) == input_ids[:, 1:]
        return (right | ~answer_mask[:, :-1]).all(-1)


def _greedy(logits: Tensor, end_logits: Tensor, answer_mask: Tensor) -> Tensor:
    """The most probable actions (B, T), where each position of the answer depends on the action before."""
    actions, held = logits.argmax(-1), None
    for place in range(answer_mask.shape[1]):
        inside = answer_mask[:, place]
        chosen = held_or_new(logits[:, place], end_logits[:, place], held).argmax(-1)
        actions[:, place] = torch.where(inside, chosen, actions[:, place])
        held = torch.where(inside, chosen, -1)
    return actions


def noise_seeds(seed: int, step: int, rows: np.ndarray) -> Tensor:
    """Seeds of these rows' draws in a step, (B,) int64: a row's draws depend on it and the step, not on its rank."""
    return torch.from_numpy(rows.astype(np.int64)) + mixed(seed, step)


def mixed(*numbers: int) -> int:
    """A seed of 62 bits for a place in a run."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


def mean_over_ranks(rows: Tensor) -> Tensor:
    """Mean of all ranks' (N, K) rows: (K,), without gradient; all ranks call."""
    sums = torch.cat([rows.detach().double().sum(0), rows.new_full((1,), len(rows), dtype=torch.float64)])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return (sums[:-1] / sums[-1].clamp_min(1.0)).to(rows.dtype)
