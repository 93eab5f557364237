"""What frameworks of others send to the endpoint of agent programs, and environments of verifiers that are played there.

The bodies are as they were on the wire: openai-agents 0.24.0, pydantic-ai 2.68.0, langchain-openai 1.7.4 and smolagents
1.26.0, each with one tool. With VERIFIERS_PYTHON and AGENTS_PYTHON, the Pythons of virtual environments that have
verifiers and openai-agents, the packages themselves are played, too.
"""

import asyncio
import json
import os
import random
import sys
import textwrap

import pytest
from runs import ROOT
from test_programs import EXAMPLES, TOOLS_TEMPLATE, speaker, tokens, utterance

from cola_ray.rollout.conversation import Conversation
from cola_ray.rollout.program_requests import RefusedError, choices
from cola_ray.rollout.programs import Limits, Programs
from cola_ray.rollout.tool_parser import ToolCalls

EXAMPLE = ROOT / "examples" / "verifiers_agent.py"
HELD_OUT = 2**30
CHAT, ENDINGS, END = tokens(TOOLS_TEMPLATE)


def played(command, says, seeds, *, max_turns=10, max_state_tokens=4000, tools=False):
    """Episodes in which a policy says what ``says`` makes of the conversation's text and the turn's number."""
    calls = ToolCalls(CHAT.tokenizer, "hermes") if tools else None

    async def generate(ids, turn, longest=0):
        return utterance(ids, [*CHAT.text_ids(says(CHAT.tokenizer.decode(ids), turn)), END])

    async def all_of_them():
        programs = Programs(
            command, lambda: Conversation(CHAT, ENDINGS, calls), Limits(1, 60.0, max_turns, max_state_tokens)
        )
        try:
            return await asyncio.gather(*(programs.play(place, seed, generate) for place, seed in enumerate(seeds)))
        finally:
            await programs.close()

    return asyncio.run(all_of_them())


# --- verifiers --------------------------------------------------------------------------------------------------------

STAND_IN = """
    import importlib

    def load_environment(name, **arguments):
        return importlib.import_module(name).load_environment(**arguments)

    class Environment:
        def __init__(self, dataset, eval_dataset=None, limit=4, groups=False):
            self.rows, self.held, self.limit, self.requires_group_rollouts = dataset, eval_dataset, limit, groups

        def get_dataset(self):
            return self.rows

        def get_eval_dataset(self):
            return self.held or self.rows

        async def run_rollout(self, row, client, model, sampling_args):
            said, stop, error = [{"role": "user", "content": row["question"]}], "max_turns_reached", None
            for _ in range(self.limit):
                try:
                    answer = await client.client.chat.completions.create(model=model, messages=said, **sampling_args)
                except Exception as raised:
                    if "maximum context length is" in str(raised):
                        stop = "prompt_too_long"
                    else:
                        stop, error = "has_error", {"error_chain_str": f"ModelError -> {raised}"}
                    break
                said += [answer.choices[0].message, {"role": "user", "content": "No. Guess again."}]
                if row["answer"] in said[-2].content:
                    stop = "guessed"
                    break
            reward = float(stop == "guessed") / (len(said) // 2) if len(said) > 1 else 0.0
            return {"reward": reward, "stop_condition": stop, "error": error}
"""
CLIENTS = """
    class OpenAIChatCompletionsClient:
        def __init__(self, client):
            self.client = client
"""
NUMBERS = """
    from verifiers import Environment

    def load_environment(**arguments):
        rows = [{"example_id": n, "question": f"Guess {n}.", "answer": str(n)} for n in range(3)]
        held = [{"example_id": 0, "question": "Guess the last.", "answer": "3"}]
        return Environment(rows, held, **arguments)
"""


@pytest.fixture
def numbers(tmp_path, monkeypatch):
    """The command of the example with an environment in which a number is guessed, and a stand-in for verifiers."""
    package = tmp_path / "verifiers"
    package.mkdir()
    for file, source in (
        (package / "__init__.py", STAND_IN), (package / "clients.py", CLIENTS), (tmp_path / "numbers_.py", NUMBERS),
    ):  # fmt: skip
        file.write_text(textwrap.dedent(source))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return f"{sys.executable} {EXAMPLE} {tmp_path}/numbers_.py"


def test_seeds_are_rows_and_held_out_ones_those_of_the_evaluation(numbers):
    seeds = [0, 1, 5, HELD_OUT, HELD_OUT + 1]
    episodes = played(numbers, lambda text, turn: str(turn), seeds)
    assert [(episode.failure, episode.terminated) for episode in episodes] == [("", True)] * 5
    assert [episode.total_reward for episode in episodes] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 4]
    assert ["Guess the last." in episode.text for episode in episodes] == [False] * 3 + [True] * 2
    assert {len(episode.as_trajectories()) for episode in episodes} == {1}, "a conversation stays one sequence"


def test_limits_of_the_run_cut_an_episode_and_its_rubric_scores_it(numbers):
    for limits in ({"max_turns": 2}, {"max_state_tokens": 60}):
        (episode,) = played(numbers, lambda text, turn: "none", [0], **limits)
        assert (episode.failure, episode.terminated, len(episode.turns)) == ("", False, 2)
    (episode,) = played(f"{numbers} '{json.dumps({'limit': 2})}'", lambda text, turn: "none", [0])
    assert episode.terminated, "the environment's own limit is one of its rules"


def test_a_rubric_that_scores_rollouts_together_is_refused(numbers):
    (episode,) = played(f"{numbers} '{json.dumps({'groups': True})}'", lambda text, turn: "none", [0])
    assert "its rubric scores rollouts of a row together" in episode.failure


# --- what clients send ------------------------------------------------------------------------------------------------

PRICE = {"name": "price", "description": "Return what one piece of a thing costs.",
         "parameters": {"type": "object", "properties": {"thing": {"type": "string"}}, "required": ["thing"]}}  # fmt: skip
TOOL = {"type": "function", "function": PRICE}
