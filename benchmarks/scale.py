"""The real controller on 8 to 4096 GPUs, with simulated engines and ranks: what it costs, and who waits for whom.

python benchmarks/scale.py --record                 all sizes; max_staleness 0, 1, 2, 4 in both update modes
python benchmarks/scale.py --gpus 8 64 --steps 6    a quick check for developers of the loop, in a minute
python benchmarks/scale.py --window --record        only rl.window: groups are trained on as they finish
python benchmarks/scale.py --profile 512            where the controller's time goes, function by function

cola_ray/loop is real, from tickets to batches, in one process as in a run. Engines and ranks are simulated: they take
as long as `cola_ray plan` says for llama-3.1-8b on H100, completions have log-normal lengths, engines are lost, and
the clock jumps to the next event. There are no weights, and tokens have no meaning. Of the cost of a call, these
figures include the pickling of its arguments and results, but not Ray itself.

Each GPU adds 8 prompts of 4 completions per step, and a quarter of the GPUs learn. Arrays hold a part of the tokens
(--token-share), because all of them would not fit into this machine at 4096 GPUs. The cost of whole completions is
measured for 64 GPUs and assumed to be proportional to the number of completions.

columns of the table of sizes, each per step:
    loop s         CPU seconds of tickets, balancing, calls, weights, waiting: all but the next two
    batches s      CPU seconds of advantages, measures and collation, with whole completions
    pickling s     CPU seconds of incoming and outgoing messages, with whole completions
    of the step    these three as a share of the simulated step
    GB in, out     through the controller's process
columns of the table of waiting:
    engines idle   share of time in which an engine neither decodes nor loads weights
    learner idle   share of time in which it neither learns nor hands over weights
    planned        by `cola_ray plan`, from its formulas alone, without losses of engines
"""

import argparse
import cProfile
import functools
import gc
import json
import pickle
import pstats
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from record import record
from simulated_cluster import Accounts, Cluster, Engines, Learner, SimulatedTime

from cola_ray.batch import Held, apart, together
from cola_ray.loop.controller import Controller
from cola_ray.loop.problems import Collected, Problems
from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.workers import WorkerGroup
from cola_ray.replay.service import Shards
from cola_ray.settings.config import Config, override
from cola_ray.settings.presets import preset
from cola_ray.studies.planned_idle import answers, idle
from cola_ray.studies.planned_time import GPUS, decoding, published, step_time, update
from cola_ray.studies.planned_work import Sizes, sizes

PROMPTS_PER_GPU, GROUP, BUCKET = 8, 4, 64 << 20
GPU_SIZES, LATE = (8, 64, 512, 4096), (0, 1, 2, 4)
WHOLE_GPUS = 64
"""The number of GPUs at which whole completions are measured."""
BOUNDS = {"step": 0.05, "engines": 0.1, "learner": 0.04}
"""Allowed errors of the plan: relative for a step's seconds, absolute for idle shares."""


def settings(gpus: int, steps: int, max_staleness: int, update_mode: str, window: int = 0) -> Config:
    """llama-3.1-8b on this many H100s, a quarter of which learn."""
    ranks = gpus // 4
    changes = {"cluster.learner_ranks": ranks, "rollout.num_workers": gpus - ranks, "rl.max_steps": steps,
               "rl.prompts_per_step": PROMPTS_PER_GPU * gpus, "rl.group_size": GROUP, "rl.eval_every": 0,
               "rl.max_staleness": max_staleness, "rl.update_mode": update_mode, "rl.window": window}  # fmt: skip
    return override(preset("llama-3.1-8b"), changes)


def cluster_of(config: Config, m: Sizes, args: argparse.Namespace) -> Cluster:
    """The cluster that `cola_ray plan` describes."""
    gpu, late = GPUS[config.hardware.gpu], config.rl.max_staleness
    planned, (hands_over, loads) = step_time(config, m, gpu), update(config, m)
    positions = config.rl.prompts_per_step * min(config.rl.max_steps, 4)
    lengths = answers(config).draw(np.random.default_rng((args.seed, 0)), (positions, GROUP))
    return Cluster(
        lengths=lengths, decoding=decoding(config, m, gpu, steps=late + 2),
        learn_per_token=planned.learn / planned.tokens, hands_over=hands_over, loads=loads,
        buckets=max(round(m.num_bytes * published(config, m) / BUCKET), 1), token_share=args.token_share,
        losses_per_second=1 / (3600 * args.hours_between_losses) if args.hours_between_losses else 0.0,
        restart_seconds=args.restart_seconds, prompt_tokens=config.rollout.max_prompt_tokens // 2, seed=args.seed,
    )  # fmt: skip


class TimedProblems(Problems):
    """The source of batches, with the CPU seconds that its batches took."""

    seconds = 0.0

    async def to_batches(self, rollouts: Collected, step: int) -> Any:
        started = time.process_time()
        made = await super().to_batches(rollouts, step)  # nothing in it waits with these settings
        self.seconds += time.process_time() - started
        return made


