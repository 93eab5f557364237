"""Whole steps of RL in one process, one per request: worker, source of batches and learner, without Ray.

    stdin: a line ─> collect ─> to_batches ─> learn ─> weights into the engine ─> stdout: STEP seconds ... peak

    with stepped([(settings, model, folder), ...]) as (process, ...):   # settings by dotted field, and the preset
        process.step()                              # {"step": 1.41, "rollout": 0.7, "learn": 0.6, "memory": ...}

Nothing is computed between two lines, so several such processes can take steps in turns. Memory is the peak within
the step: resident memory on CPU, and memory allocated by PyTorch on a GPU.
"""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ranks
from cached_run import preset_of
from record import ROOT

from cola_ray.settings.config import Config, override

MEASURED = ("step", "rollout", "learn", "memory")
"""Seconds of a step, of its rollouts and of its update; and peak memory in bytes."""


def settings_of(changes: Mapping[str, Any]) -> Config:
    return override(preset_of("rl_math", changes), changes)


# --- the process that takes steps -------------------------------------------------------------------------------------


class _OneWorker:
    """A :class:`~cola_ray.loop.workers.WorkerPool` with one worker in this process."""

    def __init__(self, config: Config, model_path: str) -> None:
        self.config, self.model_path = config, model_path

    def spawn(self) -> Any:
        from cola_ray.rollout.worker import RolloutWorker

        return RolloutWorker(self.config, self.model_path)

    async def call(self, actor: Any, method: str, *args: Any) -> Any:
        return await getattr(actor, method)(*args)

    def kill(self, actor: Any) -> None:
        raise RuntimeError("a worker in this process cannot be lost")


class WholeStep:
    """The steps of one run, on policy."""

    def __init__(self, config: Config, model: Path, folder: Path) -> None:
        from cola_ray.learner.policies import make_policy, served
        from cola_ray.learner.rl import RLLearner
        from cola_ray.loop.problems import Problems
        from cola_ray.loop.supervisor import Supervisor
        from cola_ray.loop.workers import WorkerGroup
        from cola_ray.replay.service import ReplayShard, Shards

        path = served(config, model, folder)
        self.learner = RLLearner(config, make_policy(config, path))
        supervisor = Supervisor(config.cluster.stall_timeout_s)
        self.workers = WorkerGroup(config.rollout, _OneWorker(config, path), supervisor)
        shard = ReplayShard(config.replay.max_rows, config.replay.max_mb << 20, str(folder / "replay"), 0)

        async def ask(_: int, method: str, *args: Any) -> Any:
            return getattr(shard, method)(*args)

        self.source = Problems(config, self.workers, supervisor, Shards(int(config.replays), ask, config.seed))
        self.on_gpu = config.cluster.use_gpu

    async def open(self) -> None:
        await self.workers.start()
        await self._publish()

    async def step(self) -> dict[str, float]:
        number = self.learner.version
        _forget_peak(self.on_gpu)
        started = time.perf_counter()
        rollouts = await self.source.collect(number)
        (batch,), _ = await self.source.to_batches(rollouts, number)
        before = time.perf_counter()
        self.learner.step(batch.fetched())
        learnt = time.perf_counter()
        await self._publish()
        seconds = time.perf_counter() - started
        return {"step": seconds, "rollout": rollouts.seconds, "learn": learnt - before, "memory": _peak(self.on_gpu)}

    async def _publish(self) -> None:
        await self.workers.ask_all("update_weights", self.learner.version, *self.learner.buckets())


def _forget_peak(on_gpu: bool) -> None:
    if on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def _peak(on_gpu: bool) -> float:
    if on_gpu:
        import torch

        return float(torch.cuda.max_memory_allocated())
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "/proc/self/status has no VmHWM"
    return 1024.0 * int(found[1])


def serve(asked: str) -> None:
    """Take a step for each line; ``asked`` is settings, model and folder as JSON."""
    changes, model, folder = json.loads(asked)
    config = settings_of(changes)
    from cola_ray.rollout.engine import prepare_process

    prepare_process(config.cluster.threads_per_process)
    import torch

    if not config.cluster.use_gpu:
        torch.set_num_threads(config.cluster.threads_per_process)
    ranks.join("nccl" if config.cluster.use_gpu else "gloo")
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    steps = WholeStep(config, Path(model), Path(folder))
    loop.run_until_complete(steps.open())
    print("READY", flush=True)
    for _ in sys.stdin:
        print("STEP", json.dumps(loop.run_until_complete(steps.step())), flush=True)


# --- who asks for them ------------------------------------------------------------------------------------------------


class Stepped:
    """A process that takes steps."""

    def __init__(self, changes: Mapping[str, Any], model: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
        if not settings_of(changes).cluster.use_gpu:
            environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        asked = json.dumps([dict(changes), str(model.resolve()), str(folder.resolve())])
        self.log = folder / "log.txt"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "import sys, whole_step; whole_step.serve(sys.argv[1])", asked],
                cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def wait(self) -> None:
        """Wait until it is ready; RuntimeError if it has ended."""
        self._answer("READY")

    def step(self) -> dict[str, float]:
        """Take the next step; returns the values named in ``MEASURED``.

        Raises:
            RuntimeError: the process has ended; the message has the end of its log.
        """
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        found: dict[str, float] = json.loads(self._answer("STEP"))
        return found

    def _answer(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        end = "\n".join(self.log.read_text().splitlines()[-5:])
        raise RuntimeError(f"the process ended with {self.process.wait()}; {self.log} ends with\n{end}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def stepped(asked: Iterable[tuple[Mapping[str, Any], Path, Path]]) -> Iterator[list[Stepped]]:
    """Processes that take steps, one for each settings, model and folder; they are ended with the block."""
    with contextlib.ExitStack() as stack:
        processes = list[Stepped]()
        for changes, model, folder in asked:
            processes.append(process := Stepped(changes, model, folder))
            stack.callback(process.end)
        for process in processes:
            process.wait()
        yield processes
