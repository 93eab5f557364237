"""Checkpoints that are whole or do not count, and what a run may be resumed with."""

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import letters, on_ranks, small_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_agents import WIDTH, Pool, replicas_over, soft_advantages
from test_run_folder import settings as tiny
from test_run_folder import write

from cola_ray.learner import logged_q, pretrain, reward_model
from cola_ray.learner.engine import last_checkpoint, save_checkpoint
from cola_ray.loop.controller import Controller
from cola_ray.loop.episodes import Episodes
from cola_ray.replay.buffer import ReplayBuffer, ReplayError
from cola_ray.replay.critic_service import CriticService
from cola_ray.replay.service import ReplayShard, Shards
from cola_ray.runs import checkpoints, launch, resume, run_folder
from cola_ray.runs.run_folder import claim, refusals, write_json
from cola_ray.settings.config import ConfigError, override
from cola_ray.settings.presets import preset

# --- whole or not there -------------------------------------------------------------------------------------------

PARTS = ("zero/zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero/zero_pp_rank_1_mp_rank_00_optim_states.pt", "value.pt",
         "notes.json", "services.pkl")  # fmt: skip
ROWS = "replay/0/rows-000000000000-000000000009.parquet"


def make(run, step):
    """A checkpoint of two ranks, with rows of replay beside it."""
    folder = checkpoints.staging_path(run, step)
    checkpoints.make_empty(folder)
    write(folder, *PARTS, content=f"step {step}")
    if not (run / ROWS).exists():
        write(run, ROWS, content="rows")
    files = checkpoints.checksums(folder, [folder / part for part in PARTS])
    return checkpoints.seal(folder, step, 2, "digest", files, checkpoints.checksums(run, [run / ROWS]))


def newest(run):
    found = checkpoints.newest(run).checkpoint
    return found and found.step


def test_the_newest_whole_checkpoint_is_found_and_two_are_kept(tmp_path):
    assert newest(tmp_path) is None
    for step in (2, 4, 6):
        make(tmp_path, step)
        assert newest(tmp_path) == step
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000004", "step-00000006"]
    found = checkpoints.newest(tmp_path).checkpoint
    assert (found.ranks, found.settings, set(found.outside)) == (2, "digest", {ROWS})
    shutil.rmtree(found.folder)
    assert newest(tmp_path) == 4, "a folder that somebody removed is none"
    assert checkpoints.newest(tmp_path).damaged == ()


class Killed(BaseException):
    pass


def kill_at(monkeypatch, number):
    """SIGKILL before the ``number``-th time that the disk is changed: nothing after it happens."""
    left = [number]

    def counting(work):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return work(*args, **kwargs)

        return wrapped

    for owner, names in ((Path, ("mkdir", "rename", "write_text", "open", "unlink")), (os, ("fsync", "rmdir")),
                         (checkpoints, ("_sync",))):  # fmt: skip
        for name in names:
            monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    return left


def test_a_kill_at_any_moment_leaves_the_checkpoint_before_or_this_one(tmp_path, monkeypatch):
    reached, number = set(), 0
    while True:
        run = tmp_path / str(number)
        for step in (2, 4):
            make(run, step)
        with monkeypatch.context() as patched:
            left = kill_at(patched, number)
            with contextlib.suppress(Killed):
                make(run, 6)
        found = checkpoints.newest(run)
        assert found.checkpoint.step in (4, 6)
        assert not found.damaged, "what is not whole has no name that counts"
        reached.add(found.checkpoint.step)
        checkpoints.remove_unfinished(run)
        assert not list((run / "checkpoints").glob("*.tmp"))
        make(run, 8)
        assert newest(run) == 8
        if left[0] > 0:
            break
        number += 1
    assert reached == {4, 6}
    assert number > 20, "moments that were tried"


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