@dataclass(frozen=True)
class Run:
    """A simulated run; figures per step, without the first and last steps where the time is simulated."""

    step: float
    loop: float  # CPU seconds
    batches: float  # CPU seconds, with a share of the tokens
    calls: float
    call_bytes: float
    engines_idle: float
    learner_idle: float
    losses: int
    regenerated: int
    hours: float  # simulated hours of the run
    seconds: float  # CPU seconds of the whole simulation


def simulate(config: Config, cluster: Cluster) -> Run:
    """Train for ``rl.max_steps`` steps of the real controller."""
    loop = SimulatedTime()
    engines = Engines(config, cluster, Accounts(), loop)
    learner = Learner(engines)

    async def whole() -> Controller:
        controller = Controller(config, engines, functools.partial(TimedProblems, shards=Shards(0, _none, seed=0)))
        await controller.start(resumed=True)
        await learner.train(controller)
        await controller.supervisor.cancel(*controller.supervisor.tasks)
        return controller

    with loop.as_the_controllers_clock():
        started = time.process_time()
        try:
            controller = loop.run_until_complete(whole())
        finally:
            loop.close()
        cpu = time.process_time() - started
    source: Any = controller.source
    steps, accounts = config.rl.max_steps, engines.accounts
    late = config.rl.max_staleness  # the first steps fill the slots, and in the last ones engines run out of work
    (began, learnt, worked), (ended, learnt_then, worked_then) = (
        learner.marks[late + 1],
        learner.marks[steps - 2 - late],
    )
    seconds = ended - began
    return Run(
        step=seconds / (steps - 3 - 2 * late), loop=(cpu - accounts.simulated - source.seconds) / steps,
        batches=source.seconds / steps, calls=accounts.calls / steps, call_bytes=accounts.call_bytes / steps,
        engines_idle=1 - (worked_then - worked) / seconds / config.rollout.num_workers,
        learner_idle=1 - (learnt_then - learnt) / seconds, losses=engines.lost,
        regenerated=controller.workers.totals.regenerated_groups, hours=loop.time() / 3600, seconds=cpu,
    )  # fmt: skip


async def _none(shard: int, method: str, *args: Any) -> Any:
    """Stands for calls to replay, which does not exist here."""


# --- what tokens cost -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Messages:
    """Cost of one completion: CPU seconds, and bytes through the controller's process."""

    batches: float
    pickling: float
    bytes_in: float
    bytes_out: float


