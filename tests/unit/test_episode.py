"""The multi-turn loop: ids and masks, rewards in their turns, cut episodes, failing environments, many at once."""

import asyncio
import time

import numpy as np
import pytest

from cola_ray.batch import collate
from cola_ray.packing import pack
from cola_ray.rollout.episode import EpisodeSetting, Utterance, play
from cola_ray.rollout.isolation import EnvironmentProcess
from cola_ray.tasks.guessing import TwentyQuestions, article

END = 1


def encode(text):
    return [ord(letter) + 2 for letter in text]


def decode(ids):
    return "".join(chr(int(i) - 2) for i in ids if i != END)


class Slow(TwentyQuestions):
    def step(self, utterance):
        if utterance == "hang":
            time.sleep(60)
        return super().step(utterance)


@pytest.fixture(scope="module")
def setting():
    processes = [EnvironmentProcess(Slow, timeout_s=1.5) for _ in range(2)]
    yield EpisodeSetting(processes, encode, decode, max_state_tokens=2000)
    for process in processes:
        process.close()


def speaker(lines, heard=None):
    """Says the lines in turn, then the first one for ever."""

    async def speak(ids, turn):
        if heard is not None:
            heard.append(decode(ids))
        text = lines[turn] if turn < len(lines) else lines[0]
        token_ids = np.array([*encode(text), END])
        size = len(token_ids)
        states = np.arange(len(ids) + size - 1, dtype=np.float32)[:, None]
        return Utterance(
            token_ids=token_ids, actions=np.arange(size) + 1, log_probs=-np.arange(size, dtype=np.float32),
            versions=np.full(size, turn), hidden_states=states,
        )  # fmt: skip

    return speak


def run(setting, lines, seed=3, heard=None, **more):
    return asyncio.run(play(more.pop("position", 0), seed, setting, speaker(lines, heard), **more))


def hidden(seed):
    return TwentyQuestions().reset(seed=seed)[1]["hidden"]


def test_a_won_episode(setting):
    heard = []
    win = f"Is it {article(hidden(3))}?"
    episode = run(setting, ["Is it alive?", win], heard=heard)
    alive = "Yes." if "Yes" in heard[1] else "No."
    assert heard == ["Questions:\n", f"Questions:\nIs it alive?{alive}\n"], "each state is the whole transcript"
    assert episode.text == f"Questions:\nIs it alive?{alive}\n{win}Yes.\n"
    assert [turn.reward for turn in episode.turns] == [-1, 0]
    assert (episode.total_reward, episode.terminated, episode.failure) == (-1, True, "")
    assert episode.final_features is None, "nothing follows an end"
    first, second = episode.turns
    assert decode(first.token_ids) == "Is it alive?"
    assert first.token_ids[-1] == END, "the stop token belongs to the utterance: its action is trained as well"
    before, length = len(first.state_ids), len(first.token_ids)
    said = before + length
    assert decode(second.state_ids[said:]) == f"{alive}\n"
    # Features are those of the last token before the utterance, and the mean of those read within it.
    assert (first.state_features, first.utterance_features) == (before - 1, before + (length - 2) / 2)


def test_only_the_policys_own_actions_are_trained_on(setting):
    episode = run(setting, ["Is it alive?", f"Is it {article(hidden(3))}?"])
    (trajectory,) = episode.as_trajectories()
    said = sum(len(turn.token_ids) for turn in episode.turns)
    assert trajectory.action_mask.sum() == said < len(trajectory.token_ids)
    (batch,) = collate(pack([trajectory]), [0.5], 1, 0, 0, 4096)
    padded = batch.padded()
    assert batch.num_actions_global == padded.action_mask.sum() == said
    for turn in episode.turns:
        start, end = len(turn.state_ids), len(turn.state_ids) + len(turn.token_ids)
        assert padded.action_mask[0, start - 1 : end - 1].all()
        assert (padded.actions[0, start - 1 : end - 1] == np.arange(end - start) + 1).all()
        assert (padded.input_ids[0, start:end] == turn.token_ids).all()
    assert not padded.actions[~padded.action_mask].any()


def test_twenty_questions_truncate_and_the_last_state_is_read(setting):
    episode = run(setting, ["Is it alive?"], read_state=speaker(["?"]))
    assert len(episode.turns) == 20
    assert not episode.terminated
    assert episode.total_reward == -20
    (whole,) = episode.as_trajectories()
    assert decode(episode.turns[-1].observation_ids) == episode.text.splitlines()[-1].split("?")[-1] + "\n"
    # The sequence goes on to that state's last token, for a value head to read.
    assert episode.final_features == len(whole.prompt_ids) + len(whole.token_ids) - 1
    assert whole.action_mask.sum() == sum(len(turn.token_ids) for turn in episode.turns)


def test_a_transcript_that_is_too_long_loses_its_oldest_turns(setting):
    heard = []
    small = EpisodeSetting(setting.environments, encode, decode, max_state_tokens=60)
    episode = run(small, [f"Is it {letter}?" for letter in "abcdefghij"], heard=heard)
    assert len(episode.turns) == 20
    assert max(len(turn.state_ids) for turn in episode.turns) <= 60
    lines = heard[6].splitlines()
    assert lines[0] == "Questions:"
    assert [line[:8] for line in lines[1:]] == ["Is it f?"], "as many whole turns as fit, the newest"
    pieces = episode.as_trajectories()
    assert len(pieces) > 1
    assert pack(pieces).num_actions.sum() == sum(len(turn.token_ids) for turn in episode.turns)


def test_many_at_once_and_the_failing_ones_fail_alone(setting):
    async def both():
        bad = play(0, 3, setting, speaker(["Is it alive?", "hang"]))
        good = [play(i, i, setting, speaker(["Is it alive?", "Is it round?"])) for i in range(1, 40)]
        return await asyncio.gather(bad, *good)

    bad, *good = asyncio.run(both())
    assert bad.failure == "took longer than 1.5 s"
    assert len(bad.turns) == 2, "what was said is kept"
    assert [episode.position for episode in good] == list(range(1, 40))
    assert {(len(episode.turns), episode.failure) for episode in good} == {(20, "")}
    alone = run(setting, ["Is it alive?", "Is it round?"], seed=7, position=7)
    assert good[6].text == alone.text
