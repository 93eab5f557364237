"""The commands of ``cola_ray``: what each does, how it is called, and what runs it.

A command is data, so that ``cola_ray --help`` needs no settings, and settings need no PyTorch: the function that runs a
command is named as ``module:function`` and imported once the settings have been checked.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One command, the word after ``cola_ray``.

    Args:
        run: ``module:function`` that takes a Config or, for a command without settings, the remaining words.
        job: name of its runs in folders, records and MLflow; empty: the command has no settings.
        about: what it does, in one line.
        examples: command lines, with a remark in parentheses where that helps.
        notes: further information for ``--help``.
        agents: whether its preset is that of multi-turn agents.
        task: ``task.name``, if it is always the same.
        computes: whether it starts processes and takes time; otherwise it answers at once.
    """

    run: str
    about: str
    job: str = ""
    examples: str = ""
    notes: str = ""
    agents: bool = False
    task: str = ""
    computes: bool = True

    def function(self) -> Callable[..., Any]:
        """Import and return the function that ``run`` names."""
        module, _, name = self.run.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found


COMMANDS: dict[str, Command] = {
    "pretrain": Command(
        "cola_ray.training.supervised:pretrain",
        "latent pre-training: discover actions, clone a policy over them, optionally fine-tune the base",
        "pretrain",
        """
cola_ray pretrain --preset tiny
cola_ray pretrain --preset smollm2-135m --task.name gsm8k --data.path DATA/train.jsonl --pretrain.max-steps 5
cola_ray pretrain --preset llama-3.1-8b --cluster.learner-ranks 8        (on the preset's corpus, from the hub)
cola_ray pretrain --preset llama-3.1-8b --data.path org/corpus --pretrain.stages actions policy""",
        "The stage actions trains inverse dynamics model, codebook and world model together.",
    ),
    "rl": Command(
        "cola_ray.training.rl:run_rl",
        "RL with verifiable rewards: vLLM rollouts, ZeRO-3 learner, MLflow",
        "rl_math",
        """
cola_ray rl --preset tiny                                 (makes its own base and latent model first)
cola_ray rl --preset tiny --rl.kl-coef 0.01 --seed 1
cola_ray rl --preset smollm2-135m --task.name gsm8k --task.path DATA/gsm8k --rl.max-steps 2
cola_ray rl --task.name dataset --task.path mine.jsonl --task.reward exact
cola_ray rl --preset tiny --resume                        (continue from the last checkpoint)""",
        "Your data and rewards: docs/data.md. Algorithms, tasks and environments of your own: docs/extending.md.",
    ),
    "agent": Command(
        "cola_ray.training.rl:run_agent",
        "RL of a multi-turn agent: ArCHer's off-policy utterance critic over whole turns, or any other algorithm",
        "rl_agent",
        """
cola_ray agent                                            (Twenty Questions; makes its own cloned policy first)
cola_ray agent --rl.algorithm filtered_bc --seed 1
cola_ray agent --rl.algorithm grpo --rl.group-size 8 --rl.prompts-per-step 8
cola_ray agent --task.name shop --task.options num_products 200
cola_ray agent --task.name household --task.options num_receptacles 12 max_turns 50
cola_ray agent --task.name guess_city --resume""",
        agents=True,
    ),
    "preference": Command(
        "cola_ray.training.rl:run_rl",
        "RL from preferences: prompts without a verifier, scored by a reward model or an endpoint",
        "rl_preference",
        """
cola_ray preference --task.path pairs.jsonl --task.reward-model outputs/reward_model-tiny-seed0/model
cola_ray preference --task.path org/prompts --task.reward-model http://scores:8000/ --rl.kl-coef 0.01
cola_ray preference --task.path pairs.jsonl --task.reward-model org/model --rl.action-space token""",
        "pairs.jsonl has the columns prompt and chosen, which the first policy is cloned from; with --model.path, "
        "prompt alone is enough.",
        task="preference",
    ),
    "evaluate": Command(
        "cola_ray.studies.evaluation:evaluate",
        "accuracy of a model: greedily, by samples (pass@k, majority), by beam and by tree search",
        "evaluate",
        """
cola_ray evaluate --preset tiny --model.path outputs/demo/model
cola_ray evaluate --eval.ways sample mcts --search.simulations 64 --eval.problems 512
cola_ray evaluate --task.name gsm8k --task.path DATA/gsm8k --model.path MODEL --rollout.num-workers 8
cola_ray evaluate --task.name twenty_questions --model.path outputs/demo-agent/model
cola_ray evaluate --resume                                (answers only what has no prediction yet)""",
        "Predictions are Parquet, a row a problem: question, responses, actions, rewards, answers; of environments a "
        "row a seed: transcripts, returns, turns, actions. Sampled answers are also in answers.jsonl, to pre-train on.",
    ),
    "diversity": Command(
        "cola_ray.studies.diversity:diversity",
        "how different texts of latent actions are, against the base's own samples and random tokens",
        "diversity",
        """
cola_ray diversity --preset tiny --model.path outputs/demo/model
cola_ray diversity --preset smollm2-135m --task.name gsm8k --model.path MODEL --data.path DATA/gsm8k/test.jsonl
cola_ray diversity --model.path MODEL --data.path texts.jsonl --diversity.encoder BAAI/bge-m3""",
        "Needs the packages of `make evals`. Texts are kept as Parquet.",
    ),
    "atlas": Command(
        "cola_ray.studies.atlas:atlas",
        "what each latent action does: usage, typical tokens, texts that one action steers; a page",
        "atlas",
        """
cola_ray atlas --preset tiny --model.path outputs/demo/model
cola_ray atlas --preset smollm2-135m --task.name gsm8k --model.path MODEL --data.path DATA/gsm8k/test.jsonl""",
    ),
    "capabilities": Command(
        "cola_ray.studies.capabilities:capabilities",
        "what CoLA kept of its base: both on tasks of EleutherAI's evaluation harness",
        "capabilities",
        """
cola_ray capabilities --model.path MODEL --harness.tasks mmlu gsm8k
cola_ray capabilities --model.path MODEL --harness.tasks mine --harness.include-path my_tasks""",
        """Needs the packages of `make evals`. The harness's own command also knows the model:
    lm_eval --model cola_ray --model_args pretrained=MODEL,likelihood=marginal --tasks arc_easy
after `import cola_ray.studies.harness`.""",
    ),
    "reward-model": Command(
        "cola_ray.training.supervised:train_reward_model",
        "a reward model from preference pairs: Bradley-Terry loss on a sequence classifier",
        "reward_model",
        """
cola_ray reward-model --task.path pairs.jsonl --model.path outputs/pretrain-tiny-seed0/model
cola_ray reward-model --preset llama-3.1-8b --task.path org/pairs --model.base meta-llama/Llama-3.2-1B""",
        "pairs.jsonl has the columns prompt, chosen and rejected. The result, outputs/reward_model-.../model, is what "
        "`cola_ray preference` takes as --task.reward-model.",
        task="preference",
    ),
    "train-q": Command(
        "cola_ray.training.supervised:train_q",
        "Q of latent actions for MCTS-Q: double Q-learning over the frozen base, from logged answers",
        "train_q",
        """
cola_ray evaluate --model.path MODEL --eval.split train --eval.ways sample --eval.problems 4096 \\
    --output-dir outputs/log
cola_ray train-q --model.path MODEL --data.path outputs/log/predictions/sample
cola_ray evaluate --model.path MODEL --eval.ways mcts_q --q.path outputs/train_q-tiny-seed0/model""",
    ),
    "sweep": Command(
        "cola_ray.studies.sweep:sweep",
        "one setting, several values: each a whole RL run under Ray Tune; what is reached against the KL",
        "sweep",
        """
cola_ray sweep --preset tiny                              (rl.kl_coef 0, 0.001, 0.01, 0.1 x 2 seeds)
cola_ray sweep --preset tiny --sweep.field rl.lr --sweep.values 1e-4 5e-4 --sweep.seeds 0 1 2
cola_ray sweep --preset tiny --sweep.asha --sweep.parallel 2
cola_ray sweep --preset tiny --resume                     (go on after a stop or a kill)
cola_ray sweep --task.name twenty_questions               (agents)""",
    ),
    "reproduce": Command(
        "cola_ray.studies.reproduce:reproduce",
        "the papers' matrix: pre-training, RL latent and token, KL sweep, Countdown, agents, search, studies",
        "reproduce",
        """
cola_ray reproduce --preset tiny                          (under three hours on two cores; `make evals` first)
cola_ray reproduce --preset smollm2-135m                  (hours; short instructions that a rule can check)
cola_ray reproduce --preset tiny --reproduce.stages agent_archer agent_ppo        (and what they need)
cola_ray reproduce --preset tiny --reproduce.seeds 0 1 2                          (with intervals over seeds)
cola_ray reproduce --preset llama-3.1-8b --cluster.address http://HEAD:8265 --reproduce.parallel 2""",
        "Leaves report/index.html and report/report.md. The same command again goes on after a stop: stages that are "
        "done are skipped. Each stage is a Ray job; stages/NAME-seedK has its log, and `cola_ray status "
        "stages/NAME-seedK` says how it is doing.",
    ),
    "plan": Command(
        "cola_ray.studies.plan:show",
        "what a run needs: memory by component, seconds a step; refuses what does not fit",
        "plan",
        """
cola_ray plan --preset llama-3.1-8b --hardware.gpus 16 --hardware.gpu h100
cola_ray plan --preset smollm2-135m                       (on CPU: memory alone)""",
        "Formulas are in docs/scaling.md.",
        computes=False,
    ),
    "data": Command(
        "cola_ray.tasks.summary:show",
        "what is read from task.path: rows, columns, splits, rewards, and three prompts as the model gets them",
        "data",
        """
cola_ray data --task.name dataset --task.path mine.jsonl --task.reward exact
cola_ray data --task.name dataset --task.path org/rows --task.columns prompt body solution label
cola_ray data --preset smollm2-135m --task.name gsm8k --task.path DATA/gsm8k""",
        "Rewards are tried on the first rows. Layouts that are known by themselves: docs/data.md.",
        computes=False,
    ),
    "status": Command(
        "cola_ray.runs.status:status", "what runs are doing, from the folders that they write", computes=False
    ),
    "view": Command(
        "cola_ray.studies.view:view", "a run as a page: its curves, and what it said, token by token", computes=False
    ),
    "export": Command(
        "cola_ray.training.export:main", "a run's model, or that of a checkpoint, as a folder", computes=False
    ),
    "send": Command(
        "cola_ray.runs.status:send", "send MLflow what it lacks of runs that ended while it was away", computes=False
    ),
    "serve": Command("cola_ray.serve:main", "`vllm serve` for a CoLA model, with OpenAI's endpoints"),
}
"""In the order of ``cola_ray --help``."""

OF_JOB = {command.job: name for name, command in COMMANDS.items() if command.job}
"""The command, by the name of its runs."""


def overview() -> str:
    """What ``cola_ray --help`` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cola_ray COMMAND [--branch.field value ...]",
            "",
            "Reinforcement learning for language models in a learned latent action space, on Ray.",
            "",
            *lines,
            "",
            "To begin:",
            "  cola_ray rl --preset tiny       a base, its latent actions and RL over them; minutes on two CPU cores",
            "  cola_ray rl --help              every setting that the command reads, with its default and meaning",
            "  cola_ray plan --preset llama-3.1-8b --hardware.gpus 16",
            "",
            "On a cluster: ray job submit --working-dir . -- python jobs/rl_math.py --preset llama-3.1-8b",
        ]
    )
