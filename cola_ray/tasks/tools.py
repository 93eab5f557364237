"""Questions that a model answers with tools: it calls them, sees their results, and decides when to answer.

    question ──> utterance ── calls? ── some ──> each one is checked and made (toolbox.py) ──> its result, or what is
                    ^                                                                             wrong with it ──┐
                    └─────────────────────────────────────────────────────────────────────────────────────────────┘
                                      └ none ──> it is the answer: the reward, and the end

Questions are generated (weighing.py), or are the rows of ``task.path``; ``task.reward`` scores answers. Nothing that a
model says ends a run: for a call that is malformed, unknown, wrong, too slow or that raises, the observation says so.
Tools are described to the model by its chat template or, if it has none, in plain text.
"""

import functools
import random
import time
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from cola_ray.sandbox.execution import call_in_fork
from cola_ray.settings.config import TaskConfig
from cola_ray.settings.limits import Count, Seconds, Share
from cola_ray.tasks.chat import Message, Prompt, as_text
from cola_ray.tasks.dataset import Dataset
from cola_ray.tasks.environment import HELD_OUT, Chat, Dialogue, Transition
from cola_ray.tasks.protocol import Problem, Split, Task
from cola_ray.tasks.rewarded import Rewarded
from cola_ray.tasks.tool_calls import ANY, FORMATS, Call, Malformed, calls_in, told, without_thoughts
from cola_ray.tasks.toolbox import Result, Toolbox, sandbox
from cola_ray.tasks.weighing import COLOURS, THINGS, TOOLS, Weighing

_SHARE_OF_A_STEP = 0.5  # share of task.reward_timeout_s for all calls of a turn: a slow tool must not fail the episode


