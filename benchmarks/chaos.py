"""Kills or stops every kind of process of a run at random moments, and records what becomes of the run.

    python benchmarks/chaos.py --minutes 30                                  # continues where the last call ended
    python benchmarks/chaos.py --jobs rl_math --kinds worker rank --signals SIGSTOP --trials 3

    undisturbed run: rewards and losses by step ─────────────────────────────────┐ compared step by step
    disturbed run ─> all alive? random pause ─> signal ─> two more steps? ───────┴─> trial: differences, remains
                          ^                        │ if it ended: its last line, exit code, processes, files
                          └─────── --resume <──────┘

Trials are written to docs/results/chaos.json as they are made, with the commit under test, and add up over calls. A run
that survives a trial serves for the next one; a run whose curve has left that of the undisturbed run is discarded.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from chaos_processes import KINDS, LOSSY, RUNS, SETTINGS, Run, adopt_orphans, left_files, of_kind, processes
from chaos_trials import Trial, compare, gaps, grown, missing, table, without_folders
from record import RESULTS, ROOT, hardware, write_tables

from cola_ray.runs import event_log

FOLDER = ROOT / "outputs" / "chaos"
SIGNALS = ("SIGKILL", "SIGSTOP")
START_S = 1200.0  # timeout for a run to start, on a machine that may be busy
LEFT_S = 90.0  # seconds after its end in which a run's processes must be gone; Ray's agents look for a dead GCS for 60


class Session:
    """A run and its folder, from start to end, including disturbances and resumptions."""

    def __init__(self, name: str, where: Path, start: Path, bound_s: float) -> None:
        self.name, self.setting, self.where, self.model, self.bound_s = name, SETTINGS[name], where, start, bound_s
        shutil.rmtree(where, ignore_errors=True)
        self.starts = 0
        self.launch()

    def launch(self) -> None:
        """Start the run, or continue it with --resume."""
        self.starts += 1
        self.temporary = Path(
            f"/tmp/chaos-{os.getpid()}-{self.starts}"
        )  # short, since socket paths have a length limit
        self.temporary.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(self.temporary)
        resume = ["--resume"] if self.starts > 1 else []
        if self.where.exists():
            (self.where / "log").rename(self.where / f"log-{self.starts - 1}")
        args = ["--model.path", str(self.model), *self.setting.args, *resume]
        self.run, self.memory_before = Run(self.setting.job, self.where, *args), dict[str, float]()
        RUNS.append(self.run)

    @property
    def steps(self) -> dict[int, dict[str, float]]:
        return event_log.history(event_log.read(self.run.output))

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
        """Wait until ``done``, the end of the run, or a timeout; returns whether it is done."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if done():
                return True
            if self.has_ended():
                return done()
            time.sleep(0.3)
        return False

    def is_ready(self) -> bool:
        """Wait until the run trains and has all its processes; returns whether it does."""
        return self.wait(lambda: max(self.steps, default=0) >= 1 and self.all_alive(), START_S)

    def megabytes(self) -> dict[str, float]:
        found = processes()
        sizes = {kind: [p.megabytes for p in of_kind(kind, found, self.run.process.pid)] for kind in self.setting.kinds}
        return {kind: round(max(some)) for kind, some in sizes.items() if some}

    def left(self, seconds: float | None = None) -> list[str]:
        """Processes that are still alive some seconds after the end; this kills them."""
        deadline = time.monotonic() + (LEFT_S if seconds is None else seconds)
        while (found := processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        for one in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        return [f"{one.title[:60]} ({one.state})" for one in found]

    def files(self) -> list[Path]:
        """The run's files in /tmp."""
        return [*self.temporary.iterdir(), *Path("/tmp").glob(f"*ray*{self.run.process.pid}*")]

    def discard(self) -> None:
        self.run.end()
        self.left(0.0)
        left_files(self.files())
        for temporary in Path("/tmp").glob(f"chaos-{os.getpid()}-*"):
            shutil.rmtree(temporary, ignore_errors=True)

    def disturb(self, kind: str, name: str, number: int, seed: int, commit: str, expected: Mapping[int, Any]) -> Trial:
        """Make one trial. Afterwards the run continues (resumed if it ended), unless the trial found a fault."""
        draw = random.Random(f"{seed} {self.name} {kind} {name} {number}")
        pause = round(draw.uniform(0.0, 4.0), 2)
        time.sleep(pause)
        found = of_kind(kind, processes(), self.run.process.pid)
        self.memory_before = self.memory_before or self.megabytes()
        before = max(self.steps, default=0)
        victim = draw.choice(sorted(found, key=lambda one: one.pid))
        trial = Trial(self.setting.job, self.name, kind, name, number, seed, commit, victim.title[:60], before, pause)
        began = time.monotonic()
        os.kill(victim.pid, getattr(signal, name))
        if kind == "driver" and name == "SIGSTOP":  # the user stopped the run, so the user continues it
            time.sleep(draw.uniform(5.0, 30.0))
            os.kill(victim.pid, signal.SIGCONT)
        went_on = self.wait(lambda: max(self.steps, default=0) >= before + 2 and self.all_alive(), self.bound_s)
        trial.seconds = round(time.monotonic() - began, 1)
        if went_on:
            trial.outcome = "went on"
        elif self.has_ended():
            trial.outcome, trial.exit_code = "ended and resumed", self.run.process.returncode
            killed, files = kind == "driver" and name == "SIGKILL", self.files()
            self.check_end(trial, by_signal=killed)
            if trial.exit_code == 0:
                trial.outcome = "went on"  # until its normal end
            else:
                self.resume(trial, before)
                trial.faults += left_files(files) if killed else []
        else:
            stopped = [one.title[:40] for one in processes() if one.state == psutil.STATUS_STOPPED]
            trial.faults.append(f"no step in {self.bound_s:.0f} s" + (f", stopped: {stopped}" if stopped else ""))
        self.check_result(trial, expected)
        trial.said = trial.said or self.said(kind)
        trial.megabytes = self.megabytes()
        trial.faults += grown(self.memory_before, trial.megabytes)
        trial.outcome = "fault" if trial.faults else trial.outcome
        return trial

    def check_end(self, trial: Trial, by_signal: bool) -> None:
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
        if not by_signal:  # after a killed run, the next one cleans up
            trial.faults += left_files(self.files(), failed=True)

    def resume(self, trial: Trial, before: int) -> None:
        self.launch()
        if not self.wait(lambda: max(self.steps, default=0) >= before + 2 and self.all_alive(), START_S):
            if self.has_ended() and self.run.process.returncode == 0:
                return
            last = [line for line in self.run.log.splitlines() if line.strip()][-1:]
            trial.faults.append(f"--resume does not continue: {''.join(last)[:200]}")

    def check_result(self, trial: Trial, expected: Mapping[int, Any]) -> None:
        trial.curve, where = compare(self.steps, expected)
        failed = max((metrics.get("reward/failed", 0.0) for metrics in self.steps.values()), default=0.0)
        if trial.curve == "other" and (trial.kind in LOSSY or failed):
            trial.outcome = trial.outcome and f"{trial.outcome} with a loss".replace("resumed with a loss", "resumed")
            trial.lost = f"{failed:.0f} answers failed; {where}" if failed else where
        elif trial.curve == "other":
            trial.faults.append(f"another result: {where}")
        trial.faults += gaps(self.steps, self.prompts)

    def said(self, kind: str) -> str:
        """The last line of the run that reports a loss."""
        words = ("again", "lost", "died", "gone", "answer")
        lines = [line for line in self.run.log.splitlines() if any(word in line for word in words)]
        return lines[-1][:300] if lines else ""

    def is_usable(self, trial: Trial) -> bool:
        return not (trial.faults or self.has_ended() or trial.curve == "other")


# --- start models, undisturbed runs, and the loop -----------------------------------------------------------------


def start_model(name: str) -> Path:
    """A setting's start model, made once."""
    where = FOLDER / "start" / name
    if not (where / "summary.json").exists():
        say(f"{name}: the start model")
        made = Run("pretrain", FOLDER / "start", "--output-dir", str(where), "--overwrite", *SETTINGS[name].start)
        RUNS.append(made)
        if made.process.wait(1200):
            raise SystemExit(f"pre-training of {name} failed:\n{made.log[-2000:]}")
    return where / "model"


def undisturbed(name: str, bound_s: float, again: bool = False) -> dict[int, dict[str, float]]:
    """Metrics by step of an undisturbed run; they are kept.

    Args:
        again: run again, because the kept metrics come from other code.
    """
    kept, args = FOLDER / f"{name}.json", SETTINGS[name].args
    if kept.exists() and not again and (before := json.loads(kept.read_text()))["args"] == args:
        return {int(step): metrics for step, metrics in before["steps"].items()}
    say(f"{name}: an undisturbed run of {SETTINGS[name].steps} steps")
    session = Session(name, FOLDER / name / "undisturbed", start_model(name), bound_s)
    session.wait(session.has_ended, 1800)
    steps, code = session.steps, session.run.process.poll()
    left, files = session.left(), left_files(session.files())
    session.discard()
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


def described(trial: Trial) -> str:
    line = f"{trial.job} {trial.kind} {trial.signal} at step {trial.step}: {trial.outcome}, {trial.seconds:.0f} s"
    return "; ".join([line, f"curve {trial.curve or '-'}", *trial.faults]) + f"\n         {trial.said}"


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=["rl_math", "rl_agent"], choices=["rl_math", "rl_agent"])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--signals", nargs="+", default=SIGNALS, choices=SIGNALS)
    parser.add_argument(
        "--trials", type=int, default=3, help="trials for each job and kind, over all calls; signals alternate"
    )
    parser.add_argument("--minutes", type=float, default=1e6, help="no trial starts after this time")
    parser.add_argument("--bound-s", type=float, default=300.0, help="seconds within which a run must continue or end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "chaos.json")
    args = parser.parse_args()
    adopt_orphans()
    os.environ.update({"RAY_worker_niceness": "0"})  # so that a run starts in bounded time on a busy machine
    deadline = time.monotonic() + 60 * args.minutes
    trials = json.loads(args.out.read_text())["trials"] if args.out.exists() else []
    settings = [name for name, setting in SETTINGS.items() if setting.job in args.jobs]
    session: Session | None = None
    try:
        for name, kind, sent, number in missing(trials, settings, args.kinds, args.signals, args.trials):
            if time.monotonic() > deadline:
                break
            if session is not None and (session.name != name or not has_steps_left(session)):
                session.discard()
                session = None
            session = session or new_session(name, args.bound_s)
            if not session.is_ready():
                say(f"{name}: the run does not start:\n{session.run.log[-1500:]}")
                session.discard()
                session = None
                continue
            trial = session.disturb(kind, sent, number, args.seed, commit_of(), undisturbed(name, args.bound_s))
            trials.append(without_folders(asdict(trial)))
            save(args.out, trials)
            say(described(trial))
            if not session.is_usable(trial):
                session.discard()
                session = None
    finally:
        if session is not None:
            session.discard()
        for run in RUNS:  # including one that was just being started
            run.end()
    if args.out.resolve() == (RESULTS / "chaos.json").resolve():
        write_tables()
    for row, figures in table(trials).items():
        print(f"{row:48}", "  ".join(f"{name} {value}" for name, value in figures.items()))


def new_session(name: str, bound_s: float) -> Session:
    """A run to disturb, whose first steps equal those of the undisturbed run."""
    expected = undisturbed(name, bound_s)
    session = Session(name, FOLDER / name / "run", start_model(name), bound_s)
    if session.is_ready() and compare(session.steps, expected)[0] == "other":
        session.discard()
        undisturbed(name, bound_s, again=True)
        session = Session(name, FOLDER / name / "run", start_model(name), bound_s)
    return session


def has_steps_left(session: Session) -> bool:
    """Whether the run has enough steps left for another trial."""
    return not session.has_ended() and max(session.steps, default=0) <= session.setting.steps - 8


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with the trials that are missing")
