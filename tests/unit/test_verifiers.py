"""Responses, tasks and environments that attack whoever scores them: what each tried, and that it cost itself alone."""

import ast
import contextlib
import functools
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cola_ray.rollout.isolation import EnvironmentProcess
from cola_ray.rollout.reward_process import Reward, RewardProcess
from cola_ray.sandbox.execution import NotExecutedError
from cola_ray.sandbox.messages import BrokenError, Channel, GoneError, LateError, as_data
from cola_ray.settings.config import TaskConfig
from cola_ray.tasks import make_task
from cola_ray.tasks.formulas import arithmetic, formula, literal, whole
from cola_ray.tasks.protocol import LARGEST_REWARD

SOLUTION = 721.5


@pytest.fixture(scope="module")
def marker(tmp_path_factory):
    """A file that code makes which runs where it must not."""
    return tmp_path_factory.mktemp("marker") / "was_here"


# --- a verifier that executes what it reads --------------------------------------------------------------------------


class Executing:
    """A verifier that runs a response as Python, with the solution beside it."""

    executes_responses = True

    def __init__(self, solution):
        self.solution = solution

    def score(self, split, index, response):
        names = {}
        exec(response, names)
        return float(names["answer"] == self.solution)


class Apart:
    """The same, taken apart: what executes gets the response alone."""

    def __init__(self, solution):
        self.solution = solution

    @staticmethod
    def execute(response):
        names = {}
        exec(response, names)
        return names["answer"]

    def score(self, split, index, response):
        try:
            return float(self.execute(response) == self.solution)
        except NotExecutedError:
            return 0.0


# What a response says -> what must be found in its failure; "" where it ends as a wrong answer.
ATTACKS = {
    "labels: the type of what is served is patched": (
        "import sys; f = sys._getframe()\n"
        "while f: [setattr(type(v), 'score', lambda *_: 1.0) for v in list(f.f_locals.values()) if hasattr(v, 'score')]"
        "; f = f.f_back\nanswer = 0", ""),
    "labels: builtins are patched": (
        "import builtins; builtins.float = lambda *_: 1.0; builtins.exec = lambda *_: None; answer = 0", None),
    "labels: modules are patched": (
        "import sys, json; json.dumps = lambda *_: '1'; sys.modules.clear(); answer = 0", None),
    "labels: every list that the collector knows is emptied": (
        "import gc\nfor o in gc.get_objects():\n    if type(o) is list: o.clear()\nanswer = 0", None),
    "protocol: an object with __reduce__ is given": (
        "class Evil:\n    def __reduce__(self): import os; return os.system, ('touch {marker}',)\n"
        "    def __eq__(self, other): return self\n    def __float__(self): return self\nanswer = Evil()", "TypeError"),
    "protocol: a pickle is written to every descriptor": (
        "import os\nclass Evil:\n    def __reduce__(self): return os.system, ('touch {marker}',)\n"
        "import pickle; b = pickle.dumps(Evil())\n"
        "for d in range(256):\n    try: os.write(d, len(b).to_bytes(4, 'big') + b)\n    except OSError: pass\n"
        "answer = 0", "not JSON"),
    "protocol: replies to later calls are written to every descriptor": (
        "import os\nfor d in range(3, 256):\n"
        "    for t in range(50):\n"
        "        try: os.write(d, b'[%d, {\"value\": 1.0}]\\n' % t)\n        except OSError: break\n"
        "answer = 0", "not a reply"),
    "protocol: every descriptor is closed": ("import os; os.closerange(0, 65536); answer = 0", "ended its process"),
    "protocol: a reply of two gigabytes": (
        "answer = type('T', (float,), {'__eq__': lambda *_: 'x' * (1 << 31)})()", "MemoryError"),
    "protocol: an error of a hundred megabytes": ("raise ValueError('x' * 100_000_000)", "raised ValueError: xxx"),
    "protocol: an error whose text raises": (
        "class E(Exception):\n    def __str__(self): raise E()\nraise E()", "raised E: no message"),
    "protocol: an error of surrogates and control codes": (
        "raise ValueError('\\ud800\\x1b[2J\\r\\nthe run failed: pay')",
        "raised ValueError: ? [2J  the run failed: pay"),
    "protocol: half a reply, then the end": ("import os\nfor d in range(3, 64):\n    try: os.write(d, b'{\"val')\n"
        "    except OSError: pass\nos._exit(0)", "ended its process with exit code 0"),
    "protocol: lines printed": ("print('x' * 1000); import sys; sys.stderr.write('failed'); answer = 0", ""),
    "time: it sleeps": ("import time; time.sleep(600)", "took longer than"),
    "time: it computes": ("while True: pass", "took longer than"),
    "time: it computes where Python cannot interrupt it": ("answer = 9 ** 9 ** 9", "took longer than"),
    "time: it forks a child that outlives it": ("import os; answer = os.fork()", "PermissionError"),
    "time: it starts a thread": (
        "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); answer = 0", "RuntimeError"),
    "time: it asks not to end with its parent": (
        "import ctypes, time; ctypes.CDLL(None).prctl(1, 0); time.sleep(600)", "took longer than"),
    "memory: it takes all there is": ("answer = bytearray(1 << 36)", "MemoryError"),
    "signals: it kills its parent": ("import os; os.kill(os.getppid(), 9); answer = 0", "PermissionError"),
    "signals: it kills its group": ("import os; os.killpg(0, 9); answer = 0", None),
    "signals: it kills everything": ("import os; os.kill(-1, 9); answer = 0", "PermissionError"),
    "signals: it stops itself": ("import os; os.kill(os.getpid(), 19)", "took longer than"),
    "signals: it ends by one": ("import os; os.kill(os.getpid(), 11)", "exit code -11"),
    "ends: exit": ("import os; os._exit(7)", "exit code 7"),
    "ends: sys.exit": ("raise SystemExit(0)", "SystemExit"),
    "ends: KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "ends: recursion": ("f = lambda: f()\nf()", "RecursionError"),
    "ends: recursion in C": (
        "import sys; sys.setrecursionlimit(1 << 30)\nf = lambda: [*map(lambda _: f(), [0])]\nf()", "exit code -"),
    "files: it writes": ("open('{marker}', 'w'); answer = 0", "PermissionError"),
    "files: it reads its parent's memory": (
        "import os; open(f'/proc/{{os.getppid()}}/mem', 'rb'); answer = 0", "PermissionError"),
    "files: it reads what is open elsewhere": ("import os; os.listdir('/proc/self/fd'); answer = 0", "PermissionError"),
    "files: it runs a program": ("import os; os.execv('/bin/touch', ['touch', '{marker}'])", "PermissionError"),
    "sockets: it makes one": ("import socket; socket.socket(); answer = 0", "PermissionError"),
}  # fmt: skip


