"""`make bench`: speed and memory of engine, learner and loop, as ratios within one call; medians of five.

python benchmarks/run.py [decoding] [publishing] [learning] [orchestration] [overlap]     # only these parts

Figures of the other parts are kept. Each part is timed in its own process with one thread; the overlapped step is a
real run. docs/benchmarks.md explains each figure and what limits it.
"""

import argparse
import contextlib
import functools
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ranks
import torch
from decoding import (
    POLICY_LAYERS,
    REPEATS,
    WIDE,
    WORLD_MODEL_LAYERS,
    flops_per_token,
    memcpy_seconds,
    seconds,
)
from record import RESULTS, ROOT, record
from transformers import LlamaForCausalLM

from cola_ray import CoLAForCausalLM
from cola_ray.batch import Batch, Group, apart, as_groups, collate
from cola_ray.experience import Ticket, Trajectory
from cola_ray.packing import pack
from cola_ray.settings.config import Config, override
from cola_ray.settings.presets import preset

PARTS = ("decoding", "publishing", "learning", "orchestration", "overlap")


# --- publishing ---------------------------------------------------------------------------------------------------


def publishing() -> dict[str, float]:
    """Writing a policy's tensors to Ray's object store, reading and checking them, relative to one copy of the bytes.

    Measured for one policy layer of Llama-3.1-8B in bfloat16, and two layers of the small model (tensors of 1 to 3 MB).
    Does not include loading into the engine.
    """
    import ray

    from cola_ray.weights import WeightReceiver, WeightSender

    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=3 << 30)

    def against_memcpy(hidden: int, inner: int, keys: int, layers: int, dtype: torch.dtype) -> float:
        shapes = [(hidden, hidden)] * 2 + [(keys, hidden)] * 2 + [(inner, hidden)] * 3 + [(hidden,)] * 2
        tensors = [
            (f"{layer}.{i}", torch.ones(shape, dtype=dtype))
            for layer in range(layers)
            for i, shape in enumerate(shapes)
        ]

        def publish() -> None:
            references = [ray.put(bucket) for bucket in WeightSender().buckets(1, tensors)]
            receiver = WeightReceiver(1)
            for bucket in ray.get(references):
                receiver.add(bucket)
            receiver.finish(dict(tensors))

        # Warmed up and with pauses, as in a run: seconds pass between versions, and memory of older versions is reused.
        published = seconds(publish, warm_ups=5, pause=1.0)
        return memcpy_seconds(sum(tensor.nbytes for _, tensor in tensors)) / published

    figures = {
        "publish_vs_memcpy": against_memcpy(4096, 14336, 1024, 1, torch.bfloat16),
        "publish_small_vs_memcpy": against_memcpy(512, 1536, 512, 2, torch.float32),
    }
    ray.shutdown()
    return figures


# --- learning -----------------------------------------------------------------------------------------------------