DAMAGE = {
    "cut": (
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        r"has \d+ bytes, not \d+|has changed since it was written",
    ),
    "longer": (
        lambda file: file.write_bytes(file.read_bytes() + b"\0"),
        r"has \d+ bytes|has changed since it was written",
    ),
    "empty": (lambda file: file.write_bytes(b""), "has 0 bytes|has changed since it was written"),
    "flipped": (flip, "has changed since it was written"),
    "gone": (lambda file: file.unlink(), "is missing"),
    "folder": (
        lambda file: (file.unlink(), file.mkdir()),
        "has changed since it was written|cannot be read|bytes, not",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("part", [*PARTS, checkpoints.MANIFEST, ROWS])
def test_a_damaged_checkpoint_is_passed_over_in_words(part, how, tmp_path):
    make(tmp_path, 2)
    with_rows = make(tmp_path, 4)
    if part == ROWS:  # which only the newer one needs
        manifest = json.loads((checkpoints.path_of(tmp_path, 2) / checkpoints.MANIFEST).read_text())
        manifest["outside"] = {}
        del manifest["checksum"]
        checkpoints._write_sealed(checkpoints.path_of(tmp_path, 2) / checkpoints.MANIFEST, manifest)
    damage, words = DAMAGE[how]
    damage(tmp_path / part if part == ROWS else with_rows / part)
    found = checkpoints.newest(tmp_path)
    assert found.checkpoint.step == 2
    (why,) = found.damaged
    with pytest.raises(checkpoints.CheckpointError, match=words):
        checkpoints.read(with_rows)
    (line,) = resume.announcement(found, tmp_path, is_new=False, ranks=2)
    assert line == f"{why}, so it is skipped; resuming from the checkpoint of step 2"
    assert line.startswith(f"step 4: {part} ")
    if part != ROWS:
        make(tmp_path, 3)
        assert newest(tmp_path) == 3, "what was skipped is removed as soon as there is another"


def test_a_checkpoint_under_another_name_is_none(tmp_path):
    make(tmp_path, 2).rename(checkpoints.path_of(tmp_path, 9))
    assert checkpoints.newest(tmp_path).damaged == ("step 9: manifest.json is that of step 2",)


def test_what_is_no_leftover_of_the_runs_stays(tmp_path):
    make(tmp_path, 2)
    left = ("step-00000004.tmp", "ray-0a1b2c3d")
    others = ("notes", "step-4.tmp", "step-00000004.tmp.bak", "ray-notes")
    for name in (*left, *others):
        write(tmp_path / checkpoints.FOLDER / name, "a/b")
    checkpoints.remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path / checkpoints.FOLDER)) == sorted(["step-00000002", *others])


# --- which settings -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """What passes for a model at a glance."""
    write(tmp_path / "start", "model.safetensors", "tokenizer.json", content="weights")
    write_json(tmp_path / "start" / "config.json", {"model_type": "cola", "num_actions": 64})
    return tmp_path / "start"


@pytest.fixture
def begun(tmp_path, model):
    """A run of rl_math with a checkpoint at step 4, ended."""

    def begin(**changes):
        return tiny(tmp_path / "out", **{"model.path": str(model), **changes})

    config = begin(**{"rl.kl_coef": 0.02})
    made = launch.begin(config, "rl_math")
    resume.check_inputs(made.config, made.start)
    make(made.folder.path, 4)
    made.folder.end("stopped", 4)
    return lambda **changes: begin(**{"rl.kl_coef": 0.02, "resume": True, **changes})