class Tools:
    """One question per episode; seeds from :data:`~cola_ray.tasks.environment.HELD_OUT` on give held-out questions.

    Args:
        config: of the task, with the settings of tools, their format, rows and rewards.
        max_turns: utterances of an episode; one that ends without an answer is truncated, with reward 0.
        max_calls: number of calls that are made in one turn.
        result_chars: most characters of a result that are shown.
        seconds: time limit of a call. All calls of a turn may take half of ``task.reward_timeout_s``.
        describe: whether a text without a chat template begins with a description of the tools.
        things: for generated questions: number of things to ask about.
        largest: for generated questions: largest number in them.
        skill: for demonstrations, which answer generated questions: share of calls that are right. Of the others, half
            are malformed and are repeated, half have a wrong argument and lead to a wrong answer. With 0.6 the mean
            return is 0.68.
    """

    def __init__(
        self,
        config: TaskConfig,
        max_turns: Count = 6,
        max_calls: Count = 8,
        result_chars: Annotated[int, Field(ge=20)] = 2000,
        seconds: Seconds = 5.0,
        describe: bool = True,
        things: Annotated[int, Field(strict=True, ge=2, le=len(COLOURS) * len(THINGS))] = len(COLOURS) * len(THINGS),
        largest: Count = 99,
        skill: Share = 0.6,
    ) -> None:
        if largest < things:
            raise ValueError(f"task.options.largest = {largest}: {things} things have different weights; use at least "
                             f"{things}, or fewer task.options.things")  # fmt: skip
        if config.tool_parser not in (ANY, *FORMATS):
            raise ValueError(f"task.tool_parser = {config.tool_parser!r}: tools are called as {', '.join(FORMATS)}; "
                             "use one of these, or leave it out for any of them")  # fmt: skip
        self.config, self.max_turns, self.max_calls, self.result_chars = config, max_turns, max_calls, result_chars
        self.seconds, self.describe, self.skill = seconds, describe, skill
        self.toolbox, self.task = _toolbox(config.tools or TOOLS), _task(config.model_dump_json(), things, largest)
        self.drawn = None if config.path else Weighing(things, largest)
        self._begin(0)

    # --- an episode ---------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        self._begin(seed)
        chat = Chat(self._asked(), self.toolbox.schemas, self._told())
        return self._opening(), {"chat": chat.as_data(), "metrics": self._metrics()}

    def step(self, utterance: str) -> Transition:
        self.turn += 1
        calls = calls_in(utterance, self.config.tool_parser)
        if not calls:
            answer = without_thoughts(utterance).strip()
            return "\n", self._score(answer), True, False, {"metrics": self._metrics()}
        results = self._results(calls)
        out_of_turns = self.turn >= self.max_turns
        messages = [
            {"role": "tool", "content": text, "name": getattr(call, "name", "")}
            for call, text in zip(calls[: len(results)], results, strict=True)
        ]
        seen = "\n".join(["", *results, ""])
        return seen, 0.0, False, out_of_turns, {"chat": Chat(messages).as_data(), "metrics": self._metrics()}

    def get_state(self) -> list[int]:
        return [self.seed, self.turn, self.calls, self.misfits, self.errors]

    def set_state(self, state: Sequence[int]) -> None:
        seed, *counted = state
        self._begin(seed)
        self.turn, self.calls, self.misfits, self.errors = counted

    def _begin(self, seed: int) -> None:
        self.seed, self.turn, self.calls, self.misfits, self.errors = seed, 0, 0, 0, 0
        split: Split = "heldout" if seed >= HELD_OUT else "train"
        problems = self.task.problems(split)
        self.place = split, seed % HELD_OUT % len(problems)
        self.problem: Problem = problems[self.place[1]]

    def _results(self, calls: Sequence[Call | Malformed]) -> list[str]:
        """Make the calls of a turn, one after the other; returns the results as the model sees them."""
        shown, ends = list[str](), time.monotonic() + _SHARE_OF_A_STEP * self.config.reward_timeout_s
        for number, call in enumerate(calls):
            self.calls += 1
            left = min(self.seconds, ends - time.monotonic())
            if isinstance(call, Malformed):
                result = Result(f"malformed tool call: {call.why}", failed=True, fits=False)
            elif number >= self.max_calls:
                result = Result(f"not called: a turn has at most {self.max_calls} calls", failed=True)
            elif left <= 0:
                result = Result("not called: the calls before it have used up the time of this turn", failed=True)
            else:
                result = self.toolbox.run(call, self.problem, left)
            self.misfits += not result.fits
            self.errors += result.failed
            shown.append(self._cut(f"Error: {result.text}" if result.failed else result.text))
            if number >= self.max_calls:  # one message for all remaining calls
                self.calls += len(calls) - number - 1
                self.errors += len(calls) - number - 1
                break
        return shown

    def _cut(self, text: str) -> str:
        whole = text.encode(errors="replace").decode()  # half a character cannot be tokenised
        if len(whole) <= self.result_chars:
            return whole
        return f"{whole[: self.result_chars]}... ({len(whole) - self.result_chars} more characters)"

    def _score(self, answer: str) -> float:
        """Score an answer. If a reward raises, so does this, which fails the episode, as in single-turn tasks."""
        split, index = self.place
        score = functools.partial(self.task.score, split, index, answer)
        if not getattr(self.task, "executes_responses", False):
            return score()
        reply = call_in_fork(score, _SHARE_OF_A_STEP * self.config.reward_timeout_s)
        if "failure" in reply:
            raise ValueError(reply["failure"])
        return float(reply["value"])

    def _metrics(self) -> dict[str, float]:
        """Metrics of the episode so far; the share only if there were any calls."""
        counts = {"tool_calls": float(self.calls), "tool_errors": float(self.errors)}
        return counts | ({"well_formed_calls": 1 - self.misfits / self.calls} if self.calls else {})

    # --- what the model sees ------------------------------------------------------------------------------------------

    def _asked(self) -> Sequence[Message]:
        question: Prompt = self.problem.question
        return [{"role": "user", "content": question}] if isinstance(question, str) else question

    def _told(self) -> str:
        return told(self.toolbox.schemas, self.config.tool_parser)

    def _opening(self) -> str:
        question = as_text(self.problem.question)
        return f"{self._told()}\n\n{question}\n" if self.describe else f"{question}\n"

    # --- demonstrations -----------------------------------------------------------------------------------------------

    def demonstrations(self, count: int, seed: int) -> list[Dialogue]:
        """Return episodes of a player who makes mistakes, on training questions; [] for the user's own rows."""
        if self.drawn is None or not {*TOOLS} <= {*self.toolbox.tools}:
            return []
        draw = random.Random(seed)
        return [self._demonstration(self.drawn, draw) for _ in range(count)]

    def _demonstration(self, drawn: Weighing, draw: random.Random) -> Dialogue:
        opening, info = self.reset(seed=draw.randrange(HELD_OUT))
        turns, chats, ended = list[tuple[str, str]](), [Chat.of(info["chat"])], False
        asked = drawn.drawn(*self.place)
        number, left = str(asked.number), [asked.lookup] * bool(asked.thing) + [asked.sum_of] * bool(asked.word)
        while not ended:
            utterance, read = number, True
            if left:
                utterance, read = self._attempt(left[0](number), drawn, draw)
            seen, _, terminated, truncated, info = self.step(utterance)
            turns.append((utterance, seen))
            chats.append(Chat.of(info["chat"]) if "chat" in info else Chat(()))
            ended = terminated or truncated
            if read and left:
                number = seen.strip()
                del left[0]
        return Dialogue(opening, tuple(turns), tuple(chats))

    def _attempt(self, call: Call, drawn: Weighing, draw: random.Random) -> tuple[str, bool]:
        """Return a call as the player writes it, and whether it can be parsed."""
        written = FORMATS[self.config.tool_parser or "json"].write
        fate = draw.random()
        if fate < self.skill:
            return written([call]), True
        if fate < (1 + self.skill) / 2:
            return written([drawn.mistaken(call, draw)]), True
        whole = written([call])
        return whole.replace(*draw.choice((("}}", "}"), ('"}}', "}}")))), False


@functools.cache
def _toolbox(paths: Sequence[str]) -> Toolbox:
    """The toolbox of a process, shared by all episodes. If a sandbox is needed, it starts here."""
    made = Toolbox(paths)
    if "python" in paths:
        sandbox()
    return made


@functools.cache
def _task(dumped: str, things: int, largest: int) -> Task:
    """Questions with their reward; rows are read once per process."""
    config = TaskConfig.model_validate_json(dumped)
    if not config.path:
        drawn = Weighing(things, largest)
        return Rewarded.of(config, drawn) if config.reward else drawn
    rows = Dataset.of(config, seed=0)
    for split in ("train", "heldout"):
        if not rows.problems(split):
            raise ValueError(f"task.path = {config.path!r}: no questions are in the split {split}; give more rows")
    return Rewarded.of(config, rows)
