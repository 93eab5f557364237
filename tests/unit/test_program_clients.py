"""What frameworks of others send to the endpoint of agent programs, and environments of verifiers that are played.

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
from test_programs import EXAMPLES, TOOLS_TEMPLATE, tokens, utterance

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
                        stop, error = "has_error", {"error_chain_repr": f"ModelError() -> {raised!r}"}
                    break
                if not answer.choices[0].message.content:
                    stop, error = "has_error", {"error_chain_repr": "EmptyModelResponseError()"}
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


def test_an_answer_of_no_words_ends_an_episode_without_failing_it(numbers):
    (episode,) = played(numbers, lambda text, turn: "none" if turn == 0 else "", [0])
    assert (episode.failure, episode.terminated, len(episode.turns)) == ("", True, 2)


def test_a_rubric_that_scores_rollouts_together_is_refused(numbers):
    (episode,) = played(f"{numbers} '{json.dumps({'groups': True})}'", lambda text, turn: "none", [0])
    assert "its rubric scores rollouts of a row together" in episode.failure


ENVIRONMENTS = """
    import guess
    import verifiers as vf
    from datasets import Dataset

    class Guess(vf.MultiTurnEnv):
        async def env_response(self, messages, state, **kwargs):
            return [{"role": "user", "content": "No. Guess again."}]

        @vf.stop
        async def guessed(self, state):
            return bool(state["trajectory"]) and said(state["trajectory"][-1]["completion"], state["answer"]) > 0

    def said(completion, answer):
        return float(answer in (completion[-1].content or ""))

    def soon(completion, answer, state):
        return said(completion, answer) / len(state["trajectory"])

    def add(a: int, b: int) -> int:
        \"\"\"Add two numbers.

        Args:
            a: The first.
            b: The second.
        \"\"\"
        return a + b

    def rows(*pairs):
        return Dataset.from_list([{"question": question, "answer": answer} for question, answer in pairs])

    def load_environment():
        single = vf.SingleTurnEnv(dataset=rows(("Say tea.", "tea"), ("Say milk.", "milk")),
                                  eval_dataset=rows(("Say rice.", "rice")), rubric=vf.Rubric(funcs=[said]))
        several = Guess(dataset=rows(("Guess.", "3"), ("Guess on.", "none")), rubric=vf.Rubric(funcs=[soon]),
                        max_turns=80)
        tools = vf.ToolEnv(dataset=rows(("3 + 4?", "7"), ("5 + 4?", "9")), tools=[add], rubric=vf.Rubric(funcs=[said]))
        envs = [single, several, tools, guess.load_environment(highest=3)]
        return vf.EnvGroup(envs=envs, env_names=["single", "several", "tools", "of the documents"])
