"""The cost of each option of RL: seconds and peak memory of a step, against the same step without the option.

python benchmarks/options.py --folder outputs/options [--model MODEL] [--rounds 15] [--options "top_p 0.9" ...]

    a process without the option ──┐ take whole steps in turns: rollouts, update, weights into the engine
    a process with it ─────────────┴─> one ratio per round ─> their median, and its interval

Both processes start together, since a process's memory grows over its first hundred steps. They compute in turns, so
other load on the machine affects both alike; the order changes from round to round. An option that needs another one is
compared with that one alone (column "against"). The learning rate is almost 0, so that the policy stays as it was, and
with it the length and the reward of answers.

"default, again" and two more controls compare the default with itself, and are always measured first: two processes
that do the same differ a little, above all in memory, however many rounds they take. "within noise" means that the 99 %
interval contains no difference beyond the largest of these controls; it does not mean that there is none. Memory is the
peak of the process within a step, including the engine. With the sizes of the tiny preset, most of a step is fixed
cost: look at what an option adds; options that save memory, such as gradient checkpointing, have little to save.

Options that let rollouts and learning overlap (rl.max_staleness) and options of agents are not measured. Options that
need a GPU are measured with --gpu. Rounds are kept in the folder, so a stopped benchmark continues. An interval needs
at least 8 rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from algorithms import LOSSES, SUITED, rows
from cached_run import KeptRun, run_kept
from record import record
from uncertainty import in_words, median_interval
from whole_step import MEASURED, Stepped, settings_of, stepped

from cola_ray import registry
from cola_ray.settings.combinations import refused
from cola_ray.settings.config import RLConfig

Settings = dict[str, Any]
Round = tuple[dict[str, float], dict[str, float]]
"""Measurements of a step without the option, and of one with it."""
COMMON: Settings = {"preset": "tiny", "cluster.learner_ranks": 1, "rl.lr": 1e-9, "samples.prompts": 0}
WARM_UP = 2
CONTROLS = ("default, again", "default, a third time", "default, a fourth time")
TOKENS: Settings = {"rl.action_space": "token"}
PASSES: Settings = {"rl.updates_per_batch": 2}
PPO: Settings = {"rl.algorithm": "ppo", **SUITED["ppo"]}
ON_GPU: Settings = {"cluster.use_gpu": True, "rollout.gpu_memory_utilization": 0.3, "rollout.enforce_eager": True}
"""Engine and learner share the GPU here; an engine that compiles nothing starts in seconds."""


@dataclass(frozen=True)
class Option:
    """An option's settings, and the settings it is compared with."""

    settings: Settings
    against: Settings = field(default_factory=dict)
    named: str = "default"


def values_of(name: str) -> tuple[str, ...]:
    """The values of an RL setting with a fixed list of them, except the default."""
    known = RLConfig.model_fields[name]
    return tuple(value for value in get_args(known.annotation) if value != known.default)


