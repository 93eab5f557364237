"""What agent programs ask and reward, request by request: which turns an episode has, and how it ends."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.parse
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from test_programs import CHAT, END, ENDINGS, post, speaker, utterance

from cola_ray.algorithms.gigpo import returns_to_go
from cola_ray.algorithms.ppo import generalised_advantages
from cola_ray.loop.episodes import _turn_rewards
from cola_ray.replay.transitions import as_rows
from cola_ray.rollout.conversation import Conversation
from cola_ray.rollout.playing import Playing
from cola_ray.rollout.program_requests import Reward
from cola_ray.rollout.programs import Limits, Programs
from cola_ray.tasks.endings import Endings
from cola_ray.tasks.protocol import LARGEST_REWARD

GO = {"messages": [{"role": "user", "content": "go"}]}
ASK, REWARD = "chat/completions", "reward"


def said(talk, *, generate=None, read_state=None, max_turns=10, max_state_tokens=2000):
    """The episode of a program that sends what ``talk(send, url)`` does, and what that returns."""

    async def all_of_it():
        programs = Programs(
            "sleep 60", lambda: Conversation(CHAT, ENDINGS), Limits(1, 20.0, max_turns, max_state_tokens)
        )
        episode = asyncio.create_task(programs.play(0, 7, generate or speaker(), read_state))
        while not programs.processes:
            await asyncio.sleep(0.01)
        (key,) = programs.playing
        url = f"{programs.address}/{key}/v1"

        async def send(path, body):
            return await asyncio.to_thread(post, f"{url}/{path}", body)

        try:
            found = await talk(send, url)
            return await asyncio.wait_for(episode, 30.0), found
        finally:
            await programs.close()

    return asyncio.run(all_of_it())


def exchange(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]}


def test_a_reward_goes_to_the_answer_that_it_names():
    async def talk(send, url):
        _, first = await send(ASK, GO | {"n": 3})
        (_, second), (_, third) = await asyncio.gather(send(ASK, GO), send(ASK, exchange("come")))
        ids = [answer["id"] for answer in (first, second, third)]
        assert len({*ids}) == 3
        refused = [
            await send(REWARD, {"reward": 1, "done": False} | which)
            for which in ({"id": "chatcmpl-x"}, {"id": ids[0], "index": 3}, {"id": ids[0], "index": -1},
                          {"id": 3}, {"id": ids[0], "index": "0"}, {"answer": ids[0]})
        ]  # fmt: skip
        assert [status for status, _ in refused] == [400] * 6
        for (_, line), part in zip(
            refused,
            ["no such answer", "has 3 choices", "has 3 choices", "give a completion's", "that of a choice", "answer: "],
            strict=True,
        ):
            assert part in line
        for reward, which in [(1, {"id": ids[0], "index": 0}), (2, {"id": ids[0]}), (4, {"id": ids[2]}),
                              (8, {"id": ids[1]}), (16, {"id": ids[0], "index": 0})]:  # fmt: skip
            assert (await send(REWARD, {"reward": reward, "done": False} | which))[0] == 200
        return await send(REWARD, {"reward": 32, "id": ids[0], "index": 1})

    episode, (status, answer) = said(talk)
    assert (status, answer) == (200, {"return": 63.0})
    of_prompt = {
        CHAT.tokenizer.decode(turn.state_ids).split("\n")[1].removesuffix("<|im_end|>"): turn.reward
        for turn in episode.turns[3:]
    }
    assert [turn.reward for turn in episode.turns[:3]] == [17, 32, 2]
    assert sum(of_prompt.values()) == 12
    assert of_prompt["come"] == 4


def reader(asked):
    async def read(ids, turn, longest=1):
        asked.append([*ids])
        hidden = np.arange(len(ids) * 2, dtype=np.float32).reshape(len(ids), 2)
        spoken = utterance(ids, [END])
        return type(spoken)(spoken.token_ids, spoken.actions, spoken.log_probs, spoken.versions, hidden)

    return read


@pytest.mark.parametrize("says_where", [True, False])
def test_an_episode_that_was_cut_still_has_a_value_where_it_was(says_where):
    async def talk(send, url):
        _, answer = await send(ASK, GO)
        then = exchange("go", answer["choices"][0]["message"]["content"], "no time left")
        for wrong in ({"truncated": 1}, {"truncated": True, "done": False}, {"done": 0}, then):
            status, line = await send(REWARD, {"reward": 1} | wrong)
            assert status == 400
            assert line.startswith(("truncated = ", "done = ", "messages: "))
        return await send(REWARD, {"reward": 1, "truncated": True} | (then if says_where else {}))

    read = []
    episode, (status, _) = said(talk, read_state=reader(read))
    assert status == 200
    assert (episode.terminated, episode.failure, episode.total_reward) == (False, "", 1.0)
    (turn,), (where,) = episode.turns, read
    whole = [*turn.state_ids, *turn.token_ids]
    assert where[: len(whole)] == whole
    rest = CHAT.tokenizer.decode(where[len(whole) :])
    assert rest == ("\n<|im_start|>user\nno time left<|im_end|>\n<|im_start|>assistant\n" if says_where else "")
    assert turn.observation_ids.tolist() == where[len(whole) :]
    np.testing.assert_array_equal(episode.final_features, [2 * len(where) - 2, 2 * len(where) - 1])
    (row,) = as_rows([episode], 2).to_pylist()
    assert (row["terminated"], row["next_state"]) == (False, episode.final_features.tolist())
    (sequence,) = episode.as_trajectories(gamma=0.5)
    assert sequence.discounts[sequence.action_mask][-1] == 0.5, "PPO's value of the last state counts"
    assert [*sequence.prompt_ids, *sequence.token_ids] == where


@pytest.mark.parametrize(
    ("tells", "terminated"), [({}, False), ({"truncated": False}, True), ({"truncated": True}, False)]
)
def test_a_program_that_would_have_gone_on_was_cut(tells, terminated):
    async def talk(send, url):
        _, answer = await send(ASK, GO)
        then = exchange("go", answer["choices"][0]["message"]["content"], "on")
        status, line = await send(ASK, then)
        assert status == 400
        assert "max_turns is 1" in line
        assert (await send(REWARD, {"reward": 1} | tells))[0] == 200

    read = []
    episode, _ = said(talk, read_state=reader(read), max_turns=1)
    assert episode.terminated is terminated
    assert len(read) == (not terminated)
    assert CHAT.tokenizer.decode(episode.turns[0].observation_ids).count("on<|im_end|>") == (not terminated)


def test_a_state_that_is_too_long_to_be_read_is_read_at_its_end():
    async def talk(send, url):
        _, answer = await send(ASK, GO)
        most = answer["usage"]["prompt_tokens"]
        limits.append(most)
        assert (await send(REWARD, {"reward": 1, "truncated": True, **exchange("go", "and", "on")}))[0] == 400
        assert (await send(REWARD, {"reward": 1, "truncated": True}))[0] == 200

    limits, read = [], []
    most = len(Conversation(CHAT, ENDINGS).state(GO).ids)
    episode, _ = said(talk, read_state=reader(read), max_state_tokens=most)
    (turn,) = episode.turns
    assert limits == [most]
    assert read == [[*turn.state_ids, *turn.token_ids][-most:]]


def test_rewards_of_a_turn_stay_within_what_a_reward_may_be():
    async def talk(send, url):
        await send(ASK, GO)
        found = [await send(REWARD, {"reward": LARGEST_REWARD, "done": False}) for _ in range(2)]
        await send(REWARD, {"reward": 0})
        return found

    episode, (first, second) = said(talk)
    assert (first[0], second[0], episode.total_reward) == (200, 400, LARGEST_REWARD)
    assert "with those before it" in second[1]


def test_the_last_turn_that_there_may_be_is_an_end_like_any_other():
    async def talk(send, url):
        assert (await send(ASK, GO | {"n": 2}))[0] == 400
        assert (await send(ASK, GO))[0] == 200
        await send(REWARD, {"reward": 1})

    episode, _ = said(talk, max_turns=1)
    assert (episode.terminated, len(episode.turns)) == (True, 1)


def test_only_what_the_model_was_asked_for_counts_as_changed():
    conversation = Conversation(CHAT, ENDINGS)
    shots = exchange("two and two", "four", "three and three", "six", "go")["messages"]
    for _ in range(2):
        state = conversation.state({"messages": shots})
        assert state.retokenised == 0, "a program's own examples"
        answer = conversation.answer({}, state, [utterance(state.ids, [*CHAT.text_ids("yes"), END])])
        message = answer["choices"][0]["message"]
    on = {"role": "user", "content": "on"}
    assert conversation.state({"messages": [*shots, message, on]}).retokenised == 0
    changed = [*shots, message | {"content": "no"}, on]
    assert conversation.state({"messages": changed}).retokenised == 1
    state = conversation.state({"messages": changed})
    conversation.answer({}, state, [utterance(state.ids, [*CHAT.text_ids("well"), END])])
    later = [*changed, {"role": "assistant", "content": "well"}, on]
    assert conversation.state({"messages": later}).retokenised == 1, "the one, each time"
    others = exchange("of another kind", "an example", "go", "and one", "go")
    assert conversation.state(others).retokenised == 0


def test_what_follows_a_break_counts_as_it_came():
    """Conversations that take turns: nothing of the next one can be read at the end of the one before."""
    rewards, gamma = [1.0, -2.0, 4.0, 8.0], 0.9

    async def talk(send, url):
        for number, reward in enumerate(rewards):
            assert (await send(ASK, exchange(f"conversation {number % 3}")))[0] == 200
            assert (await send(REWARD, {"reward": reward, "done": number + 1 == len(rewards)}))[0] == 200

    episode, _ = said(talk)
    pieces = episode.as_trajectories(gamma)
    assert len(pieces) == len(rewards)
    for number, piece in enumerate(pieces):
        row = [torch.tensor(part)[None] for part in (piece.rewards, piece.discounts, piece.action_mask)]
        unfitted = torch.full(row[0].shape, 0.0), torch.full((1,), 1e9)
        gains = generalised_advantages(row[0], row[1], *unfitted, row[2], 1.0)[0]
        later = sum(gamma**n * reward for n, reward in enumerate(rewards[number:]))
        np.testing.assert_allclose(gains[row[2][0]], later, rtol=1e-6)
    summed = sum(piece.rewards.sum() for piece in episode.as_trajectories(0.0))
    assert summed == sum(rewards), "where each turn is by itself, each has its own"


def conversed(talks, *, ends=(END,), rewards=(1.0,)):
    """The episode of requests in order: messages, the model's words, the token that ends them. The last answers get the
    rewards."""

    async def all_of_it():
        conversation = Conversation(CHAT, Endings(CHAT.tokenizer, ends))
        playing = Playing(0, 7, None, None, conversation, asyncio.get_running_loop().create_future())
        for messages, *choices in talks:
            state = conversation.state(messages)
            with playing.turns(len(choices)) as turns:
                made = [utterance(state.ids, [*CHAT.text_ids(text), end]) for text, end in choices]
                answer = conversation.answer(messages, state, made, turns)
                playing.said(state, turns, made, answer["id"])
        for index, reward in enumerate(rewards):
            playing.reward(playing.rewarded(Reward(reward, answer["id"], index, False, None)), reward)
        playing.end()
        return playing.ended.result()

    return asyncio.run(all_of_it())


@pytest.mark.parametrize("rewards", [(1.0, 0.0), (0.0, 1.0)])
def test_choices_of_one_answer_do_not_follow_one_another(rewards):
    episode = conversed([(GO, ("so", END)), (GO, ("left", END), ("right", END))], rewards=rewards)
    before, *both = episode.as_trajectories(0.5)
    assert [sequence.rewards.sum() for sequence in both] == [*rewards]
    assert before.rewards.sum() == 0.5, "the turn before is followed by the whole answer"
    own = returns_to_go([turn.reward for turn in episode.turns], 0.5, episode.answers)
    assert own.tolist() == [0.5, *rewards]
    rows = as_rows([episode], 2).to_pylist()
    assert [row["terminated"] for row in rows] == [False, True, True]
    assert len({*_turn_rewards(episode, whole_state=False).anchors}) == 1, "all three answer the same words"


def test_what_follows_an_answer_follows_each_of_its_choices():
    on = exchange("go", "right", "on")
    episode = conversed([(GO, ("left", END), ("right", END)), (on, ("done", END))], rewards=(4.0,))
    assert [turn.left for turn in episode.turns] == [True, False, False]
    left, right = episode.as_trajectories(0.5)
    assert left.rewards.sum() == 2.0
    assert right.action_mask.sum() == sum(len(turn.token_ids) for turn in episode.turns[1:])
    rows = as_rows([episode], 2).to_pylist()
    assert rows[0]["next_state"] == rows[1]["next_state"] == rows[2]["state"]


def test_an_answer_is_looked_for_in_its_own_conversation():
    """Two conversations take turns, and the model says the same in both."""
    talks = [(exchange("a"), ("yes", END)), (exchange("x"), ("yes", END)), (exchange("a", "yes", "b"), ("no", END))]
    episode = conversed(talks)
    assert [turn.left for turn in episode.turns] == [True, True, False]
    assert [sequence.rewards.sum() for sequence in episode.as_trajectories(0.5)] == [0.25, 0.5, 1.0]


def test_an_answer_with_another_end_than_the_templates_is_found():
    other = CHAT.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    episode = conversed([(exchange("a"), ("yes", other)), (exchange("a", "yes", "b"), ("no", END))], ends=(END, other))
    first, _ = episode.turns
    assert not first.left
    assert CHAT.tokenizer.decode(first.observation_ids) == "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    early, late = episode.as_trajectories(0.5)
    assert (early.rewards.sum(), early.discounts[early.action_mask][-1]) == (0.0, 0.5)
    assert late.rewards.sum() == 1.0


def test_where_older_messages_are_left_out_the_value_is_read_at_what_came_last():
    async def talk(send, url):
        messages = exchange("go")["messages"]
        for place in range(3):
            _, answer = await send(ASK, {"messages": messages[-3:]})
            messages += [answer["choices"][0]["message"], {"role": "user", "content": f"news {place}"}]
        await send(REWARD, {"reward": 1})

    episode, _ = said(talk)
    first, second, _ = episode.turns
    for turn, news in ((first, 0), (second, 1)):
        text = CHAT.tokenizer.decode(turn.observation_ids)
        assert text == f"\n<|im_start|>user\nnews {news}<|im_end|>\n<|im_start|>assistant\n"
    early, late = episode.as_trajectories(0.5)
    assert early.discounts[early.action_mask][-1] == 0.5
    assert early.rewards.sum() == 0
    assert CHAT.tokenizer.decode(early.token_ids).endswith("news 1<|im_end|>\n<|im_start|>assistant\n")
    assert late.discounts[late.action_mask][-1] == 0


def test_requests_that_come_to_nothing_are_no_turns():
    """Cancelled ones free their places, and their seeds; so do those that go away as they are answered."""
    started, asked, held = [], [], []

    async def generate(ids, turn, longest=0):
        asked.append(turn)
        if len(asked) <= 2:
            started.append(turn)
            held.append(asyncio.Event())
            await held[-1].wait()
        return utterance(ids, [*CHAT.text_ids(f"yes {turn}"), END])

    async def talk(send, url):
        parts = urllib.parse.urlsplit(url)
        content = json.dumps(GO | {"n": 2}).encode()
        head = f"POST {parts.path}/{ASK} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        _, gone = await asyncio.open_connection(parts.hostname, parts.port)
        gone.write(head.encode() + content)
        while len(started) < 2:
            await asyncio.sleep(0.01)
        assert (await send(ASK, GO))[0] == 400, "while they are under way there is no place for a third"
        gone.close()
        deadline = time.monotonic() + 10
        while (found := await send(ASK, GO))[0] == 400 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for one in held:
            one.set()
        assert found[0] == 200
        assert (await send(ASK, GO))[0] == 200
        assert (await send(ASK, GO))[0] == 400
        await send(REWARD, {"reward": 1, "truncated": False})

    episode, _ = said(talk, generate=generate, max_turns=2)
    assert asked == [0, 1, 0, 1]
    assert episode.text.count("yes") == len(episode.turns) == 2


@pytest.mark.parametrize(
    ("name", "served", "refused"),
    [
        ("stream", [False, None], [True]),
        ("tool_choice", ["auto", "none", None], ["required", {"type": "function", "function": {"name": "add"}}]),
        ("parallel_tool_calls", [True], [False]),
        ("response_format", [{"type": "text"}], [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}]),
        ("structured_outputs", [], [{"json": {}}]),
        ("logit_bias", [{}], [{"5": -100}]),
        ("top_logprobs", [0], [3]),
        ("functions", [[]], [[{"name": "add"}]]),
        ("modalities", [["text"]], [["text", "audio"]]),
        ("chat_template_kwargs", [], [{"enable_thinking": False}]),
        ("temperature", [0.0, 2.0], []), ("top_p", [0.1], []), ("stop", ["x", ["y"]], []), ("seed", [3], []),
        ("frequency_penalty", [1.0], []), ("user", ["me"], []), ("n", [1, None], [0, 65, True, "2"]),
        ("max_tokens", [3], [0, 2.5]), ("max_completion_tokens", [3], [0]),
    ],
)  # fmt: skip
def test_what_would_change_an_answer_is_served_or_refused(name, served, refused):
    async def talk(send, url):
        found = [await send(ASK, GO | {name: value}) for value in (*served, *refused)]
        await send(ASK, GO)
        await send(REWARD, {"reward": 1})
        return found

    _, found = said(talk)
    assert [status for status, _ in found] == [200] * len(served) + [400] * len(refused)
    for _, line in found[len(served) :]:
        assert line.startswith(f"{name} = ")
        assert "\n" not in line


def test_hidden_states_are_not_kept_for_an_episode():
    spoken = []

    async def generate(ids, turn, longest=0):
        assert [one() for one in spoken] == [None] * turn
        one = utterance(ids, [*CHAT.text_ids("yes"), END])
        one.hidden_states[:] = turn + 1
        spoken.append(weakref.ref(one.hidden_states))
        return one

    async def talk(send, url):
        for _ in range(3):
            assert (await send(ASK, GO))[0] == 200
        await send(REWARD, {"reward": 1})

    episode, _ = said(talk, generate=generate)
    for number, turn in enumerate(episode.turns):
        assert turn.state_features.tolist() == turn.utterance_features.tolist() == [number + 1] * 2


GRANDCHILD = """
    import os, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); os.fork() and os._exit(0); "
                              "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)".replace(
                              "import os", "import os, sys"), sys.argv[1]])
    child.wait()
    {then}
