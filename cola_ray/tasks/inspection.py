"""Checks of a task before a run: its name, its options, and whether a user's class has the required methods.

    faults(config.task)       lines ``field = value: why; fix``

A user's class is created once and asked for its first problem, or played for one turn; if this takes longer than
:data:`TRIAL_S` seconds, the check is left to the run.
"""

import ast
import functools
import importlib.util
import inspect
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cola_ray import registry
from cola_ray.registry import error_in_a_line
from cola_ray.sandbox.messages import as_data
from cola_ray.sandbox.programs import NoSandboxError
from cola_ray.settings.config import MULTI_TURN, TaskConfig, is_environment
from cola_ray.settings.limits import nearest
from cola_ray.settings.relevance import OF_ROWS
from cola_ray.tasks import called, make_environment, make_task, task_class
from cola_ray.tasks.chat import as_prompt
from cola_ray.tasks.dataset import as_problems, first_examples
from cola_ray.tasks.environment import STATE, Dialogue, demonstrated
from cola_ray.tasks.protocol import LARGEST_REWARD, Problem, not_a_reward
from cola_ray.tasks.rewarded import REWARD_MODEL, name_of, trial
from cola_ray.tasks.rows import is_local
from cola_ray.tasks.weighing import Weighing

TRIAL_S = 10.0
_FEW = 64  # problems of a generator, enough for both splits to have some
FIXED = (*registry.BUILT_IN["task"], *MULTI_TURN)
"""Tasks that are not generators of reasoning-gym."""
_ENVIRONMENT = ("reset", "step")
_TASK = ("problems", "demonstrations", "score")


def faults(task: TaskConfig) -> list[str]:
    """At most a few lines, the first cause first; the same task is checked once per process."""
    return [*_judged(task.model_dump_json()), *_unable(task.model_dump_json())]


@functools.cache
def _judged(dumped: str) -> list[str]:
    task = TaskConfig.model_validate_json(dumped)
    if is_own(task.name):
        return list(_of_own(task))
    if is_environment(task.name):
        return _made(task)
    if task.name == "instructions":
        return _asked(task)
    return list(_of_generator(task)) if task.options and task.name not in OF_ROWS else []


def is_own(name: str) -> bool:
    """Whether a task is the user's own, given by path or by a name that a package has registered."""
    own = {*registry.names("task"), *registry.names("environment")} - {*FIXED}
    return registry.is_path(name) or name in own


def unknown(name: str) -> str:
    """Why there is no task of this name; empty if there is. A user's class must be importable."""
    if name in FIXED:
        return ""
    if not is_own(name):
        return "" if name in generators() else nearest(name, [*FIXED, *generators()], "unknown task")
    try:
        found = task_class(name)
    except registry.NotFoundError as error:
        return str(error)
    if callable(found):
        return ""
    return f"{name.rpartition(':')[2]} is {type(found).__name__}, not a class; name a class"


# --- rewards ------------------------------------------------------------------------------------------------------


@functools.cache
def _unable(dumped: str) -> list[str]:
    """A line for each reward that scores none of the first problems; nothing if they are not available."""
    task = TaskConfig.model_validate_json(dumped)
    tried = [reward for reward in task.reward if reward not in ("verifier", REWARD_MODEL)]
    answers = task.name == "tools" or not is_environment(task.name)
    if not tried or (task.path and not is_local(task.path)) or not answers:
        return []
    whys = {reward: _within(TRIAL_S, functools.partial(_why_not, task, reward)) for reward in tried}
    return [f"task.reward = {reward!r}: {name_of(reward)} {why}" for reward, why in whys.items() if why]


def _why_not(task: TaskConfig, reward: str) -> str:
    try:
        first = _first_problems(task.model_dump_json())
    except Exception:  # other checks report it
        return ""
    return trial(task, reward, first)


@functools.cache
def _first_problems(dumped: str) -> Sequence[Problem]:
    task = TaskConfig.model_validate_json(dumped)
    if task.name == "dataset" or (task.name == "tools" and task.path):
        return as_problems(first_examples(task, 2))
    if task.name == "tools":
        return Weighing(2, 2).problems("train")[:2]
    plain = task.model_copy(update={"reward": (), "thinking": False, "num_problems": _FEW})
    return make_task(plain, 0).problems("train")[:2]


# --- generators of reasoning-gym ----------------------------------------------------------------------------------