def messages(config: Config, cluster: Cluster) -> Messages:
    """Handle one step's groups as the controller does: unpickle them, make batches, pickle these for ranks."""
    loop = SimulatedTime()
    engines = Engines(config, cluster, Accounts(), loop)
    workers = WorkerGroup(config.rollout, engines, Supervisor(1e9))
    workers.facts = {"pad_token_id": 0}
    source = TimedProblems(config, workers, workers.supervisor, Shards(0, _none, seed=0))
    lengths = cluster.lengths[: config.rl.prompts_per_step]
    count, share = len(lengths) * GROUP, max(len(lengths) // config.rollout.num_workers, 1)
    replies, data = [], []
    for first in range(0, len(lengths), share):
        of_call = lengths[first : first + share]
        groups, _ = apart(engines.groups(range(first, first + len(of_call)), of_call, 0))
        replies.append(_sent(groups))
        data.append([Held(None, f"{first:056x}")])
    gc.collect()
    gc.freeze()  # or a collection over everything imported, a quarter of a second, would be counted as messages
    started = time.process_time()
    calls = [pickle.loads(reply[0], buffers=reply[1]) for reply in replies]
    groups = [group for call, held in zip(calls, data, strict=True) for group in together(call, held)]
    pickling = time.process_time() - started
    batches, _ = loop.run_until_complete(source.to_batches(Collected(groups, [], 1.0), 0))
    loop.close()
    started = time.process_time()
    sent = [_sent(batch, copied=True) for batch in batches]
    pickling += time.process_time() - started
    gc.unfreeze()
    return Messages(source.seconds / count, pickling / count, _size(replies) / count, _size(sent) / count)


Sent = tuple[bytes, list[Any]]


def _sent(value: Any, copied: bool = False) -> Sent:
    """Pickled like in Ray, arrays out of band; ``copied``: arrays are copied, as into the object store."""
    buffers: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return rest, [bytes(one) if copied else bytearray(one) for one in buffers]


def _size(sent: Sequence[Sent]) -> int:
    return sum(len(rest) + sum(len(one) for one in buffers) for rest, buffers in sent)


# --- figures --------------------------------------------------------------------------------------------------------


def of_sizes(m: Sizes, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The controller's cost by number of GPUs."""
    rows = {}
    whole, part = (_messages_at(m, args, share) for share in (1.0, args.token_share))
    for gpus in args.gpus:
        config = settings(gpus, args.steps, 1, "drain")
        run = simulate(config, cluster_of(config, m, args))
        completions = config.rl.prompts_per_step * GROUP
        batches = run.batches + completions * (whole.batches - part.batches)
        pickling = completions * whole.pickling
        rows[f"{gpus} GPUs"] = {
            "completions a step": completions, "calls a step": round(run.calls), "step s": run.step, "loop s": run.loop,
            "batches s": batches, "pickling s": pickling, "of the step": (run.loop + batches + pickling) / run.step,
            "GB in a step": completions * whole.bytes_in / 1e9,
            "GB out a step": (completions * whole.bytes_out + run.call_bytes) / 1e9, "lost engines": run.losses,
        }  # fmt: skip
        _say(f"{gpus} GPUs, {run.hours * 60:.0f} minutes in {run.seconds:.0f} CPU s: {_shown(rows[f'{gpus} GPUs'])}")
    return rows


def _messages_at(m: Sizes, args: argparse.Namespace, share: float) -> Messages:
    config = settings(min(WHOLE_GPUS, max(args.gpus)), 2, 1, "drain")
    _say(f"messages of {config.rl.prompts_per_step * GROUP} completions with {share:.3g} of their tokens")
    given = argparse.Namespace(**{**vars(args), "token_share": share})
    return messages(config, cluster_of(config, m, given))


def of_staleness(m: Sizes, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Idle shares of engines and learner, simulated and planned."""
    rows = {}
    for gpus in args.idle_gpus:
        for mode, late in ((mode, late) for mode in ("drain", "continue") for late in args.max_staleness):
            if mode == "continue" and not late:
                continue
            config = settings(gpus, max(args.steps, 4 * late + 8), late, mode)
            run = simulate(config, cluster_of(config, m, args))
            planned = idle(config, m, GPUS[config.hardware.gpu])
            name = f"{gpus} GPUs, {mode}, {late}"
            rows[name] = {
                "step s": run.step, "step planned": planned.step, "engines idle": run.engines_idle,
                "engines planned": planned.engines, "learner idle": run.learner_idle,
                "learner planned": planned.learner,
            }  # fmt: skip
            _say(f"{name}: {_shown(rows[name])}")
    return rows


def of_window(m: Sizes, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The time saved by training on groups as they finish (rl.window), for each bound on staleness."""
    rows: dict[str, dict[str, Any]] = {}
    for gpus in args.idle_gpus:
        for late in (one for one in args.max_staleness if one > 1):
            for window in sorted({0, 1, late - 1}):
                config = settings(gpus, max(args.steps, 4 * late + 8), late, "continue", window)
                run = simulate(config, cluster_of(config, m, args))
                name = f"{gpus} GPUs, max_staleness {late}, window {window}"
                rows[name] = {"step s": run.step, "engines idle": run.engines_idle, "learner idle": run.learner_idle,
                              "calls a step": round(run.calls)}  # fmt: skip
                _say(f"{name}: {_shown(rows[name])}")
    return rows


def _shown(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def profile(m: Sizes, gpus: int, args: argparse.Namespace) -> None:
    """Print where a simulated run spends its CPU time."""
    config = settings(gpus, args.steps, 1, "drain")
    cluster, profiler = cluster_of(config, m, args), cProfile.Profile()
    profiler.enable()
    run = simulate(config, cluster)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
    print(run)


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPU_SIZES, help="sizes in GPUs, at least 4")
    parser.add_argument("--idle-gpus", type=int, nargs="*", default=(8, 64), help="sizes at which staleness is varied")
    parser.add_argument("--max-staleness", type=int, nargs="+", default=LATE)
    parser.add_argument("--steps", type=int, default=12, help="steps of each run, at least 6")
    parser.add_argument(
        "--token-share", type=float, default=1 / 64, help="the share of a completion's tokens that its arrays hold"
    )
    parser.add_argument("--hours-between-losses", type=float, default=1000.0, help="of one engine; 0: no losses")
    parser.add_argument("--restart-seconds", type=float, default=120.0, help="until a lost engine is replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=int, metavar="GPUS", help="only profile a run with this many GPUs")
    parser.add_argument("--window", action="store_true", help="only measure how step time depends on rl.window")
    parser.add_argument("--record", action="store_true", help="write docs/results and the tables in docs/scaling.md")
    return parser.parse_args(argv)


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)
    m = sizes(settings(8, 4, 1, "drain"))
    if args.profile:
        profile(m, args.profile, args)
        return
    if args.window:
        rows = of_window(m, args)
        print(json.dumps(rows, indent=2))
        if args.record:
            record(
                "window", rows, [args.seed], "A step around simulated engines, with groups trained on as they finish"
            )
        return
    costs, waits = of_sizes(m, args), of_staleness(m, args)
    print(json.dumps({"scale": costs, "idle": waits}, indent=2))
    if args.record:
        record(
            "scale",
            costs,
            [args.seed],
            "The controller's CPU seconds and bytes a step around simulated engines and ranks",
        )
        record("idle", waits, [args.seed], "Idle shares of simulated engines and learner, and as planned")


if __name__ == "__main__":
    main()