def options() -> dict[str, Option]:
    """Options by name, controls first. Algorithms and losses come from the registry, modes from the settings."""
    found = {name: Option({}) for name in CONTROLS}
    found |= {
        name: Option(settings)
        for name, settings in rows(common=COMMON).items()
        if name in registry.names("algorithm") and name != "grpo"
    }
    found |= {
        f"loss {name}": Option({"rl.loss": name, **PASSES, **LOSSES.get(name, {})}, PASSES, "2 passes")
        for name in registry.names("loss")
        if name != "ppo"
    }
    for setting in ("loss_agg_mode", "importance_mode", "scale_rewards"):
        found |= {f"{setting} {value}": Option({f"rl.{setting}": value}) for value in values_of(setting)}
    return found | {
        "actor_free": Option({"rl.algorithm": "etpo", **SUITED["etpo"], "rl.actor_free": True},
                             {"rl.algorithm": "etpo", **SUITED["etpo"]}, "etpo"),
        "value_steps 32": Option({**PPO, "rl.value_steps": 32}, PPO, "ppo"),
        "cliprange_value 0.2": Option({**PPO, "rl.cliprange_value": 0.2}, PPO, "ppo"),
        "updates_per_batch 2": Option(PASSES),
        "num_minibatches 4": Option({"rl.num_minibatches": 4}),
        "num_minibatches 16": Option({"rl.num_minibatches": 16}),
        "clip_c 3": Option({**PASSES, "rl.clip_c": 3.0}, PASSES, "2 passes"),
        "importance_cap 0": Option({"rl.importance_cap": 0.0}),
        "kl_coef 0": Option({"rl.kl_coef": 0.0}),
        "kl_in loss": Option({"rl.kl_in": "loss"}),
        "kl_estimator k1": Option({"rl.kl_estimator": "k1"}),
        "entropy_coef 0.01": Option({"rl.entropy_coef": 0.01}),
        "control_variate": Option({"rl.control_variate": True}),
        "marginal_aliases": Option({"rl.marginal_aliases": True}),
        "dynamic_sampling": Option({"rl.dynamic_sampling": True}),
        "overlong_buffer 2": Option({"rl.overlong_buffer": 2}),
        "mask_truncated_completions": Option({"rl.mask_truncated_completions": True}),
        "micro_batch_tokens 1024": Option({"rl.micro_batch_tokens": 1024}),
        "micro_batch_tokens 2048": Option({"rl.micro_batch_tokens": 2048}),
        "micro_batch_tokens 32768": Option({"rl.micro_batch_tokens": 32_768}),
        "cache_hidden_states": Option({"rl.cache_hidden_states": True}),
        "top_p 0.9": Option({"rollout.top_p": 0.9}),
        "top_k 8": Option({"rollout.top_k": 8}),
        "temperature 0.8": Option({"rollout.temperature": 0.8}),
        "no prefix_caching": Option({"rollout.prefix_caching": False}),
        "max_num_seqs 64": Option({"rollout.max_num_seqs": 64}),
        "gradient_checkpointing": Option({"cluster.gradient_checkpointing": True}),
        "tokens": Option(TOKENS),
        "tokens, lora_rank 16": Option({**TOKENS, "rl.lora_rank": 16}, TOKENS, "tokens"),
        "tokens, steering all": Option({**TOKENS, "rl.steering": "all"}, TOKENS, "tokens"),
        "tokens, steering last": Option({**TOKENS, "rl.steering": "last"}, TOKENS, "tokens"),
        "tokens, gradient_checkpointing": Option({**TOKENS, "cluster.gradient_checkpointing": True}, TOKENS, "tokens"),
        "offload_optimizer": Option({"cluster.offload_optimizer": True}),
        "offload_frozen": Option({"cluster.offload_frozen": True}),
    }  # fmt: skip


def complete(settings: Settings, on_gpu: bool) -> Settings:
    """Settings with the common ones added. An option may overrule these; without an actor, rl.lr is left out."""
    found = {**COMMON, **(ON_GPU if on_gpu else {}), **settings}
    return {name: value for name, value in found.items() if name != "rl.lr" or not settings.get("rl.actor_free")}


def refusals(option: Option, on_gpu: bool) -> list[str]:
    """Reasons why an option cannot be measured here; empty if it can."""
    return refused(settings_of(complete(option.settings, on_gpu)))


# --- measuring --------------------------------------------------------------------------------------------------------


def rounds_of(default: Stepped, option: Stepped, count: int) -> list[Round]:
    """Steps of both in turns, after warm-up steps; the order alternates."""
    found = list[Round]()
    for number in range(-WARM_UP, count):
        if number % 2:
            with_it = option.step()
            without = default.step()
        else:
            without = default.step()
            with_it = option.step()
        if number >= 0:
            found.append((without, with_it))
    return found


def ratios_of(rounds: Sequence[Round], name: str) -> list[float]:
    return [with_it[name] / without[name] for without, with_it in rounds]


def more_mb_of(rounds: Sequence[Round]) -> list[float]:
    return [(with_it["memory"] - without["memory"]) / 2**20 for without, with_it in rounds]


def margins_of(controls: Iterable[Sequence[Round]]) -> tuple[float, float]:
    """The largest difference between two processes that do the same: in time (ratio minus 1) and in MB."""
    medians = [(statistics.median(ratios_of(one, "step")), statistics.median(more_mb_of(one))) for one in controls]
    return max((abs(time - 1) for time, _ in medians), default=0), max((abs(more) for _, more in medians), default=0)


