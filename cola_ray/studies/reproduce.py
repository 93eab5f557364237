"""Runs the papers' matrix: stages as Ray jobs, ordered by their dependence on each other's models, and a report.

    reproduce(config)
      ├─ cluster: an existing one, or a new head on this machine
      ├─ while stages are left: submit those whose needs are done, at most reproduce.parallel at a time
      │     a stage is done if its folder has a summary.json; if one fails, those that need it do not run
      └─ report/index.html and report/report.md: each figure of the papers beside ours

Each stage is the command line that a user would type, with a log, a folder, and an id that ``ray job`` knows. Run the
command again after a stop or a failure: stages that are done are skipped, and others continue from their checkpoints.
"""

import contextlib
import graphlib
import itertools
import json
import os
import secrets
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import tenacity
from ray._private.utils import set_kill_on_parent_death_linux
from ray.job_submission import JobStatus, JobSubmissionClient

from cola_ray.checks.refusals import check
from cola_ray.cli.commands import OF_JOB
from cola_ray.cluster import actors, head
from cola_ray.runs import launch
from cola_ray.runs.display import current, shown
from cola_ray.runs.explanations import one_line
from cola_ray.runs.failure import explained_failures
from cola_ray.runs.figures import print_summary
from cola_ray.runs.run_folder import summary_of, write_json
from cola_ray.settings.config import Config, RunFailedError
from cola_ray.settings.matrix import Stage, chosen, folder_of, machines
from cola_ray.studies.report import write_report
from cola_ray.training.ranks import signals

_POLL_S = 2.0
_STOP_WAIT_S = 60  # time that a stage has for its last step and checkpoint before Ray kills it


def write_sums(folder: Path) -> None:
    """Write a task for the evaluation harness that a base of a million parameters can solve: choose the right sum."""
    pairs = itertools.product(range(1, 10), repeat=2)
    write_choices(folder, "sums", [(f"{a} + {b} =", [str(n) for n in (a + b, a + b + 1, a - b, a * b + 20)])
                                   for a, b in pairs])  # fmt: skip


def write_choices(folder: Path, name: str, questions: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Write a multiple-choice task for the evaluation harness.

    Args:
        folder: where ``<name>.yaml`` and ``<name>.jsonl`` are written.
        questions: each with its choices, the right one first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    rows = [{"question": question, "choices": list(choices), "label": 0} for question, choices in questions]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: label\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )


@shown()
@explained_failures()
def reproduce(config: Config) -> dict[str, Any]:
    """Run the matrix of ``config.preset`` for each seed; writes ``stages/NAME-seedK/`` and ``report/``.

    Returns:
        The summary: the state of each stage.

    Raises:
        ConfigError: before anything starts.
        RunFailedError: a stage failed; the report has the others, and the same command runs it again.
    """
    check(config, "reproduce")
    begun = launch.begin(config, "reproduce")
    output, own = begun.folder.path, {"chat_options": config.data.chat_options}  # else stages have their models'
    config = begun.config  # with absolute paths, which stages read from folders of their own
    matrix = chosen(config.model_copy(update={"data": config.data.model_copy(update=own)}))
    started = time.time()
    with begun.folder.failing():
        (output / "stages").mkdir(exist_ok=True)
        write_sums(output / "sums")
        current().doing("starting a Ray head" if not actors.address(config) else "asking the Ray cluster")
        with dashboard(config) as (address, headers):
            submitter = Submitter(address, headers, config)
            ran = run(matrix, output / "stages", submitter, _at_once(config))
        done = all(state == "done" for state in ran.values())
        summary = {"state": "finished" if done else "failed", "preset": config.preset, "stages": ran,
                   "wall_seconds": round(time.time() - started, 1)}  # fmt: skip
        write_json(output / "summary.json", summary)
        current().doing("writing the report")
        page = write_report(output)
        print_summary(f"reproduction, {config.preset}: {page}", {name: state for name, state in ran.items()})
        failed = [name for name, state in ran.items() if state != "done"]
        if failed:
            raise RunFailedError(f"not done: {', '.join(failed)}", f"look at the logs in {output / 'stages'}")
    begun.folder.end("finished")
    return summary


@contextlib.contextmanager
def dashboard(config: Config) -> Iterator[tuple[str, dict[str, str] | None]]:
    """Address and headers of a dashboard that accepts jobs, of an existing cluster or of a head started here."""
    address = actors.address(config)
    if address.startswith("http"):
        yield address, None
    elif address:
        context = ray.init(address=address, log_to_driver=False)
        yield f"http://{context.dashboard_url}", None
        ray.shutdown()
    else:
        with _local_head(config) as found:
            yield found


@contextlib.contextmanager
def _local_head(config: Config) -> Iterator[tuple[str, dict[str, str]]]:
    """Run ``ray start --head`` with a token that only this process and its jobs know.

    It uses its own ports, since another Ray on this machine, e.g. of another run, may have Ray's default ports, and a
    head whose agent has no port starts no job.
    """
    token = secrets.token_hex(32)
    gcs, dashboard, agent, client = _free_ports(4)
    cpus = _at_once(config) * (int(actors.demand(config)["CPU"]) + 3)
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats",
               f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
               f"--ray-client-server-port={client}", f"--num-cpus={cpus}"]  # fmt: skip
    variables = {"OMP_NUM_THREADS": str(config.cluster.threads_per_process), "RAY_AUTH_MODE": "token",
                 "RAY_AUTH_TOKEN": token, "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S),
                 **head.own_folder()}  # fmt: skip
    log = Path(config.output_dir) / "head.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=set_kill_on_parent_death_linux,  # so that the head ends even if this process is killed
        ) as process,  # fmt: skip
    ):
        try:
            yield f"http://127.0.0.1:{dashboard}", {"Authorization": f"Bearer {token}"}
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_WAIT_S)  # the head drains its node first
    head.remove_own_folder()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _at_once(config: Config) -> int:
    return config.reproduce.parallel or (2 if config.preset == "tiny" else 1)