@functools.cache
def generators() -> dict[str, tuple[str, ...]]:
    """Names of reasoning-gym's generators, each with its options, read from its sources.

    Importing the package takes seconds, because it imports matplotlib and sympy. Options are () if a generator's
    settings are not listed in one place.
    """
    package = importlib.util.find_spec("reasoning_gym")
    found: dict[str, tuple[str, ...]] = {}
    for file in sorted(Path(str(package.origin)).parent.rglob("*.py")) if package and package.origin else ():
        text = file.read_text()
        if "register_dataset(" in text:
            found |= _registered(ast.parse(text))
    if not found:
        from reasoning_gym.factory import DATASETS

        return dict.fromkeys(DATASETS, ())
    return found


def _registered(module: ast.Module) -> dict[str, tuple[str, ...]]:
    texts = {
        target.id: node.value.value
        for node in module.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(module):
        if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "register_dataset" and node.args):
            continue
        name = node.args[0]
        text = name.value if isinstance(name, ast.Constant) else texts.get(getattr(name, "id", ""))
        settings = classes.get(getattr(node.args[2], "id", "")) if len(node.args) > 2 else None
        stated = settings.body if settings is not None and not settings.bases else []
        assigned = [one.target for one in stated if isinstance(one, ast.AnnAssign)]
        fields = tuple(target.id for target in assigned if isinstance(target, ast.Name))
        if isinstance(text, str):
            found[text] = fields
    return found


def _of_generator(task: TaskConfig) -> Iterator[str]:
    name = "chain_sum" if task.name == "arithmetic" else task.name
    known = [option for option in generators().get(name, ()) if option not in ("seed", "size")]
    for option, value in task.options.items():
        if option in ("seed", "size"):
            other = "seed" if option == "seed" else "task.num_problems"
            yield f"task.options.{option} = {value!r}: has a setting of its own; use {other}"
        elif known and option not in known:
            yield f"task.options.{option} = {value!r}: {nearest(option, known, f'no option of {name}')}"
    if known and not set(task.options) <= set(known):
        return
    import reasoning_gym  # last of all: it takes seconds

    try:
        reasoning_gym.create_dataset(name, size=task.num_problems, seed=0, **task.options)
    except Exception as error:  # asserts, mostly
        yield f"task.options = {task.options}: {error_in_a_line(error)}; see the options of {name} in reasoning-gym"


def _asked(task: TaskConfig) -> list[str]:
    try:
        make_task(task.model_copy(update={"reward": (), "thinking": False}), 0)
    except ValueError as error:
        return [str(error)]
    return []


# --- environments -------------------------------------------------------------------------------------------------


def _made(task: TaskConfig) -> list[str]:
    if task.name == "tools":  # rows and rewards are checked separately
        task = task.model_copy(update={"path": "", "reward": ()})
    try:
        make_environment(task)
    except NoSandboxError as error:
        return [f"task.name = {task.name!r}: {error}"]
    except Exception as error:
        said = str(error)
        return [said if said.startswith("task.") else f"task.options = {task.options}: {said}; see {task.name}'s own"]
    return []


_OWN_ANSWERS = (
    "the base's own answers (answers.jsonl of `cola_ray evaluate --rl.action-space token --eval.split train "
    "--eval.ways sample`)"
)


def undemonstrated(task: TaskConfig) -> str:
    """Why a task or an environment has no texts to pre-train on; empty if it has some, or if that is unknown."""
    if task.name == "tools" and task.path:
        return f"task.path = {task.path!r}: rows do not show how tools are called; give texts that do as --data.path"
    made = None if unknown(task.name) or not is_own(task.name) else task_class(task.name)
    plays = isinstance(made, type) and all(callable(getattr(made, name, None)) for name in _ENVIRONMENT)
    if task.name != "instructions" and (not plays or hasattr(made, "demonstrations")):
        return ""
    texts = _OWN_ANSWERS if task.name == "instructions" else "texts"
    return f"task.name = {task.name!r}: has no demonstrations to clone a first policy from; give {texts} as --data.path"


# --- classes of users ---------------------------------------------------------------------------------------------


def _of_own(task: TaskConfig) -> Iterator[str]:
    named = f"task.name = {task.name!r}"
    if unknown(task.name):
        return
    made, attribute = task_class(task.name), task.name.rpartition(":")[2]
    assert made is not None
    plays = hasattr(made, "step") or hasattr(made, "reset")
    protocol = f"cola_ray/tasks/{'environment' if plays else 'protocol'}.py"
    stated = STATE if plays and any(hasattr(made, name) for name in STATE) else ()
    wanted = (*_ENVIRONMENT, *stated) if plays else _TASK
    missing = [name for name in wanted if not callable(getattr(made, name, None))]
    if isinstance(made, type) and missing:
        yield f"{named}: {attribute} has no {' and no '.join(missing)}; {protocol} says what each is"
        return
    if not plays:
        try:
            inspect.signature(called(made)).bind(task, 0)
        except TypeError as error:
            by = attribute if called(made) is made else f"{attribute}.of"
            yield f"{named}: {by} is called with (TaskConfig, seed), and {error}; see make_task in cola_ray/tasks"
            return
        except ValueError:  # no signature to read
            pass
    trial = _play if plays else _ask
    why = _within(TRIAL_S, lambda: trial(task, made))
    if why:
        yield why if why.startswith("task.") else f"{named}: {attribute} {why}; {protocol} says what is wanted"