@pytest.fixture(scope="module")
def executing():
    process = RewardProcess(functools.partial(Executing, SOLUTION), timeout_s=2.0)
    yield process
    process.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_response_that_attacks_costs_itself_alone(name, executing, marker):
    program, expected = ATTACKS[name]
    program = program.replace("{marker}", str(marker)).replace("{{", "{").replace("}}", "}")
    owner = executing.process.pid
    said = [program, "answer = 0", f"answer = {SOLUTION}"]
    attack, wrong, right = executing.score([("train", 0, response) for response in said])
    assert (wrong, right) == (Reward(0.0), Reward(1.0)), "what comes next is scored as ever"
    assert attack.value in (0.0, 1.0)
    if expected == "":
        assert attack == Reward(0.0)
    elif expected is not None:
        assert expected in attack.failure
    assert not marker.exists()
    assert executing.process.pid == owner, "nobody had to be started again"


LOOKS_FOR_LABELS = {
    "frames": """
        import sys
        answer, frame = 0, sys._getframe()
        while frame:
            for value in frame.f_locals.values():
                answer = getattr(value, "solution", answer)
            frame = frame.f_back
    """,
    "the collector": """
        import gc
        answer = 0
        gc.collect()
        for one in gc.get_objects():
            if type(one) is dict and type(one.get("solution")) is float: answer = one["solution"]
            if type(one).__name__ == "Apart": answer = getattr(one, "solution", answer)
    """,
    "classes": """
        answer = 0
        todo = [object]
        while todo:
            one = todo.pop()
            todo += type.__subclasses__(one)
            answer = vars(one).get("solution", answer)
    """,
    "its own memory": """
        import struct
        memory = open("/proc/self/mem", "rb")
        answer = 0
    """,
    "modules": """
        import sys
        answer = 0
        for module in list(sys.modules.values()):
            for value in list(vars(module).values()):
                answer = getattr(value, "solution", answer) if type(value).__name__ == "Apart" else answer
    """,
    "equality": """
        class Same(float):
            def __eq__(self, other): return True
        answer = Same(0)
    """,
}


