"""Every kind of process of a run killed or stopped at a random moment, and what became of the run.

    python benchmarks/chaos.py --minutes 30                                  # goes on where the last call ended
    python benchmarks/chaos.py --jobs rl_math --kinds worker rank --signals SIGSTOP --trials 3

    undisturbed run: rewards and losses by step ───────────────────────────────────┐ compared, step by step
    disturbed run ─> all alive? a pause, drawn ─> signal ─> two steps further? ────┴─> trial: what differs, what is left
                          ^                          │ it ended: its line, its exit code, its processes, its files
                          └──────── --resume <───────┘

Trials are written to docs/results/chaos.json as they are made, with the commit that they tried, and add up over calls.
A run that survives serves for the next trial; one whose curve has left the undisturbed one's is given up.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from record import RESULTS, ROOT, hardware, write_tables

sys.path.insert(0, str(ROOT / "tests" / "system"))
from runs import Run

FOLDER = ROOT / "outputs" / "chaos"
SIGNALS = ("SIGSTOP", "SIGKILL")
SAME = ("policy/loss", "policy/grad_norm", "reward/mean", "rollout/response_length")
START_S = 1200.0  # at most, for a run to start; others may compute on the machine, too
LEFT_S = 90.0  # in which what a run has started must be gone; Ray's agents look for a dead GCS for a minute
GROWTH = 1.25  # of the driver's and the controller's memory, over what they had at the run's first trial
TOLERANCE = 1e-4  # a lost share is generated in another batch, whose arithmetic differs in the last bit
PATIENCE = ["--cluster.answer-timeout-s", "30", "--cluster.stall-timeout-s", "200", "--task.reward-timeout-s", "10",
            "--cluster.max-failures", "1000", "--rollout.max-restarts", "1000"]  # fmt: skip


# --- what is disturbed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A job under settings that keep kinds of processes alive."""

    job: str
    kinds: tuple[str, ...]
    start: tuple[str, ...]
    """Of the pre-training of its start model."""
    run: tuple[str, ...]
    steps: int

    @property
    def args(self) -> list[str]:
        return [*self.run, *PATIENCE, "--rl.max-steps", str(self.steps), "--rl.eval-every", "0", "--rl.save-every", "2"]


ALWAYS = ("worker", "rank", "controller", "train controller", "driver", "raylet", "GCS")
SETTINGS = {
    "arithmetic": Setting(
        "rl_math",
        ("reward process", *ALWAYS),
        ("--pretrain.steps.base", "120", "--pretrain.steps.actions", "40", "--pretrain.steps.policy", "40"),
        ("--rl.prompts-per-step", "32", "--rl.eval-problems", "64"),
        80,
    ),
    "twenty_questions": Setting(
        "rl_agent",
        ("environment process", *ALWAYS, "replay shard", "critic replica"),
        ("--task.name", "twenty_questions", "--task.num-problems", "300", "--pretrain.steps.base", "60",
         "--pretrain.steps.actions", "20", "--pretrain.steps.policy", "20"),
        ("--rl.prompts-per-step", "8", "--rl.eval-problems", "8", "--critic.steps", "10", "--critic.batch-size", "64",
         "--critic.fresh-states", "64", "--replay.snapshot-every-s", "1"),
        24,
    ),
    "data_science": Setting(
        "rl_agent",
        ("sandbox server",),
        ("--task.name", "data_science", "--task.num-problems", "100", "--pretrain.steps.base", "60",
         "--pretrain.steps.actions", "20", "--pretrain.steps.policy", "20"),
        ("--task.name", "data_science", "--rl.algorithm", "grpo", "--rl.prompts-per-step", "2", "--rl.group-size", "4",
         "--rl.eval-problems", "2"),
        20,
    ),
}  # fmt: skip
KINDS = tuple(dict.fromkeys(kind for setting in SETTINGS.values() for kind in setting.kinds))
LOSSY = ("replay shard", "critic replica")
"""Come back with what they last saved: the run goes on with a little less, and another curve."""
OUTCOMES = ("went on", "went on with a loss", "ended and resumed", "fault")

