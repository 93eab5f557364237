"""What a rollout worker asks and counts: its problems and scores, over an engine that only echoes."""

import asyncio
import math
import types

import numpy as np
import pytest

from cola_ray.rollout.engine import Completion
from cola_ray.rollout.isolation import Reward
from cola_ray.rollout.worker import EngineWorker, RolloutWorker
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

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
    rewards = asyncio.run(worker.evaluate(range(len(fitting)), bare_base=False))
    asked = ["".join(map(chr, request.prompt_ids)) for request in worker.batch.asked]
    assert asked == fitting, "whole, and in order"
    places = [heldout.index(question) for question in fitting]
    assert {place % 2 for place in places} == {0, 1}
    expected = [math.nan if place % 2 else place for place in places]
    np.testing.assert_array_equal(rewards, expected)
