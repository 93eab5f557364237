"""One iteration of RL in one process, without Ray: a rollout worker, the loop and the learner, step by step.

``Local`` stands in for Ray's actors. A small random model is rewarded for digits. Half a minute, most of it imports.
"""

import asyncio
import os
import tempfile

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
os.environ |= {"DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class Local:
    """How the loop makes, calls and ends workers: here they are plain objects in this process."""

    def __init__(self, make):
        self.spawn = make

    async def call(self, worker, method, *args):
        return await getattr(worker, method)(*args)

    def kill(self, worker): ...


def digits(problem, response):
    return sum(letter.isdigit() for letter in response) / max(len(response), 1)


def random_model(config, folder):
    import torch

    from cola_ray.learner.start_model import attach, make_tiny_llama, make_tokenizer
    from cola_ray.model import conversion
    from cola_ray.tasks import make_task

    tokenizer = make_tokenizer(make_task(config.task, config.seed))
    conversion.save(make_tiny_llama(len(tokenizer), tokenizer.eos_token_id, config.seed), tokenizer, f"{folder}/base")
    model, draw = attach(config, f"{folder}/base"), torch.Generator().manual_seed(config.seed)
    for parameter in model.world_model.parameters():  # untrained, it would repeat the base whatever the action
        parameter.data.normal_(std=0.3, generator=draw)
    conversion.save(model, tokenizer, folder)


async def one_iteration(config, model):
    from cola_ray.learner import engine, policies, rl
    from cola_ray.loop import controller, problems
    from cola_ray.replay.service import Shards
    from cola_ray.rollout.worker import RolloutWorker

    worker = RolloutWorker(config, model)
    shards = Shards(0, None, config.seed)  # without replay
    loop = controller.Controller(config, Local(lambda: worker), lambda *of: problems.Problems(*of, shards=shards))
    await loop.start(resumed=False)
    engine.join_group("gloo")
    learner = rl.RLLearner(config, policies.make_policy(config, model))
    await loop.begin(0, learner.buckets())
    batch = await loop.next_batch(rank=0, version=0)  # tickets, rollouts, rewards, advantages, dealt out to ranks
    batch = batch.fetched()
    print(f"produced {len(batch.sequences)} sequences with {batch.num_actions_global} actions, for example")
    for row in range(3):
        prompt, response = batch.sequences.prompts[row], batch.sequences.responses[row]
        text, actions = worker.tokenizer.decode([*prompt, *response]), batch.sequences.actions[row]
        print(f"  {text!r}: actions {actions}, advantage {batch.advantages[row]:+.2f}")
    metrics = learner.step(batch)
    print(f"learnt from them: loss {metrics['policy/loss']:+.4f}, gradient norm {metrics['policy/grad_norm']:.4f}")
    await loop.publish(1, learner.buckets(), metrics)
    assert await loop.next_batch(rank=0, version=1) is None  # the run is over after one step
    print(f"published: the worker holds version {worker.engine.version}")


if __name__ == "__main__":
    from cola_ray.settings.config import override
    from cola_ray.settings.presets import preset

    small = {"rl.max_steps": 1, "rl.prompts_per_step": 8, "rl.eval_problems": 8, "task.num_problems": 200}
    single = {"rollout.num_workers": 1, "cluster.learner_ranks": 1, "task.reward": f"{__file__}:digits"}
    tiny = override(preset("tiny"), small | single)
    with tempfile.TemporaryDirectory() as folder:
        random_model(tiny, folder)
        asyncio.run(one_iteration(tiny, folder))