_TITLES = {
    "controller": ("ray::Controller", "ray::AgentController"),
    "worker": ("ray::RolloutWorker", "ray::AgentWorker"),
    "rank": ("ray::RayTrainWorker",),
    "train controller": ("ray::TrainController",),
    "replay shard": ("ray::ReplayShard",),
    "critic replica": ("ray::CriticService",),
}


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    title: str
    state: str
    megabytes: float


def processes() -> list[Process]:
    """All below this one, which takes in those whose parents have died (see :func:`adopt_orphans`)."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                _bury(process.pid)
                continue
            title = " ".join(process.cmdline()) or process.name()
            found.append(
                Process(process.pid, process.ppid(), title, process.status(), process.memory_info().rss / 2**20)
            )
        except psutil.NoSuchProcess:
            continue
    return found


def of_kind(kind: str, among: Sequence[Process], driver: int) -> list[Process]:
    """The processes of a run that are of a kind."""
    below = {one.pid: one for one in among}
    match kind:
        case "driver":
            return [one for one in among if one.pid == driver]
        case "GCS":
            return [one for one in among if "gcs_server" in one.title.split(" ")[0]]
        case "raylet":
            return [one for one in among if one.title.split(" ")[0].endswith("/raylet")]
        case "reward process" | "environment process":
            return [one for one in among if _forks(one) and _forks(below.get(one.parent))]
        case "sandbox server":
            servers = {one.pid for one in among if "sandbox_server.py" in one.title}
            return [one for one in among if one.pid in servers and one.parent not in servers]
    return [one for one in among if one.title.startswith(_TITLES[kind])]


def _forks(process: Process | None) -> bool:
    return process is not None and "multiprocessing.forkserver" in process.title


def adopt_orphans() -> None:
    """Processes whose parents die become this one's children, and not init's: none is lost sight of."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _bury(pid: int) -> None:
    """A child that has ended; one that subprocess waits for is left to it."""
    if pid not in {run.process.pid for run in _RUNS}:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


_RUNS: list[Run] = []


# --- trials -------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """What was done to a run, and what became of it."""

    job: str
    setting: str
    kind: str
    signal: str
    number: int
    seed: int
    commit: str
    victim: str  # its title: what it was at
    step: int  # the last one before
    pause_s: float  # from the moment when everything was alive
    outcome: str = ""  # one of OUTCOMES
    seconds: float = 0.0  # to the second step after, or to the end
    said: str = ""  # about it, by the run
    exit_code: int | None = None
    lost: str = ""  # where a loss is documented: answers whose process was lost, and what replay and critic last saved
    curve: str = ""  # against the undisturbed run: "exact", "within 1e-4", "other", or "" where no step followed
    megabytes: dict[str, float] = field(default_factory=dict)  # of the largest process of a kind, afterwards
    faults: list[str] = field(default_factory=list)


def missing(trials: Sequence[Mapping[str, Any]], settings: Sequence[str], kinds: Sequence[str], signals: Sequence[str],
            wanted: int) -> Iterator[tuple[str, str, str, int]]:  # fmt: skip
    """(setting, kind, signal, number) that no trial has; the first of each before the second of any."""
    made: dict[tuple[str, ...], int] = {}
    for trial in trials:
        key = (trial["setting"], trial["kind"], trial["signal"])
        made[key] = made.get(key, 0) + 1
    for number in range(wanted):
        for setting in settings:
            for lossy in (False, True):
                for kind in SETTINGS[setting].kinds:
                    if kind in kinds and (kind in LOSSY) == lossy:
                        for name in signals:
                            if made.get((setting, kind, name), 0) <= number:
                                yield setting, kind, name, number


def compare(found: Mapping[int, Mapping[str, float]], expected: Mapping[int, Mapping[str, float]]) -> tuple[str, str]:
    """How two curves agree on the steps that both have, and where they first do not."""
    verdict, where = "", ""
    for step in sorted(found.keys() & expected.keys() - {0}):
        for key in SAME:
            one, other = found[step].get(key), expected[step].get(key)
            if one == other:
                verdict = verdict or "exact"
            elif one is None or other is None or abs(one - other) > TOLERANCE * max(abs(other), 0.1):
                return "other", f"step {step}: {key} {one} for {other}"
            else:
                verdict = f"within {TOLERANCE:g}"
    return verdict, where


