"""Thousands of concurrent episodes on a few workers, compared with requests that go to the engines directly.

    python benchmarks/episodes.py --model MODEL [--preset smollm2-135m] [--episodes 2000] [--workers 2] [--turns 3]

    environment   our own environment answers each utterance          rollout/episode.py, environment processes
    program       a program answers, over HTTP with OpenAI's client   rollout/programs.py

Each way plays all episodes concurrently, with one process per worker. Then the same requests, with the same ids and
seeds, go to the same engines again, each episode's requests in sequence, without any environment: the floor. Reported
are the median over repeats of (episodes / floor - 1), the milliseconds that a turn costs, and the worker's memory
after a quarter of the episodes and after all of them.
"""

import argparse
import asyncio
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS = ("environment", "program")
LENGTH = 8  # maximum tokens of an utterance
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


class Echo:
    """Repeats each utterance; an episode has ``max_turns`` turns, each with reward 1."""

    max_turns = int(os.environ.get("ECHO_TURNS", "3"))

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        self.turns = 0
        return _opening(seed), {}

    def step(self, utterance: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turns += 1
        return f"You said {utterance[:20]}\n", 1.0, self.turns >= self.max_turns, False, {}

    def get_state(self) -> int:
        return self.turns

    def set_state(self, state: int) -> None:
        self.turns = state


def _opening(seed: int) -> str:
    return " ".join(WORDS[seed // 10**place % 10] for place in range(4)) + "\n"


async def play_program(count: int) -> None:
    """The agent program: ``count`` concurrent episodes."""
    from openai import APIError, AsyncOpenAI

    client = AsyncOpenAI(timeout=None)

    async def play_on() -> None:
        while True:
            episode: Any = await client.post("/episodes", body={}, cast_to=object)
            policy = client.copy(base_url=episode["base_url"])
            messages: list[Any] = [{"role": "user", "content": _opening(episode["seed"])}]
            try:
                for turn in range(1, Echo.max_turns + 1):
                    answer = await policy.chat.completions.create(model="policy", messages=messages)
                    said = answer.choices[0].message
                    messages += [said, {"role": "user", "content": f"You said {str(said.content)[:20]}\n"}]
                    done = turn == Echo.max_turns
                    await policy.post("/reward", body={"reward": 1.0, "done": done}, cast_to=object)
            except APIError as error:
                print(error, flush=True)

    await asyncio.gather(*(play_on() for _ in range(count)))


class Worker:
    """Runs in a worker's process: its part of the episodes, and the same requests without an environment."""

    def __init__(self, args: argparse.Namespace) -> None:
        from cola_ray.rollout.agent_worker import AgentWorker
        from cola_ray.settings.config import override
        from cola_ray.settings.presets import preset

        program = {
            "task.name": "program", "task.command": f"{sys.executable} {__file__} --program {args.share}",
            "task.options": {"max_turns": Echo.max_turns},
        }  # fmt: skip
        task = program if args.way == "program" else {"task.name": f"{__file__}:Echo"}
        config = override(
            preset(args.preset), {
                **task, "task.reward_timeout_s": 600.0, "cluster.threads_per_process": 1, "rollout.in_rounds": False,
                "rollout.max_new_tokens": LENGTH, "rollout.max_prompt_tokens": 128, "rollout.max_num_seqs": 256,
                "rollout.environment_processes": 1,
            },
        )  # fmt: skip
        self.played = 0
        self.worker = AgentWorker(config, args.model)

    async def episodes(self, count: int) -> list[Any]:
        from cola_ray.experience import Ticket

        first = self.played = self.played + count
        episodes = await self.worker.play_episodes([Ticket(first + i, first + i) for i in range(count)])
        assert not any(episode.failure for episode in episodes), [one.failure for one in episodes if one.failure][:3]
        assert all(len(episode.turns) == Echo.max_turns for episode in episodes)
        return episodes

    async def floor(self, episodes: list[Any]) -> None:
        """The same draws in the same states, one turn after the other."""

        async def chain(episode: Any) -> None:
            for number, turn in enumerate(episode.turns):
                seed = self.worker._seed(episode.position, number)
                request = self.worker._request(turn.state_ids, seed, self.worker.config.rollout.temperature)
                (found,) = await self.worker.batch.complete([request])
                assert found.token_ids.tolist() == turn.token_ids.tolist()

        await asyncio.gather(*map(chain, episodes))

    async def serve(self, share: int) -> None:
        """Answer the parent's lines with seconds and memory."""
        episodes = list[Any]()
        for line in iter(sys.stdin.readline, ""):
            self.worker.engine.reset_prefix_cache()
            started = time.perf_counter()
            if line.strip() == "floor":
                await self.floor(episodes)
            else:
                episodes = await self.episodes(share // 4 if line.strip() == "some" else share)
            said = {"seconds": time.perf_counter() - started, "memory_mb": _memory_mb()}
            print(json.dumps(said), file=ANSWERS, flush=True)
        if self.worker.programs is not None:
            await self.worker.programs.close()


def _memory_mb() -> float:
    """Resident memory, without freed memory that the C library holds back (160 MB after 12 000 episodes)."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measured(args: argparse.Namespace, way: str) -> dict[str, float]:
    """Figures of one way, with all workers running at the same time."""
    command = [sys.executable, __file__, "--model", args.model, "--preset", args.preset, "--way", way,
               "--share", str(args.episodes // args.workers)]  # fmt: skip
    environment = os.environ | {"ECHO_TURNS": str(args.turns), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(args.workers)
    ]

    def ask(what: str) -> tuple[float, float]:
        """Seconds of the slowest worker, and memory of the largest."""
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(what + "\n")
            worker.stdin.flush()
        answers = [json.loads(worker.stdout.readline()) for worker in workers if worker.stdout is not None]
        print(way, what, answers, file=sys.stderr, flush=True)
        return max(one["seconds"] for one in answers), max(one["memory_mb"] for one in answers)

    try:
        _, after_some = ask("some")
        ask("floor")
        pairs = [(ask("all"), ask("floor")) for _ in range(args.repeats)]
    finally:
        for worker in workers:
            worker.communicate(timeout=60)
    played, floor = ([one[of][0] for one in pairs] for of in (0, 1))
    turns = args.episodes * args.turns
    return {
        "overhead": statistics.median(p / f - 1 for p, f in zip(played, floor, strict=True)),
        "overhead_ms_a_turn": statistics.median(p - f for p, f in zip(played, floor, strict=True)) / turns * 1e3,
        "turns_a_second": turns / statistics.median(played),
        "memory_mb_after_a_quarter": after_some,
        "memory_mb_after_all": pairs[-1][0][1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a CoLA model of the preset")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--program", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        asyncio.run(play_program(args.program))
    elif args.way:
        asyncio.run(Worker(args).serve(args.share))
    elif args.model:
        compare(args)
    else:
        parser.error("--model: give a CoLA model of the preset, e.g. outputs/demo/model")


def compare(args: argparse.Namespace) -> None:
    """Measure both ways and record the figures."""
    from record import record

    args.model = str(Path(args.model).resolve())
    rows = {way: measured(args, way) for way in WAYS}
    record(
        "episodes" if args.preset == "tiny" else f"episodes_{args.preset.split('-')[0]}", rows,
        about=f"{args.episodes} episodes of {args.turns} turns at once on {args.workers} workers, utterances of up to "
        f"{LENGTH} tokens, against the same requests to the same engines; medians of {args.repeats} pairs.",
    )  # fmt: skip


if __name__ == "__main__":
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to stderr
    main()