"""
OF_VERIFIERS, OF_AGENTS = os.environ.get("VERIFIERS_PYTHON", ""), os.environ.get("AGENTS_PYTHON", "")


@pytest.mark.slow
@pytest.mark.skipif(not OF_VERIFIERS, reason="VERIFIERS_PYTHON names no Python that has verifiers")
def test_environments_of_verifiers_are_played(tmp_path):
    """Questions, conversations, one of them to the limit of its tokens, and tools, one of them called wrongly."""
    (tmp_path / "several.py").write_text(textwrap.dedent(ENVIRONMENTS))
    (tmp_path / "guess.py").write_text(EXAMPLES["guess.py"])

    def says(text, turn):
        call = 'So <tool_call>{{"name":  "{}", "arguments": {}}}</tool_call>'
        if "3 + 4?" in text:
            return [call.format("add", '{"a": 3, "b": 4}'), "It is 7"][turn]
        if "5 + 4?" in text:
            return [call.format("mul", "{}"), call.format("add", '{"a": 3}'), "It is 8"][turn]
        return f"rice or milk {turn}"

    episodes = played(f"{OF_VERIFIERS} {EXAMPLE} {tmp_path}/several.py", says, [*range(6), 6, 8, HELD_OUT], tools=True,
                      max_turns=100, max_state_tokens=700)  # fmt: skip
    assert [episode.failure for episode in episodes] == [""] * 9
    assert [episode.total_reward for episode in episodes] == [0, 1, 1 / 4, 0, 1, 0, 1, 1 / 3, 1]
    assert [len(episode.turns) for episode in episodes if episode.terminated] == [1, 1, 4, 2, 3, 1, 3, 1]
    assert not episodes[3].terminated, "its conversation became too long"
    assert {(len(episode.as_trajectories()), episode.retokenised) for episode in episodes} == {(1, 0)}


# --- what clients send ------------------------------------------------------------------------------------------------

THING = {"thing": {"type": "string"}}
QUESTION, RESULT = "What do 3 tea cost?", {"role": "tool", "tool_call_id": "ID", "content": "3"}
PRICE = {"name": "price", "description": "Return what one piece of a thing costs."}


def tool(parameters, **further):
    return {"type": "function", "function": {**PRICE, "parameters": {"type": "object", **parameters}, **further}}


def called(arguments):
    call = {"id": "ID", "type": "function", "function": {"name": "price", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


SENT = {
    "openai-agents": (
        {"model": "policy", "tools": [tool({"properties": {"thing": {"title": "Thing", "type": "string"}},
                                            "required": ["thing"], "title": "price_args",
                                            "additionalProperties": False}, strict=True)]},
        [{"role": "user", "content": QUESTION}],
        [called('{"thing": "tea"}'), RESULT],
    ),
    "pydantic-ai": (
        {"model": "policy", "stream": False, "tool_choice": "auto",
         "tools": [tool({"additionalProperties": False, "properties": THING, "required": ["thing"]}, strict=True)]},
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        [called('{"thing":"tea"}'), RESULT],
    ),
    "langchain-openai": (
        {"model": "policy", "stream": False, "max_completion_tokens": 50,
         "tools": [tool({"properties": THING, "required": ["thing"]})]},
        [{"content": "Be brief.", "role": "system"},
         {"content": [{"type": "text", "text": QUESTION}], "role": "user"}],
        [called('{"thing": "tea"}'), RESULT],
    ),
    "smolagents": (  # with tool_choice="auto"; it writes the model's calls and what came of them as text
        {"model": "policy", "stop": ["Observation:", "Calling tools:"], "tool_choice": "auto",
         "tools": [tool({"properties": THING, "required": ["thing"]})]},
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
         {"role": "user", "content": [{"type": "text", "text": f"New task:\n{QUESTION}"}]}],
        [{"role": "assistant", "content": [{"type": "text", "text": "Calling tools:\n[{'id': 'c1'}]"}]},
         {"role": "user", "content": [{"type": "text", "text": "Observation:\n3"}]}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("client", SENT)
def test_what_frameworks_send_is_served_and_keeps_what_was_sampled(client):
    """However a framework writes a call down again, its ids stay; smolagents makes a text of it, which is another."""
    body, opening, then = SENT[client]
    assert choices({**body, "messages": opening}) == (1, body.get("max_completion_tokens", 0))
    conversation = Conversation(CHAT, ENDINGS, ToolCalls(CHAT.tokenizer, "hermes"))
    state = conversation.state({**body, "messages": opening})
    said = [*CHAT.text_ids('<tool_call>{"name":  "price", "arguments": {"thing": "tea"}}</tool_call>'), END]
    answer = conversation.answer({**body, "messages": opening}, state, [utterance(state.ids, said)])
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    replies = json.loads(json.dumps(then).replace('"ID"', json.dumps(call["id"])))
    following = conversation.state({**body, "messages": [*opening, *replies]})
    kept = following.ids[: len(state.ids) + len(said)] == [*state.ids, *said]
    assert (kept, following.retokenised) == ((False, 1) if client == "smolagents" else (True, 0))
    assert "3" in CHAT.tokenizer.decode(following.ids[len(state.ids) :])


@pytest.mark.parametrize("arguments", [{"thing": "tea"}, json.dumps({"thing": "tea"}), "tea", json.dumps("[1")])
def test_a_call_that_comes_back_as_it_was_answered_keeps_its_ids(arguments):
    """Models also write arguments as a string, which the parser passes on as it is."""
    conversation = Conversation(CHAT, ENDINGS, ToolCalls(CHAT.tokenizer, "hermes"))
    body = {"messages": [{"role": "user", "content": QUESTION}], "tools": [tool({})]}
    state = conversation.state(body)
    text = f"<tool_call>{json.dumps({'name': 'price', 'arguments': arguments})}</tool_call>"
    said = [*CHAT.text_ids(text), END]
    message = conversation.answer(body, state, [utterance(state.ids, said)])["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "3"}
    following = conversation.state(body | {"messages": [*body["messages"], message, result]})
    assert following.ids[: len(state.ids) + len(said)] == [*state.ids, *said]
    assert following.retokenised == 0


@pytest.mark.parametrize("tools", [{}, {"tools": []}, {"tools": None}, {"tools": [tool({})], "tool_choice": "none"}])
def test_a_turn_without_tools_is_served_where_calls_are_parsed(tools):
    conversation = Conversation(CHAT, ENDINGS, ToolCalls(CHAT.tokenizer, "hermes"))
    body = {"messages": [{"role": "user", "content": QUESTION}], **tools}
    state = conversation.state(body)
    assert "price" not in CHAT.tokenizer.decode(state.ids)
    said = utterance(state.ids, [*CHAT.text_ids('<tool_call>{"name": "price", "arguments": {}}</tool_call>'), END])
    message = conversation.answer(body, state, [said])["choices"][0]["message"]
    assert "tool_calls" not in message


ASKS_NOTHING = {
    "stream": False, "stream_options": None, "n": 1, "store": True, "metadata": {"run": "1"}, "user": "me", "seed": 3,
    "parallel_tool_calls": True, "tool_choice": "auto", "response_format": {"type": "text"}, "logit_bias": {},
    "max_completion_tokens": None, "top_logprobs": None, "logprobs": False, "service_tier": "auto", "stop": ["\n"],
    "reasoning_effort": "low", "temperature": 0.2, "prediction": None, "continue_final_message": False,
}  # fmt: skip


def test_fields_that_ask_for_nothing_are_served():
    assert choices(ASKS_NOTHING) == (1, 0)
    for name, value in ASKS_NOTHING.items():
        assert choices({name: value}) in {(1, 0)}


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("stream", True, "answers come whole"),
        ("tool_choice", "required", 'use "auto" or "none"'),
        ("tool_choice", {"type": "function", "function": {"name": "price"}}, 'use "auto" or "none"'),
        ("parallel_tool_calls", False, "a message may have several calls"),
        ("response_format", {"type": "json_object"}, "ask for a form in the messages"),
        ("guided_regex", "[0-9]+", "ask for a form in the messages"),
        ("continue_final_message", True, "begins a message"),
        ("chat_template_kwargs", {"enable_thinking": False}, "data.chat_options"),
    ],
)
def test_what_would_mean_something_else_is_refused(name, value, why):
    with pytest.raises(RefusedError, match=f"^{name} = .*{why}"):
        choices({name: value})


ASKS = """
    import os
    from openai import APIStatusError, OpenAI
    client, said = OpenAI(default_headers={"X-Anything": "1"}), []
    assert [model.id for model in client.models.list()] == ["cola_ray"]
    assert client.models.retrieve("somebody/policy").id == "somebody/policy"
    for ask in (
        lambda: client.responses.create(model="policy", input="go"),
        lambda: client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "go " * 90}]),
    ):
        try:
            ask()
        except APIStatusError as error:
            said.append((error.status_code, error.code, error.body["message"]))
    assert said[0] == (
        404, "not_found",
        "POST responses: not served; below OPENAI_BASE_URL are chat/completions, reward, episodes and models",
    )
    assert said[1][:2] == (400, "context_length_exceeded")
    assert "this model's maximum context length is 50 tokens (rollout.max_prompt_tokens is 50)" in said[1][2]
    client.chat.completions.create(model="policy", messages=[{"role": "developer", "content": "go"}])
    client.post("/reward", body={"reward": 1}, cast_to=object)
