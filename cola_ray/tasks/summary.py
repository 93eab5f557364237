"""A printed summary of a task's data and of the prompts that the model gets, before a run and for ``cola_ray data``.

lines(config, chat)     rows, columns, splits, rewards, and three prompts
show(config)            prints them; nothing is started
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from cola_ray.model.hub import cached
from cola_ray.runs import provenance
from cola_ray.runs.display import plain, print_line
from cola_ray.settings.config import Config, ConfigError, DataConfig, TaskConfig
from cola_ray.tasks import least_right_reward, make_task
from cola_ray.tasks.chat import ChatTokenizer, as_text
from cola_ray.tasks.dataset import Dataset
from cola_ray.tasks.protocol import Problem, Prompts
from cola_ray.tasks.rewarded import weights_of

_SHOWN = 3  # number of prompts shown
_UNCLONED = "cloned   no response: RL needs a model to start from (--model.path), or texts (--data.path)"
_MEASURED = 1000  # number of prompts measured
_CHARACTERS = 1500  # shown of each prompt


def show(config: Config) -> None:
    """Print :func:`lines`, with the tokenizer of the start model or, before there is one, of the base.

    Raises:
        ConfigError: the rows cannot be read.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    start = provenance.start_model(config)
    place = str(start) if (start / "config.json").exists() else config.model.base
    chat = _chat(place, provenance.resolve(config, "data").data) if place else None
    try:
        for line in lines(config, chat):
            print_line(line)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _chat(place: str, told: DataConfig) -> ChatTokenizer | None:
    from transformers import AutoTokenizer

    if place.endswith(".gguf"):
        return None
    tokenizer = AutoTokenizer.from_pretrained(cached(place, "model") or place)
    return ChatTokenizer(tokenizer, told.date, told.chat_options)


def lines(config: Config, chat: ChatTokenizer | None) -> Iterator[str]:
    """Yield what was read, a line each, and :data:`_SHOWN` prompts as the model gets them; no control characters.

    Args:
        chat: the model's tokenizer; without it prompts are shown as text.
    """
    yield from map(plain, _lines(config, chat))


def _lines(config: Config, chat: ChatTokenizer | None) -> Iterator[str]:
    task = make_task(config.task, config.seed)
    problems, heldout = task.problems("train"), task.problems("heldout")
    data = _data(task)
    if data is not None:
        yield from _of_rows(config.task, data)
    how = ", by checksum of the prompt" if data is not None and all("" in one.files for one in data.sources) else ""
    yield f"splits   {_many(len(problems), 'problem')} to train on, {len(heldout):,} held out{how}"
    count = len(task.demonstrations())
    yield f"cloned   {_many(count, 'response')}, where a first policy is made" if count else _UNCLONED
    yield f"reward   {_rewards(config.task, task)}"
    if chat is not None:
        yield from _lengths(config, problems, chat)
    for number, problem in enumerate(problems[:_SHOWN], 1):
        yield from _prompt(number, problem, chat)


def _data(task: Prompts) -> Dataset | None:
    inner = task
    while not isinstance(inner, Dataset) and hasattr(inner, "task"):
        inner = inner.task
    return inner if isinstance(inner, Dataset) else None


def _of_rows(task: TaskConfig, data: Dataset) -> Iterator[str]:
    for source, weight in itertools.zip_longest(data.sources, task.weights):
        examples = source.all_examples
        columns = dict.fromkeys(name for one in examples for name in one.row)
        share = f", {weight / sum(task.weights):.0%} of the prompts" if weight else ""
        yield f"data     {source.path}: {_many(len(examples), 'row')} of {', '.join(columns)}{share}"
        layouts = Counter(", ".join(f"{what} from {name}" for what, name in one.found_in.items()) for one in examples)
        for layout, count in layouts.most_common():
            yield f"read     {layout}" + (f", in {_many(count, 'row')}" if len(layouts) > 1 else "")
        if source.files.keys() == {"train", "heldout"}:
            yield f"files    {source.files['train']} to train on, {source.files['heldout']} held out"
        if source.left_out:
            yield f"         not read: {', '.join(source.left_out)}; task.splits names others"
        if unsolved := sum(not one.solution for one in examples):
            yield f"         {_many(unsolved, 'row')} without a solution"
    if data.in_both:
        left_out = "has a prompt that is" if data.in_both == 1 else "have prompts that are"
        yield f"         {_many(data.in_both, 'row')} to train on {left_out} held out, too: left out"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _rewards(task: TaskConfig, made: Prompts) -> str:
    weights = weights_of(task)
    named = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
    if not (named or task.reward_model or hasattr(made, "score")):
        return "none yet: task.reward says what a response is worth, and RL needs it"
    least = least_right_reward(task)
    right = (
        "no accuracy, since nothing says what is right (task.right_from)" if least is None else f"right from {least:g}"
    )
    return f"{named or task.reward_model or 'the verifier of ' + task.name}; {right}"


def _lengths(config: Config, problems: Sequence[Problem], chat: ChatTokenizer) -> Iterator[str]:
    first, limit = problems[:_MEASURED], config.rollout.max_prompt_tokens
    lengths = [len(chat.prompt_ids(problem.question)) for problem in first]
    of = f"the first {_MEASURED:,} prompts" if len(first) < len(problems) else "the prompts"
    yield f"tokens   {sum(lengths) / max(len(lengths), 1):.0f} on average, {max(lengths, default=0)} at most, of {of}"
    if long := sum(length > limit for length in lengths):
        yield f"         {long:,} of these are longer than rollout.max_prompt_tokens = {limit}, and are left out"


def _prompt(number: int, problem: Problem, chat: ChatTokenizer | None) -> Iterator[str]:
    if chat is None:
        text, size = as_text(problem.question), "as text, since there is no model yet"
    else:
        ids = chat.prompt_ids(problem.question)
        text, size = str(chat.tokenizer.decode(ids)), f"{_many(len(ids), 'token')}, as the model gets it"
    yield f"prompt {number} ({size})"
    yield from (f"  | {line}" for line in _cut(text).splitlines())
    if problem.solution:
        yield f"  solution: {_cut(' '.join(problem.solution.split()))[:200]}"


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} ... ({len(text):,} characters)"
