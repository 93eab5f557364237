"""The table of options that do not go together: every row refuses what it is for, and nothing that is in use."""

import re
from pathlib import Path

import pytest

from cola_ray.cli import arguments
from cola_ray.settings.combinations import COMBINATIONS, refused
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

GAME = {"task.name": "twenty_questions"}
ETPO = {"rl.algorithm": "etpo", "rl.kl_coef": 0.05}
TBRM = {"rl.algorithm": "tbrm", "rl.kl_coef": 0.05}
SOFT = ETPO | {"rl.actor_free": True}
TOKENS = {"rl.action_space": "token"}
WINDOW = {"rl.window": 1, "rl.max_staleness": 2, "rl.update_mode": "continue"}
ALIASES = {"rl.marginal_aliases": True}
LASTING = {"model.action_every": 2}
ENDING = {"model.learnt_ends": True}


def agent(algorithm, **changes):
    return GAME | {"rl.algorithm": algorithm} | {name.replace("__", "."): value for name, value in changes.items()}


REFUSED = [
    ({"rl.group_size": 1}, "rl.group_size = 1: grpo compares completions of one prompt; use 2 or more"),
    ({"rl.algorithm": "rloo", "rl.group_size": 1}, "rl.group_size = 1: rloo compares"),
    ({"rl.algorithm": "ppo", "rl.advantage": "grpo"}, "rl.advantage = 'grpo': ppo makes its advantages in the"),
    ({"rl.algorithm": "reinforce", "rl.group_size": 1, "rl.prompts_per_step": 1}, "rl.prompts_per_step = 1"),
    (agent("remax"), "rl.algorithm = 'remax': episodes have no greedy one"),
    ({"rl.algorithm": "archer"}, "rl.algorithm = 'archer': learns from turns"),
    ({"rl.algorithm": "gigpo"}, "rl.algorithm = 'gigpo': an answer has one turn, and grpo is the same; use grpo"),
    (agent("gigpo"), "rl.group_size = 1: gigpo compares completions of one prompt; use 2 or more"),
    (agent("gigpo", rl__advantage="rloo"), "rl.advantage = 'rloo': gigpo compares episodes and turns alike"),
    (agent("grpo", rl__step_advantage_w=0.5), "rl.step_advantage_w = 0.5: only gigpo compares turns"),
    (agent("ppo", rl__anchor_state="transcript"), "rl.anchor_state = 'transcript': only gigpo compares turns"),
    (
        agent("gigpo", rl__anchor_state="transcript", rl__step_advantage_w=0.0),
        "rl.anchor_state = 'transcript': no turns are compared; let rl.step_advantage_w be above 0",
    ),
    (TOKENS | agent("chai"), "rl.algorithm = 'chai': its players choose by the frozen base's states"),
    (TOKENS | agent("archer", critic__chooses=False), "critic.encoder = '': with rl.action_space token"),
    (agent("chai", critic__encoder="a/b", critic__chooses=False), "critic.encoder = 'a/b': players choose"),
    (agent("archer", critic__encoder="a/b", critic__chooses=True), "critic.encoder = 'a/b': players choose"),
    (ETPO | {"rl.kl_coef": 0.0}, "rl.kl_coef = 0.0: etpo divides by it"),
    (
        TBRM | {"rl.kl_coef": 0.0},
        "rl.kl_coef = 0.0: tbrm's values are the logits times it, and nothing would be learnt",
    ),
    (TBRM | {"rl.loss": "gspo"}, "rl.loss = 'gspo': tbrm has a loss of its own, or none"),
    (TBRM | {"rl.advantage": "rloo"}, "rl.advantage = 'rloo': tbrm makes its advantages in the learner"),
    *(
        (TBRM | {field: value}, f"{field} = {value!r}: with rl.algorithm tbrm nothing reads it; leave it out")
        for field, value in (
            ("rl.kl_in", "loss"),
            ("rl.kl_estimator", "k2"),
            ("rl.importance_cap", 5.0),
            ("rl.importance_mode", "token_mask"),
            ("rl.clip_low", 0.1),
            ("rl.clip_high", 0.1),
            ("rl.clip_c", 3.0),
            ("rl.marginal_aliases", True),
        )
    ),
    (TBRM | {"rl.entropy_coef": 0.1}, "rl.entropy_coef = 0.1: a bonus would lead away from where the residuals are 0"),
    (
        TBRM | {"rl.loss_agg_mode": "seq-mean-token-sum"},
        "rl.loss_agg_mode = 'seq-mean-token-sum': a trajectory has one",
    ),
    (TBRM | {"rollout.top_k": 4}, "rollout.top_k = 4: the logits of all actions are values, and none may be left out"),
    (TBRM | {"rollout.top_p": 0.9}, "rollout.top_p = 0.9: the logits of all actions are values, and none may be left"),
    (TBRM | {"rl.control_variate": True}, "rl.control_variate = True: for grpo, rloo, remax, reinforce"),
    (TBRM | {"rl.actor_free": True}, "rl.algorithm = 'tbrm': rl.actor_free needs 'etpo'"),
    (TBRM | {"rl.scale_rewards": "none"}, "rl.scale_rewards = 'none': only advantages of grpo and gigpo are divided"),
    (TBRM | {"rl.value_lr": 1e-2}, "rl.value_lr = 0.01: no value head and no Q trains"),
    (TBRM | {"rl.dynamic_sampling": True}, "rl.dynamic_sampling = True: for grpo and rloo"),
    ({"rl.kl_estimator": "k2"}, "rl.kl_estimator = 'k2': as a reward it does not have the divergence"),
    (agent("ppo", rl__kl_estimator="k3"), "rl.kl_estimator = 'k3': as a reward it does not have the divergence"),
    ({"rl.kl_estimator": "k1", "rl.kl_in": "loss"}, "rl.kl_estimator = 'k1': in the loss its expected gradient is 0"),
    (ETPO | {"rl.kl_estimator": "k1"}, "rl.kl_estimator = 'k1': with rl.algorithm etpo nothing reads it"),
    (ETPO | {"rl.kl_in": "loss"}, "rl.kl_in = 'loss': with rl.algorithm etpo nothing reads it"),
    (agent("filtered_bc", rl__importance_cap=5.0), "rl.importance_cap = 5.0: with rl.algorithm filtered_bc nothing"),
    (agent("filtered_bc", rl__importance_mode="token_mask"), "rl.importance_mode = 'token_mask': with rl.algorithm"),
    (
        {"rl.importance_mode": "sequence_mask", "rl.importance_cap": 0.0},
        "rl.importance_mode = 'sequence_mask': there is no weight; set rl.importance_cap",
    ),
    (
        {"rl.importance_mode": "geometric_mask", "rl.importance_cap": 0.9},
        "rl.importance_mode = 'geometric_mask': with rl.importance_cap up to 1 no weight",
    ),
    (agent("chai", rl__kl_target=0.1), "rl.kl_target = 0.1: with rl.algorithm chai nothing reads it"),
    (agent("filtered_bc", rl__kl_target=0.1), "rl.kl_target = 0.1: with rl.algorithm filtered_bc nothing reads it"),
    ({"rl.kl_target": 0.1, "rl.kl_coef": 0.0}, "rl.kl_target = 0.1: rl.kl_coef is multiplied from step to step"),
    (agent("chai", rl__entropy_coef=0.1), "rl.entropy_coef = 0.1: no policy trains"),
    (SOFT | {"rl.entropy_coef": 0.1}, "rl.entropy_coef = 0.1: no policy trains"),
    (SOFT | {"rl.loss_agg_mode": "seq-mean-token-sum"}, "rl.loss_agg_mode = 'seq-mean-token-sum': no policy trains"),
    (
        {"rl.loss_agg_mode": "seq-mean-token-mean", "rl.control_variate": True},
        "rl.loss_agg_mode = 'seq-mean-token-mean': what an action weighs depends on how its completion goes on",
    ),
    *(
        ({"rl.control_variate": True, field: 4}, "rl.control_variate = True: a clip would see an advantage from which")
        for field in ("rl.updates_per_batch", "rl.num_minibatches")
    ),
    *(
        (
            {"rl.control_variate": True, "rl.max_staleness": 1, "rl.importance_mode": mode},
            f"rl.importance_mode = '{mode}': weights that are not each action's own would add a bias",
        )
        for mode in ("token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask")
    ),
    (SOFT | {"rl.updates_per_batch": 3}, "rl.updates_per_batch = 3: no policy trains"),
    *(
        (settings | {"rl.num_minibatches": 2}, f"rl.num_minibatches = 2: {name} learns from replay, and a step's")
        for name, settings in (
            ("etpo", SOFT),
            ("archer", agent("archer")),
            ("chai", agent("chai")),
            ("filtered_bc", agent("filtered_bc")),
        )
    ),
    (
        {"rl.prompts_per_step": 3, "rl.group_size": 2, "rl.num_minibatches": 7},
        "rl.num_minibatches = 7: more than the sequences of a step, rl.prompts_per_step x rl.group_size; use at most",
    ),
    (ETPO | {"rl.loss": "mine.py:mine"}, "rl.loss = 'mine.py:mine': etpo has a loss of its own, or none"),
    *(
        (
            {"rl.loss": "mine.py:mine", field: 0.1, "rl.updates_per_batch": 2},
            f"{field} = 0.1: rl.loss replaces the clipped",
        )
        for field in ("rl.clip_low", "rl.clip_high")
    ),
    (
        {"rl.loss": "mine.py:mine", "rl.clip_c": 3.0, "rl.updates_per_batch": 2},
        "rl.clip_c = 3.0: rl.loss replaces the clipped",
    ),
    ({"rl.loss": "cispo", "rl.clip_c": 3.0, "rl.updates_per_batch": 2}, "rl.clip_c = 3.0: cispo clips a weight"),
    ({"rl.clip_c": 3.0}, "rl.clip_c = 3.0: ratios are to the policy at the start of a batch"),
    (ETPO | {"rl.clip_c": 3.0, "rl.updates_per_batch": 2}, "rl.clip_c = 3.0: with rl.algorithm etpo nothing reads it"),
    ({"rl.loss": "gspo"}, "rl.loss = 'gspo': ratios are to the policy at the start of a batch, and in its first"),
    ({"rl.loss": "cispo"}, "rl.loss = 'cispo': ratios are to the policy at the start of a batch, and in its first"),
    (ETPO | {"rl.clip_low": 0.1, "rl.updates_per_batch": 2}, "rl.clip_low = 0.1: with rl.algorithm etpo nothing"),
    (ETPO | {"rl.clip_high": 0.1, "rl.updates_per_batch": 2}, "rl.clip_high = 0.1: with rl.algorithm etpo nothing"),
    ({"rl.clip_low": 0.1}, "rl.clip_low = 0.1: ratios are to the policy at the start of a batch"),
    ({"rl.clip_high": 0.28}, "rl.clip_high = 0.28: ratios are to the policy at the start of a batch"),
    ({"rl.update_mode": "continue"}, "rl.update_mode = 'continue': nothing is in flight at an update"),
    ({"rl.window": 1, "rl.max_staleness": 1}, "rl.window = 1: no step would be generated ahead"),
    ({"rl.window": 1, "rl.max_staleness": 2}, "rl.window = 1: an update waits for all that is in flight; set rl.upd"),
    ({**WINDOW, "rl.dynamic_sampling": True}, "rl.window = 1: rl.dynamic_sampling and rl.actor_free take whole steps"),
    ({**WINDOW, "task.name": "guess_city"}, "rl.window = 1: episodes are trained on in whole steps"),
    ({"hardware.response_tokens": 7}, "hardware.response_tokens = 7: more than rollout.max_new_tokens"),
    ({"rl.algorithm": "ppo", "rl.dynamic_sampling": True}, "rl.dynamic_sampling = True: for grpo and rloo on"),
    (agent("grpo", rl__group_size=4, rl__dynamic_sampling=True), "rl.dynamic_sampling = True: for grpo and rloo on"),
    ({"rl.refill_rounds": 5}, "rl.refill_rounds = 5: nothing reads it; set rl.dynamic_sampling"),
    ({"rl.algorithm": "rloo", "rl.scale_rewards": "none"}, "rl.scale_rewards = 'none': only advantages of grpo and"),
    ({"rl.advantage": "rloo", "rl.scale_rewards": "batch"}, "rl.scale_rewards = 'batch': only advantages of grpo and"),
    (
        agent("ppo", rl__mask_truncated_completions=True),
        "rl.mask_truncated_completions = True: episodes are limited by their turns",
    ),
    (
        SOFT | {"rl.mask_truncated_completions": True},
        "rl.mask_truncated_completions = True: Q learns from every step",
    ),
    (
        {"rl.reward_clip_range": 1.0},
        "rl.reward_clip_range = 1.0: no reward of the task is further from 0 than 1; use less",
    ),
    (
        agent("ppo", rl__reward_clip_range=5),
        "rl.reward_clip_range = 5.0: no reward of the task is further from 0 than 1",
    ),
    (agent("ppo", task__name="shop", rl__reward_clip_range=1.0), "rl.reward_clip_range = 1.0: no reward of the task"),
    (
        agent("ppo", task__name="household", rl__reward_clip_range=1),
        "rl.reward_clip_range = 1.0: no reward of the task",
    ),
    (agent("ppo", rl__overlong_buffer=4), "rl.overlong_buffer = 4: episodes are limited by their turns"),
    ({"rl.overlong_buffer": 7, "rollout.max_new_tokens": 6}, "rl.overlong_buffer = 7: more than"),
    ({"rollout.top_k": 1}, "rollout.top_k = 1: all completions of a prompt would be the same"),
    ({"rollout.max_num_batched_tokens": 8}, "rollout.max_num_batched_tokens = 8: less than rollout.max_num_seqs"),
    ({"rollout.quantization": "fp8"}, "rollout.quantization = 'fp8': its kernels compute in bfloat16; set model.dtype"),
    (
        {"rollout.optimization_level": 3, "rollout.enforce_eager": True},
        "rollout.optimization_level = 3: an eager engine compiles nothing; leave it out",
    ),
    (
        {"rl.algorithm": "ppo", "rl.control_variate": True},
        "rl.control_variate = True: for grpo, rloo, remax, reinforce",
    ),
    ({"rl.gae_lambda": 0.9}, "rl.gae_lambda = 0.9: only ppo reads it"),
    *(
        (agent(algorithm, rl__gae_level="turn"), "rl.gae_level = 'turn': only ppo reads it; leave it out")
        for algorithm in ("archer", "chai", "filtered_bc", "etpo")
    ),
    (agent("gigpo", rl__group_size=4, rl__gae_level="turn"), "rl.gae_level = 'turn': only ppo reads it; leave it out"),
    (
        {"rl.algorithm": "ppo", "rl.gae_level": "turn"},
        "rl.gae_level = 'turn': an answer has one turn, and there would be nothing for GAE to run over; leave it out",
    ),
    *(
        (agent("chai", **{field.replace(".", "__"): value}), f"{field} = {value!r}: no policy trains")
        for field, value in (
            ("rl.lr", 0.1),
            ("rl.warmup_steps", 3),
            ("rl.lr_scheduler_type", "cosine"),
            ("rl.min_lr_ratio", 0.5),
            ("rl.adam_betas", (0.8, 0.9)),
            ("rl.grad_clip", 3.0),
            ("rl.kl_coef", 0.5),
            ("critic.warmup_iterations", 3),
        )
    ),
    ({"rl.min_lr_ratio": 0.1}, "rl.min_lr_ratio = 0.1: a constant rate has no end; set rl.lr_scheduler_type"),
    (
        {"rl.lr_scheduler_type": "cosine", "rl.warmup_steps": 9, "rl.max_steps": 9},
        "rl.lr_scheduler_type = 'cosine': rl.warmup_steps takes all steps",
    ),
    (SOFT | {"rl.lr": 0.1}, "rl.lr = 0.1: no policy trains, and Q's is rl.value_lr; use rl.value_lr"),
    (agent("filtered_bc", rl__kl_coef=0.5), "rl.kl_coef = 0.5: the best episodes are cloned without a reference"),
    (agent("grpo", rl__group_size=4, critic__gamma=0.5), "critic.gamma = 0.5: grpo compares whole episodes"),
    ({"preset": "smollm2-135m"} | agent("chai", critic__actor_states="played"), "critic.actor_states = 'played': no"),
    ({"preset": "smollm2-135m"} | agent("chai", critic__chooses=True), "critic.chooses = True: its players choose"),
    (agent("chai", critic__candidates=1), "critic.candidates = 1: nothing to choose from"),
    (agent("archer", critic__candidates=1, critic__chooses=True), "critic.candidates = 1: nothing to choose from"),
    (agent("archer", critic__candidates=3, critic__chooses=False), "critic.candidates = 3: nobody chooses"),
    (agent("archer", critic__warmup_iterations=40, rl__max_steps=40), "critic.warmup_iterations = 40: as many as"),
    ({"rl.value_steps": 9}, "rl.value_steps = 9: no value head and no Q trains"),
    ({"rl.value_lr": 1e-2}, "rl.value_lr = 0.01: no value head and no Q trains"),
    ({"rl.algorithm": "ppo", "rl.target_tau": 0.1}, "rl.target_tau = 0.1: only etpo's"),
    ({"rl.cliprange_value": 0.2}, "rl.cliprange_value = 0.2: no value head trains"),
    (ETPO | {"rl.cliprange_value": 0.2}, "rl.cliprange_value = 0.2: no value head trains"),
    (
        {"rl.algorithm": "ppo", "rl.cliprange_value": 0.2, "rl.value_steps": 1},
        "rl.cliprange_value = 0.2: values are as they were",
    ),
    ({"rl.lora_rank": 4}, "rl.lora_rank = 4: for rl.action_space token; leave it out"),
    ({"rl.steering": "last"}, "rl.steering = 'last': for rl.action_space token; leave it out"),
    (TOKENS | {"rl.steering": "all", "rl.lora_rank": 4}, "rl.steering = 'all': rl.lora_rank trains adapters"),
    (SOFT | {"cluster.gradient_checkpointing": True}, "cluster.gradient_checkpointing = True: no layer trains"),
    ({"cluster.offload_optimizer": True}, "cluster.offload_optimizer = True: without cluster.use_gpu all is in host"),
    ({"cluster.offload_frozen": True}, "cluster.offload_frozen = True: without cluster.use_gpu all is in host memory"),
    (
        TOKENS | {"rl.kl_coef": 0.0, "cluster.use_gpu": True, "cluster.offload_frozen": True},
        "cluster.offload_frozen = True: all weights train, and nobody asks",
    ),
    (agent("archer", critic__gpu_share=0.5), "critic.gpu_share = 0.5: there are no GPUs to share; set cluster.use_gpu"),
    (agent("ppo", rl__cache_hidden_states=True), "rl.cache_hidden_states = True: turns do not bring"),
    (TOKENS | {"rl.cache_hidden_states": True}, "rl.cache_hidden_states = True: with rl.action_space token"),
    (ALIASES | ETPO, "rl.marginal_aliases = True: with rl.algorithm etpo nothing reads it"),
    (ALIASES | TOKENS, "rl.action_space = 'token': rl.marginal_aliases needs 'latent'"),
    (LASTING | TOKENS, "model.action_every = 2: a token is said once"),
    (LASTING | {"task.name": "guess_city"}, "model.action_every = 2: turns of agents are learnt from token by token"),
    (LASTING | ETPO | {"rl.actor_free": True}, "rl.actor_free = True: Q learns from replay token by token"),
    (LASTING | ALIASES, "rl.marginal_aliases = True: another action that says this token"),
    (LASTING | {"eval.ways": ("mcts_q",)}, "eval.ways = ('mcts_q',): mcts_q's Q is of single tokens"),
    (ENDING | TOKENS, "model.learnt_ends = True: a token is said once"),
    (ENDING | LASTING, "model.learnt_ends = True: actions end after model.action_every tokens"),
    (ENDING | ETPO, "rl.algorithm = 'etpo': its values are of texts"),
    (ENDING | {"rl.algorithm": "tbrm"}, "rl.algorithm = 'tbrm': its values are of texts"),
    (ENDING | {"rl.control_variate": True}, "rl.control_variate = True: its Q is of texts"),
    (ENDING | ALIASES, "rl.marginal_aliases = True: another action that says this token"),
    (ENDING | {"eval.ways": ("mcts_q",)}, "eval.ways = ('mcts_q',): mcts_q's Q is of single tokens"),
    (
        ENDING | {"pretrain.stages": ("actions", "policy", "fta_policy")},
        "pretrain.stages = ('actions', 'policy', 'fta_policy'): it draws all actions of a text at once",
    ),
    (ALIASES | {"rl.kl_estimator": "k1"}, "rl.kl_estimator = 'k1': rl.marginal_aliases needs 'exact'"),
    (ALIASES | {"rl.cache_hidden_states": True}, "rl.cache_hidden_states = True: rl.marginal_aliases needs False"),
    (ALIASES | {"rl.control_variate": True}, "rl.control_variate = True: rl.marginal_aliases needs False"),
    (SOFT | {"rl.algorithm": "grpo"}, "rl.algorithm = 'grpo': rl.actor_free needs 'etpo'"),
    (SOFT | TOKENS, "rl.action_space = 'token': rl.actor_free needs 'latent'"),
    (SOFT | {"rl.cache_hidden_states": True}, "rl.cache_hidden_states = True: rl.actor_free needs False"),
    (SOFT | {"rl.kl_target": 0.1}, "rl.kl_target = 0.1: rl.actor_free needs 0.0"),
    (SOFT | {"rollout.temperature": 0.5}, "rollout.temperature = 0.5: rl.actor_free needs 1.0"),
    (SOFT | {"rollout.top_k": 4}, "rollout.top_k = 4: rl.actor_free needs 0"),
    (SOFT | {"rollout.top_p": 0.9}, "rollout.top_p = 0.9: rl.actor_free needs 1.0"),
    (
        {"pretrain.states": "model", "pretrain.stages": ("actions", "policy", "fta_idm")},
        "pretrain.states = 'model': the stages fta_* train the base",
    ),
    ({"pretrain.states_gb": 5.0}, "pretrain.states_gb = 5.0: nothing is written"),
    ({"pretrain.states_cache": "there"}, "pretrain.states_cache = 'there': nothing is written"),
    (agent("chai", critic__reuse=2), "critic.reuse = 2: no policy trains"),
    (agent("chai", critic__td_share=0.2), "critic.td_share = 0.2: no policy trains"),
    (agent("chai", critic__token_baseline=True), "critic.token_baseline = True: no policy trains"),
    *(
        (
            {"preset": "smollm2-135m", "critic.chooses": False} | agent("archer_soft") | {field: value},
            f"{field} = {value!r}: {why}",
        )
        for field, value, why in (
            ("critic.reuse", 2, "archer_soft learns from replayed utterances, whoever said them; leave it out"),
            ("critic.td_share", 0.2, "archer_soft learns from replayed utterances"),
            ("critic.token_baseline", True, "archer_soft learns from replayed utterances"),
            ("critic.actor_states", "played", "archer_soft learns from replayed utterances"),
            ("critic.expectile", 0.7, "V follows soft values of utterances; leave it out, or use archer"),
            ("critic.candidates", 3, "nobody chooses"),
            ("critic.warmup_iterations", 100, "as many as rl.max_steps or more"),
            ("rl.kl_coef", 0.0, "archer_soft divides by it; use a number above 0"),
            ("rl.loss", "mine.py:mine", "archer_soft has a loss of its own, or none"),
            ("rl.kl_in", "loss", "with rl.algorithm archer_soft nothing reads it"),
            ("rl.kl_estimator", "k1", "with rl.algorithm archer_soft nothing reads it"),
            ("rl.importance_cap", 5.0, "with rl.algorithm archer_soft nothing reads it"),
            ("rl.clip_high", 0.5, "with rl.algorithm archer_soft nothing reads it"),
            ("rl.marginal_aliases", True, "with rl.algorithm archer_soft nothing reads it"),
            ("rl.num_minibatches", 2, "archer_soft learns from replay, and a step's rollouts are not its batch"),
            ("rl.advantage", "grpo", "archer_soft makes its advantages in the learner"),
            ("rl.cliprange_value", 0.2, "no value head trains"),
            ("rl.gae_level", "turn", "only ppo reads it"),
        )
    ),
    ({"rl.algorithm": "archer_soft", "rl.kl_coef": 0.1}, "rl.algorithm = 'archer_soft': learns from turns"),
    (TOKENS | agent("archer_soft", critic__chooses=False), "critic.encoder = '': with rl.action_space token"),
    (agent("archer_soft", rl__actor_free=True), "rl.algorithm = 'archer_soft': rl.actor_free needs 'etpo'"),
    (agent("archer", critic__actor_states="replayed", critic__td_share=0.2), "critic.td_share = 0.2: of what was"),
    (agent("archer", critic__actor_states="replayed", critic__reuse=2, critic__td_share=0.0), "critic.reuse = 2: of"),
]


