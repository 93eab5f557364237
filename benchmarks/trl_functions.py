"""Losses, corrections and advantages against TRL's own code, on the same tensors in float64.

benchmarks/vs_trl.sh FOLDER --functions

    log-probabilities, advantages, rewards ─┬─> cola_ray.algorithms ─────────────────────────┐
    of rows of unequal lengths              └─> GRPOTrainer, RLOOTrainer: _compute_loss,     ├─> largest difference
                                                _generate_and_score_completions ─────────────┘

It runs in TRL's environment. The trainers are TRL's classes; only what would run a model is replaced: their model's
log-probabilities, their generation and their reward functions give these tensors. TRL divides advantages by a spread to
which it adds 1e-4; this is taken out before the comparison. It ends with 1 if anything differs by more than 1e-9.
"""

import contextlib
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import trl
from record import record
from torch import Tensor

from cola_ray.algorithms import grpo, rloo
from cola_ray.algorithms.advantages import Outcomes
from cola_ray.algorithms.aggregation import LossAggMode, loss_weights
from cola_ray.algorithms.importance import importance_weights
from cola_ray.algorithms.policy_loss import Clip, kl_estimate
from cola_ray.registry import find

LENGTHS = (6, 2, 5, 1, 3, 4, 6, 2)
GROUP, LONGEST, CAP, BETA, ENTROPY_COEF = 4, 9, 1.3, 0.3, 0.1
MOST = 1e-9
MODES: dict[str, LossAggMode] = {"dapo": "token-mean", "grpo": "seq-mean-token-mean", "luspo": "seq-mean-token-sum",
                                 "dr_grpo": "seq-mean-token-sum-norm"}  # fmt: skip
