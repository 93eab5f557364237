"""Algorithm options that cannot be combined: one table, which refusals.py reads.

    refused(config, "rl_math")      # ["rl.kl_estimator = 'k2': ...; use ..."], a line for each row that applies

A row names the field at fault, its refused values, the condition under which they are refused, the reason, and what to
do instead. The values that a setting may have by itself are in its type (config.py).
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from cola_ray.settings.algorithms import COMPARING, OF_OUTCOMES, of
from cola_ray.settings.config import MULTI_TURN, Config, is_environment, value_at
from cola_ray.settings.relevance import defaults

Condition = Callable[[Config], bool]
_UNREAD = "nothing reads it"
_EACH_TOKEN = "leave it out, or use a model whose actions give one token each"
_UP_TO_ONE = ("arithmetic", "gsm8k", "math500", "instructions", "twenty_questions", "guess_city", "tools", "shop",
              "household")  # fmt: skip
"""Tasks whose own rewards all lie between -1 and 1."""
_CLIPS = ("rl.clip_low", "rl.clip_high", "rl.clip_c")
_FOLLOWS_Q = ("etpo", "archer_soft")
_HAS_NO_SURROGATE = (*_FOLLOWS_Q, "tbrm", "chai")
"""Algorithms whose policy has its own loss, or none."""
_WITHOUT_ADVANTAGES = (*_HAS_NO_SURROGATE, "filtered_bc")
"""Algorithms whose policy is not affected by penalties or weights on advantages."""


@dataclass(frozen=True)
class _AllBut:
    """Contains all values except one."""

    wanted: Any

    def __contains__(self, value: object) -> bool:
        return value != self.wanted


@dataclass(frozen=True)
class _Naming:
    """Contains all lists with this name."""

    wanted: str

    def __contains__(self, value: object) -> bool:
        return isinstance(value, tuple) and self.wanted in value


@dataclass(frozen=True)
class Combination:
    """Which values a field may not have, when, why, and what to use. In texts, ``{}`` is the run's algorithm."""

    field: str  # dotted
    values: Container[Any] | None  # refused values; None: all except the defaults of class and preset
    when: Condition
    why: str
    fix: str = "leave it out"
    job: str = ""  # the one job to which this row applies; empty: all jobs

    def line(self, config: Config, job: str = "") -> str | None:
        """The refusal, if the row applies."""
        if self.job not in ("", job):
            return None
        value = value_at(config, self.field)
        wrong = value not in _defaults(config, self.field) if self.values is None else value in self.values
        if not wrong or not self.when(config):
            return None
        return f"{self.field} = {value!r}: {self.why}; {self.fix}".replace("{}", config.rl.algorithm)


def refused(config: Config, job: str = "") -> list[str]:
    """A line ``field = value: why; fix`` for each row that applies; only the first one for a field.

    Args:
        job: rows for this job alone are included.
    """
    lines: dict[str, str] = {}
    for row in COMBINATIONS:
        line = row.line(config, job)
        if line is not None:
            lines.setdefault(row.field, line)
    return list(lines.values())


_CLASS_DEFAULTS = Config()


def _defaults(config: Config, field: str) -> tuple[Any, Any]:
    """The field's default values, which users did not choose: the class's and the preset's."""
    return value_at(_CLASS_DEFAULTS, field), value_at(defaults(config), field)


# --- conditions -------------------------------------------------------------------------------------------------------


def _of(*algorithms: str) -> Condition:
    return lambda config: config.rl.algorithm in algorithms


def _not_of(*algorithms: str) -> Condition:
    return lambda config: config.rl.algorithm not in algorithms


def _needs(need: str) -> Condition:
    """Whether the algorithm is one with this property, see :class:`~cola_ray.settings.algorithms.Algorithm`."""
    return lambda config: bool(getattr(config.algorithm, need))


def _lacks(need: str) -> Condition:
    return lambda config: not getattr(config.algorithm, need)


def _learns_otherwise(config: Config) -> bool:
    """Whether the algorithm, without changes by settings, does not compute advantages from outcomes."""
    return not of(config.rl.algorithm).advantage


def _without_grpo(config: Config) -> bool:
    return config.algorithm.advantage != "grpo"


def _own_loss(config: Config) -> bool:
    return config.algorithm.has_own_loss


def _loss_is(*names: str) -> Condition:
    return lambda config: config.algorithm.loss in names


def _agents(config: Config) -> bool:
    return is_environment(config.task.name)


