"""What a rollout worker asks and counts: its problems and scores, over an engine that only echoes."""

import asyncio
import math
import types

import numpy as np
import pytest

from cola_ray.checks.engine_args import _OWNED, faults, known
from cola_ray.experience import Ticket
from cola_ray.rollout.engine import Completion
from cola_ray.rollout.reward_process import Reward
from cola_ray.rollout.worker import EngineWorker, RolloutWorker, engine_args
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset
from cola_ray.tasks.protocol import Problem

LIMIT = 9  # characters of a prompt: sums of two numbers fit, of three not


class Echo:
    """An engine's running batch that answers with the prompt."""

    def __init__(self):
        self.asked = []

    async def complete(self, requests):
        self.asked += requests
        ids = [np.asarray(request.prompt_ids, np.int64) for request in requests]
        return [Completion(one, one, one * 0.0, one * 0, False, None, computed_tokens=len(one)) for one in ids]


@pytest.fixture
def worker(monkeypatch):
    def serve(self, config, model_path, keep_hidden_states):
        self.config, self.latent, self.batch = config, True, Echo()
        self.chat = types.SimpleNamespace(prompt_ids=lambda question: [ord(letter) for letter in question])
        self.tokenizer = types.SimpleNamespace(pad_token_id=0, eos_token_id=1)
        self.endings = types.SimpleNamespace(strings=(), text=lambda ids: "".join(map(chr, ids)))

    monkeypatch.setattr(EngineWorker, "__init__", serve)
    monkeypatch.setattr(EngineWorker, "served", types.SimpleNamespace(sliding_window=None))
    config = override(preset("tiny"), {"rollout.max_prompt_tokens": LIMIT, "task.num_problems": 300})
    made = RolloutWorker(config, "", reward_model=lambda *_: None)

    async def score(split, indices, texts):
        questions = [made.task.problems(split)[index].question for index in indices]
        assert questions == list(texts), "each response is scored as an answer to its own problem"
        return [Reward(0.0, "hung") if index % 2 else Reward(float(index)) for index in indices]

    made._score = score
    return made


def test_held_out_prompts_that_are_too_long_are_left_out_and_counted(worker):
    facts = asyncio.run(worker.facts())
    heldout = [problem.question for problem in worker.task.problems("heldout")]
    fitting = [question for question in heldout if len(question) <= LIMIT]
    assert 0 < len(fitting) < len(heldout)
    assert facts["num_heldout"] == len(fitting)
    assert facts["num_heldout_too_long"] == len(heldout) - len(fitting)
    assert facts["shares_prompts"]
    answers = asyncio.run(worker.evaluate(range(len(fitting)), bare_base=False))
    rewards = [answer.reward for answer in answers]
    asked = ["".join(map(chr, request.prompt_ids)) for request in worker.batch.asked]
    assert asked == fitting, "whole, and in order"
    places = [heldout.index(question) for question in fitting]
    assert {place % 2 for place in places} == {0, 1}
    expected = [math.nan if place % 2 else place for place in places]
    np.testing.assert_array_equal(rewards, expected)
    kept = worker.config.samples.prompts
    assert 0 < kept < len(fitting)
    assert [one.text for answer in answers for one in answer.sequences] == fitting[:kept], "the rest stays where it is"
    assert [bool(one.failure) for answer in answers for one in answer.sequences] == [n % 2 == 1 for n in places[:kept]]


def test_answers_that_are_kept_have_the_source_of_their_own_problem(worker):
    problems = {
        "train": [Problem(0, "1", "", source="a")],
        "heldout": [Problem(i, "2", "", source="b") for i in (0, 1)],
    }
    worker.task = types.SimpleNamespace(problems=problems.get)
    worker.prompts = {split: [[ord(one.question)] for one in some] for split, some in problems.items()}
    worker.fitting = {split: [*range(len(some))] for split, some in problems.items()}
    answers = asyncio.run(worker.evaluate(range(2), bare_base=False))
    assert [one.source for answer in answers for one in answer.sequences] == ["b", "b"]
    groups = asyncio.run(worker.generate_groups([Ticket(0, 0)]))
    assert {one.source for group in groups for one in group.samples} == {"a"}
    assert [[one.source for one in group.read] for group in groups] == [["a"] * len(groups[0].samples)]


def test_texts_of_a_kept_steps_first_groups_go_along(worker):
    """Of the rest the loop gets records alone."""
    worker.config = override(worker.config, {"samples.every": 3, "samples.prompts": 2, "rl.prompts_per_step": 4})
    first = worker.fitting["train"][0]
    assert worker.task.problems("train")[first].question == "".join(map(chr, worker.prompts["train"][first]))
    beyond = 4 * (3 * worker.config.rl.max_steps - 1)  # a refill
    positions = [0, 1, 2, 4, 8, 9, 11, 12, beyond]  # of the steps that make versions 1, 1, 1, 2, 3, 3, 3, 4
    groups = asyncio.run(worker.generate_groups([Ticket(position, 0) for position in positions]))
    assert [group.position for group in groups if group.read] == [0, 1, 8, 9]
    assert all(len(group.read) == len(group.samples) for group in groups if group.read)


def test_settings_reach_the_engine():
    on_gpu = {"cluster.use_gpu": True, "model.dtype": "bfloat16"}
    changes = {
        "rollout.gpu_memory_utilization": 0.7, "rollout.max_num_batched_tokens": 4096, "rollout.prefix_caching": False,
        "rollout.quantization": "fp8", "rollout.kv_cache_dtype": "fp8", "rollout.optimization_level": 3,
        "rollout.async_scheduling": False, "rollout.engine_args": {"block_size": 64},
    }  # fmt: skip
    assert engine_args(override(preset("tiny"), on_gpu | changes)) == {
        "gpu_memory_utilization": 0.7, "max_num_batched_tokens": 4096, "enable_prefix_caching": False,
        "quantization": "fp8", "kv_cache_dtype": "fp8", "enforce_eager": False, "optimization_level": 3,
        "async_scheduling": False, "block_size": 64,
    }  # fmt: skip
    eager = engine_args(override(preset("tiny"), on_gpu | {"rollout.enforce_eager": True}))
    assert eager["enforce_eager"]
    assert not {"optimization_level", "quantization", "max_num_batched_tokens"} & {*eager}
    assert engine_args(preset("tiny")) == {"enable_prefix_caching": True}, "vLLM's CPU backend has its own of the rest"
    assert {*engine_args(override(preset("tiny"), on_gpu | changes))} <= known()


def test_names_of_arguments_are_those_of_vllm():
    """Read from its sources, they are what the class has; and what settings own is among them."""
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    assert known() == {field.name for field in fields(EngineArgs) if not field.name.startswith("_")}
    assert {*_OWNED} <= known()


def test_names_are_not_checked_where_vllm_is_not_installed(monkeypatch):
    config = override(preset("tiny"), {"rollout.engine_args": {"blok_size": 64, "seed": 3}})
    assert [line.split(":")[0] for line in faults(config)] == [
        "rollout.engine_args.blok_size = 64", "rollout.engine_args.seed = 3"
    ]  # fmt: skip
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    known.cache_clear()
    assert [line.split(":")[0] for line in faults(config)] == ["rollout.engine_args.seed = 3"]
    known.cache_clear()
