"""Samples of a run: what is told of a step is what it was learnt from, and keeping it harms nothing."""

import dataclasses
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import words
from rich.console import Console
from test_agents import EPISODES
from test_agents import run as run_agents
from test_controller import GROUP, PROMPTS, STEPS, Pool, run, train

from cola_ray.experience import Answer
from cola_ray.runs import display, samples
from cola_ray.runs.display import Display
from cola_ray.runs.samples import Sample, SampleFolder, files, read, step_of, table


class Talking(Pool):
    """Its evaluations bring along what was said."""

    async def call(self, worker, method, *args):
        if method == "evaluate":
            return [Answer(float(index), (self.trajectory(worker, worker.version, 1),)) for index in args[0]]
        return await super().call(worker, method, *args)


def told(controller):
    """Samples by (step, kind)."""
    return {
        (event["samples"][0].step, event["samples"][0].kind): event["samples"]
        for event in controller.supervisor.events
        if "samples" in event
    }


def sample(step=1, kind="train", group=0, sibling=0, length=3, **more):
    ids = np.arange(3, 3 + length)
    made = Sample(step, kind, group, sibling, np.arange(3, 8), ids, "", 1.0, "", False, None, ids % 4,
                  -np.ones(length, np.float32), ids * 0 + step, np.full(length, 0.5, np.float32))  # fmt: skip
    return dataclasses.replace(made, **more)


@pytest.fixture
def folder(tmp_path):
    return SampleFolder(tmp_path, 1, words)


@pytest.fixture
def said(monkeypatch):
    """What the display says."""
    lines = []
    monkeypatch.setattr(Display, "say", lambda self, line: lines.append(line))
    return lines


# --- what is told -------------------------------------------------------------------------------------------------


def test_a_steps_samples_are_what_it_learns_from():
    controller, batches = run(Talking(), {"samples.every": 4, "samples.prompts": 2, "rl.eval_every": 3})
    found = told(controller)
    evaluated = [(0, "base"), (0, "eval"), (3, "eval"), (STEPS, "eval")]
    assert sorted(found) == sorted([(1, "train"), (4, "train"), (STEPS, "train"), *evaluated])
    for step in (1, 4, STEPS):
        some, batch = found[step, "train"], batches[step - 1]
        assert [(one.group, one.sibling) for one in some] == [
            ((step - 1) * PROMPTS + place, sibling) for place in range(2) for sibling in range(GROUP)
        ]
        assert {one.reward for one in some} == {0.0, 1.0}
        padded = batch.padded()
        learnt = {float(row[mask][0]) for row, mask in zip(padded.advantages, padded.action_mask, strict=True)}
        assert {float(one.advantages[0]) for one in some} == learnt, "GRPO's of rewards 0 and 1: below and above 0"
        assert all((one.versions == step - 1).all() for one in some), "a step's rollouts are of the version before"
    assert all(one.advantages is None for step, kind in evaluated for one in found[step, kind])
    assert found[0, "base"][0].actions is None, "the bare base chooses tokens"
    assert found[0, "eval"][0].actions is not None


@pytest.mark.parametrize("changes", [{"samples.prompts": 0}, {"samples.every": 0}])
def test_nothing_of_a_step_is_told_where_nothing_is_asked_and_batches_are_the_same(changes):
    controller, without = run(Pool(), changes)
    assert not told(controller)
    kept, batches = run(Pool(), {"samples.every": 1, "samples.prompts": PROMPTS})
    assert [len(some) for some in told(kept).values()] == [PROMPTS * GROUP] * STEPS, "all of them"
    for one, other in zip(without, batches, strict=True):
        for field in dataclasses.fields(one.padded()):
            np.testing.assert_array_equal(getattr(one.padded(), field.name), getattr(other.padded(), field.name))


def test_what_failed_has_its_reason_and_no_reward():
    controller, _ = run(Pool(reward_failure="raised ValueError: bad"), {"task.max_failed_rewards": 1.0})
    some = told(controller)[1, "train"]
    failed = [one for one in some if one.failure]
    assert failed
    assert all(one.reward is None and one.advantages is None for one in failed)
    assert all(one.reward is not None for one in some if not one.failure)


def test_advantages_that_only_the_learner_knows_are_left_open():
    controller, _ = run(Pool(), {"rl.algorithm": "ppo"})
    assert all(one.advantages is None for one in told(controller)[1, "train"])