def _answers(config: Config) -> bool:
    return not is_environment(config.task.name)


def _tokens(config: Config) -> bool:
    return config.rl.action_space == "token"


def _latent(config: Config) -> bool:
    return config.rl.action_space == "latent"


def _any(*conditions: Condition) -> Condition:
    return lambda config: any(condition(config) for condition in conditions)


def _all(*conditions: Condition) -> Condition:
    return lambda config: all(condition(config) for condition in conditions)


def _has(field: str, *values: Any) -> Condition:
    return lambda config: value_at(config, field) in values


def _alone(config: Config) -> bool:
    return config.rl.prompts_per_step * config.rl.group_size == 1


def _one_update(config: Config) -> bool:
    return config.rl.updates_per_batch == 1 and config.rl.num_minibatches == 1


def _more_parts_than_sequences(config: Config) -> bool:
    return config.rl.num_minibatches > config.rl.prompts_per_step * config.rl.group_size


def _buffer_too_long(config: Config) -> bool:
    return config.rl.overlong_buffer > config.rollout.max_new_tokens


def _answers_too_long(config: Config) -> bool:
    return not is_environment(config.task.name) and config.hardware.response_tokens > config.rollout.max_new_tokens


def _too_few_tokens(config: Config) -> bool:
    return 0 < config.rollout.max_num_batched_tokens < config.rollout.max_num_seqs


def _never_trains(config: Config) -> bool:
    return config.critic.warmup_iterations >= config.rl.max_steps


def _no_room_for_weights(config: Config) -> bool:
    return 0 < config.rl.importance_cap <= 1


def _warms_up_all_along(config: Config) -> bool:
    return config.rl.warmup_steps >= config.num_trained_steps


def _without_values(config: Config) -> bool:
    return not config.learns_values


def _without_value_head(config: Config) -> bool:
    return not (config.algorithm.value_head or (config.rl.algorithm == "archer" and config.critic.token_baseline))


def _nothing_ahead(config: Config) -> bool:
    return config.rl.window >= config.rl.max_staleness


def _nothing_frozen(config: Config) -> bool:
    rl = config.rl
    refers = bool(rl.kl_coef or rl.kl_target) or config.learns_values
    return rl.action_space == "token" and rl.trains_all_weights and not refers


def _never_clipped(config: Config) -> bool:
    limit, task = config.rl.reward_clip_range, config.task
    return limit is not None and limit >= 1 and task.name in _UP_TO_ONE and not task.reward


def _base_trains(config: Config) -> bool:
    return any(stage.startswith("fta") for stage in config.pretrain.stages)


def _lasts(config: Config) -> bool:
    return config.model.action_every > 1 or config.model.learnt_ends


def _ends(config: Config) -> bool:
    return config.model.learnt_ends


_actor_free = _has("rl.actor_free", True)


# --- the table --------------------------------------------------------------------------------------------------------