# --- the graph ----------------------------------------------------------------------------------------------------


def run(matrix: Sequence[Stage], folder: Path, submitter: "Submitter", parallel: int) -> dict[str, str]:
    """Run every stage once its needs are done.

    Args:
        matrix: the stages, with those that they need.
        folder: the parent of the stages' folders.
        parallel: most stages at a time.

    Returns:
        By folder of the stage: "done", "failed", or "needs FOLDER" if that one is not done.

    Raises:
        KeyboardInterrupt: stopped, after the running stages have written their checkpoints.
    """
    stages = {stage.folder: stage for stage in matrix}
    states = {name: "done" for name, stage in stages.items() if _is_done(folder, stage)}
    needs = {
        name: [need for need in stages[name].needs if need not in states] for name in stages.keys() - states.keys()
    }
    graph = graphlib.TopologicalSorter(needs)
    graph.prepare()
    waiting, running = list(graph.get_ready()), dict[str, str]()
    with signals() as received:
        while waiting or running:
            if received:
                submitter.stop(list(running.values()))
                raise KeyboardInterrupt
            waiting.sort(key=list(stages).index)
            while waiting and len(running) < parallel:
                name = waiting.pop(0)
                running[name] = submitter.submit(stages[name], folder)
                said = f"{name} started{_expected(stages[name], folder)}"
                current().update("stages", len(states), len(matrix), said, milestone=True)
            for name, job in list(running.items()):
                succeeded = submitter.ended(job)
                if succeeded is None:
                    continue
                states[name] = "done" if succeeded and _is_done(folder, stages[name]) else "failed"
                del running[name]
                if states[name] == "done":
                    graph.done(name)
                    waiting += graph.get_ready()
                current().update("stages", len(states), len(matrix), f"{name} {states[name]}", milestone=True)
            if running:
                time.sleep(_POLL_S)
    for name in graphlib.TopologicalSorter(needs).static_order():
        if name not in states:
            states[name] = f"needs {next(need for need in needs[name] if states[need] != 'done')}"
    return {name: states[name] for name in stages}


def _is_done(folder: Path, stage: Stage) -> bool:
    return summary_of(folder / stage.folder) is not None


def _expected(stage: Stage, folder: Path) -> str:
    """How long a stage will take, from the same stage of other seeds; nothing if this is the first."""
    others = [summary_of(file.parent) or {} for file in folder.glob(f"{folder_of(stage.name, '*')}/summary.json")]
    seconds = [one["wall_seconds"] for one in others if "wall_seconds" in one]
    return f", about {max(round(statistics.median(seconds) / 60), 1)} min" if seconds else ""


_NOT_YET = (RuntimeError, OSError)  # from a dashboard that does not accept jobs yet, and connection errors
_RETRY = tenacity.Retrying(  # a head that has just started has no dashboard yet, and then no agent
    retry=tenacity.retry_if_exception_type(_NOT_YET),
    wait=tenacity.wait_fixed(1),
    stop=tenacity.stop_after_delay(120),
    reraise=True,
)


class Submitter:
    """Submits stages as jobs to a Ray cluster.

    Args:
        address: of the cluster's dashboard.
        headers: with the token of a head started here; None to use the user's token.
        config: of the reproduction.
    """

    def __init__(self, address: str, headers: dict[str, str] | None, config: Config) -> None:
        self.client, self.config = _RETRY(JobSubmissionClient, address, headers=headers), config

    def submit(self, stage: Stage, folder: Path) -> str:
        """Start a stage; returns the id of its Ray job."""
        where = folder / stage.folder
        where.mkdir(parents=True, exist_ok=True)
        folders = {name: str(folder / need) for name, need in zip(stage.names, stage.needs, strict=True)}
        settings = [word.format(**folders) for word in stage.settings]
        words = [sys.executable, "-m", "cola_ray", OF_JOB[stage.job], "--preset", self.config.preset,
                 *machines(self.config, stage.job), *settings, "--seed", str(stage.seed),
                 "--output-dir", str(where), "--resume"]  # fmt: skip
        entrypoint = f"{shlex.join(words)} > {shlex.quote(str(where / 'log.txt'))} 2>&1"
        variables = {"OMP_NUM_THREADS": str(self.config.cluster.threads_per_process)}
        try:
            job: str = _RETRY(self.client.submit_job, entrypoint=entrypoint, runtime_env={"env_vars": variables})
        except _NOT_YET as error:
            why = f"the Ray cluster takes no job: {one_line(error)}"
            raise RunFailedError(why, "see dashboard_agent.log and dashboard_JobHead.log among its logs") from error
        return job

    def stop(self, jobs: Sequence[str]) -> None:
        """Stop these jobs and wait until they have ended; they write a checkpoint first."""
        for job in jobs:
            self.client.stop_job(job)
        deadline = time.monotonic() + 2 * _STOP_WAIT_S
        while time.monotonic() < deadline and any(self.ended(job) is None for job in jobs):
            time.sleep(_POLL_S)

    def ended(self, job: str) -> bool | None:
        """Whether a job succeeded; None while it runs."""
        status = self.client.get_job_status(job)
        if status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
            return bool(status == JobStatus.SUCCEEDED)
        return None