def test_what_executes_apart_does_not_know_the_solution():
    secret = 1234.0625  # made here, and only handed to the task
    process = RewardProcess(functools.partial(Apart, secret), timeout_s=2.0)
    looks = [textwrap.dedent(program) for program in LOOKS_FOR_LABELS.values()]
    others = [*(program for program, _ in ATTACKS.values() if "{marker}" not in program)][::4]
    found = process.score([("train", 0, said) for said in [*looks, *others, f"answer = {secret}", "answer = 1"]])
    process.close()
    assert found[:-2] == [Reward(0.0)] * (len(found) - 2)
    assert found[-2:] == [Reward(1.0), Reward(0.0)]


def test_execution_apart_is_behind_other_tasks_as_well():
    """Thinking takes the answer out of its tags, and gives that alone to the task."""
    from cola_ray.tasks.verifiable import Thinking

    process = RewardProcess(functools.partial(_thinking, Thinking), timeout_s=4.0)
    tagged = "<think>{}</think><answer>{}</answer>"
    responses = [tagged.format("hm", "answer = 3.0"), tagged.format("answer = 3.0", "answer = 2"), "answer = 3.0"]
    found = process.score([("train", 0, response) for response in responses])
    process.close()
    assert [reward.value for reward in found] == [1.0, 0.1, 0.0]


def _thinking(kind):
    return kind(Apart(3.0))


# --- reasoning-gym: nothing is executed -----------------------------------------------------------------------------

GYM_ATTACKS = [
    # Reaches the serving loop's frames and sends what a pickle would execute.
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'catch_warnings'][0]()._module.__builtins__"
    "['__import__']('sys')._getframe(9).f_locals['connection'].send(type('E', (), {'__reduce__': lambda s: "
    "(__import__('os').system, ('touch {marker}',))})())",
    # Makes every later answer right.
    "setattr(type(__import__('sys')._getframe(9).f_locals['served']), 'score', lambda *a: 1.0) or 5",
    "__import__('os').system('touch {marker}')",
    "open('{marker}', 'w').write('1')",
    "(lambda: __import__('pathlib').Path('{marker}').touch())()",
    "[x for x in (1).__class__.__mro__]",
    "__import__('time').sleep(600)",
    "9**9**9**9",
    "(((((((((9**9)**9)**9)**9)**9)**9)**9)**9)**9)",
    "(" * 50_000 + "1" + ")" * 50_000,
    "-" * 50_000 + "1",
    "1+" * 100_000 + "1",
    "9" * 100_000,
    "1e999999999",
    "factorial(10**9)",
    "\ud800",
    "\0",
    "10000000!",
    "Integral(x, x)",
    "Symbol('x').subs('__import__(\"os\").system(\"touch {marker}\")', 1)",
    'sympify(\'__import__("os").system("touch {marker}")\')',
    'f\'{__import__("os").system("touch {marker}")}\'',
]


@pytest.mark.parametrize("name", ["countdown", "n_queens", "simple_integration"])
def test_answers_to_generators_are_data(name, marker):
    config = TaskConfig(name=name, num_problems=6)
    process = RewardProcess(functools.partial(make_task, config, 0), timeout_s=20.0)
    problem = make_task(config, 0).problems("train")[0]
    attacks = [attack.replace("{marker}", str(marker)) for attack in GYM_ATTACKS]
    *bad, right, wrong = process.score([("train", 0, said) for said in [*attacks, problem.solution, "1 + 1"]])
    process.close()
    assert [(attack[:40], reward) for attack, reward in zip(attacks, bad, strict=True) if reward.value >= 0.1] == []
    assert right == Reward(1.0)
    assert wrong.value < 0.1
    assert not marker.exists()