COMBINATIONS: tuple[Combination, ...] = (
    # An algorithm needs the completions that it compares.
    Combination("rl.group_size", (1,), _needs("groups"), "{} compares completions of one prompt", "use 2 or more"),
    Combination(
        "rl.prompts_per_step", (1,), _all(_of("reinforce"), _alone),
        "the batch's mean is {}'s baseline, and one completion is its own mean", "use 2 or more",
    ),
    Combination(
        "rl.algorithm", _AllBut(""), _all(_needs("greedy"), _agents), "episodes have no greedy one to be compared with",
        "use grpo, rloo or reinforce",
    ),
    Combination(
        "rl.algorithm", _AllBut(""), _all(_needs("replays"), _answers),
        "learns from turns, and task.name names a task without any",
        f"use one of {', '.join(MULTI_TURN)} with `cola_ray agent`",
    ),
    Combination(
        "rl.algorithm", ("chai",), _tokens, "its players choose by the frozen base's states",
        "use rl.action_space latent",
    ),
    Combination(
        "rl.algorithm", _AllBut(""), _all(_needs("turns"), _answers), "an answer has one turn, and grpo is the same",
        f"use grpo, or one of {', '.join(MULTI_TURN)} with `cola_ray agent`",
    ),
    Combination(
        "rl.advantage", _AllBut(""), _needs("turns"), "{} compares episodes and turns alike, by rl.scale_rewards",
    ),
    Combination(
        "rl.advantage", _AllBut(""), _learns_otherwise, "{} makes its advantages in the learner",
        f"leave it out, or use {', '.join(OF_OUTCOMES)} or an algorithm of your own",
    ),
    Combination(
        "rl.loss", _AllBut(""), _any(_of(*_HAS_NO_SURROGATE), _actor_free),
        "{} has a loss of its own, or none",
    ),
    Combination(
        "critic.encoder", ("",), _all(_tokens, _of("archer", "archer_soft")),
        "with rl.action_space token the base's states change", "give an encoder",
    ),
    Combination(
        "critic.encoder", None, _any(_of("chai"), _has("critic.chooses", True)),
        "players choose by the base's states", "leave it out, or let critic.chooses be False",
    ),
    # Divergence from the reference.
    Combination(
        "rl.kl_coef", (0.0,), _of(*_FOLLOWS_Q), "{} divides by it", "use a number above 0, e.g. 0.05"
    ),
    Combination(
        "rl.kl_coef", (0.0,), _of("tbrm"), "tbrm's values are the logits times it, and nothing would be learnt",
        "use a number above 0, e.g. 0.05",
    ),
    Combination(
        "rl.kl_estimator", ("k2", "k3"), _all(_has("rl.kl_in", "reward"), _not_of(*_WITHOUT_ADVANTAGES)),
        "as a reward it does not have the divergence's gradient, and may lead away from the reference",
        "use exact or k1, or set rl.kl_in to loss",
    ),
    Combination(
        "rl.kl_estimator", ("k1",), _all(_has("rl.kl_in", "loss"), _not_of(*_WITHOUT_ADVANTAGES)),
        "in the loss its expected gradient is 0 wherever the policy is",
        "use exact, k2 or k3, or set rl.kl_in to reward",
    ),
    *(
        Combination(field, None, _of(*_WITHOUT_ADVANTAGES), f"with rl.algorithm {{}} {_UNREAD}")
        for field in ("rl.kl_in", "rl.kl_estimator", "rl.importance_cap", "rl.importance_mode")
    ),
    Combination(
        "rl.importance_mode", None, _has("rl.importance_cap", 0.0), "there is no weight", "set rl.importance_cap"
    ),
    Combination(
        "rl.importance_mode", ("geometric_mask",), _no_room_for_weights,
        "with rl.importance_cap up to 1 no weight is between 1 / rl.importance_cap and that", "use a cap above 1",
    ),
    *(
        Combination(field, None, _of("chai"), "no policy trains")
        for field in ("rl.lr", "rl.warmup_steps", "rl.lr_scheduler_type", "rl.min_lr_ratio", "rl.adam_betas",
                      "rl.grad_clip", "rl.kl_coef", "critic.warmup_iterations")
    ),
    Combination(
        "rl.min_lr_ratio", None, _has("rl.lr_scheduler_type", "constant"), "a constant rate has no end",
        "set rl.lr_scheduler_type to linear or cosine",
    ),
    Combination(
        "rl.lr_scheduler_type", ("linear", "cosine"), _warms_up_all_along,
        "rl.warmup_steps takes all steps that train, and the rate would never fall", "use fewer, or more rl.max_steps",
    ),
    Combination("rl.lr", None, _actor_free, "no policy trains, and Q's is rl.value_lr", "use rl.value_lr"),
    Combination("rl.kl_coef", None, _of("filtered_bc"), "the best episodes are cloned without a reference"),
    Combination("rl.kl_target", None, _of("chai", "filtered_bc"), f"with rl.algorithm {{}} {_UNREAD}"),
    Combination(
        "rl.kl_target", None, _has("rl.kl_coef", 0.0),
        "rl.kl_coef is multiplied from step to step, and from 0 it never moves", "set rl.kl_coef to a number above 0",
    ),
    Combination("rl.entropy_coef", None, _any(_of("chai"), _actor_free), "no policy trains"),
    Combination(
        "rl.entropy_coef", None, _of("tbrm"), "a bonus would lead away from where the residuals are 0",
        "use more rl.kl_coef",
    ),
    # How losses are added up.
    Combination("rl.loss_agg_mode", None, _any(_of("chai"), _actor_free), "no policy trains"),
    Combination("rl.loss_agg_mode", None, _of("tbrm"), "a trajectory has one residual, and the loss is a mean of them"),
    Combination(
        "rl.loss_agg_mode", ("seq-mean-token-mean",), _has("rl.control_variate", True),
        "what an action weighs depends on how its completion goes on, and rl.control_variate would add a bias",
        "use another, or leave rl.control_variate out",
    ),
    # Several updates on a batch.
    Combination("rl.updates_per_batch", None, _any(_of("chai"), _actor_free), "no policy trains"),
    Combination(
        "rl.num_minibatches", None, _any(_needs("replays"), _actor_free),
        "{} learns from replay, and a step's rollouts are not its batch",
    ),
    Combination(
        "rl.num_minibatches", None, _more_parts_than_sequences,
        "more than the sequences of a step, rl.prompts_per_step x rl.group_size", "use at most as many",
    ),
    *(
        Combination(field, None, _of(*_HAS_NO_SURROGATE), f"with rl.algorithm {{}} {_UNREAD}")
        for field in _CLIPS
    ),
    *(
        Combination(field, None, _own_loss, "rl.loss replaces the clipped surrogate")
        for field in _CLIPS
    ),
    Combination("rl.clip_c", None, _loss_is("cispo"), "cispo clips a weight, on both sides of 1 for every advantage"),
    *(
        Combination(
            field, None, _one_update,
            "ratios are to the policy at the start of a batch, and are all 1 in its first update",
            "set rl.updates_per_batch or rl.num_minibatches to 2 or more",
        )
        for field in _CLIPS
    ),
    Combination(
        "rl.loss", ("gspo", "cispo"), _one_update,
        "ratios are to the policy at the start of a batch, and in its first update the gradient is ppo's",
        "set rl.updates_per_batch or rl.num_minibatches to 2 or more",
    ),
    Combination(
        "rl.update_mode", ("continue",), _has("rl.max_staleness", 0), "nothing is in flight at an update",
        "set rl.max_staleness to 1 or more",
    ),
    Combination(
        "rl.window", _AllBut(0), _agents, "episodes are trained on in whole steps",
    ),
    Combination(
        "rl.window", _AllBut(0), _nothing_ahead, "no step would be generated ahead, whose groups could come first",
        "set rl.max_staleness to more than it",
    ),
    Combination(
        "rl.window", _AllBut(0), _has("rl.update_mode", "drain"), "an update waits for all that is in flight",
        "set rl.update_mode continue",
    ),
    Combination(
        "rl.window", _AllBut(0), _any(_has("rl.dynamic_sampling", True), _actor_free),
        "rl.dynamic_sampling and rl.actor_free take whole steps", "leave one of them out",
    ),
    # What shapes and selects outcomes.
    Combination(
        "rl.scale_rewards", None, _all(_without_grpo, _lacks("turns")),
        "only advantages of grpo and gigpo are divided by a spread",
    ),
    *(
        Combination(field, None, _lacks("turns"), "only gigpo compares turns")
        for field in ("rl.step_advantage_w", "rl.anchor_state")
    ),
    Combination("rl.anchor_state", None, _has("rl.step_advantage_w", 0.0), "no turns are compared",
                "let rl.step_advantage_w be above 0"),
    Combination(
        "rl.dynamic_sampling", (True,), _any(_lacks("groups"), _agents),
        f"for {' and '.join(COMPARING)} on problems with answers",
    ),
    Combination(
        "rl.refill_rounds", None, _has("rl.dynamic_sampling", False), _UNREAD, "set rl.dynamic_sampling"
    ),
    Combination(
        "hardware.response_tokens", None, _answers_too_long, "more than rollout.max_new_tokens, which no completion is",
        "use less",
    ),
    Combination("rl.mask_truncated_completions", (True,), _agents, "episodes are limited by their turns"),
    Combination(
        "rl.mask_truncated_completions", (True,), _actor_free, "Q learns from every step that there is an answer to",
    ),
    Combination(
        "rl.reward_clip_range", None, _never_clipped, "no reward of the task is further from 0 than 1",
        "use less than 1, or leave it out",
    ),
    Combination("rl.overlong_buffer", None, _agents, "episodes are limited by their turns"),
    Combination(
        "rl.overlong_buffer", None, _buffer_too_long, "more than rollout.max_new_tokens: nothing would be short enough",
        "use less",
    ),
    Combination(
        "rollout.top_k", (1,), lambda _: True, "all completions of a prompt would be the same",
        "use 0 (all) or 2 or more",
    ),
    *(
        Combination(
            field, _AllBut(wanted), _of("tbrm"), "the logits of all actions are values, and none may be left out",
            f"use {wanted!r}",
        )
        for field, wanted in (("rollout.top_k", 0), ("rollout.top_p", 1.0))
    ),
    # Engines.
    Combination(
        "rollout.max_num_batched_tokens", None, _too_few_tokens,
        "less than rollout.max_num_seqs, each of which takes a token a step", "use at least that, or fewer sequences",
    ),
    Combination(
        "rollout.quantization", ("fp8",), _has("model.dtype", "float32"), "its kernels compute in bfloat16",
        "set model.dtype to bfloat16",
    ),
    Combination(
        "rollout.optimization_level", None, _has("rollout.enforce_eager", True), "an eager engine compiles nothing"
    ),
    # Values and controls.
    Combination(
        "rl.control_variate", (True,), _any(_lacks("advantage"), _agents),
        f"for {', '.join(OF_OUTCOMES)} on problems with answers",
    ),
    Combination(
        "rl.control_variate", (True,), lambda config: not _one_update(config),
        "a clip would see an advantage from which most is taken, and let the policy go on without a bound",
        "leave it out, or rl.updates_per_batch and rl.num_minibatches",
    ),
    Combination(
        "rl.importance_mode", _AllBut("token_truncate"), _has("rl.control_variate", True),
        "weights that are not each action's own would add a bias to rl.control_variate",
        "use token_truncate, or leave rl.control_variate out",
    ),
    *(
        Combination(field, None, _lacks("value_head"), "only ppo reads it")
        for field in ("rl.gae_lambda", "rl.gae_level")
    ),
    Combination(
        "rl.gae_level", ("turn",), _answers, "an answer has one turn, and there would be nothing for GAE to run over",
        f"leave it out, or use one of {', '.join(MULTI_TURN)} with `cola_ray agent`",
    ),
    *(
        Combination(field, None, _without_values, "no value head and no Q trains")
        for field in ("rl.value_lr", "rl.value_steps")
    ),
    Combination("rl.cliprange_value", None, _without_value_head, "no value head trains"),
    Combination(
        "rl.cliprange_value", None, _has("rl.value_steps", 1),
        "values are as they were before the batch in its first gradient step", "set rl.value_steps to 2 or more",
    ),
    Combination(
        "rl.target_tau", None, _all(_not_of(*_FOLLOWS_Q), _has("rl.control_variate", False)),
        "only etpo's, archer_soft's and rl.control_variate's Q have a target",
    ),
    # What an action is.
    Combination(
        "model.action_every", _AllBut(1), _tokens, "a token is said once, and no action of rl.action_space token lasts",
        "leave it out, or use rl.action_space latent",
    ),
    Combination(
        "model.action_every", _AllBut(1), _agents, "turns of agents are learnt from token by token",
        "use 1, or a task with answers",
    ),
    Combination(
        "model.learnt_ends", (True,), _tokens, "a token is said once, and no action of rl.action_space token lasts",
        "leave it out, or use rl.action_space latent",
    ),
    Combination(
        "model.learnt_ends", (True,), lambda config: config.model.action_every > 1,
        "actions end after model.action_every tokens", "use one of them",
    ),
    Combination(
        "rl.actor_free", (True,), _lasts, "Q learns from replay token by token, and the model's actions last",
        _EACH_TOKEN,
    ),
    Combination(
        "rl.algorithm", (*_FOLLOWS_Q, "tbrm"), _ends,
        "its values are of texts, and with model.learnt_ends the policy also depends on the last action", _EACH_TOKEN,
    ),
    Combination(
        "rl.control_variate", (True,), _ends,
        "its Q is of texts, and with model.learnt_ends the policy also depends on the last action", _EACH_TOKEN,
    ),
    Combination(
        "rl.marginal_aliases", (True,), _lasts, "another action that says this token may say another next",
        _EACH_TOKEN,
    ),
    Combination(
        "eval.ways", _Naming("mcts_q"), _lasts, "mcts_q's Q is of single tokens, and the model's actions last",
        "use mcts, or a model whose actions give one token each",
    ),
    Combination(
        "pretrain.stages", _Naming("fta_policy"), _ends,
        "it draws all actions of a text at once, and with model.learnt_ends each depends on the last",
        "leave fta_policy out",
    ),
    *(
        Combination(
            "harness.likelihoods", _Naming(name), _lasts,
            "the model's actions last, and a token's probability depends on where its action began", "use base",
            "capabilities",
        )
        for name in ("marginal", "greedy")
    ),
    *(
        Combination(
            field, values, _lasts, "the model's actions last, and Q learns token by token",
            "use a model whose actions give one token each", "train_q",
        )
        for field, values in (("model.action_every", _AllBut(1)), ("model.learnt_ends", (True,)))
    ),
    Combination("rl.lora_rank", None, _latent, "for rl.action_space token"),
    Combination("rl.steering", ("all", "last"), _latent, "for rl.action_space token"),
    Combination(
        "rl.steering", ("all", "last"), lambda config: config.rl.lora_rank > 0,
        "rl.lora_rank trains adapters in the base's place", "use one of them",
    ),
    Combination("rl.cache_hidden_states", (True,), _agents, "turns do not bring their states to the learner"),
    Combination("rl.cache_hidden_states", (True,), _tokens, "with rl.action_space token the states change"),
    Combination("rl.marginal_aliases", (True,), _of(*_HAS_NO_SURROGATE), f"with rl.algorithm {{}} {_UNREAD}"),
    *(
        Combination(
            field, _AllBut(wanted), _has("rl.marginal_aliases", True), f"rl.marginal_aliases needs {wanted!r}",
            "use that, or leave rl.marginal_aliases out",
        )
        for field, wanted in (
            ("rl.action_space", "latent"), ("rl.kl_estimator", "exact"), ("rl.cache_hidden_states", False),
            ("rl.control_variate", False),
        )
    ),
    *(
        Combination(
            field, _AllBut(wanted), _actor_free, f"rl.actor_free needs {wanted!r}",
            "use that, or leave rl.actor_free out",
        )
        for field, wanted in (
            ("rl.algorithm", "etpo"), ("rl.action_space", "latent"), ("rl.cache_hidden_states", False),
            ("rl.kl_target", 0.0), ("rollout.temperature", 1.0), ("rollout.top_k", 0), ("rollout.top_p", 1.0),
        )
    ),
    # States of the base on disk.
    Combination(
        "pretrain.states", ("model", "bfloat16"), _base_trains, "the stages fta_* train the base, whose states change",
        "pre-train pretrain.stages actions,policy with it, and run the others by themselves from model.path",
    ),
    *(
        Combination(field, None, _has("pretrain.states", "off"), "nothing is written", "set pretrain.states")
        for field in ("pretrain.states_cache", "pretrain.states_gb")
    ),
    # Where the learner keeps its tensors.
    Combination("cluster.gradient_checkpointing", (True,), _any(_of("chai"), _actor_free), "no layer trains"),
    *(
        Combination(field, (True,), _has("cluster.use_gpu", False), "without cluster.use_gpu all is in host memory")
        for field in ("cluster.offload_optimizer", "cluster.offload_frozen")
    ),
    Combination(
        "cluster.offload_frozen", (True,), _nothing_frozen, "all weights train, and nobody asks for a reference",
    ),
    Combination(
        "critic.gpu_share", None, _has("cluster.use_gpu", False), "there are no GPUs to share",
        "set cluster.use_gpu, or leave it out",
    ),
    # ArCHer's critic. Algorithms without a critic read none of its settings (relevance.py).
    *(
        Combination(field, None, _of("chai"), "no policy trains")
        for field in ("critic.reuse", "critic.td_share", "critic.token_baseline", "critic.actor_states")
    ),
    *(
        Combination(field, None, _of("archer_soft"), "{} learns from replayed utterances, whoever said them")
        for field in ("critic.reuse", "critic.td_share", "critic.token_baseline", "critic.actor_states")
    ),
    Combination(
        "critic.expectile", None, _of("archer_soft"), "V follows soft values of utterances",
        "leave it out, or use archer",
    ),
    Combination("critic.chooses", None, _of("chai"), "its players choose always"),
    *(
        Combination(
            field, None, _has("critic.actor_states", "replayed"), "of what was played",
            "set critic.actor_states to played, or leave it out",
        )
        for field in ("critic.td_share", "critic.reuse")
    ),
    Combination(
        "critic.gamma", None, _any(_needs("advantage"), _of("filtered_bc")),
        "{} compares whole episodes, whatever their length",
    ),
    Combination(
        "critic.candidates", (1,), _any(_of("chai"), _has("critic.chooses", True)), "nothing to choose from",
        "use 2 or more",
    ),
    Combination(
        "critic.candidates", None, _all(_of("archer", "archer_soft"), _has("critic.chooses", False)), "nobody chooses",
        "set critic.chooses",
    ),
    Combination(
        "critic.warmup_iterations", None, _all(_of("archer", "archer_soft"), _never_trains),
        "as many as rl.max_steps or more: no policy would train", "use fewer, or more rl.max_steps",
    ),
)  # fmt: skip
"""In order of priority: for each field, the first row that applies is reported."""