def random_batch(
    prompt: int = 64, response: int = 64, count: int = 16, vocab: int = 31_000, micro_batch_tokens: int = 1 << 30,
    num_actions: int = 64, group: int = 1,
) -> Batch:  # fmt: skip
    draw = np.random.default_rng(0)
    items = [
        Trajectory(
            prompt_ids, draw.integers(1, vocab, response), draw.integers(0, num_actions, response),
            np.full(response, -4.0, np.float32), np.zeros(response, np.int64), 0.0, False, "",
        )
        for prompt_ids in (draw.integers(1, vocab, prompt) for _ in range(count // group))
        for _ in range(group)
    ]  # fmt: skip
    (batch,) = collate(
        pack(items), draw.normal(size=count).tolist(), 1, 0, 0, micro_batch_tokens, shares_prompts=group > 1
    )
    return batch


def one_rank() -> Config:
    torch.set_num_threads(1)
    ranks.join("gloo")
    return override(preset("tiny"), {"model.num_actions": 64, "rl.kl_coef": 0.001, "rl.kl_estimator": "k1"})


def latent_learning(latent: str) -> dict[str, float]:
    """Our RL step against a minimal DeepSpeed loop with the same arithmetic."""
    from cola_ray.learner.policies import LatentPolicy
    from cola_ray.learner.rl import RLLearner

    learner = RLLearner(one_rank(), LatentPolicy(CoLAForCausalLM.from_pretrained(latent)))
    batch = random_batch()
    bare, _ = bare_latent_step(latent, batch)
    pairs = []
    for _ in range(2 * REPEATS + 1):  # alternating, so that a slow moment of the machine affects both
        started = time.perf_counter()
        learner.step(batch)
        between = time.perf_counter()
        bare()
        pairs.append((between - started, time.perf_counter() - between))
    group, ratios = random_batch(group=8), list[float]()
    for _ in range(REPEATS + 1):
        took = {}
        for learner.update.shares_prompts in (True, False):
            started = time.perf_counter()
            learner.step(group)
            took[learner.update.shares_prompts] = time.perf_counter() - started
        ratios.append(took[True] / took[False])
    return {
        "latent_step_seconds": statistics.median(ours for ours, _ in pairs[1:]),
        "shared_prompts_step_time": statistics.median(ratios[1:]),
        "learner_vs_bare_deepspeed": statistics.median(ours / theirs for ours, theirs in pairs[1:]),
        "latent_optimizer_bytes": state_bytes(learner.zero.optimizer),
    }


def token_learning(base: str) -> dict[str, float]:
    """The RL step over tokens: the whole base is trained, and the reference is a copy of it."""
    from cola_ray.learner.policies import TokenPolicy
    from cola_ray.learner.rl import RLLearner

    config = override(one_rank(), {"rl.action_space": "token"})
    learner, batch = RLLearner(config, TokenPolicy(LlamaForCausalLM.from_pretrained(base))), random_batch()
    return {
        "token_step_seconds": seconds(lambda: learner.step(batch)),
        "token_optimizer_bytes": state_bytes(learner.zero.optimizer),
    }


def bare_latent_step(latent: str, batch: Batch) -> tuple[Callable[[], None], Any]:
    """The same losses in a minimal hand-written DeepSpeed step, without metrics or checks."""

    from cola_ray.learner.micro_batch import MicroBatch
    from cola_ray.learner.policies import LatentPolicy

    module = LatentPolicy(CoLAForCausalLM.from_pretrained(latent))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith("cola.policy."))
    engine, optimizer = deepspeed_engine(module)

    def step() -> None:
        piece = MicroBatch.cut(batch, *batch.micro_batches[0], torch.device("cpu"))
        mask = piece.action_mask
        logits, _, reference, _ = engine(piece.input_ids, piece.attention_mask, mask)
        taken, place = piece.actions[mask][:, None], torch.zeros(mask.shape)
        log_probs, reference = (
            place.masked_scatter(mask, one.log_softmax(-1).gather(-1, taken)[:, 0]) for one in (logits, reference)
        )
        old = log_probs.detach()
        advantages = piece.advantages - 0.001 * ((old - reference) * mask).flip(1).cumsum(1).flip(1)
        ratio = (log_probs - old).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        engine.backward((loss * mask).sum() / batch.num_actions_global)
        engine.step()

    return step, optimizer


def deepspeed_engine(module: torch.nn.Module) -> tuple[Any, Any]:
    import deepspeed

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, optimizer, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(trained, lr=1e-6),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 30,
        },
    )
    return engine, optimizer


def state_bytes(optimizer: Any) -> int:
    """Bytes of the optimizer's moments."""
    states = optimizer.optimizer.state.values()
    return sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))


# --- the loop -----------------------------------------------------------------------------------------------------


class EchoWorker:
    """Returns prepared groups, so that a step consists only of controller, Ray and collation."""

    def __init__(self, config: Config) -> None:
        self.size = config.rl.group_size
        one = np.ones(8, np.int64)
        self.trajectories = tuple(
            Trajectory(one, one, one, -np.ones(8, np.float32), one, float(i % 2), False, "") for i in range(self.size)
        )

    async def facts(self) -> dict[str, int]:
        return {"num_train": 1000, "num_heldout": 4, "pad_token_id": 0, "num_too_long": 0}

    async def evaluate(self, indices: list[int], bare_base: bool) -> list[float]:
        return [0.0] * len(indices)

    async def update_weights(self, version: int, *_: object) -> int:
        return version

    async def generate_groups(self, tickets: list[Ticket]) -> list[Group]:
        return as_groups([(ticket.position, self.trajectories, None) for ticket in tickets])

    async def generate_in_parts(self, tickets: list[Ticket]) -> list[Any]:
        groups, data = apart(await self.generate_groups(tickets))
        return [groups, *data]


def orchestration() -> dict[str, float]:
    import ray

    from cola_ray.cluster.actors import RayWorkers, RemoteController, replay
    from cola_ray.loop.controller import Controller
    from cola_ray.loop.problems import Problems

    config = override(preset("tiny"), {"rl.max_steps": 40, "rl.eval_every": 0, "cluster.learner_ranks": 1})
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    pool = RayWorkers(config, "")
    pool.actor, pool.args = ray.remote(EchoWorker).options(num_cpus=1), (config,)
    controller = (
        ray.remote(Controller)
        .options(num_cpus=0, max_concurrency=64)
        .remote(config, pool, functools.partial(Problems, shards=replay(config)))
    )
    ray.get(controller.start.remote(False))
    source = RemoteController(controller)
    source.begin(0, [], None)
    times = []
    for version in range(config.rl.max_steps):
        started = time.perf_counter()
        assert source.next_batch(0, version) is not None
        source.publish(version + 1, [], {"time/learn": 0.0})
        times.append(time.perf_counter() - started)
    ray.shutdown()
    return {"orchestration_ms": 1000 * statistics.median(times[5:])}


