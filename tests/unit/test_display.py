"""What a job's display says, and when, by a clock that the test turns."""

import ast
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cola_ray.cli.arguments import from_command_line
from cola_ray.cli.commands import COMMANDS
from cola_ray.runs import display as module
from cola_ray.runs.display import QUIET_S, Display, current, shown, wide_console
from cola_ray.settings.config import override, value_at
from cola_ray.settings.presets import expectation, preset


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def display(clock):
    """A plain log's, not entered: no thread beats but the test."""
    return Display(Console(file=io.StringIO(), soft_wrap=True), clock)


def lines(display):
    return display.console.file.getvalue().splitlines()


def test_each_phase_is_told_when_it_begins_and_with_its_time_when_it_ends(display, clock):
    display.doing("starting Ray")
    clock.now += 12
    display.doing("starting Ray")  # the same: nothing new
    display.doing("opening MLflow")
    clock.now += 61.5
    display.doing("")
    assert lines(display) == [
        "0:00  starting Ray ...", "0:12  starting Ray: 12.0 s", "0:12  opening MLflow ...",
        "1:13  opening MLflow: 1 min 1 s",
    ]  # fmt: skip
    assert display.seconds == {"starting Ray": 12.0, "opening MLflow": 61.5}


def test_a_phase_that_says_nothing_is_never_silent_for_ten_seconds(display, clock):
    display.doing("importing")
    told = [clock.now]
    for _ in range(60):
        clock.now += 1  # the heartbeat's interval
        before = len(lines(display))
        display.beat()
        if len(lines(display)) > before:
            told.append(clock.now)
    assert len(told) > 5
    assert max(b - a for a, b in itertools.pairwise(told)) <= QUIET_S + 1 < 10
    assert lines(display)[-1].endswith("importing ...  (1 min 0 s)")


def test_steps_are_lines_now_and_then_and_their_last_one_always(display, clock):
    for step in range(1, 101):
        clock.now += 0.2
        display.update("base", step, 100, f"loss {step}", milestone=step == 7)
    told = [line.split("base ")[1].split()[0] for line in lines(display) if "/100" in line]
    assert told[0] == "7/100"
    assert told[-1] == "100/100"
    assert len(told) <= 2 + 20 / QUIET_S
    display.doing("")
    assert lines(display)[-1].endswith("base: 19.8 s")


def test_a_step_that_has_not_been_told_is_when_its_phase_ends(display):
    display.update("rl", 3, 10, "reward 0.5")
    display.doing("saving")
    assert "0:00  rl: 0.0 s  3/10  reward 0.5" in lines(display)


def test_what_is_shown_of_a_value_is_no_markup(display):
    display.say("task.options = [red]")
    assert lines(display) == ["0:00  task.options = [red]"]


def test_one_display_a_process(capsys):
    with shown() as outer:
        assert current() is outer
        with shown() as inner:
            assert inner is outer
        assert current() is outer
    assert current() is not outer
    assert outer.closed.is_set()


def test_a_terminal_keeps_each_phase_with_its_time(clock):
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=100)
    with Display(console, clock) as display:
        display.doing("starting Ray")
        clock.now += 3
        display.update("base", 5, 10, "loss 1")
    text = console.file.getvalue()
    assert "0:03  starting Ray: 3.0 s" in text
    assert "base" in text