# What calls eval or its like in reasoning-gym, and on what: its own problems, or a reader of ours in its place.
KNOWN = {
    "algorithmic/string_insertion.py": "literal", "algorithmic/spiral_matrix.py": "literal",
    "algorithmic/binary_matrix.py": "literal", "games/n_queens.py": "literal", "games/countdown.py": "arithmetic",
    "games/puzzle24.py": "whole", "algebra/simple_integration.py": "formula",
    "algebra/intermediate_integration.py": "formula", "algebra/polynomial_multiplication.py": "formula",
    "algorithmic/number_sorting.py": "its own solution", "arithmetic/bitwise_arithmetic.py": "its own problem",
    "arithmetic/basic_arithmetic.py": "its own problem", "code/codeio.py": "its own programs",
    "arithmetic/gsm_symbolic/generators_00_49.py": "its own problem",
    "arithmetic/gsm_symbolic/generators_50_99.py": "its own problem",
}  # fmt: skip


def test_every_place_where_a_generator_executes_is_known():
    import importlib.util

    root = Path(importlib.util.find_spec("reasoning_gym").origin).parent
    executing = {"eval", "exec", "sympify", "parse_expr", "__import__", "import_module", "system", "Popen", "loads"}
    found = {}
    for file in root.rglob("*.py"):
        name = str(file.relative_to(root))
        text = file.read_text()
        if not any(f"{call}(" in text for call in executing):
            continue
        tree = ast.parse(text)
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                json_loads = called == "loads" and getattr(getattr(node.func, "value", None), "id", "") == "json"
                if called in executing - own and not json_loads:
                    found.setdefault(name, called)
    assert found.keys() == KNOWN.keys()


@pytest.mark.parametrize("form", ["{}", "The final answer is {}", "$x$ = {}", "#### {}", "1 + {} + 1"])
def test_what_math_verify_evaluates_has_no_names(form, monkeypatch, marker):
    """It hands plain formulas to SymPy's parse_expr, which evaluates them as Python: digits and operators alone."""
    import math_verify.parser as theirs

    from cola_ray.tasks.expressions import canonical, final_expression

    evaluated, real = [], theirs.parse_expr
    monkeypatch.setattr(theirs, "parse_expr", lambda text, **how: evaluated.append(text) or real(text, **how))
    theirs.parse_expr_cached.cache_clear()
    for said in ["3*(4+5)", *GYM_ATTACKS, "1_0*2", "0x10+1", "1e9+1", "(1)(2)", "2*__import__('os')"]:
        found = final_expression(form.format(said.replace("{marker}", str(marker))))
        if found is not None:
            canonical(found)
    assert evaluated or form != "The final answer is {}", "what this test looks at is still done"
    assert [text for text in evaluated if not re.fullmatch(r"[\d\s.+*/()\u00d7\u00f7-]+", text)] == []
    assert not marker.exists()


def test_readers_of_answers_read_and_bound():
    assert arithmetic("(3 + 4) * 2 / 4 - -1") == Fraction(9, 2)
    assert whole("2**3 * 3") == 24
    assert literal("[[1, -2.5], ('a', None)]") == [[1, -2.5], ("a", None)]
    assert str(formula("3*x**2/2 + sin(x)*exp(-x) + C")) == "C + 3*x**2/2 + exp(-x)*sin(x)"
    for read, text in [
        (arithmetic, "0x10"), (arithmetic, "1e2"), (arithmetic, "1_0"), (arithmetic, "2**9999"), (arithmetic, "1/0"),
        (whole, "49/2"), (literal, "['a'*9]"), (literal, "{1}"), (formula, "f(x)"), (formula, "x.y"),
        (formula, "2**9999**9"), (formula, "lambda: 1"), (formula, "'x'"), (literal, "[" * 60 + "]" * 60),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=r"no |not |than |deep|only"):
            read(text)


def test_the_game_of_24_is_played_with_the_numbers_given_and_exactly():
    task = make_task(TaskConfig(name="puzzle24", num_problems=6), 0)
    problem = task.problems("train")[0]
    assert task.score("train", 0, problem.solution) == 1.0
    for reward_for_all in ("4 * 6 * 1 * 1", "(7 * 7 * 1) / 2"):
        assert task.score("train", 0, reward_for_all) < 0.1


def test_a_solution_that_repeats_the_question_is_no_problem():
    task = make_task(TaskConfig(name="intermediate_integration", num_problems=60), 1)
    entries = [*task._entries["train"], *task._entries["heldout"]]
    assert not any("Integral(" in entry["answer"] for entry in entries)
    assert task.score("train", 0, f"Integral({task._entries['train'][0]['metadata']['integrand']}, x)") == 0.0