def row_of(rounds: Sequence[Round], against: str, margins: tuple[float, float] = (0, 0)) -> dict[str, Any]:
    """A row of the table from an option's rounds.

    Args:
        margins: of time and memory, see ``margins_of``.
    """
    ratios, more_mb = {name: ratios_of(rounds, name) for name in MEASURED}, more_mb_of(rounds)
    time_of, memory_of = median_interval(ratios["step"]), median_interval(more_mb)
    return {
        "against": against,
        "time": statistics.median(ratios["step"]),
        "time_low": time_of and time_of[0],
        "time_high": time_of and time_of[1],
        "says": in_words(time_of, 1.0, "time", margins[0]),
        "rollout": statistics.median(ratios["rollout"]),
        "learn": statistics.median(ratios["learn"]),
        "more_mb": statistics.median(more_mb),
        "mb_low": memory_of and memory_of[0],
        "mb_high": memory_of and memory_of[1],
        "and": in_words(memory_of, 0.0, "memory", margins[1]),
        "rounds": len(rounds),
    }


def kept(folder: Path, name: str) -> Path:
    return folder / "rounds" / f"{name.replace(' ', '-').replace(',', '')}.json"


def measured(
    folder: Path, model: Path, chosen: Mapping[str, Option], count: int, on_gpu: bool
) -> dict[str, list[Round]]:
    """Rounds by option; rounds in the folder are not repeated."""
    found = {name: json.loads(kept(folder, name).read_text()) for name in chosen if kept(folder, name).exists()}
    left = {name: option for name, option in chosen.items() if len(found.get(name, [])) < count}
    print(f"{len(left)} of {len(chosen)} options to measure, {count} rounds each", flush=True)
    kept(folder, "").parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for number, (name, option) in enumerate(left.items(), 1):
        at = folder / "processes" / kept(folder, name).stem
        both = [(complete(changes, on_gpu), model, at / of)
                for of, changes in (("without", option.against), ("with", option.settings))]  # fmt: skip
        with stepped(both) as (default, process):
            found[name] = rounds_of(default, process, count)
        kept(folder, name).write_text(json.dumps(found[name]))
        minutes = (time.monotonic() - started) / number * (len(left) - number) / 60
        row = row_of(found[name], option.named, margins_of(found[one] for one in CONTROLS if one in found))
        print(f"{number} of {len(left)}  {name}: {row['time']:.3g} of the time of {row['against']}, {row['says']}; "
              f"{row['more_mb']:+.0f} MB, {row['and']}; about {minutes:.0f} minutes left", flush=True)  # fmt: skip
    return {name: found[name] for name in chosen}


def main() -> None:
    known = options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where rounds are kept; reuse it to continue")
    parser.add_argument("--model", type=Path, help="a CoLA model; by default, the script pre-trains one")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps per option")
    parser.add_argument("--options", nargs="+", choices=list(known), default=list(known), metavar="OPTION",
                        help=f"rows of the table: {'; '.join(known)}")  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="run engine and learner on one GPU, which some options need")
    args = parser.parse_args()
    folder, model = args.folder.resolve(), args.model
    if model is None:
        start = KeptRun(folder / "start", "pretrain", {"preset": "tiny"})
        run_kept([start], parallel=1)
        model = start.output / "model"
    chosen = {name: known[name] for name in dict.fromkeys((*CONTROLS, *args.options))}
    for name, option in chosen.items():
        for line in refusals(option, args.gpu):
            print(f"left out: {name}: {line}")
    chosen = {name: option for name, option in chosen.items() if not refusals(option, args.gpu)}
    found = measured(folder, model, chosen, args.rounds, args.gpu)
    found = {name: rounds[: args.rounds] for name, rounds in found.items()}
    margins = margins_of(found[name] for name in CONTROLS)
    figures = {name: row_of(rounds, chosen[name].named, margins) for name, rounds in found.items()}
    about = f"Seconds and peak memory of a step of the tiny preset, with and without an option: {args.rounds} pairs."
    record("options_gpu" if args.gpu else "options", figures, [0], about)


if __name__ == "__main__":
    main()