def test_whoever_waits_for_ray_is_in_a_phase():
    """Every job's function opens the display, and nothing of it is imported that takes long."""
    folder = Path(module.__file__).parents[1]
    jobs = {"training/supervised": {"pretrain", "train_reward_model", "train_q"},
            "training/rl": {"run_rl", "run_agent"},
            "studies/evaluation": {"evaluate"}, "studies/diversity": {"diversity"}, "studies/atlas": {"atlas"},
            "studies/capabilities": {"capabilities"}, "studies/sweep": {"sweep"},
            "studies/reproduce": {"reproduce"}}  # fmt: skip
    for name, functions in jobs.items():
        tree = ast.parse((folder / f"{name}.py").read_text())
        opened = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)
                  and "shown()" in [ast.unparse(decorator) for decorator in node.decorator_list]}  # fmt: skip
        assert functions <= opened
    imported = {node.module.split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name
                for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert imported <= {"contextlib", "threading", "time", "collections", "typing", "rich", "cola_ray"}


FIRST = """
import sys
from types import SimpleNamespace
from cola_ray.cli import commands, main

def refuse(name):
    heavy = {"torch", "ray", "vllm", "mlflow", "transformers"}
    print(sorted(heavy & {*sys.modules}), file=sys.stderr)
    return SimpleNamespace(run_rl=lambda config: None)

commands.importlib = SimpleNamespace(import_module=refuse)
main("rl")
"""


def test_what_will_happen_is_said_before_anything_heavy_is_imported(tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", FIRST, "--preset", "tiny"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (said.returncode, said.stderr) == (0, "[]\n")
    lines = said.stdout.splitlines()
    assert "starts from" in lines[0]
    pretraining = r"\d+ \+ \d+ \+ \d+ steps of pre-training"
    assert re.match(rf"0:0\d  time: about \d+ minutes for {pretraining} and \d+ of RL", lines[-3])
    assert re.match(r"0:0\d  importing PyTorch, Ray and vLLM ...", lines[-2])


def test_how_long_it_takes_follows_from_steps_and_sizes():
    def minutes(changes, makes=False):
        return int(
            re.search(r"about (\d+) minute", expectation(override(preset("tiny"), changes), "rl_math", makes))[1]
        )

    assert minutes({}, makes=True) > minutes({})
    hours = minutes({"rl.max_steps": 4000})
    assert minutes({"rl.max_steps": 4000, "rl.prompts_per_step": 32}) == pytest.approx(hours / 2, rel=0.05)
    assert "`cola_ray plan --preset llama-3.1-8b`" in expectation(preset("llama-3.1-8b"), "rl_math", False)


def test_a_run_ends_with_what_it_gained_where_it_is_and_what_is_next(cola_dir, tmp_path, monkeypatch):
    from cola_ray.training.rl import afterwards

    monkeypatch.chdir(tmp_path)
    config = override(preset("tiny"), {"output_dir": str(tmp_path / "outputs" / "demo")})
    summary = {"bc_accuracy": 0.35, "rl_accuracy": 0.85, "eval_problems": 512}
    assert afterwards(config, "rl_math", summary) == [
        "accuracy on 512 held-out problems: 0.35 before RL, 0.85 after, +50 points",
        "the model: outputs/demo/model",
        "next, for example:",
        "  cola_ray view outputs/demo",
        "  cola_ray evaluate --preset tiny --task.name arithmetic --model.path outputs/demo/model",
        "  cola_ray atlas --preset tiny --task.name arithmetic --model.path outputs/demo/model",
    ]
    shutil.copytree(cola_dir, "outputs/demo/model")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="e").save_pretrained(
        "outputs/demo/model"
    )
    for line in afterwards(config, "rl_math", summary)[-2:]:
        _, command, *args = line.split()
        from_command_line(COMMANDS[command].job, args)
    tokens = afterwards(override(config, {"rl.action_space": "token"}), "rl_math", summary)
    assert tokens[-1].endswith("--rl.action-space token")
    Path("my rows.jsonl").write_text('{"q": "a", "answer": "b"}\n')
    mine = {"task.name": "dataset", "task.path": "my rows.jsonl", "task.columns": {"prompt": "q"},
            "task.reward": ("exact", "length"), "task.reward_weights": (1.0, 0.1), "task.right_from": 1.0}  # fmt: skip
    rows = override(override(preset("tiny", task="dataset"), {"output_dir": config.output_dir}), mine)
    for line in afterwards(rows, "rl_math", summary)[-2:]:
        _, command, *args = shlex.split(line)
        read = from_command_line(COMMANDS[command].job, args)
        for field in mine if command == "evaluate" else ("task.path", "task.columns"):
            assert value_at(read, field) == mine[field]
    scored = override(rows, {"task.reward": ("exact", "reward_model"), "task.reward_model": "http://x/"})
    assert not any("evaluate" in line for line in afterwards(scored, "rl_math", summary)), "which would refuse it"


def test_tables_go_to_streams_that_are_no_files(monkeypatch):
    """Ray Tune puts one in standard output's place that has write and flush, and nothing else."""

    class Stream:
        def __init__(self):
            self.said = ""

        def write(self, text):
            self.said += text

        def flush(self):
            pass

    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    wide_console(log_width=200).print("x" * 150)
    assert stream.said == "x" * 150 + "\n"


UNREAD = """
import sys
from cola_ray.runs.display import current, shown, print_line, wide_console

@shown()
def job():
    for number in range(3):
        current().say("x" * 9)
        print_line("y")
        wide_console(80).print("z")
    sys.stderr.write("done")

job()
"""


@pytest.mark.parametrize("where", ["a pipe that nobody reads", "/dev/full"])
def test_who_does_not_read_does_not_end_a_job(where):
    reader, writer = os.pipe()
    os.close(reader)
    if where == "/dev/full":
        os.close(writer)
        writer = os.open(where, os.O_WRONLY)
    done = subprocess.run([sys.executable, "-c", UNREAD], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr.startswith("done")