def read_steps(log: Path) -> dict[int, dict[str, float]]:
    """The last metrics of each step of a run's ``log.jsonl``."""
    steps: dict[int, dict[str, float]] = {}
    try:
        lines = log.read_text().splitlines()
    except OSError:
        return steps
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # written at this moment
            continue
        if event.get("event") == "step":
            steps.setdefault(int(event["version"]), {}).update(event)
    return steps


def gaps(steps: Mapping[int, Mapping[str, float]], prompts: int) -> list[str]:
    """Steps that are missing, and prompts that were not generated once each."""
    numbers = sorted(step for step in steps if step)
    wrong = [f"step {a + 1} is missing" for a, b in zip([0, *numbers], numbers, strict=False) if b != a + 1]
    for step in numbers:
        last = steps[step].get("rollout/last_position")
        if last is not None and last != step * prompts - 1:
            wrong.append(f"step {step} ended with prompt {last:.0f}")
    return wrong[:3]


def table(trials: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int | str]]:
    """A row for each job, kind of process and signal."""
    rows: dict[str, dict[str, int | str]] = {}
    order = {kind: index for index, kind in enumerate(KINDS)}
    for trial in sorted(trials, key=lambda one: (one["job"], order[one["kind"]], one["signal"])):
        name = f"{trial['job']}: {trial['kind']}, {trial['signal']}"
        row = rows.setdefault(name, {"tried": 0, **dict.fromkeys(OUTCOMES, 0), "seconds": 0})
        row["tried"] = int(row["tried"]) + 1
        row[trial["outcome"]] = int(row[trial["outcome"]]) + 1
        row["seconds"] = max(int(row["seconds"]), round(trial["seconds"]))
    return rows


# --- a run under fire ---------------------------------------------------------------------------------------------