CHANGED = {
    "seed": 1, "task.name": "countdown", "rl.algorithm": "rloo", "rl.kl_coef": 0.1, "rl.lr": 1e-3,
    "rl.prompts_per_step": 4, "rollout.temperature": 0.5, "rl.max_staleness": 1, "task.num_problems": 100,
    "rollout.stop": ("x",), "rl.adam_betas": (0.9, 0.99), "task.options": {"min_terms": 2}, "rl.eval_problems": 3,
    "model.dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGED)
def test_what_is_changed_is_refused_by_name(field, begun):
    (line,) = launch.refusals(begun(**{field: CHANGED[field]}), "rl_math")
    named = "task.options.min_terms" if field == "task.options" else field
    assert line.startswith(f"{named} = ")
    assert ": the run began with" in line
    assert line.endswith("use that to continue it, or another --output-dir for a new run")


def test_a_default_without_effect_may_differ_in_another_version(begun):
    file = Path(begun().output_dir) / "config.json"
    tree = json.loads(file.read_text())
    tree["pretrain"]["steps"]["q"] = tree["pretrain"]["lr"] = tree["search"]["simulations"] = 77
    file.write_text(json.dumps(tree))
    assert launch.refusals(begun(), "rl_math") == []


def test_each_change_has_a_line_with_what_there_was(begun):
    lines = launch.refusals(begun(seed=3, **{"rl.kl_coef": 0.5}), "rl_math")
    assert [line.split(";")[0] for line in lines] == [
        "seed = 3: the run began with 0", "rl.kl_coef = 0.5: the run began with 0.02"]  # fmt: skip


ALLOWED = {
    "rl.max_steps": 500, "rl.save_every": 3, "rl.eval_every": 7, "rollout.num_workers": 2, "cluster.max_failures": 9,
    "cluster.threads_per_process": 2, "cluster.weight_transport": "nccl", "tracking_uri": "http://mlflow:5000",
    "rollout.max_num_seqs": 8, "rl.micro_batch_tokens": 64, "task.reward_timeout_s": 3.0,
    "cluster.stall_timeout_s": 99.0, "samples.every": 3, "samples.prompts": 0,
}  # fmt: skip


@pytest.mark.parametrize("field", ALLOWED)
def test_what_may_change_does(field, begun):
    assert launch.refusals(begun(**{field: ALLOWED[field]}), "rl_math") == []


def test_every_pattern_of_what_may_change_is_a_field():
    from cola_ray.settings.config import schemas

    for pattern in resume.MAY_CHANGE:
        branch = pattern.removesuffix(".*")
        assert any(field == branch or field.startswith(f"{branch}.") for field in schemas()), pattern


def test_fewer_steps_than_were_made_are_refused(begun):
    (line,) = launch.refusals(begun(**{"rl.max_steps": 3}), "rl_math")
    assert line == "rl.max_steps = 3: the run has made 4 steps; use at least as many"


def test_another_number_of_ranks_goes_on_and_says_so(begun, capsys):
    assert launch.begin(begun(**{"cluster.learner_ranks": 1}), "rl_math").resumes
    assert "resuming from the checkpoint of step 4, which 2 learner ranks saved, on 1" in said(capsys)


def test_all_checkpoints_damaged_is_a_refusal_and_none_at_all_a_new_beginning(begun, tmp_path, capsys):
    folder = checkpoints.path_of(tmp_path / "out", 4)
    (folder / "value.pt").unlink()
    (line,) = launch.refusals(begun(), "rl_math")
    assert line == (
        f"resume = True: no checkpoint in {tmp_path / 'out' / 'checkpoints'} is intact (step 4: value.pt is missing); "
        "restore one from a copy, or begin again with --overwrite"
    )
    with pytest.raises(ConfigError, match="is intact"):
        launch.begin(begun(), "rl_math")
    assert folder.exists()
    shutil.rmtree(folder)
    made = launch.begin(begun(), "rl_math")
    assert not made.resumes
    assert f"no checkpoint in {tmp_path / 'out' / 'checkpoints'} yet: the run begins again at step 0" in said(capsys)


def said(capsys):
    return capsys.readouterr().out.replace("\n", " ")


def test_resuming_where_nothing_is_begins_and_says_so(tmp_path, model, capsys):
    made = launch.begin(tiny(tmp_path / "new", resume=True, **{"model.path": str(model)}), "rl_math")
    assert not made.resumes
    assert f"nothing to resume in {tmp_path / 'new'}: a new run begins" in said(capsys)


def test_a_launch_says_where_it_goes_on_and_tidies(begun, tmp_path, capsys):
    write(tmp_path / "out" / "checkpoints" / "step-00000008.tmp", "half")
    record = run_folder.read_record(tmp_path / "out")
    write_json(tmp_path / "out" / "run.json", {key: value for key, value in record.items() if key != "files"})
    made = launch.begin(begun(), "rl_math")
    assert made.resumes
    assert "resuming from the checkpoint of step 4" in said(capsys)
    assert not (tmp_path / "out" / "checkpoints" / "step-00000008.tmp").exists()
    assert run_folder.read_record(tmp_path / "out")["inputs"], "kept"


@pytest.mark.parametrize("change", [flip, lambda file: file.unlink(), lambda file: file.write_bytes(b"more weights")])
def test_another_model_under_the_same_path_is_refused(begun, model, change):
    file = model / "model.safetensors"
    os.utime(file)
    assert launch.refusals(begun(), "rl_math") == [], "a new time alone is no change"
    change(file)
    (line,) = launch.refusals(begun(), "rl_math")
    assert line.startswith(f"model.path = {str(model)!r}: {file} ")


def test_lost_settings_are_known_by_their_digest(begun, tmp_path, model):
    run = tmp_path / "out"
    recorded = json.loads((run / "config.json").read_text())
    shutil.rmtree(checkpoints.path_of(run, 4))
    folder = checkpoints.staging_path(run, 4)
    checkpoints.make_empty(folder)
    checkpoints.seal(folder, 4, 2, resume.digest(recorded), {}, {})
    (run / "config.json").unlink()
    changed = launch.refusals(begun(seed=5), "rl_math")
    assert "the settings are not those of" in changed[0]
    assert launch.refusals(begun(), "rl_math") == []


@pytest.mark.parametrize(("job", "changes", "named"), [
    ("evaluate", {"eval.split": "train"}, "eval.split"), ("evaluate", {"rollout.temperature": 0.3}, "rollout."),
    ("sweep", {"sweep.values": (1.0,)}, "sweep.values"), ("reproduce", {"seed": 4}, "seed"),
])  # fmt: skip
def test_jobs_without_checkpoints_are_compared_likewise(job, changes, named, tmp_path, model):
    more = {} if job == "reproduce" else {"model.path": str(model)}
    launch.begin(tiny(tmp_path / job, **more), job).folder.end("stopped")
    assert launch.refusals(tiny(tmp_path / job, resume=True, **more), job) == []
    lines = launch.refusals(tiny(tmp_path / job, resume=True, **more, **changes), job)
    assert any(line.startswith(named) and "the run began with" in line for line in lines)


def test_secrets_may_differ_and_what_stands_around_them_may_not(tmp_path, model):
    def at(where):
        pairs = {"task.name": "preference", "task.path": str(tmp_path / "rows.jsonl"), "task.reward_model": where}
        return tiny(tmp_path / "out", **{"model.path": str(model), **pairs})

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    launch.begin(at("http://ann:old@judge/score"), "rl_preference").folder.end("stopped")
    assert "old" not in (tmp_path / "out" / "config.json").read_text()
    again = {"resume": True}
    assert launch.refusals(override(at("http://ann:new@judge/score"), again), "rl_preference") == []
    (line,) = launch.refusals(override(at("http://ann:new@another/score"), again), "rl_preference")
    assert line.startswith(
        "task.reward_model = 'http://***@another/score': the run began with 'http://***@judge/score'"
    )


# --- the lock -----------------------------------------------------------------------------------------------------

HOLD = """
    import sys, fcntl
    from cola_ray.runs import run_folder
    {before}
    from cola_ray.settings.config import override
    from cola_ray.settings.presets import preset
    run = run_folder.claim(override(preset("tiny"), {{"output_dir": sys.argv[1], **{how}}}), "rl_math")
    print("held", flush=True)
    sys.stdin.read()
"""
LOCKLESS = {
    "locks": "",
    "no lock of folders": """
def only_files(handle, how, lock=fcntl.flock):
    import os, stat
    if stat.S_ISDIR(os.fstat(handle).st_mode): raise OSError(9, "Bad file descriptor")
    return lock(handle, how)
fcntl.flock = only_files
""",
    "no locks": """
def none(handle, how): raise OSError(37, "No locks available")
fcntl.flock = none
""",
}


def holding(folder, kind, how="{}"):
    code = textwrap.dedent(HOLD).format(before=LOCKLESS[kind], how=how)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", LOCKLESS)
def test_two_runs_in_one_folder_also_across_overwrite_and_without_locks(kind, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    if kind != "locks":
        monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # to be put back
        exec(LOCKLESS[kind], {"fcntl": fcntl})
    claim(tiny(folder), "rl_math").end("stopped")
    process = holding(folder, kind, '{"overwrite": True}')
    try:
        write(folder, "model/weights", content="of the run at work")
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigError, match="is in progress there"):
                claim(tiny(folder, **how), "rl_math")
        assert (folder / "model" / "weights").exists()
        assert not refusals(tiny(folder / "another"), "rl_math")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()
    claim(tiny(folder, resume=True), "rl_math").end("finished")
    claim(tiny(folder, overwrite=True), "rl_math")


def test_a_lock_file_of_another_machine_is_believed_until_it_is_removed(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    claim(tiny(tmp_path), "rl_math")
    (tmp_path / "run.lock").write_text("7 on elsewhere, since 5")
    (line,) = refusals(tiny(tmp_path, resume=True), "rl_math")
    assert f"if that process is gone, remove {tmp_path / 'run.lock'}" in line
    for stale in (f"7 on {socket.gethostname()}, since 5", f"{os.getpid()} on {socket.gethostname()}, since 5"):
        (tmp_path / "run.lock").write_text(stale)
        assert refusals(tiny(tmp_path, resume=True), "rl_math") == [], "a number that another process has by now"


def test_a_run_that_came_and_went_meanwhile_is_noticed(tmp_path, monkeypatch):
    look = run_folder.refusals

    def slowly(*args):
        found = look(*args)
        if not (tmp_path / "run.json").exists():
            write_json(tmp_path / "run.json", {"tool": "cola_ray", "job": "rl_math", "wrote": []})
        return found

    monkeypatch.setattr(run_folder, "refusals", slowly)
    with pytest.raises(ConfigError, match="another run used it a moment ago"):
        claim(tiny(tmp_path), "rl_math")


# --- replay, critic and controller --------------------------------------------------------------------------------


def rows(first, count):
    numbers = np.arange(first, first + count)
    return pa.table({"n": numbers, "ids": pa.array([[int(n)] * (n % 3 + 1) for n in numbers], pa.list_(pa.int32()))})


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=25), st.data())
def test_a_buffer_returns_to_its_checkpoint(tmp_path_factory, sizes, data):
    """Contents, priorities, draws, and what is evicted from then on: those of a buffer that was not restored."""
    at, folder = data.draw(st.integers(0, len(sizes) - 1)), tmp_path_factory.mktemp("rows")
    buffer, total, needed = ReplayBuffer(50, 3000), 0, set()
    histories, checkpoint = [], None
    for again in (False, True):
        history = []
        if again:
            buffer.restore(folder, checkpoint)
            total = buffer.end
        for number, size in enumerate(sizes):
            if again and number < at:
                continue
            if number == at and not again:
                checkpoint = buffer.checkpoint(folder)
                needed = set(checkpoint["files"])
            buffer.append(rows(total, size))
            total += size
            rng = np.random.default_rng(number)
            table, drawn, shares = buffer.sample_prioritised(20, rng)
            buffer.set_priorities(drawn, rng.random(20))
            if number % 3 == 0:
                buffer.snapshot(folder, needed=needed)
            if number >= at:
                plain, _ = buffer.sample(20, rng)
                history.append((table["n"].to_pylist(), shares.tolist(), plain["ids"].to_pylist(), buffer.first,
                                buffer.starts[1:]))  # fmt: skip
        histories.append(history)
    assert histories[0] == histories[1]


