"""From settings to a run that may begin: what it starts from, what it reads, where it writes.

lines = refusals(config, "rl_math")      # why it may not begin; nothing is touched
print(first_lines(config, "rl_math"))    # starts from, base, task, data, actions, writes to
launch = begin(config, "rl_math")        # takes the folder
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from cola_ray.runs import provenance, resume, run_folder, saved
from cola_ray.runs.display import current
from cola_ray.runs.run_folder import RunFolder
from cola_ray.settings import relevance
from cola_ray.settings.config import Config, ConfigError, override

_FROM_A_MODEL = ("rl_math", "rl_preference", "rl_agent", "sweep", "evaluate", "diversity", "atlas", "capabilities",
                 "train_q")  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A run that has begun: its settings with absolute paths and the start model's sizes, and its folder."""

    config: Config
    job: str
    start: Path | None
    """The model that it starts from; None where there is none, or only a plain base."""
    folder: RunFolder
    resumes: bool = False
    """Whether it goes on from a checkpoint."""
    began: float = field(default_factory=time.time)
    """Seconds since the epoch."""


def refusals(config: Config, job: str) -> list[str]:
    """A line for each reason why the job may not begin: settings that do nothing, the start model, the folder."""
    config, job = _as_run(config, job)
    lines = relevance.unread(config, job)
    if job not in run_folder.WRITES:
        return lines
    if job in _FROM_A_MODEL or config.model.path:
        lines += provenance.refusals(config, job)
    start = _start(config, job)
    resolved = provenance.resolve(config, job)
    found = run_folder.refusals(resolved, job, start)
    return lines + (found or resume.refusals(_sized(resolved, start), job))


def first_lines(config: Config, job: str) -> str:
    """What a run starts from, on which base, task and data, and where it writes; empty for what is no run."""
    if job not in run_folder.WRITES:
        return ""
    config, job = _as_run(config, job)
    start = _start(config, job)
    return provenance.first_lines(_sized(provenance.resolve(config, job), start), job, start)


def _sized(config: Config, start: Path | None) -> Config:
    return config if start is None else provenance.with_sizes_of(config, start)


def begin(config: Config, job: str) -> Launch:
    """Take the folder, say from where the run goes on, and remove what a kill left of a checkpoint.

    Raises:
        ConfigError: it may not, see :func:`refusals`.
    """
    lines = refusals(config, job)
    if lines:
        raise ConfigError("\n".join(lines))
    config, job = _as_run(config, job)
    start = _start(config, job)
    config = _sized(provenance.resolve(config, job), start)
    is_new = run_folder.read_record(Path(config.output_dir)) is None
    folder = run_folder.claim(config, job, start)
    if not config.resume or saved.FOLDER not in run_folder.WRITES[job]:
        return Launch(config, job, start, folder)
    saved.tidy(folder.path)
    found = resume.looked_at(folder.path)
    for line in resume.words(found, folder.path, is_new):
        current().say(line)
    return Launch(config, job, start, folder, found.checkpoint is not None)


def _as_run(config: Config, job: str) -> tuple[Config, str]:
    """With what goes without saying: preferences are a job of their own, and a reproduction goes on where it was."""
    if job == "rl_math" and config.task.name == "preference":
        return config, "rl_preference"
    if job == "reproduce" and not config.overwrite:
        record = run_folder.read_record(Path(provenance.resolve(config, job).output_dir))
        config = override(config, {"resume": record is not None and record.get("job") == job})
    return config, job


def _start(config: Config, job: str) -> Path | None:
    if job not in _FROM_A_MODEL or provenance.starts_from_base(config):
        return None
    return provenance.start_model(config).resolve()