@pytest.mark.parametrize(
    ("algorithm", "changes", "known"),
    [
        ("archer", {"critic.actor_states": "played", "critic.reuse": 2, "critic.warmup_iterations": 0}, True),
        ("archer", {}, False),
        ("archer_soft", {"rl.kl_coef": 0.1}, False),
        ("gigpo", {"rl.group_size": 2}, True),
        ("filtered_bc", {}, False),
        ("ppo", {}, False),
        ("reinforce", {}, True),
    ],
)
def test_episodes_are_told_with_what_their_turns_weigh(algorithm, changes, known, tmp_path):
    controller, batches, *_ = run_agents(tmp_path, algorithm, **{"samples.every": 1, "samples.prompts": 3} | changes)
    found = told(controller)
    for step, batch in enumerate(batches):
        some = found[step + 1, "train"]
        assert list(dict.fromkeys(one.group for one in some)) == [step * EPISODES + place for place in range(3)]
        for one in some:
            assert one.by_policy.sum() == (one.actions != 0).sum() * 2, "turns say 0 and 1"
            assert (one.advantages is not None) == known
            if not known:
                continue
            rows = batch.padded()
            own = [row[mask] for row, mask in zip(rows.advantages, rows.action_mask, strict=True)]
            assert any(np.array_equal(one.advantages[one.by_policy], weights) for weights in own)


def test_a_run_that_goes_on_says_from_where():
    async def act(controller):
        await controller.begin(4, [])
        return [event for event in controller.supervisor.events if "goes on from" in event]

    assert run(Pool(), act=act)[1] == [{"goes on from": 4}]


EVERY = {"samples.every": 1, "samples.prompts": 2, "rl.eval_every": 3}


def keys(events):
    """Of samples and metrics, (step, kind)."""
    kinds = [(event["samples"][0].step, event["samples"][0].kind) for event in events if "samples" in event]
    return {*kinds, *((event["step"], "metrics") for event in events if "step" in event)}


def test_a_checkpoint_has_what_a_killed_driver_has_not_read():
    """Whoever goes on from it is told of the steps to it that no driver has read, and of no later one."""
    saved, read = {}, set()

    async def act(controller):
        await controller.begin(0, [])
        for version in range(STEPS):
            await controller.next_batch(0, version)
            await controller.publish(version + 1, [], {"time/learn": 0.0})
            saved[version + 1] = await controller.checkpoint(0, version + 1)
            if version == 2:  # the driver reads what there is, and no more after it
                events, _ = await controller.drain(0)
                read.update(keys(events))
                await controller.drain(len(events))
        return read | keys([*controller.supervisor.told, *controller.supervisor.events])

    whole = run(Talking(), EVERY, act)[1]
    made = {(step, kind) for step in range(1, STEPS + 1) for kind in ("train", "metrics")}
    assert whole >= made | {(0, "base"), (0, "eval"), (0, "metrics"), (3, "eval")}
    for version in (2, 3, 4, 6):

        async def go_on(controller, version=version):
            await controller.drain(0)
            await controller.begin(version, [], saved[version])
            return keys(controller.supervisor.events)

        known = read if version > 3 else set()  # the driver had read nothing when versions 2 and 3 were saved
        assert run(Talking(), EVERY, go_on)[1] == {one for one in whole - known if one[0] <= version}


@pytest.mark.parametrize("drained", [False, True])
def test_steps_that_are_made_again_are_in_a_checkpoint_once(drained):
    async def act(controller):
        for first, until in ((0, 4), (1, 2)):
            await train(controller, first, until)
            if drained:
                await controller.drain(0)
        state = await controller.checkpoint(0, 2)
        return [event["samples"][0].step for event in state["unread"] if "samples" in event]

    assert run(Pool(), EVERY, act)[1] == [1, 2]


# --- what is kept -------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_told(folder, tmp_path):
    mixed = np.array([True, False, True])
    given = [
        sample(2, sibling=0, truncated=True, parts={"exact": 1.0, "length": 0.5}),
        sample(2, sibling=1, reward=None, failure="raised\n\x1b[31m at http://ann:pw@h/", advantages=None),
        sample(2, sibling=2, by_policy=mixed, actions=None, log_probs=None, completion="what was scored"),
    ]
    folder.keep(given)
    (file,) = files(tmp_path)
    rows = read(file)
    assert pq.read_table(tmp_path / "samples").num_rows == len(rows) == 3, "as pandas and others read it"
    for one, row in zip(given, rows, strict=True):
        assert row["prompt"] == "w3 w4 w5 w6 w7"
        for name in ("prompt_ids", "token_ids", "by_policy", "actions", "log_probs", "versions", "advantages"):
            value = getattr(one, name)
            assert row[name] == (None if value is None else value.tolist()), name
        for name in ("step", "kind", "group", "sibling", "reward", "truncated"):
            assert row[name] == getattr(one, name), name
    assert "".join(rows[0]["tokens"]).split() == rows[0]["completion"].split() == ["w3", "w4", "w5"]
    assert rows[1]["failure"] == "raised\n\x1b[31m at http://***@h/", "without secrets"
    assert rows[2]["completion"] == "what was scored"
    exact, length = {"name": "exact", "value": 1.0}, {"name": "length", "value": 0.5}
    assert [row["parts"] for row in rows] == [[exact, length], [], []]