# --- messages: tasks that get at the connection ---------------------------------------------------------------------


class Liar:
    """A task that finds the connection in its caller's frames and writes to it what the response says."""

    def score(self, split, index, response):
        frame = sys._getframe()
        while "channel" not in frame.f_locals:
            frame = frame.f_back
        channel, token = frame.f_locals["channel"], frame.f_locals["token"]
        if response.startswith("write "):
            raw = bytes.fromhex(response.split()[1]).replace(b"TOKEN", b"%d" % token)
            channel.send.__globals__["os"].write(channel.writing, raw)
        if response == "evil":
            os.write(channel.writing, pickle.dumps(Evil()))
        if response == "flood":
            while True:
                os.write(channel.writing, b"[" * 65536)
        if response.endswith("exit"):
            os._exit(0)
        if response.endswith("hang"):
            time.sleep(60)
        if response == "close":
            os.close(channel.writing)
        if response == "big":
            return "x" * (2 << 20)
        return {"object": object(), "none": None, "text": "1.0", "list": [1.0], "large": 1e7}.get(response, 0.5)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ.get("EVIL", "/nowhere/evil"),)


def written(raw, then=""):
    return f"write {raw.hex()} {then}".strip()


LIES = {
    "a pickle": ("evil", "not JSON|too long|longer than|not a reply"),
    "a pickle in a frame": (written(struct.pack("!i", 20) + pickle.dumps([1.0]) + b"\n"), "not JSON"),
    "not JSON": (written(b"hello\n"), "not JSON"),
    "half a reply, then nothing": (written(b'[TOKEN, {"val', "hang"), "took longer than 2 s"),
    "half a reply, then the end": (written(b'[TOKEN, {"val', "exit"), "exit code 0"),
    "more than fits": ("flood", "more than 1048576 bytes"),
    "a line that is too long": (written(b"[" + b"1," * 30000, "exit"), "exit code 0"),
    "lists within lists": (written(b"[" * 50000 + b"]" * 50000 + b"\n"), "not JSON|not a reply"),
    "lists as deep as JSON goes": (
        written(b'[TOKEN, {"value": ' + b"[" * 900 + b"]" * 900 + b"}]\n"),
        "not JSON|nested",
    ),
    "another call's token": (written(b'[1, {"value": 1.0}]\n'), "not a reply"),
    "two replies": (written(b'[TOKEN, {"value": 0.25}]\n'), ""),
    "a reply and a half": (written(b'[TOKEN, {"value": 0.25}]\n[TOKEN, {'), ""),
    "an empty line": (written(b"\n"), "not JSON"),
    "null": (written(b"null\n"), "not a reply"),
    "a number": (written(b"1.0\n"), "not a reply"),
    "no list": (written(b'{"token": TOKEN, "value": 1.0}\n'), "not a reply"),
    "no value": (written(b"[TOKEN, {}]\n"), "not a reply"),
    "value and failure": (written(b'[TOKEN, {"value": 1, "failure": "no"}]\n'), "not a reply"),
    "a failure that is no text": (written(b'[TOKEN, {"failure": [1]}]\n'), "not a reply"),
    "a failure without a word": (written(b'[TOKEN, {"failure": ""}]\n'), "without a message"),
    "not-a-number": (written(b'[TOKEN, {"value": NaN}]\n'), "returned nan"),
    "infinity": (written(b'[TOKEN, {"value": -Infinity}]\n'), "returned -inf"),
    "1e999": (written(b'[TOKEN, {"value": 1e999}]\n'), "returned inf"),
    "a number of 4000 digits": (written(b'[TOKEN, {"value": ' + b"9" * 4000 + b"}]\n"), "returned 9999"),
    "a number of 5000 digits": (written(b'[TOKEN, {"value": ' + b"9" * 5000 + b"}]\n"), "not JSON"),
    "text for a number": (written(b'[TOKEN, {"value": "1.0"}]\n'), "returned '1.0'"),
    "a list for a number": (written(b'[TOKEN, {"value": [1.0]}]\n'), r"returned \[1.0\]"),
    "bytes that are no UTF-8": (written(b'[TOKEN, {"failure": "\xff\xfe"}]\n'), "not JSON"),
    "surrogates": (written(b'[TOKEN, {"failure": "\\ud800\\u001b[2J"}]\n'), r"\? \[2J"),
    "the connection closed": ("close", "closed the connection|exit code"),
    "an object": ("object", "TypeError: value is object"),
    "nothing": ("none", "returned None"),
    "text": ("text", "returned '1.0'"),
    "a list": ("list", r"returned \[1.0\]"),
    "more than a megabyte": ("big", "returned too much"),
    "more than a reward may be": ("large", "1e[+]07, more than 1e[+]06 either way; rescale it"),
}


