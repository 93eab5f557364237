"""The examples of docs/extending.md, each in a file outside the project, through the registry and the checks."""

import functools
import importlib.metadata
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import folder_of_ones_own

from cola_ray import registry
from cola_ray.algorithms.advantages import Outcomes
from cola_ray.checks.refusals import check
from cola_ray.cli.arguments import from_command_line
from cola_ray.rollout.isolation import EnvironmentProcess
from cola_ray.settings.config import ConfigError, is_environment, named, override
from cola_ray.settings.presets import preset
from cola_ray.settings.training import TaskConfig
from cola_ray.tasks import inspection, least_right_reward, make_environment, make_task, stop_strings
from cola_ray.tasks.environment import Replayed

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
EXAMPLES = dict(re.findall(r"```python file=(\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))
COMMANDS = re.findall(r"^    cola_ray (rl|agent) (.*)$", PAGE.read_text(), re.MULTILINE)
JOBS = {"rl": "rl_math", "agent": "rl_agent"}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with the page's files, from which a job starts."""
    texts = {"games.jsonl": '{"text": "A number from 1 to 9? 5"}\n' * 4}
    yield from folder_of_ones_own(EXAMPLES | texts, tmp_path, monkeypatch)


def refusal(changes):
    with pytest.raises(ConfigError) as caught:
        check(override(preset("tiny"), changes), "rl_math")
    return str(caught.value)


@pytest.mark.parametrize(("command", "words"), COMMANDS)
def test_every_command_line_of_the_page_passes_the_checks(command, words, outside):
    if "--task.name doubling" in words and ".py" not in words:
        pytest.skip("of a package")
    config = from_command_line(JOBS[command], words.split())
    assert [name for _, name in named(config) if ".py:" in name]
    assert inspection.faults(config.task) == [], "which tries a task or an environment of one's own"


def test_every_kind_has_an_example():
    assert {*EXAMPLES} == {
        "median.py",
        "max_rl.py",
        "sapo.py",
        "doubling.py",
        "countdown_game.py",
        "guess_number.py",
        "close.py",
        "phi3.py",
    }


def test_an_advantage_and_an_algorithm(outside):
    prompts = [Outcomes(torch.tensor([1.0, 0.0, 0.0])), Outcomes(torch.tensor([2.0, 4.0]))]
    config = override(preset("tiny"), {"rl.advantage": "median.py:median"})
    assert [one.tolist() for one in config.algorithm.advantages()(prompts)] == [[1, 0, 0], [0, 2]]
    assert registry.find("advantage", "median") is registry.find("advantage", "median.py:over_the_median")
    config = override(preset("tiny"), {"rl.algorithm": "max_rl.py:MAX_RL"})
    assert config.algorithm.groups
    assert config.algorithm.advantages()(prompts)[1].tolist() == pytest.approx([-1 / 3, 1 / 3])
    assert refusal({"rl.algorithm": "max_rl.py:MAX_RL", "rl.group_size": 1}).startswith(
        "rl.group_size = 1: max_rl.py:MAX_RL compares completions of one prompt"
    )


def test_a_loss(outside):
    """Where nothing has moved, SAPO's gradient is PPO's; far away it is 0, whatever the advantage."""
    loss = override(preset("tiny"), {"rl.loss": "sapo.py:sapo"}).algorithm.policy_loss()
    advantages, mask = torch.tensor([[2.0, -3.0]]), torch.ones(1, 2, dtype=torch.bool)
    for moved, wanted in ((0.0, [-2.0, 3.0]), (4.0, [0.0, 0.0])):
        log_probs = torch.full((1, 2), -5.0 + moved, requires_grad=True)
        loss(log_probs, torch.full((1, 2), -5.0), advantages, mask).sum().backward()
        assert log_probs.grad[0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_task_with_a_reward(outside):
    config = TaskConfig(name="doubling.py:Doubling", reward="close.py:close")
    task = make_task(config, 0)
    assert task.problems("heldout")[0].question == "1 + 1 ="
    assert [task.score("heldout", 0, said) for said in ("2", "4", "two")] == [1.0, 1 / 3, 0.0]
    assert least_right_reward(config) is None, "the function does not say what is right"
    assert least_right_reward(config.model_copy(update={"reward": ""})) == 1.0
    assert make_task(config, 0).problems("train")[0].solution == "6"


def test_an_environment(outside):
    name = "countdown_game.py:Countdown"
    assert is_environment(name)
    game = make_environment(TaskConfig(name=name, options={"start": 2}))
    assert game.reset(seed=0)[0] == "2"
    assert game.step("1")[1:4] == (1.0, False, False)
    assert game.step("0")[1:4] == (1.0, True, False)
    with pytest.raises(ValueError, match=r"task.options.begin = 2: countdown_game.py:Countdown takes start"):
        make_environment(TaskConfig(name=name, options={"begin": 2}))


GUESS = "guess_number.py:GuessNumber"


def shown(reply):
    """What a process says of a turn."""
    assert not reply.failure
    return reply.value.observation, reply.value.reward, reply.value.terminated, reply.value.truncated


def test_gymnasiums_methods_are_enough_for_an_environment(outside):
    """The page's copy-paste example, whole episodes of it in processes: a killed one goes on in the next."""
    assert len(EXAMPLES["guess_number.py"].splitlines()) <= 20
    hidden = random.Random(3).randint(1, 9)
    wrong = [str(guess) for guess in range(1, 10) if guess != hidden]
    make = functools.partial(make_environment, TaskConfig(name=GUESS, options={"max_turns": 3}))
    process = EnvironmentProcess(make, timeout_s=30.0)
    try:
        begun = process.reset(0, 3)
        assert shown(begun) == ("A number from 1 to 9?", 0.0, False, False)
        first = process.step(0, begun.value.state, wrong[0])
        says = {guess: "Higher." if int(guess) < hidden else "Lower." for guess in wrong}
        assert shown(first) == (says[wrong[0]], 0.0, False, False)
        process._restart()
        second = process.step(0, first.value.state, wrong[1])
        assert shown(second) == (says[wrong[1]], 0.0, False, False)
        assert shown(process.step(0, second.value.state, wrong[2])) == (says[wrong[2]], 0.0, False, True)
        again = process.reset(1, 3)
        assert shown(process.step(1, again.value.state, str(hidden))) == ("Right.", 1.0, True, False)
    finally:
        process.close()


def test_an_episode_that_cannot_be_played_again_fails_by_itself(outside):
    text = EXAMPLES["guess_number.py"].replace("random.Random(seed).randint(1, self.largest)", "next(DRAWS)")
    (outside / "unseeded.py").write_text(
        text.replace("import random\n", "import itertools\nDRAWS = itertools.count(1)\n")
    )
    make = functools.partial(make_environment, TaskConfig(name="unseeded.py:GuessNumber"))
    first, other = make(), make()
    first.reset(seed=0)
    first.step("1")
    with pytest.raises(
        ValueError, match=r"played again from seed 0 it shows 'Higher.' and not 'Right.'; draw from the"
    ):
        other.set_state(first.get_state())


def test_an_environment_without_demonstrations_needs_texts_or_a_model(outside):
    def refused(job, **changes):
        try:
            check(override(preset("tiny", True, GUESS), {"task.name": GUESS, **changes}), job)
        except ConfigError as error:
            return str(error)
        return ""

    for job in ("rl_agent", "pretrain"):
        assert refused(job) == (
            f"task.name = {GUESS!r}: has no demonstrations to clone a first policy from; give texts as --data.path, or "
            "the model to start from as --model.path"
        )
        assert not refused(job, **{"data.path": "games.jsonl"})
    assert refused("rl_agent", **{"task.options": {"max_turns": 0}, "data.path": "games.jsonl"}).startswith(
        "task.options.max_turns = 0: out of range"
    )
    assert refused("rl_agent", **{"task.options": {"smallest": 2}, "data.path": "games.jsonl"}) == (
        f"task.options.smallest = 2: {GUESS} takes largest"
    )


def test_an_environment_that_shows_no_text_is_refused_in_a_line(outside):
    (outside / "grid.py").write_text(
        "class Grid:\n    def reset(self, *, seed=None, options=None):\n        return 0, {}\n"
        "    def step(self, action):\n        return 1, 0.0, True, False, {}\n"
    )
    (line,) = inspection.faults(TaskConfig(name="grid.py:Grid"))
    assert line.startswith("task.name = 'grid.py:Grid': Grid gives int as an observation, not text; wrap it")


def test_environments_that_gymnasium_knows_by_an_id(outside, monkeypatch):
    gymnasium = pytest.importorskip("gymnasium", reason="the extra gymnasium installs it")
    (outside / "my_games.py").write_text(
        "import gymnasium\nfrom guess_number import GuessNumber\n"
        "class Guess(GuessNumber, gymnasium.Env):\n"
        "    observation_space = action_space = gymnasium.spaces.Text(99)\n"
        "gymnasium.register('Guess-v0', Guess, max_episode_steps=2)\n"
    )
    monkeypatch.syspath_prepend(str(outside))
    config = TaskConfig(name="gymnasium:my_games:Guess-v0", options={"largest": 1})
    try:
        assert is_environment(config.name)
        assert inspection.faults(config) == []
        game = make_environment(config)
        assert game.reset(seed=0)[0] == "A number from 1 to 1?"
        assert [game.step("2")[:4] for _ in range(2)] == [("Lower.", 0.0, False, False), ("Lower.", 0.0, False, True)]
        assert make_environment(config.model_copy(update={"options": {"max_episode_steps": 7}})).max_turns == 7
        assert "has no demonstrations" in inspection.undemonstrated(config)
        assert inspection.unknown("gymnasium:my_games:Gess-v0").startswith("NameNotFound: Environment `Gess` doesn't")
    finally:
        gymnasium.registry.pop("Guess-v0", None)


def test_what_else_a_class_has_counts_behind_an_id_too(outside, monkeypatch):
    gymnasium = pytest.importorskip("gymnasium", reason="the extra gymnasium installs it")
    (outside / "my_own_games.py").write_text(
        "import gymnasium\nfrom guess_number import GuessNumber\n"
        "class Guess(GuessNumber, gymnasium.Env):\n"
        "    observation_space = action_space = gymnasium.spaces.Text(99)\n"
        "    stop, max_turns = ('!',), 4\n"
        "    def get_state(self): return 'kept'\n"
        "    def set_state(self, state): self.restored = state\n"
        "    def demonstrations(self, count, seed): return ['one'] * count\n"
        "gymnasium.register('Free-v0', Guess)\n"
        "gymnasium.register('Limited-v0', Guess, max_episode_steps=2)\n"
    )
    monkeypatch.syspath_prepend(str(outside))
    try:
        config = TaskConfig(name="gymnasium:my_own_games:Free-v0")
        free = make_environment(config)
        assert (free.max_turns, free.get_state(), free.demonstrations(2, 0)) == (4, "kept", ["one", "one"])
        assert stop_strings(config) == ("!",)
        limited = make_environment(TaskConfig(name="gymnasium:my_own_games:Limited-v0"))
        assert isinstance(limited, Replayed), "gymnasium counts the steps, and a state would not have their number"
        assert limited.max_turns == 2
    finally:
        for name in ("Free-v0", "Limited-v0"):
            gymnasium.registry.pop(name, None)


def test_an_id_without_gymnasium_is_refused_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    config = override(preset("tiny", agents=True), {"task.name": "gymnasium:Guess-v0"})
    with pytest.raises(ConfigError) as refused:
        check(config, "rl_agent")
    assert "task.name = 'gymnasium:Guess-v0': needs the package gymnasium; `pip install gymnasium` installs it" in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rl.advantage": "median.py:medain"}, "rl.advantage = 'median.py:medain': median.py has no medain"),
        ({"rl.advantage": "nowhere.py:a"}, "rl.advantage = 'nowhere.py:a': no such file nowhere.py; give its path"),
        ({"rl.advantage": "two-words.py:a"}, "rl.advantage = 'two-words.py:a': two-words.py cannot be imported"),
        ({"rl.advantage": "broken.py:a"}, "rl.advantage = 'broken.py:a': importing broken.py raised ZeroDivisionError"),
        ({"rl.advantage": "json.py:a"}, "rl.advantage = 'json.py:a': Python has another module 'json'"),
        ({"rl.advantage": "grop"}, "rl.advantage = 'grop': unknown advantage; did you mean grpo?"),
        ({"rl.advantage": "close.py:close"}, "rl.advantage = 'close.py:close': close is called with (prompts), and "),
        ({"rl.algorithm": "close.py:close"}, "rl.algorithm = 'close.py:close': close is function, not an Algorithm"),
        (
            {"task.reward": "median.py:over_the_median"},
            "task.reward = 'median.py:over_the_median': over_the_median is ",
        ),
        ({"task.name": "doubling.py:Halving"}, "task.name = 'doubling.py:Halving': doubling.py has no Halving"),
        ({"task.name": "close.py:close"}, "task.name = 'close.py:close': close "),
    ],
)
def test_what_is_wrong_with_a_name_is_one_line(changes, line, outside):
    (outside / "broken.py").write_text("1 / 0\n")
    (outside / "json.py").write_text("a = 1\n")
    (outside / "two-words.py").write_text("a = 1\n")
    said = refusal(changes)
    assert said.startswith(line)
    assert len(said.splitlines()) == 1


def test_rays_copy_of_a_file_is_found_by_its_name(outside, tmp_path, monkeypatch):
    """On another node the path leads nowhere, and the file lies in a folder of Ray's on ``sys.path``."""
    (there := tmp_path / "of_ray").mkdir()
    (outside / "median.py").rename(there / "median.py")
    monkeypatch.syspath_prepend(str(there))
    assert registry.find("advantage", "/home/me/median.py:median")([]) == []


def test_files_are_what_nodes_need_a_copy_of(outside):
    config = override(preset("tiny"), {"rl.advantage": "median.py:median", "task.reward": "close.py:close"})
    assert registry.files(name for _, name in named(config)) == [str(outside / "median.py"), str(outside / "close.py")]


def test_entry_points_of_packages(outside, monkeypatch):
    entry = importlib.metadata.EntryPoint("doubling", "doubling:Doubling", "cola_ray.tasks")
    monkeypatch.syspath_prepend(str(outside))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if group == entry.group else [])
    registry._entry_points.cache_clear()
    try:
        assert "doubling" in registry.names("task")
        check(override(preset("tiny"), {"task.name": "doubling"}), "rl_math")
        assert make_task(TaskConfig(name="doubling"), 0).problems("train")
    finally:
        registry._entry_points.cache_clear()


def test_names_of_ours_are_not_taken():
    with pytest.raises(ValueError, match="the project has an advantage of this name"):
        registry.register("advantage", "grpo")
    with pytest.raises(ValueError, match="kind = 'model': unknown; use one of algorithm, advantage"):
        registry.register("model", "mine")


@pytest.mark.parametrize("kind", registry.KINDS)
def test_what_is_built_in_is_found_in_the_same_way(kind):
    for name in registry.BUILT_IN[kind]:
        assert registry.find(kind, name) is not None