def test_rows_that_no_checkpoint_needs_may_be_damaged(tmp_path):
    """A run that goes back does not look at them; a shard that was killed within a run does."""
    shard = ReplayShard(50, 1 << 20, str(tmp_path), 0)
    shard.insert(rows(0, 10))
    checkpoint = shard.checkpoint()
    shard.insert(rows(10, 10))
    shard.snapshot()
    (later,) = tmp_path.glob("rows-000000000010-*.parquet")
    later.write_bytes(b"PAR1 but no more")
    with pytest.raises(ReplayError, match="cannot be read"):
        ReplayShard(50, 1 << 20, str(tmp_path), 0).size()
    again = ReplayShard(50, 1 << 20, str(tmp_path), 0)
    again.restore(checkpoint)
    assert again.size()[0] == 10
    assert not later.exists()
    anew = ReplayShard(50, 1 << 20, str(tmp_path), 0)
    anew.restore(None)
    assert anew.size()[0] == 0
    assert not list(tmp_path.iterdir())


class Client:
    """Trains nothing; counts batches, and saves where it is told to."""

    def __init__(self, tmp_path, changes):
        fixed = {"rl.max_steps": 8, "rl.prompts_per_step": 6, "rl.group_size": 1, "rl.eval_every": 0,
                 "rl.eval_problems": 3, "rollout.num_workers": 2, "cluster.learner_ranks": 1, "critic.steps": 4,
                 "critic.batch_size": 8, "critic.fresh_states": 10, "critic.warmup_iterations": 2,
                 "task.max_failed_rewards": 0.5, "replay.max_rows": 60}  # fmt: skip
        self.config = override(preset("tiny", agents=True), fixed | changes)
        self.folder, count = tmp_path, self.config.replay.shards
        self.parts = [
            ReplayShard(60, 1 << 24, str(tmp_path / "replay" / str(i)), 0.01 if i else 0) for i in range(count)
        ]

        async def ask(shard, method, *args):
            return getattr(self.parts[shard], method)(*args)

        shards = [Shards(count, ask, seed=0) for _ in range(2)]
        self.service = CriticService(self.config.critic, WIDTH, "", shards[0], str(tmp_path / "critic"), seed=0)
        source = functools.partial(Episodes, shards=shards[1], critic=replicas_over(self.service))
        self.controller = Controller(self.config, Pool(), source)

    async def train(self, version, state, until, save_at=None):
        """Batches from ``version`` on, and the state of the checkpoint at ``save_at``."""
        await self.controller.begin(version, [], state)
        batches = []
        while version < until:
            batches.append(await self.controller.next_batch(0, version))
            version += 1
            if self.config.rl.algorithm == "archer_soft":
                await self.controller.learnt(version, soft_advantages(batches[-1]))
            await self.controller.publish(version, [], {"time/learn": 0.0})
            if version == save_at:
                state = await self.controller.checkpoint(0, version)
                if state.get("critic"):  # a learner takes it along at once: the critic keeps its last files alone
                    state["critic"] = shutil.copy(state["critic"], self.folder)
        return batches, state