class Session:
    """A run in a folder of its own, from its start over disturbances and resumptions to its end."""

    def __init__(self, name: str, where: Path, start: Path, bound_s: float) -> None:
        self.name, self.setting, self.where, self.model, self.bound_s = name, SETTINGS[name], where, start, bound_s
        shutil.rmtree(where, ignore_errors=True)
        self.starts = 0
        self.launch()

    def launch(self) -> None:
        """Begin, or go on with --resume."""
        self.starts += 1
        self.temporary = Path(f"/tmp/chaos-{os.getpid()}-{self.starts}")  # short: sockets are made in such folders
        self.temporary.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(self.temporary)
        again = ["--resume"] if self.starts > 1 else []
        if self.where.exists():
            (self.where / "log").rename(self.where / f"log-{self.starts - 1}")
        args = ["--model.path", str(self.model), *self.setting.args, *again]
        self.run, self.small = Run(self.setting.job, self.where, *args), dict[str, float]()
        _RUNS.append(self.run)

    @property
    def steps(self) -> dict[int, dict[str, float]]:
        return read_steps(self.run.output / "log.jsonl")

    @property
    def prompts(self) -> int:
        return int(json.loads((self.run.output / "config.json").read_text())["rl"]["prompts_per_step"])

    def has_ended(self) -> bool:
        return self.run.process.poll() is not None

    def all_alive(self) -> bool:
        found = processes()
        wanted = [kind for kind in self.setting.kinds if not of_kind(kind, found, self.run.process.pid)]
        return not wanted and not any(one.state == psutil.STATUS_STOPPED for one in found)

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Until it is done, or the run has ended, or the time is over; whether it is done."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if done():
                return True
            if self.has_ended():
                return done()
            time.sleep(0.3)
        return False

    def is_ready(self) -> bool:
        """Waits until it trains and all that it consists of is there."""
        return self.wait(lambda: max(self.steps, default=0) >= 1 and self.all_alive(), START_S)

    def megabytes(self) -> dict[str, float]:
        found = processes()
        sizes = {kind: [p.megabytes for p in of_kind(kind, found, self.run.process.pid)] for kind in self.setting.kinds}
        return {kind: round(max(some)) for kind, some in sizes.items() if some}

    def left(self, seconds: float | None = None) -> list[str]:
        """Processes that are still there some time after the end; they are ended then."""
        deadline = time.monotonic() + (LEFT_S if seconds is None else seconds)
        while (found := processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        for one in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        return [f"{one.title[:60]} ({one.state})" for one in found]

    def files(self) -> list[Path]:
        """Of the run, below /tmp."""
        return [*self.temporary.iterdir(), *Path("/tmp").glob(f"*ray*{self.run.process.pid}*")]

    def give_up(self) -> None:
        self.run.end()
        self.left(0.0)
        left_files(self.files())
        for temporary in Path("/tmp").glob(f"chaos-{os.getpid()}-*"):
            shutil.rmtree(temporary, ignore_errors=True)

    def disturb(self, kind: str, name: str, number: int, seed: int, commit: str, expected: Mapping[int, Any]) -> Trial:
        """One trial: the run goes on afterwards, resumed if it had ended, unless the trial is a fault."""
        draw = random.Random(f"{seed} {self.name} {kind} {name} {number}")
        pause = round(draw.uniform(0.0, 4.0), 2)
        time.sleep(pause)
        found = of_kind(kind, processes(), self.run.process.pid)
        self.small = self.small or self.megabytes()
        before = max(self.steps, default=0)
        victim = draw.choice(sorted(found, key=lambda one: one.pid))
        trial = Trial(self.setting.job, self.name, kind, name, number, seed, commit, victim.title[:60], before, pause)
        began = time.monotonic()
        os.kill(victim.pid, getattr(signal, name))
        if kind == "driver" and name == "SIGSTOP":  # a run that a user holds goes on when he lets it
            time.sleep(draw.uniform(5.0, 30.0))
            os.kill(victim.pid, signal.SIGCONT)
        went_on = self.wait(lambda: max(self.steps, default=0) >= before + 2 and self.all_alive(), self.bound_s)
        trial.seconds = round(time.monotonic() - began, 1)
        if went_on:
            trial.outcome = "went on"
        elif self.has_ended():
            trial.outcome, trial.exit_code = "ended and resumed", self.run.process.returncode
            killed, files = kind == "driver" and name == "SIGKILL", self.files()
            self.judge_end(trial, by_signal=killed)
            if trial.exit_code == 0:
                trial.outcome = "went on"  # to its end
            else:
                self.resume(trial, before)
                trial.faults += left_files(files) if killed else []
        else:
            stopped = [one.title[:40] for one in processes() if one.state == psutil.STATUS_STOPPED]
            trial.faults.append(f"no step in {self.bound_s:.0f} s" + (f", stopped: {stopped}" if stopped else ""))
        self.judge_result(trial, expected)
        trial.said = trial.said or self.said(kind)
        trial.megabytes = self.megabytes()
        trial.faults += grown(self.small, trial.megabytes)
        trial.outcome = "fault" if trial.faults else trial.outcome
        return trial

    def judge_end(self, trial: Trial, by_signal: bool) -> None:
        lines = [line for line in self.run.log.splitlines() if line.strip()]
        trial.said = next((line for line in lines if line.startswith("the run failed: ")), "")
        if not by_signal and trial.exit_code != 0:
            if trial.exit_code != 1:
                trial.faults.append(f"exit code {trial.exit_code}")
            if not trial.said:
                trial.faults.append(f"ended without its line: {(lines or [''])[-1][:160]}")
            elif "--resume" not in trial.said:
                trial.faults.append("its line has no next step")
            if any(line.startswith("Traceback") for line in lines):
                trial.faults.append("a traceback is shown")
        trial.said = trial.said[:400]
        if left := self.left():
            trial.faults.append(f"left {len(left)} processes: {'; '.join(left[:4])}")
        if not by_signal:  # of a run that was killed the next one cleans up
            trial.faults += left_files(self.files(), failed=True)

    def resume(self, trial: Trial, before: int) -> None:
        self.launch()
        if not self.wait(lambda: max(self.steps, default=0) >= before + 2 and self.all_alive(), START_S):
            if self.has_ended() and self.run.process.returncode == 0:
                return
            last = [line for line in self.run.log.splitlines() if line.strip()][-1:]
            trial.faults.append(f"--resume does not go on: {''.join(last)[:200]}")

    def judge_result(self, trial: Trial, expected: Mapping[int, Any]) -> None:
        trial.curve, where = compare(self.steps, expected)
        failed = max((metrics.get("reward/failed", 0.0) for metrics in self.steps.values()), default=0.0)
        if trial.curve == "other" and (trial.kind in LOSSY or failed):
            trial.outcome = trial.outcome and f"{trial.outcome} with a loss".replace("resumed with a loss", "resumed")
            trial.lost = f"{failed:.0f} answers failed; {where}" if failed else where
        elif trial.curve == "other":
            trial.faults.append(f"another result: {where}")
        trial.faults += gaps(self.steps, self.prompts)

    def said(self, kind: str) -> str:
        """The last line of the run about what was lost."""
        words = ("again", "lost", "died", "gone", "answer")
        lines = [line for line in self.run.log.splitlines() if any(word in line for word in words)]
        return lines[-1][:300] if lines else ""

    def is_usable(self, trial: Trial) -> bool:
        return not (trial.faults or self.has_ended() or trial.curve == "other")


def without_folders(trial: Any) -> Any:
    """With files by their names alone: a record is for other machines."""
    if isinstance(trial, str):
        return re.sub(r"(/[\w.+@-]+)+/(?=[\w.+@-])", "", trial)
    if isinstance(trial, list):
        return [without_folders(one) for one in trial]
    return {k: without_folders(v) for k, v in trial.items()} if isinstance(trial, dict) else trial


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Of the processes that no trial replaces, those that need much more memory than before, a line each."""
    both = [kind for kind in ("driver", "controller") if kind in before and kind in after]
    return [f"the {k} grew from {before[k]} MB to {after[k]}" for k in both if after[k] > GROWTH * before[k]]


def left_files(files: Sequence[Path], failed: bool = False) -> list[str]:
    """What is still there of these, in a line; it is removed. Ray's logs may be, of a run that failed."""
    there = [path for path in files if path.exists()]
    left = [str(path) for path in there if not (_is_cache(path) or (failed and _is_logs(path)))]
    for path in there:
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    return [f"left below /tmp: {', '.join(sorted(left)[:4])}"] if left else []


def _is_cache(path: Path) -> bool:
    return path.name.startswith("torchinductor_")


def _is_logs(path: Path) -> bool:
    """Whether nothing but logs is left in a folder."""
    files = [file for file in path.rglob("*") if not file.is_dir()]
    return path.is_dir() and all("logs" in file.parts for file in files)


# --- models, yardsticks, and the loop -----------------------------------------------------------------------------


def start_model(name: str) -> Path:
    """Made once for a setting, and kept."""
    where = FOLDER / "start" / name
    if not (where / "summary.json").exists():
        say(f"{name}: the start model")
        made = Run("pretrain", FOLDER / "start", "--output-dir", str(where), "--overwrite", *SETTINGS[name].start)
        _RUNS.append(made)
        if made.process.wait(1200):
            raise SystemExit(f"pre-training of {name} failed:\n{made.log[-2000:]}")
    return where / "model"


def undisturbed(name: str, bound_s: float, again: bool = False) -> dict[int, dict[str, float]]:
    """Metrics by step of a run that nobody disturbs; kept.

    Args:
        again: what was kept is of other code.
    """
    kept, args = FOLDER / f"{name}.json", SETTINGS[name].args
    if kept.exists() and not again and (before := json.loads(kept.read_text()))["args"] == args:
        return {int(step): metrics for step, metrics in before["steps"].items()}
    say(f"{name}: an undisturbed run of {SETTINGS[name].steps} steps")
    session = Session(name, FOLDER / name / "undisturbed", start_model(name), bound_s)
    session.wait(session.has_ended, 1800)
    steps, code = session.steps, session.run.process.poll()
    left, files = session.left(), left_files(session.files())
    session.give_up()
    if code != 0:
        raise SystemExit(f"the undisturbed run of {name} ended with {code}:\n{session.run.log[-2000:]}")
    say(f"{name}: {len(steps)} steps; left behind: {left or 'no process'}; {files or 'no file'}")
    kept.write_text(json.dumps({"args": args, "left": left, "files": files, "steps": steps}))
    return steps


def commit_of(path: str = "cola_ray") -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%h", "--", path, "jobs") + (
        "+changes" if git("status", "--porcelain", "--", path, "jobs") else ""
    )


