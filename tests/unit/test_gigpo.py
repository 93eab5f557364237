"""GiGPO (Feng et al. 2025, arXiv 2505.10978): advantages of turns against the paper's equations, turn by turn."""

import numpy as np
import pytest
import torch
from test_agents import Worker, metrics_of, run

from cola_ray.algorithms.gigpo import TurnRewards, advantages, returns_to_go, same_state
from cola_ray.experience import Episode, Turn

SCALES = ["group", "batch", "none"]


def drawn(seed):
    """Groups of 1 to 5 episodes of 1 to 7 turns each, in few states, which come back within an episode as well."""
    draw = np.random.default_rng(seed)
    return [
        [
            TurnRewards(draw.normal(size=turns).tolist(), draw.integers(0, 4, turns).tolist())
            for turns in draw.integers(1, 8, draw.integers(1, 6))
        ]
        for _ in range(draw.integers(1, 5))
    ]


def brute_force(groups, gamma, weight, scale):
    """Equations 3 to 8 as they stand, a turn at a time."""

    def relative(value, others, everything):
        if len(others) == 1:
            return 0.0
        divisor = {"group": lambda: np.std(others, ddof=1), "none": lambda: 1.0,
                   "batch": lambda: np.std(everything, ddof=1)}[scale]()  # fmt: skip
        return (value - np.mean(others)) / divisor

    def to_go(episode, turn):
        return sum(gamma ** (later - turn) * episode.rewards[later] for later in range(turn, len(episode.rewards)))

    all_returns = [sum(episode.rewards) for group in groups for episode in group]
    all_to_go = [to_go(episode, turn) for group in groups for episode in group for turn in range(len(episode.rewards))]
    made = []
    for group in groups:
        for episode in group:
            whole = relative(sum(episode.rewards), [sum(one.rewards) for one in group], all_returns)
            of_turns = []
            for turn, state in enumerate(episode.anchors):
                alike = [to_go(one, place) for one in group for place, other in enumerate(one.anchors)
                         if other == state]  # fmt: skip
                of_turns.append(whole + weight * relative(to_go(episode, turn), alike, all_to_go))
            made.append(of_turns)
    return made


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", range(20))
def test_advantages_are_the_papers(seed, scale):
    groups = drawn(seed)
    gamma, weight = [(0.95, 1.0), (1.0, 0.5), (0.0, 2.0), (0.5, 0.0)][seed % 4]
    found, by_hand = advantages(groups, gamma, weight, scale), brute_force(groups, gamma, weight, scale)
    assert [one.dtype for one in found] == [torch.float64] * len(by_hand)
    for one, wanted in zip(found, by_hand, strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-12, atol=1e-12)


def test_a_worked_example():
    """Two ways out of room a; the second episode walks in a circle first. gamma 0.5, weight 2.

    Returns 1, 0 and 1, mean 2/3. From a: 0.5 (through b), 0 (ends there), 0.25 (back to a) and 1, mean 0.4375.
    """
    group = [
        TurnRewards([0.0, 1.0], ["a", "b"]),
        TurnRewards([0.0], ["a"]),
        TurnRewards([0.0, 0.0, 1.0], ["a", "c", "a"]),
    ]
    assert same_state([group]) == [[0, 2, 3, 5], [1], [4]]
    first, second, third = advantages([group], 0.5, 2.0, "none")
    assert first.tolist() == pytest.approx([1 / 3 + 2 * 0.0625, 1 / 3])
    assert second.tolist() == pytest.approx([-2 / 3 - 2 * 0.4375])
    assert third.tolist() == pytest.approx([1 / 3 - 2 * 0.1875, 1 / 3, 1 / 3 + 2 * 0.5625])


def test_a_state_of_another_seed_is_another_state():
    groups = [[TurnRewards([1.0], ["a"])], [TurnRewards([0.0], ["a"])]]
    assert same_state(groups) == [[0], [1]]
    assert not any(one.any() for one in advantages(groups, 0.9, 1.0))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reward", [0.0, 0.1, -2.7, 31.0])