ARCHER = {"rl.algorithm": "archer", "critic.chooses": False}


@pytest.mark.parametrize("changes", [
    ARCHER | {"critic.actor_states": "played", "critic.reuse": 2, "critic.td_share": 0.5},
    ARCHER | {"critic.actor_states": "replayed", "critic.priority_beta": 0.4, "replay.shards": 2,
              "critic.td_share": 0.0},
    {"rl.algorithm": "archer_soft", "rl.kl_coef": 0.5, "critic.chooses": False},
    {"rl.algorithm": "filtered_bc"}, {"rl.algorithm": "etpo", "rl.actor_free": True, "rl.kl_coef": 0.5},
    {"rl.algorithm": "ppo"},
])  # fmt: skip
@pytest.mark.parametrize("where", ["in another process", "in the same"])
def test_a_run_that_goes_back_makes_the_same_batches(changes, where, tmp_path):
    async def straight():
        client = Client(tmp_path / "straight", changes)
        await client.controller.start(resumed=False)
        return (await client.train(0, None, 8))[0]

    async def interrupted():
        client = Client(tmp_path / "again", changes)
        await client.controller.start(resumed=False)
        batches, state = await client.train(0, None, 6, save_at=4)
        await asyncio.sleep(0.05)
        if where == "in another process":
            for task in list(client.controller.supervisor.tasks):
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            client = Client(tmp_path / "again", changes)
            await client.controller.start(resumed=True)
        return batches[:4] + (await client.train(4, state, 8))[0], client.controller

    whole, (parts, controller) = asyncio.run(straight()), asyncio.run(interrupted())
    assert len(whole) == len(parts) == 8
    for step, (one, other) in enumerate(zip(whole, parts, strict=True)):
        for name, value in {**vars(one), **vars(one.padded())}.items():
            if name != "sequences":
                assert np.array_equal(value, {**vars(other), **vars(other.padded())}[name]), (step, name)
    if where == "in another process":
        told = {event["step"] for event in controller.supervisor.events if "step" in event}
        assert {1, 2, 3, 4} <= told, "a driver that was killed may not have heard of them"