REFUSED_BY_A_JOB = [
    ("train_q", LASTING, "model.action_every = 2: the model's actions last, and Q learns token by token"),
    ("train_q", ENDING, "model.learnt_ends = True: the model's actions last, and Q learns token by token"),
    ("capabilities", ENDING, "harness.likelihoods = ('base', 'marginal'): the model's actions last"),
    ("capabilities", LASTING | {"harness.likelihoods": ("greedy",)}, "harness.likelihoods = ('greedy',): the model's"),
]


def settings(changes):
    """Over the preset of the changes' task, as the command line has it."""
    return override(preset("tiny", agents="task.name" in changes), changes)


@pytest.mark.parametrize(("changes", "line"), REFUSED)
def test_a_row_refuses_what_it_is_for(changes, line):
    lines = refused(settings(changes))
    assert any(one.startswith(line) for one in lines), lines
    for one in lines:
        assert re.fullmatch(r"\w+\.\w+ = .+: .+; .+", one)
        assert "{" not in one


@pytest.mark.parametrize(("job", "changes", "line"), REFUSED_BY_A_JOB)
def test_a_row_of_a_job_refuses_in_this_job_alone(job, changes, line):
    assert any(one.startswith(line) for one in refused(settings(changes), job))
    assert not refused(settings(changes), "rl_math")