def save(out: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    content = {
        "about": "Processes killed or stopped at random moments of running jobs; seconds are the longest to the second "
        "step after, or to the end.",
        "command": "make chaos",
        "commit": trials[-1]["commit"],
        "hardware": hardware(),
        "seeds": sorted({trial["seed"] for trial in trials}),
        "figures": table(trials),
        "trials": list(trials),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(out)


def told(trial: Trial) -> str:
    what = f"{trial.job} {trial.kind} {trial.signal} at step {trial.step}: {trial.outcome}, {trial.seconds:.0f} s"
    return "; ".join([what, f"curve {trial.curve or '-'}", *trial.faults]) + f"\n         {trial.said}"


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=["rl_math", "rl_agent"], choices=["rl_math", "rl_agent"])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--signals", nargs="+", default=SIGNALS, choices=SIGNALS)
    parser.add_argument("--trials", type=int, default=3, help="of each kind, signal and job, in all")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no trial begins")
    parser.add_argument("--bound-s", type=float, default=300.0, help="in which a run must go on or end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "chaos.json")
    args = parser.parse_args()
    adopt_orphans()
    os.environ.update({"RAY_worker_niceness": "0"})  # where others compute too, a run is to start in bounded time
    deadline = time.monotonic() + 60 * args.minutes
    trials = json.loads(args.out.read_text())["trials"] if args.out.exists() else []
    settings = [name for name, setting in SETTINGS.items() if setting.job in args.jobs]
    session: Session | None = None
    try:
        for name, kind, sent, number in missing(trials, settings, args.kinds, args.signals, args.trials):
            if time.monotonic() > deadline:
                break
            if session is not None and (session.name != name or not room(session)):
                session.give_up()
                session = None
            session = session or begun(name, args.bound_s)
            if not session.is_ready():
                say(f"{name}: the run does not start:\n{session.run.log[-1500:]}")
                session.give_up()
                session = None
                continue
            trial = session.disturb(kind, sent, number, args.seed, commit_of(), undisturbed(name, args.bound_s))
            trials.append(without_folders(asdict(trial)))
            save(args.out, trials)
            say(told(trial))
            if not session.is_usable(trial):
                session.give_up()
                session = None
    finally:
        if session is not None:
            session.give_up()
    if args.out.resolve() == (RESULTS / "chaos.json").resolve():
        write_tables()
    for row, figures in table(trials).items():
        print(f"{row:48}", "  ".join(f"{name} {value}" for name, value in figures.items()))


def begun(name: str, bound_s: float) -> Session:
    """A run to disturb, whose first steps are those of the undisturbed one."""
    expected = undisturbed(name, bound_s)
    session = Session(name, FOLDER / name / "run", start_model(name), bound_s)
    if session.is_ready() and compare(session.steps, expected)[0] == "other":
        session.give_up()
        undisturbed(name, bound_s, again=True)
        session = Session(name, FOLDER / name / "run", start_model(name), bound_s)
    return session


def room(session: Session) -> bool:
    """Whether the run has enough steps left for another trial."""
    return not session.has_ended() and max(session.steps, default=0) <= session.setting.steps - 8


if __name__ == "__main__":
    main()