def test_a_stop_saves_the_state_that_the_next_step_begins_with(tmp_path):
    """Although that step has been produced already, into replay and critic."""

    async def stopped():
        client = Client(tmp_path, ARCHER)
        await client.controller.start(resumed=False)
        await client.train(0, None, 3)
        while 3 not in client.controller.batches.steps:
            await asyncio.sleep(0.01)
        assert client.service.critic.steps == 16
        await client.controller.stop()
        assert await client.controller.next_batch(0, 3) is None
        return await client.controller.checkpoint(0, 3)

    state = asyncio.run(stopped())
    assert Path(state["critic"]).name == "critic-000000012.pt"
    assert sum(shard["end"] for shard in state["shards"]) == 3 * 12


# --- learners -----------------------------------------------------------------------------------------------------


class Report:
    """Takes metrics of steps; ends the process, so to say, at one."""

    def __init__(self, at=None):
        self.at, self.seen, self.lines, self.failures = at, {}, [], []

    def __call__(self, metrics, saved=False):
        if (metrics["stage"], metrics["step"]) == self.at:
            raise Killed
        known = {name: value for name, value in metrics.items() if not name.startswith(("time", "base/tokens"))}
        self.seen[metrics["stage"], metrics["step"]] = {n: v for n, v in known.items() if "per_second" not in n}

    def doing(self, what): ...

    def say(self, line):
        self.lines.append(line)

    def fail(self, reason):
        self.failures.append(reason)