"""TRL's loss_type, and our rl.loss_agg_mode."""
SURROGATES: dict[str, tuple[Clip, dict[str, Any]]] = {
    "ppo": (Clip(0.2, 0.28), {"epsilon_low": 0.2, "epsilon_high": 0.28}),
    "ppo, clip_c": (Clip(0.2, 0.28, 1.4), {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": 1.4}),
    "gspo": (Clip(0.1, 0.15), {"epsilon_low": 0.1, "epsilon_high": 0.15, "importance_sampling_level": "sequence"}),
    "cispo": (Clip(1.0, 0.3), {"epsilon_high": 1.3, "loss_type": "cispo"}),
}
"""Our rl.loss with its clip, and what TRL calls it."""


class Tensors:
    """What both sides get: B rows of LENGTHS actions, prompts of GROUP rows each; (B, T) float64."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = len(LENGTHS), max(LENGTHS)
        self.mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
        self.log_probs, self.old, self.reference, self.sampling = (
            -1.6 * torch.rand(shape, generator=draw) for _ in range(4)
        )
        self.log_probs.requires_grad_()
        self.entropies = torch.rand(shape, generator=draw)
        self.advantages, self.rewards = (torch.randn(shape[0], generator=draw) for _ in range(2))

    @property
    def wide(self) -> Tensor:
        """The advantage of each action."""
        return self.advantages[:, None].expand_as(self.mask).masked_fill(~self.mask, 0.0)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.log_probs, retain_graph=True)[0]


# --- TRL's --------------------------------------------------------------------------------------------------------


class _Given:
    """In front of one of TRL's trainers: gives it tensors in place of a model, generation and reward functions."""

    def __init__(self, given: Tensors, **settings: Any) -> None:
        self.given = given
        usual = {
            "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2,
            "beta": 0.0, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
            "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": CAP, "vllm_importance_sampling_clip_min": None, "ref_model": None,
            "aux_loss_enabled": False, "_entropy_bonus_enabled": False, "use_adaptive_entropy": False,
            "entropy_coef": ENTROPY_COEF, "max_completion_length": LONGEST, "current_gradient_accumulation_steps": 1,
            "num_generations": GROUP, "num_iterations": 1, "scale_rewards": "group", "reward_weights": torch.ones(1),
            "mask_truncated_completions": False, "multi_objective_aggregation": "sum_then_normalize",
            "reward_func_names": ["given"], "reward_clip_range": None, "normalize_advantages": False, "tools": None,
            "environments": None, "environment_factories": None, "pad_to_multiple_of": None, "log_multimodal": False,
            "_metrics": defaultdict(lambda: defaultdict(list)), "_logs": _Logs(), "_pending_extra_logs": {},
            "_pending_metrics": {},
        }  # fmt: skip
        arguments = {name: settings.pop(name, value) for name, value in (
            ("delta", None), ("steps_per_generation", 1), ("use_bias_correction_kl", False),
            ("per_device_train_batch_size", 1), ("gradient_accumulation_steps", 1),
            ("gradient_checkpointing_kwargs", None),
        )}  # fmt: skip
        for name, value in (usual | settings).items():
            setattr(self, name, value)
        self.args = SimpleNamespace(**arguments)
        self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self._tokenizer = SimpleNamespace(pad_token_id=0)
        self.accelerator = SimpleNamespace(
            device=torch.device("cpu"), num_processes=1, process_index=0, sync_gradients=True,
            gather=lambda value: value, gather_for_metrics=lambda value: value, reduce=lambda value, **_: value,
        )  # fmt: skip

    def _get_per_token_logps_and_entropies(self, *_: Any, compute_entropy: bool = False, **__: Any) -> tuple[Any, ...]:
        return (self.given.log_probs if compute_entropy else self.given.old), self.given.entropies, None

    def _calculate_rewards(self, *_: Any) -> Tensor:
        return self.given.rewards[:, None]

    def loss(self, **more: Tensor) -> Tensor:
        mask = self.given.mask.long()
        ids = torch.ones_like(mask)
        found: Tensor = self._compute_loss(self.model, {  # type: ignore[attr-defined]
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
            "advantages": self.given.advantages, "old_per_token_logps": self.given.old,
            "ref_per_token_logps": self.given.reference, "num_items_in_batch": mask.sum(), **more,
        })  # fmt: skip
        return found

    def scored(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._generate_and_score_completions(  # type: ignore[attr-defined]
            [{"prompt": "?"} for _ in LENGTHS]
        )
        return found


class _Logs(dict[str, Any]):
    """Lists, and dictionaries of lists, as TRL keeps them."""

    def __missing__(self, name: str) -> Any:
        self[name] = defaultdict(list) if name in ("rewards", "extra") else []
        return self[name]


class Grpo(_Given, trl.GRPOTrainer):
    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        rows = [[1] * length for length in LENGTHS]
        sampled = [row[:length].tolist() for row, length in zip(self.given.sampling, LENGTHS, strict=True)]
        return [[1]] * len(rows), rows, None, ["!"] * len(rows), sampled, {}, None, None


class Rloo(_Given, trl.RLOOTrainer):
    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        rows = [[1] * length for length in LENGTHS]
        return [[1]] * len(rows), rows, ["!"] * len(rows)


# --- both ---------------------------------------------------------------------------------------------------------


def aggregated(of_each: Tensor, mask: Tensor, mode: LossAggMode) -> Tensor:
    """One number from the losses of single actions, as learners make it."""
    count = int(mask.sum())
    weights = loss_weights(mask, mode, count, len(mask), LONGEST)
    return (of_each if weights is None else weights * of_each).sum() / count


def losses(given: Tensors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each case's name, our loss, and TRL's."""
    for (name, (clip, theirs)), (kind, mode) in itertools.product(SURROGATES.items(), MODES.items()):
        if name == "cispo" and kind != "dapo":
            continue  # TRL's cispo has one way of averaging
        surrogate = find("loss", name.partition(",")[0])
        of_each, _ = surrogate(given.log_probs, given.old, given.wide, given.mask, clip)
        said = f"{name}, {mode}"
        trainer = {"loss_type": kind, **theirs}
        yield said, aggregated(of_each, given.mask, mode), Grpo(given, **trainer).loss()
        if name == "ppo":
            divergence = kl_estimate(given.log_probs, given.reference, "k3").masked_fill(~given.mask, 0.0)
            yield (f"{said}, KL k3", aggregated(of_each + BETA * divergence, given.mask, mode),
                   Grpo(given, **trainer, beta=BETA).loss())  # fmt: skip
    of_each, _ = find("loss", "ppo")(given.log_probs, given.old, given.wide, given.mask, Clip(0.2, 0.2))
    with_entropy = of_each - ENTROPY_COEF * given.entropies.masked_fill(~given.mask, 0.0)
    yield ("ppo, token-mean, entropy", aggregated(with_entropy, given.mask, "token-mean"),
           Grpo(given, loss_type="dapo", _entropy_bonus_enabled=True).loss())  # fmt: skip


def corrections(given: Tensors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each mode's name, our weights of actions, and TRL's."""
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        ours, _ = importance_weights(given.old, given.sampling, given.mask, CAP, mode)
        theirs = Grpo(given, use_vllm=True, vllm_importance_sampling_mode=mode).scored()["importance_sampling_ratio"]
        yield f"weights, {mode}", ours, theirs.expand_as(given.mask) * given.mask


def advantages(given: Tensors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each estimator's name, our advantages, and TRL's without the 1e-4 in its divisor."""
    groups = [Outcomes(rewards) for rewards in given.rewards.view(-1, GROUP)]
    spreads = {
        "group": torch.cat([one.rewards.std().expand(GROUP) for one in groups]),
        "batch": given.rewards.std().expand(len(LENGTHS)),
    }
    for scale in ("group", "batch", "none"):
        theirs = Grpo(given, scale_rewards=scale).scored()["advantages"]
        if scale in spreads:
            theirs = theirs * (spreads[scale] + 1e-4) / spreads[scale]
        yield f"advantages, grpo, {scale}", torch.cat(grpo.advantages(groups, scale)), theirs
    yield "advantages, rloo", torch.cat(rloo.advantages(groups)), Rloo(given).scored()["advantages"]


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def compare(seeds: range) -> dict[str, dict[str, Any]]:
    """The largest differences of each case over the seeds: of values, and of losses' gradients."""
    rows: dict[str, dict[str, Any]] = {}
    for given in map(Tensors, seeds):
        for name, ours, theirs in itertools.chain(losses(given), corrections(given), advantages(given)):
            row = rows.setdefault(name, {"difference": 0.0, "of_gradients": None})
            row["difference"] = max(row["difference"], apart(ours, theirs))
            if ours.requires_grad:
                gradients = apart(given.gradient(ours), given.gradient(theirs))
                row["of_gradients"] = max(row["of_gradients"] or 0.0, gradients)
    return rows


def worst(rows: Mapping[str, Mapping[str, Any]]) -> float:
    values = [value for row in rows.values() for value in row.values() if value is not None]
    return max(math.inf if math.isnan(value) else value for value in values)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    with contextlib.redirect_stdout(sys.stderr):
        rows = compare(range(5))
    for name, row in rows.items():
        gradients = "" if row["of_gradients"] is None else f"   gradients {row['of_gradients']:.1e}"
        print(f"{name:40} {row['difference']:.1e}{gradients}")
    about = f"Largest differences from TRL {trl.__version__}'s own trainers, relative to the largest value."
    record("trl_functions", rows, list(range(5)), about)
    if not worst(rows) < MOST:
        raise SystemExit(f"differs from TRL by {worst(rows):.1e}")
    print(f"{len(rows)} functions agree with TRL {trl.__version__} within {worst(rows):.1e}")


if __name__ == "__main__":
    main()