def test_equal_episodes_have_no_advantage(reward, scale):
    """Where the same states bring the same, however rounding sums it up."""
    noise = np.random.default_rng(0)
    for episodes in (2, 3, 7):
        rewards = [[reward + 1e-7 * max(1.0, abs(reward)) * noise.normal() for _ in range(3)] for _ in range(episodes)]
        group = [TurnRewards(one, ["a", "b", "c"]) for one in rewards]
        for one in advantages([group, group[:2]], 0.95, 1.0, scale):
            assert not one.any()


def test_returns_to_go_of_a_number():
    assert returns_to_go([3.0, 2.0, 1.0], 1.0).tolist() == [6.0, 3.0, 1.0]
    assert returns_to_go([3.0, 2.0, 1.0], 0.0).tolist() == [3.0, 2.0, 1.0]


# --- in the loop ------------------------------------------------------------------------------------------------------


def turn(state, said, reward, answer):
    said = np.array(said)
    return Turn(np.array(state), said, said, -np.ones(len(said), np.float32), said * 0, reward, np.array(answer))


def test_a_turn_answers_what_was_said_last():
    played = Episode(0, (turn([1, 2], [3], 0.0, [4, 5]), turn([1, 2, 3, 4, 5], [6], 1.0, [7])), True, "")
    assert [ids.tolist() for ids in played.observations] == [[1, 2], [4, 5]]


@pytest.mark.parametrize("kept", [True, False], ids=["one sequence", "a sequence each"])
def test_all_actions_of_a_turn_have_its_advantage_and_what_follows_still_counts(kept):
    second = [1, 2, 3, 3, 4, 5] if kept else [1, 2, 5]
    turns = (turn([1, 2], [3, 3], 0.0, [4, 5]), turn(second, [6, 6, 6], 1.0, [7]))
    pieces = Episode(0, turns, True, "").as_trajectories(0.9, [0.25, -1.5])
    assert len(pieces) == (1 if kept else 2)
    acting = [(piece.advantages[piece.action_mask], piece.discounts[piece.action_mask]) for piece in pieces]
    assert np.concatenate([weights for weights, _ in acting]).tolist() == [0.25, 0.25, -1.5, -1.5, -1.5]
    discounts = np.concatenate([those for _, those in acting])
    np.testing.assert_array_equal(discounts, np.float32([1.0, 0.9, 1.0, 1.0, 0.0]))
    assert not any(piece.advantages[~piece.action_mask].any() for piece in pieces)


@pytest.mark.parametrize("anchor", ["observation", "transcript"])
def test_a_run_weighs_turns_by_their_seed_and_state(tmp_path, anchor):
    """The players' answers are all alike, [7]: turns after the first are one state by what was answered, not by all."""
    changes = {"rl.group_size": 4, "rl.prompts_per_step": 3, "rl.anchor_state": anchor, "rl.step_advantage_w": 0.5,
               "rl.scale_rewards": "none", "critic.gamma": 0.9}  # fmt: skip
    controller, batches, shard, *_ = run(tmp_path, "gigpo", **changes)
    assert shard.size()[0] == 0, "on-policy: nothing is kept"
    for step, batch in enumerate(batches):
        tickets = controller.source.tickets(step)
        played = [[Worker().episode(ticket) for ticket in tickets if ticket.problem == seed]
                  for seed in dict.fromkeys(ticket.problem for ticket in tickets)]  # fmt: skip
        groups = [[TurnRewards([one.reward for one in episode.turns],
                               [min(place, 1) if anchor == "observation" else place
                                for place in range(len(episode.turns))]) for episode in group]
                  for group in played]  # fmt: skip
        wanted = sorted(tuple(np.float32(one)) for one in brute_force(groups, 0.9, 0.5, "none"))
        padded, found = batch.padded(), []
        for mask, weights in zip(padded.action_mask, padded.advantages, strict=True):
            of_turns = weights[mask].reshape(-1, 2)  # each utterance has two actions
            assert np.array_equal(of_turns[:, 0], of_turns[:, 1])
            found.append(tuple(of_turns[:, 0]))
        np.testing.assert_allclose(np.concatenate(sorted(found)), np.concatenate(wanted), atol=1e-6)
        assert batch.trains
        assert padded.advantages.any()
    sizes = [len(numbers) for numbers in same_state(groups)]
    metrics = metrics_of(controller)[len(batches)]
    assert metrics["agent/anchor_turns"] == pytest.approx(np.mean(sizes))
    assert metrics["agent/compared"] == 1.0, "four episodes of one seed are of one length"