"""


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("ends", ["owner killed", "owner closes", "program ends"])
def test_nothing_that_a_program_has_started_outlives_it(tmp_path, ends):
    """Not even what has left its session and its parent."""
    told, program = tmp_path / "pid", tmp_path / "agent.py"
    program.write_text(textwrap.dedent(GRANDCHILD.format(then="" if ends == "program ends" else "time.sleep(600)")))
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(f"""
            import asyncio, sys
            from cola_ray.rollout.program_process import Process
            async def main():
                process = Process("", None)
                await process.start([sys.executable, {str(program)!r}, {str(told)!r}], {{}})
                await asyncio.to_thread(sys.stdin.readline)
                process.kill()
                print(await process.running.wait(), flush=True)
                await asyncio.sleep(600)
            asyncio.run(main())
        """)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (told.exists() and told.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pid = int(told.read_text())
        if ends == "owner killed":
            assert alive(pid)
            owner.send_signal(signal.SIGKILL)
        elif ends == "owner closes":
            assert alive(pid)
            owner.stdin.write("\n")
            owner.stdin.flush()
            assert owner.stdout.readline(), "it waits until all have ended"
            assert not alive(pid)
        deadline = time.monotonic() + 20
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(pid)
    finally:
        owner.kill()
        owner.communicate()
        if alive(pid := int(told.read_text() or "0")) and pid:
            os.kill(pid, signal.SIGKILL)