"""


def test_clients_are_told_what_they_understand(tmp_path):
    """A model that is looked up, an API that is not served, and OpenAI's words for a conversation that is too long."""
    (tmp_path / "asks.py").write_text(textwrap.dedent(ASKS))
    (episode,) = played(f"{sys.executable} {tmp_path}/asks.py", lambda text, turn: "yes", [0], max_state_tokens=50)
    assert (episode.failure, episode.total_reward) == ("", 1)


@pytest.mark.slow
@pytest.mark.skipif(not OF_AGENTS, reason="AGENTS_PYTHON names no Python that has openai-agents")
def test_the_documents_agent_of_a_framework_plays(tmp_path):
    (tmp_path / "clerk.py").write_text(EXAMPLES["clerk.py"])
    draw = random.Random(3)
    prices = {"tea": 3, "milk": 2, "bread": 4}
    thing, count = draw.choice([*prices]), draw.randint(2, 9)

    def says(text, turn):
        call = json.dumps({"name": "price", "arguments": {"thing": thing}})
        return f"<tool_call>{call}</tool_call>" if turn == 0 else f"That is {count * prices[thing]}"

    (episode,) = played(f"{OF_AGENTS} {tmp_path}/clerk.py", says, [3], tools=True)
    assert (episode.failure, episode.total_reward, len(episode.turns)) == ("", 1, 2)
    assert (len(episode.as_trajectories()), episode.retokenised) == (1, 0)