def overlap() -> dict[str, float]:
    """Run the tiny preset with one engine and one rank, one core each, first without and then with overlap."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        short = ["--pretrain.steps.base", "20", "--pretrain.steps.actions", "20", "--pretrain.steps.policy", "5"]
        common = ["--cluster.learner-ranks", "1", "--rl.max-steps", "30", "--rl.eval-every", "0", "--rl.eval-problems",
                  "8", "--rl.prompts-per-step", "128", "--rl.save-every", "1000"]  # fmt: skip
        job = [sys.executable, str(ROOT / "jobs" / "rl_math.py"), "--preset", "tiny", *short, *common]

        def series(staleness: int, key: str) -> dict[int, float]:
            id_file = where / f"outputs/{staleness}/mlflow_run_id"
            if not id_file.exists():
                return {}
            with sqlite3.connect(where / "outputs" / "mlflow.db", timeout=60) as database:
                query = "select step, value from metrics where run_uuid = ? and key = ? and step > 5"
                return dict(database.execute(query, (id_file.read_text().strip(), key)).fetchall())

        def median(staleness: int, key: str) -> float:
            return statistics.median(series(staleness, key).values())

        def cpu_seconds(process: psutil.Process) -> tuple[int, float]:
            """The last step, and the CPU seconds of all processes of the run so far."""
            total = 0.0
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += one.cpu_times().user + one.cpu_times().system
            return max(series(1, "time/step"), default=0), total

        for staleness in (0, 1):
            command = [*job, "--rl.max-staleness", str(staleness), "--output-dir", f"outputs/{staleness}"]
            running = psutil.Popen(command, cwd=where, stdout=subprocess.DEVNULL)
            samples = []
            while running.poll() is None:  # between two late steps, after all processes have started
                if staleness and max(series(1, "time/step"), default=0) in (8, 28):
                    samples.append(cpu_seconds(running))
                time.sleep(0.2)
            assert running.returncode == 0
        apart = {key: median(0, f"time/{key}") for key in ("rollout", "learn", "sync", "step")}
        together = median(1, "time/step")
    (first, before), (last, after) = samples[0], samples[-1]
    return {
        "rollout_seconds": apart["rollout"],
        "learn_seconds": apart["learn"],
        "step_seconds_apart": apart["step"],
        "step_seconds_overlapped": together,
        "overlap_vs_max": together / max(apart["rollout"], apart["learn"]),
        "overlap_vs_all_processes_cpu": together / ((after - before) / (last - first) / len(os.sched_getaffinity(0))),
    }


def isolated(name: str, *args: str, module: str = "run") -> dict[str, float]:
    """Run a function in its own process, so that no part inherits another's threads and memory."""
    code = f"import json, {module}; print('RESULT' + json.dumps({module}.{name}(*{args!r})))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    print(name, line.removeprefix("RESULT"), flush=True)
    return json.loads(line.removeprefix("RESULT"))


def decoding(latent: str, base: str) -> dict[str, float]:
    parts = {"latent_decoding": latent, "plain_decoding": base, "torch_decoding": latent}
    figures: dict[str, float] = {}
    for name, model in parts.items():
        figures |= isolated(name, model, module="decoding")
    rate, cost = figures["latent_tokens_per_second"], flops_per_token(WIDE, latent=True)
    flop_ratio = flops_per_token(WIDE, latent=False) / cost
    figures["latent_vs_plain_per_flop"] = rate / figures["plain_tokens_per_second"] / flop_ratio
    figures["latent_vs_hf_generate"] = rate / figures["torch_tokens_per_second"]
    figures["latent_vs_hf_generate_rollouts"] = figures["torch_rollouts_seconds"] / figures["latent_rollouts_seconds"]
    # Prompts have as many tokens as completions; processing one costs as much as decoding one, except for the LM head.
    read = cost - 2 * WIDE.hidden_size * WIDE.vocab_size
    figures["latent_decode_share_of_gemm_rate"] = rate * (cost + read) / figures["gemm_gflops_per_second"] / 1e9
    return figures


def learning(latent: str, base: str) -> dict[str, float]:
    figures = isolated("latent_learning", latent) | isolated("token_learning", base)
    figures["latent_vs_token_step_time"] = figures["latent_step_seconds"] / figures["token_step_seconds"]
    figures["latent_vs_token_optimizer_bytes"] = figures["latent_optimizer_bytes"] / figures["token_optimizer_bytes"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)}; default: all")
    asked = parser.parse_args().parts
    if unknown := [part for part in asked if part not in PARTS]:
        parser.error(f"{unknown[0]!r} is no part; give some of {', '.join(PARTS)}")
    file = RESULTS / "bench.json"
    figures: dict[str, float] = json.loads(file.read_text())["figures"] if asked and file.exists() else {}
    with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as latent:
        torch.manual_seed(0)
        LlamaForCausalLM(WIDE).save_pretrained(base)
        sizes = {"num_idm_layers": 1, "num_policy_layers": POLICY_LAYERS, "num_world_model_layers": WORLD_MODEL_LAYERS}
        CoLAForCausalLM.attach(base, **sizes).save_pretrained(latent)
        for part in asked or PARTS:
            if part in ("decoding", "learning"):
                figures |= (decoding if part == "decoding" else learning)(latent, base)
            else:
                figures |= isolated(part)
    record("bench", figures, about="Hidden 512, 8 + 2 layers, vocabulary 32 000, float32, one thread a process.")


if __name__ == "__main__":
    main()