def _within(seconds: float, trial: Callable[[], str]) -> str:
    """The result of a trial, or its exception; empty if it takes longer, since it may do work that a run needs."""
    said = [""]

    def run() -> None:
        try:
            said[0] = trial()
        except BaseException as error:  # from the user's code, including sys.exit
            said[0] = f"raised {error_in_a_line(error)}"

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0]


def _ask(task: TaskConfig, made: Callable[..., Any]) -> str:
    """Try the first problem of each split, and the score of a right answer."""
    served = called(made)(task, 0)
    for split in ("train", "heldout"):
        problems = served.problems(split)
        if not hasattr(problems, "__len__") or not hasattr(problems, "__getitem__"):
            return f"gives {type(problems).__name__} as problems({split!r}), not a sequence"
        if not len(problems):
            if split == "train":
                return "has no problems to train on: problems('train') is empty"
            continue
        first = problems[0]
        for field, kind in (("question", (str, list, tuple)), ("solution", str), ("index", int)):
            if not hasattr(first, field):
                return f"gives {type(first).__name__} as a problem, which has no {field}"
            if not isinstance(getattr(first, field), kind):
                return f"has a first problem whose {field} is {getattr(first, field)!r:.60}"
        as_prompt(first.question)
        executes = getattr(served, "executes_responses", False) or hasattr(served, "execute")
        if split == "train" and not executes:
            whys = (_unscored(served, problem) for problem in itertools.islice(problems, 4))
            wrong = list(itertools.takewhile(bool, whys))
            if len(wrong) == min(len(problems), 4):  # a single failure only costs its own sample, also in a run
                return wrong[0]
    return ""


def _unscored(served: Any, problem: Any) -> str:
    """Why a right answer has no score; empty if it has one."""
    try:
        reward = served.score("train", problem.index, problem.solution)
    except Exception as error:
        return f"cannot score its own solution: {error_in_a_line(error)}"
    if why := not_a_reward(_number(reward)):
        return f"gives the score {why:.90} to its own solution, not a number of at most {LARGEST_REWARD:g} either way"
    return ""


def _number(value: Any) -> Any:
    """Convert a reward as when it leaves its process: scalars of NumPy and PyTorch become numbers."""
    return float(value) if hasattr(value, "__float__") else value


def _play(task: TaskConfig, _: Callable[..., Any]) -> str:
    """Try a turn of an episode, and its state."""
    try:
        played = make_environment(task)
    except ValueError as error:
        if str(error).startswith("task."):  # about an option
            return str(error)
        raise
    turns = getattr(played, "max_turns", None)
    if not isinstance(turns, int) or turns < 1:
        return f"has max_turns = {turns!r}, not a whole number of at least 1"
    begun = played.reset(seed=0)
    if isinstance(begun, tuple) and len(begun) == 2 and not isinstance(begun[0], str):
        return f"gives {type(begun[0]).__name__} as an observation, not text; wrap it, so that it says what it shows"
    if not isinstance(begun, tuple) or len(begun) != 2:
        return f"gives {begun!r:.60} from reset, not (observation, info)"
    turn: Any = played.step("yes")
    if not isinstance(turn, tuple) or len(turn) != 5 or not isinstance(turn[0], str):
        return f"gives {turn!r:.60} from step, not (observation, reward, terminated, truncated, info)"
    if why := not_a_reward(_number(turn[1])):
        return f"gives the reward {why:.90} from step, not a number of at most {LARGEST_REWARD:g} either way"
    try:
        state = as_data(played.get_state(), "get_state()")
    except TypeError as error:
        return f"cannot go on in another process: {error}"
    played.set_state(json.loads(json.dumps(state)))
    shown = demonstrated(played, 1, 0)
    if not hasattr(shown, "__len__") or (len(shown) and not isinstance(shown[0], Dialogue)):
        return f"gives {shown!r:.60} as demonstrations, not a sequence of Dialogue"
    return ""
