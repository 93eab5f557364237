"""Text adventures: any z-machine file through Jericho, and games that TextWorld generates at a chosen difficulty.

Held-out episodes of TextWorld are in games that training does not have. Jericho has one game, and held-out seeds differ
only in what the game itself draws.

Both packages are optional (``make games``); Jericho is licensed under the GPL-2.0. Rewards are increments of the game's
own score; an episode is truncated after ``max_turns``, 50 as in the ArCHer paper's Detective (Zhou et al. 2024).
"""

import base64
import functools
import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cola_ray.settings.limits import Count, Share
from cola_ray.tasks.environment import HELD_OUT, Dialogue, Replayed, Transition


class Jericho:
    """A z-machine game; its state is that of the machine.

    Args:
        game: path of the file.
        max_turns: after which an episode is truncated.
        skill: share of the demonstrations' steps that follow Jericho's walkthrough.
    """

    def __init__(self, game: str, max_turns: Count = 50, skill: Share = 0.7) -> None:
        import jericho

        if not Path(game).is_file():
            raise ValueError(f"task.game = {game!r}: no such z-machine file; give the path of one")
        self.env = jericho.FrotzEnv(game)
        self.max_turns, self.skill, self.turn = max_turns, skill, 0

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        self.env.seed(seed)
        observation, info = self.env.reset()
        self.turn = 0
        return tidy(observation), dict(info)

    def step(self, utterance: str) -> Transition:
        command = first_line(utterance)
        observation, reward, done, info = self.env.step(command or "look")
        self.turn += 1
        ended = bool(done or self.env.victory() or self.env.game_over())
        cut = self.turn >= self.max_turns and not ended
        return f"\n{tidy(observation)}", float(reward), ended, cut, dict(info)

    def get_state(self) -> list[Any]:
        """Return turn and machine: memory and stack as base64, registers and random state, the last text."""
        ram, stack, *registers, narrative = self.env.get_state()
        return [self.turn, *map(_packed, (ram.tobytes(), stack.tobytes(), narrative)), _plain(registers)]

    def set_state(self, state: Sequence[Any]) -> None:
        self.turn, ram, stack, narrative, registers = state
        memory = (np.frombuffer(base64.b64decode(one), np.uint8).copy() for one in (ram, stack))
        self.env.reset()
        self.env.set_state((*memory, *registers, base64.b64decode(narrative)))

    def demonstrations(self, count: int, seed: int) -> list[Dialogue]:
        """Return playthroughs of the walkthrough with some of its commands at the wrong place."""
        draw = random.Random(seed)
        commands = [command.lower() for command in self.env.get_walkthrough()]
        return [self._demonstration(draw, commands) for _ in range(count)]

    def _demonstration(self, draw: random.Random, commands: Sequence[str]) -> Dialogue:
        opening, _ = self.reset(seed=draw.randrange(1 << 30))
        turns, place = [], 0
        while place < len(commands):
            if draw.random() < self.skill:
                command, place = commands[place], place + 1
            else:
                command = draw.choice(commands)
            observation, _, terminated, truncated, _ = self.step(command)
            turns.append((command, observation))
            if terminated or truncated:
                break
        return Dialogue(opening, tuple(turns))


class TextWorld(Replayed):
    """Games of one of TextWorld's challenges, generated when they are needed and kept while the process lives.

    Args:
        challenge: tw-coin_collector, tw-treasure_hunter, tw-simple or tw-cooking.
        level: 1 to 300 for tw-coin_collector, 1 to 30 for tw-treasure_hunter.
        games: number of different games in training, and as many others are held out; an episode's seed picks one.
        max_turns: after which an episode is truncated.
        skill: share of the demonstrations' steps that follow the winning commands.
    """

    def __init__(
        self,
        challenge: str = "tw-coin_collector",
        level: Count = 1,
        games: Count = 8,
        max_turns: Count = 50,
        skill: Share = 0.7,
    ) -> None:
        super().__init__(_TextWorldGames(challenge, level, games), max_turns)
        self.skill = skill

    def demonstrations(self, count: int, seed: int) -> list[Dialogue]:
        draw = random.Random(seed)
        return [self._demonstration(draw) for _ in range(count)]

    def _demonstration(self, draw: random.Random) -> Dialogue:
        opening, info = self.reset(seed=draw.randrange(1 << 30))
        turns = []
        while True:
            command = info["way"][0] if info["way"] and draw.random() < self.skill else draw.choice(info["possible"])
            observation, _, terminated, truncated, info = self.step(command)
            turns.append((command, observation))
            if terminated or truncated:
                return Dialogue(opening, tuple(turns))


class _TextWorldGames:
    """A challenge's games with gymnasium's signature."""

    def __init__(self, challenge: str, level: int, games: int) -> None:
        import textworld.challenges

        if challenge not in textworld.challenges.CHALLENGES:
            raise ValueError(
                f"task.options.challenge = {challenge!r}: use one of {sorted(textworld.challenges.CHALLENGES)}"
            )
        self.make = textworld.challenges.CHALLENGES[challenge][1]
        self.settings = {"level": level, **_SETTINGS.get(challenge, {})}
        self.games = games
        self.folder = _folder_of_games(challenge, level)

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        import textworld

        wanted = textworld.EnvInfos(admissible_commands=True, policy_commands=True, score=True)
        number = seed % self.games + (self.games if seed >= HELD_OUT else 0)
        self.env = textworld.start(str(self._file(number)), wanted)
        state = self.env.reset()
        self.score = 0
        return tidy(state.feedback), self._info(state)

    def step(self, utterance: str) -> Transition:
        state, _, done = self.env.step(first_line(utterance) or "look")
        gained, self.score = state.score - self.score, state.score
        return f"\n{tidy(state.feedback)}", float(gained), bool(done), False, self._info(state)

    def _info(self, state: Any) -> dict[str, Any]:
        return {"way": list(state.policy_commands or []), "possible": list(state.admissible_commands)}

    def _file(self, number: int) -> Path:
        import textworld

        path = Path(self.folder.name) / f"{number}.z8"
        if not path.exists():
            options = textworld.GameOptions()
            options.seeds, options.path, options.force_recompile = number, str(path), True
            textworld.generator.compile_game(self.make(self.settings, options), options)
        return path


@functools.cache
def _folder_of_games(challenge: str, level: int) -> tempfile.TemporaryDirectory:
    """Where this process keeps the games that it has generated, which all its episodes share."""
    return tempfile.TemporaryDirectory(prefix="cola_ray-textworld-")


_SETTINGS: dict[str, dict[str, Any]] = {
    "tw-simple": {"rewards": "dense", "goal": "detailed", "test": False},
    "tw-cooking": {"recipe": 1, "take": 1, "go": 1, "open": False, "cook": False, "cut": False, "drop": False,
                   "split": "train", "recipe_seed": 0},
}  # fmt: skip


def _packed(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _plain(registers: Sequence[Any]) -> list[Any]:
    """Return the registers as plain integers, without ctypes and NumPy."""
    return [_plain(one) if isinstance(one, tuple | list) else int(one) for one in registers]


def first_line(utterance: str) -> str:
    """Return the first line, since games take one line of input."""
    lines = utterance.strip().splitlines()
    return lines[0].strip() if lines else ""


def tidy(feedback: str) -> str:
    """Return the game's text without banners, status line, prompt and blank lines, followed by a prompt."""
    lines = [line.rstrip() for line in feedback.splitlines()]
    words = [line for line in lines if not line.startswith(">") and not re.fullmatch(r"[\s$\\_|/]+", line)]
    return re.sub(r"\n{2,}", "\n", "\n".join(words)).strip() + "\n> "