def test_a_full_disk_costs_the_checkpoint_and_not_the_one_before(tmp_path, one_rank):
    write_json(tmp_path / "config.json", {})
    report = Report()
    save_checkpoint(tmp_path, 2, lambda folder: write(folder, "a"), report.fail)

    def full(folder):
        write(folder, "a")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 4, full, report.fail)
    (reason,) = report.failures
    assert reason.startswith("the checkpoint of step 4 could not be written to ")
    assert reason.endswith("No space left on device")
    assert last_checkpoint(tmp_path).step == 2
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000002"], "room again"


def lose_the_other(rank, folder):
    report = Report()

    def save(place):
        if rank == 1:
            os._exit(0)
        write(place, "a")

    with pytest.raises(RuntimeError, match="gloo"):
        save_checkpoint(folder, 2, save, report.fail)
    assert not report.failures, "the run is not over: another group goes on"


def test_a_rank_that_dies_in_a_checkpoint_is_no_full_disk(tmp_path):
    write_json(tmp_path / "config.json", {})
    on_ranks(lose_the_other, 2, tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == []


def both_ways(loop, config, folder, at):
    """A run in one go and one that ended at ``at`` and was resumed: their metrics, and where they left models."""
    found = []
    for way, ends in (("straight", (None,)), ("resumed", (at, None))):
        changed = override(config, {"output_dir": str(folder / way)})
        (folder / way).mkdir()
        write_json(folder / way / "config.json", changed.model_dump())
        seen = {}
        for end in ends:
            report = Report(end)
            try:
                loop(changed, report)
            except Killed:
                assert end is not None
            checkpoints.remove_unfinished(folder / way)
            seen |= report.seen
        found.append((seen, folder / way / "model"))
    (straight, one), (resumed, other) = found
    assert straight == resumed
    for file in one.glob("*.safetensors"):
        assert file.read_bytes() == (other / file.name).read_bytes()
    return straight


@pytest.mark.slow
def test_pretraining_resumes_bit_for_bit(tmp_path, one_rank):
    """Codes that are revived by what was used before the checkpoint, too."""
    config = override(preset("tiny"), {
        "pretrain.steps": {"base": 3, "actions": 14, "policy": 3}, "pretrain.save_every": 5, "pretrain.revive_every": 8,
        "pretrain.batch_size": 4, "pretrain.micro_batch_size": 4, "cluster.learner_ranks": 1, "task.num_problems": 60,
        "model.num_actions": 16,
    })  # fmt: skip
    seen = both_ways(pretrain.train_loop, config, tmp_path, ("actions", 8))
    assert ("actions", 8) in seen
    assert seen["actions", 8]["actions/revived"] > 0

    stage = tmp_path / "resumed" / "stages" / "actions"
    flip(stage / "model.safetensors")
    report = Report()
    pretrain.train_loop(override(config, {"output_dir": str(tmp_path / "resumed")}), report)
    assert report.lines == [f"{stage}: model.safetensors has changed since it was written; the stage is made again"]
    for name in ("straight", "resumed"):
        model = (tmp_path / name / "model" / "model.safetensors").read_bytes()
        assert model == (tmp_path / "straight" / "model" / "model.safetensors").read_bytes()


def test_a_reward_model_and_logged_q_resume_bit_for_bit(tmp_path, one_rank, cola_dir):
    small_llama().save_pretrained(tmp_path / "base")
    tokenizer = letters()
    tokenizer.add_special_tokens({"eos_token": chr(0x4E02), "pad_token": chr(0x4E00)})
    tokenizer.save_pretrained(tmp_path / "base")
    pairs = [{"prompt": chr(0x4E00 + i), "chosen": chr(0x4E10 + i), "rejected": chr(0x4E20 + i)} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    trained = {"pretrain.max_steps": 9, "pretrain.save_every": 3, "pretrain.batch_size": 4, "cluster.learner_ranks": 1}
    config = override(
        preset("tiny", task="preference"),
        {"task.name": "preference", "task.path": str(tmp_path / "pairs.jsonl"), "model.base": str(tmp_path / "base")}
        | trained,
    )
    both_ways(reward_model.train_loop, config, tmp_path, ("reward", 8))

    rng = np.random.default_rng(0)
    logged = [{"prompt_ids": [3, 4], "token_ids": rng.integers(3, 90, (2, 5)).tolist(), "rewards": [1.0, 0.0],
               "actions": rng.integers(0, 16, (2, 5)).tolist()} for _ in range(20)]  # fmt: skip
    (tmp_path / "logged.jsonl").write_text("\n".join(map(json.dumps, logged)))
    config = override(preset("tiny"), {"model.path": str(cola_dir), "data.path": str(tmp_path / "logged.jsonl"),
                                       "q.copy_every": 4} | trained)  # fmt: skip
    (tmp_path / "q").mkdir()
    both_ways(logged_q.train_loop, config, tmp_path / "q", ("q", 8))