def test_every_row_is_tried():
    seen = {(row.field, row.why, row.job) for row in COMBINATIONS}
    for job, changes in [*(("", changes) for changes, _ in REFUSED), *(one[:2] for one in REFUSED_BY_A_JOB)]:
        config = settings(changes)
        seen -= {(row.field, row.why, row.job) for row in COMBINATIONS if row.line(config, job)}
    assert not seen


PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text().replace("\\\n", " ")
RECIPES = re.findall(r"^cola_ray rl (.*?)\s*(?:#.*)?$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("words", RECIPES)
def test_no_part_of_a_documented_recipe_is_refused(words, monkeypatch):
    monkeypatch.setattr(arguments, "check", lambda *_: None)  # of the machine, too
    assert not refused(arguments.from_command_line("rl_math", words.split()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rl.algorithm": "etpo", "rl.kl_coef": 0.05, "rl.target_tau": 0.1, "rl.value_lr": 1e-2},
        SOFT,
        {"rl.kl_coef": 0.0, "rl.kl_estimator": "k3", "rl.kl_in": "loss"},  # as in a sweep over the coefficient
        {"rl.algorithm": "ppo", "rl.gae_lambda": 1.0, "rl.clip_high": 0.28, "rl.updates_per_batch": 2},
        {"rl.loss": "gspo", "rl.clip_low": 3e-4, "rl.clip_high": 4e-4, "rl.updates_per_batch": 4, "rl.clip_c": 3.0},
        {"rl.loss": "cispo", "rl.clip_low": 1.0, "rl.clip_high": 4.0, "rl.updates_per_batch": 4},
        {"rl.prompts_per_step": 3, "rl.group_size": 2, "rl.num_minibatches": 6, "rl.clip_high": 0.28},
        {"rl.loss": "cispo", "rl.clip_low": 1.0, "rl.clip_high": 4.0, "rl.num_minibatches": 4},
        {"rl.algorithm": "ppo", "rl.num_minibatches": 4, "rl.updates_per_batch": 4},
        {"rl.algorithm": "etpo", "rl.kl_coef": 0.05, "rl.num_minibatches": 2},
        TBRM | {"rl.updates_per_batch": 4, "rl.num_minibatches": 2, "rl.max_staleness": 1, "rl.group_size": 1},
        TBRM | TOKENS | {"rl.lora_rank": 4, "rollout.temperature": 0.8, "rl.kl_target": 0.1},
        TBRM | {"rl.cache_hidden_states": True, "rl.overlong_buffer": 2, "rl.mask_truncated_completions": True},
        agent("tbrm", rl__kl_coef=0.05, critic__gamma=0.9),
        agent("ppo", rl__num_minibatches=2),
        {"rl.algorithm": "ppo", "rl.mask_truncated_completions": True},
        {"rl.lr_scheduler_type": "cosine", "rl.min_lr_ratio": 0.1, "rl.warmup_steps": 3, "rl.max_steps": 4},
        {"rl.algorithm": "ppo", "rl.cliprange_value": 0.2},
        agent("archer", critic__token_baseline=True, rl__cliprange_value=0.2),
        agent("ppo", rl__gae_level="turn", rl__gae_lambda=0.9, critic__gamma=0.9, rl__cliprange_value=0.2),
        {"rl.importance_mode": "geometric_mask", "rl.importance_cap": 1.01},
        {"rl.algorithm": "remax", "rl.group_size": 1},
        {"rl.algorithm": "rloo", "rl.advantage": "grpo", "rl.scale_rewards": "batch"},
        agent("grpo", rl__group_size=8, rl__scale_rewards="none", rl__loss_agg_mode="seq-mean-token-sum-norm"),
        {"rl.algorithm": "reinforce", "rl.group_size": 1},
        {"rl.dynamic_sampling": True, "rl.refill_rounds": 4, "rl.overlong_buffer": 2},
        {"rl.reward_clip_range": 0.5, "rl.overlong_buffer": 2},
        {"rl.reward_clip_range": 5.0, "task.reward": ("length",), "task.reward_weights": (9.0,)},
        agent("archer", rl__reward_clip_range=0.5),
        {"task.name": "textworld", "rl.algorithm": "ppo", "rl.reward_clip_range": 1.0},
        {"rl.max_staleness": 1, "rl.update_mode": "continue", "rollout.top_k": 4},
        WINDOW,
        {"model.dtype": "bfloat16", "rollout.quantization": "fp8", "rollout.max_num_batched_tokens": 512},
        ALIASES,
        {"rl.control_variate": True, "rl.value_lr": 1e-2},
        TOKENS | {"rl.lora_rank": 4, "cluster.gradient_checkpointing": True},
        TOKENS | {"rl.steering": "all", "cluster.gradient_checkpointing": True},
        TOKENS | {"rl.steering": "last", "rl.kl_coef": 0.0},
        {"cluster.use_gpu": True, "cluster.offload_optimizer": True, "cluster.offload_frozen": True},
        {"pretrain.states": "bfloat16", "pretrain.states_gb": 5.0, "pretrain.states_cache": "there"},
        TOKENS | {"cluster.use_gpu": True, "cluster.offload_frozen": True},
        *(agent(algorithm) for algorithm in ("archer", "chai", "filtered_bc", "ppo")),
        *(agent(algorithm, rl__group_size=8) for algorithm in ("grpo", "rloo", "reinforce")),
        agent("gigpo", rl__group_size=4, critic__gamma=0.9, rl__scale_rewards="none", rl__anchor_state="transcript"),
        agent("gigpo", rl__group_size=4, rl__step_advantage_w=0.0),
        agent("archer", critic__expectile=0.7, critic__priority_beta=0.4),
        agent("archer", critic__token_baseline=True, rl__value_lr=1e-2),
        agent("archer_soft", rl__kl_coef=0.1, rl__target_tau=0.1, rl__value_lr=1e-2, critic__chooses=False),
        agent("archer_soft", rl__kl_target=0.1, rl__updates_per_batch=3, critic__candidates=3),
        agent("filtered_bc", replay__kept_share=0.5, rl__entropy_coef=0.01),
    ],
)
def test_what_is_in_use_is_not_refused(changes):
    assert not refused(settings(changes))