@pytest.fixture(scope="module")
def lying():
    process = RewardProcess(Liar, timeout_s=2.0)
    yield process
    process.close()


@pytest.mark.parametrize("name", LIES)
def test_a_message_that_is_none_costs_its_own_sample(name, lying, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    response, failure = LIES[name]
    bad, *good = lying.score([("train", 0, said) for said in (response, "honest", "honest")])
    assert good == [Reward(0.5)] * 2, "the next ones have their own answers"
    assert re.search(failure, bad.failure) if failure else bad == Reward(0.25)
    assert not (tmp_path / "evil").exists(), "nothing was unpickled"


def test_a_response_that_is_too_long_to_hand_over_costs_itself(lying):
    bad, good = lying.score([("train", 0, "x" * (2 << 20)), ("train", 0, "honest")])
    assert "too much to hand over" in bad.failure
    assert good == Reward(0.5)


def test_answers_that_are_no_text_are_none(lying):
    class_answers = lying.call([("answer_of", "\ud800"), ("answer_of", "yes")])
    assert [answer.value for answer in class_answers] == ["\ud800", "yes"]
    assert lying.answers(["\ud800", "yes"]) == ["", "yes"]


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield Channel(reading, -1, 100), writing
    for descriptor in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(descriptor)


@pytest.mark.parametrize(
    ("sent", "closed", "error"),
    [
        (b"", True, GoneError), (b"[1", True, GoneError), (b"[1", False, LateError), (b"x" * 99, False, LateError),
        (b"x" * 100, False, BrokenError),
        (b"x" * 200 + b"\n", False, BrokenError), (b"[1]]\n", False, BrokenError), (b'"\xe4"\n', False, BrokenError),
    ],
)  # fmt: skip
def test_a_channel_gives_whole_messages_or_raises(pipe, sent, closed, error):
    channel, writing = pipe
    os.write(writing, sent)
    if closed:
        os.close(writing)
    with pytest.raises(error):
        channel.receive(0.05)


def test_a_channel_carries_text_of_any_kind(pipe):
    channel, writing = pipe
    for value in ["\ud800\n\0\u2028", [1, None, True, 0.1, {"a": []}], "\x7f" * 9]:
        Channel(-1, writing, 100).send(value)
        assert channel.receive(1.0) == value
        assert channel.silent()
    with pytest.raises(ValueError, match="a message of 101 bytes; at most 100"):
        Channel(-1, writing, 100).send("x" * 98)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"x", "value is bytes"), (np.zeros(2), "value is ndarray"), ({1: 2}, "value has the key 1"),
        ({"a": [0, object()]}, r"value\['a'\]\[1\] is object"), ({1, 2}, "value is set"),
        (functools.reduce(lambda inner, _: [inner], range(70), 0), "nested more than 64 deep"),
    ],
)  # fmt: skip
def test_what_is_no_data_is_named(value, message):
    with pytest.raises(TypeError, match=message):
        as_data(value)


def test_data_is_what_json_gives_back():
    value = {"a": (1, 2.5, None), "b": [np.float32(0.5), np.int64(3), np.bool_(True)], "c": "\ud800"}
    assert (
        as_data(value)
        == json.loads(json.dumps(as_data(value)))
        == {"a": [1, 2.5, None], "b": [0.5, 3, True], "c": "\ud800"}
    )


# --- environments ---------------------------------------------------------------------------------------------------