def test_a_character_of_several_tokens_is_with_the_last_of_them():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise)
    ids = np.array(tokenizer("é 🙂!")["input_ids"])
    assert len(ids) == 8
    texts = samples.token_texts(tokenizer, np.array([], np.int64), ids)
    assert texts == ["", "é", " ", "", "", "", "🙂", "!"]
    assert samples.token_texts(tokenizer, ids, ids[:5]) == ["", "é", " ", "", "\ufffd"], "cut off within a character"
    assert samples.token_texts(tokenizer, ids, ids[:0]) == []


def test_a_step_that_is_made_again_is_there_once(folder, tmp_path):
    for step in (1, 5, 10):
        folder.keep([sample(step), sample(step, sibling=1)])
    folder.keep([sample(5, reward=0.25)])
    assert [step_of(file) for file in files(tmp_path)] == [1, 5, 10]
    assert [row["reward"] for row in read(files(tmp_path)[1])] == [0.25]
    folder.forget_after(5)
    assert [step_of(file) for file in files(tmp_path)] == [1, 5]


def test_a_kill_while_writing_leaves_what_there_was(folder, tmp_path, monkeypatch):
    folder.keep([sample(1)])

    def killed(*_, **__):
        (tmp_path / "samples" / ".00000002-train.parquet.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", killed)
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)  # a kill tidies nothing
        with pytest.raises(KeyboardInterrupt):
            folder.keep([sample(2)])
    assert [step_of(file) for file in files(tmp_path)] == [1]
    SampleFolder(tmp_path, 1, words).keep([sample(2)])
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == [file.name for file in files(tmp_path)]
    assert [step_of(file) for file in files(tmp_path)] == [1, 2]


def test_a_full_disk_is_said_once_and_ends_nothing(folder, tmp_path, monkeypatch, said):
    folder.keep([sample(1)])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        folder.keep([sample(2)])
        folder.keep([sample(3)])
    assert said == ["samples: OSError: [Errno 28] No space left on device; the run goes on without those"]
    folder.keep([sample(4)])
    assert [step_of(file) for file in files(tmp_path)] == [1, 4]
    assert not list((tmp_path / "samples").glob(".*"))


def test_no_tokenizer_and_no_samples_are_no_fault_of_the_run(tmp_path, said):
    def missing():
        raise OSError("no tokenizer.json")

    SampleFolder(tmp_path, 1, missing).keep([])
    assert not said
    SampleFolder(tmp_path, 1, missing).keep([sample()])
    assert said == ["samples: OSError: no tokenizer.json; the run goes on without those"]


def test_the_disk_is_bounded_and_what_stays_spans_the_run(folder, tmp_path, said):
    draw = np.random.default_rng(0)
    for step in range(1, 101):
        noise = draw.normal(size=20_000).astype(np.float32)  # which no compression makes less
        folder.keep([sample(step, log_probs=noise)])
        if step in (1, 50, 100):
            folder.keep([sample(step, "eval")])
    kept = files(tmp_path)
    assert sum(file.stat().st_size for file in kept) <= 1 << 20
    assert [step_of(file) for file in kept if samples.kind_of(file) == "eval"] == [1, 50, 100]
    steps = [step_of(file) for file in kept if samples.kind_of(file) == "train"]
    assert 5 <= len(steps) <= 15
    assert (steps[0], steps[-1]) == (1, 100)
    assert max(np.diff(steps)) <= 25, "no part of the run is empty"
    assert not said


def test_one_step_that_is_too_large_is_said(tmp_path, said):
    noise = np.random.default_rng(0).normal(size=400_000).astype(np.float32)
    SampleFolder(tmp_path, 1, words).keep([sample(1, log_probs=noise)])
    assert said == ["samples: one step's take more than samples.max_mb = 1; the run goes on without those"]
    assert files(tmp_path) == []


def test_a_damaged_file_is_named(folder, tmp_path):
    folder.keep([sample(1)])
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"00000001-train.parquet: not readable as samples"):
        read(file)


# --- what is shown ------------------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;owned\x07[bold red]sum\x1b[31m\r\n\u202eevil\x9b2J"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_has_a_table_and_a_log_has_none(is_terminal, folder, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120, color_system=None)
    with Display(console) as shown:
        monkeypatch.setattr(display, "_OPEN", [shown])
        folder.keep([sample(7, group=group, completion=HOSTILE) for group in (0, 0, 1, 2, 3)])
        text = console.file.getvalue()
    assert ("step 7" in text) == is_terminal
    assert text.count("[bold red]sum") == 3 * is_terminal, "as it stands, of three prompts"
    assert ("3 (0.37) 0 (0.37)" in text) == is_terminal, "exp(-1) = 0.37"


def test_no_control_character_of_a_text_reaches_the_terminal():
    rows = [{"kind": "eval", "step": 1, "group": 0, "prompt": HOSTILE, "completion": HOSTILE, "reward": None,
             "advantages": None, "actions": None, "log_probs": None, "by_policy": None}]  # fmt: skip
    console = Console(file=io.StringIO(), force_terminal=False, width=120)
    console.print(table(rows))
    text = console.file.getvalue()
    assert "[bold red]sum" in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)