class Odd:
    """An environment that says and keeps what it is told to."""

    max_turns = 9

    def __init__(self):
        self.turn, self.kept = 0, None

    def reset(self, *, seed):
        return "begin", {}

    def step(self, utterance):
        self.turn += 1
        said = ("fine", 0.5, False, False, {})
        changes = {
            "bytes": (0, b"x"), "surrogate": (0, "\ud800"), "none": (0, None), "much": (0, "x" * (5 << 20)),
            "nan": (1, float("nan")), "inf": (1, float("inf")), "1e308": (1, -1e308), "reward of text": (1, "one"),
            "array": (1, np.ones(3)),
        }  # fmt: skip
        if utterance in changes:
            place, value = changes[utterance]
            said = (*said[:place], value, *said[place + 1 :])
        self.kept = {"object": object(), "keys": {1: 2}, "raw": b"x", "array state": np.ones(3)}.get(utterance)
        if utterance == "deep":
            self.kept = functools.reduce(lambda inner, _: [inner], range(2000), 0)
        if utterance == "four":
            return said[:4]
        return said

    def get_state(self):
        return (self.turn, self.kept)

    def set_state(self, state):
        self.turn, self.kept = state


@pytest.fixture(scope="module")
def games():
    process = EnvironmentProcess(Odd, timeout_s=5.0)
    yield process
    process.close()


@pytest.mark.parametrize(
    ("utterance", "failure"),
    [
        ("bytes", "TypeError: value"), ("surrogate", "which is not valid text"), ("none", "observation None"),
        ("much", "returned too much"), ("nan", "returned the reward nan"), ("inf", "returned the reward inf"),
        ("1e308", "more than 1e+06 either way"), ("reward of text", "ValueError"), ("array", "TypeError"),
        ("object", "get_state()[1] is object"), ("keys", "get_state()[1] has the key 1"),
        ("raw", "get_state()[1] is bytes"),
        ("array state", "get_state()[1] is ndarray"), ("deep", "nested more than 64 deep"), ("four", "ValueError"),
    ],
)  # fmt: skip
def test_an_outcome_that_is_none_costs_its_own_episode(games, utterance, failure):
    other = games.reset(1, seed=0).value
    bad = games.step(2, games.reset(2, seed=0).value.state, utterance)
    assert failure in bad.failure
    good = games.step(1, other.state, "hello")
    assert (good.failure, good.value.observation, good.value.reward, good.value.state) == ("", "fine", 0.5, [1, None])


# --- nobody is left behind --------------------------------------------------------------------------------------------

OWNER = """
import functools, sys, threading, time
sys.path.insert(0, {folder!r})
from cola_ray.rollout.reward_process import RewardProcess
from test_verifiers import Executing, Liar
if __name__ == "__main__":
    processes = [RewardProcess(functools.partial(Executing, 1.0), 60.0), RewardProcess(Liar, 60.0)]
    for process, said in zip(processes, ("import time; time.sleep(600)", "hang")):
        process.score([("train", 0, "answer = 1")])
        threading.Thread(target=process.score, args=([("train", 0, said)],), daemon=True).start()
    print(*(process.process.pid for process in processes), flush=True)
    time.sleep(600)
"""


def _descendants(pid):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found += [int(folder.name), *_descendants(int(folder.name))]
    return found


def test_an_owner_that_is_killed_leaves_nobody(tmp_path):
    (tmp_path / "owner.py").write_text(OWNER.format(folder=str(Path(__file__).parent)))
    owner = subprocess.Popen([sys.executable, str(tmp_path / "owner.py")], stdout=subprocess.PIPE, text=True)
    served = [int(pid) for pid in owner.stdout.readline().split()]
    deadline = time.monotonic() + 60
    while not (forks := _descendants(served[0])) and time.monotonic() < deadline:
        time.sleep(0.1)
    everybody = _descendants(owner.pid)
    assert {*served, *forks} <= {*everybody}
    assert forks, "the response sleeps in a fork"
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in everybody):
        time.sleep(0.1)
    assert [pid for pid in everybody if Path(f"/proc/{pid}").exists()] == []


def test_rewards_up_to_the_bound_are_rewards():
    from cola_ray.rollout.isolation import Reply
    from cola_ray.rollout.reward_process import as_reward

    for value in (LARGEST_REWARD, -LARGEST_REWARD, 0, True, -0.0, 5e-324):
        assert as_reward(Reply(value)) == Reward(float(value))
    for value in (
        np.nextafter(LARGEST_REWARD, np.inf).item(),
        -1e308,
        10**400,
        float("inf"),
        float("nan"),
        None,
        "1",
        [1],
    ):
        assert as_reward(Reply(value)).failure.startswith("returned ")
        assert as_reward(Reply(value)).value == 0.0
