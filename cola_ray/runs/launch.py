"""Decides whether a run may begin, prints what it starts from, reads and writes, and claims its folder.

lines = refusals(config, "rl_math")      # why it may not begin; changes nothing
print(first_lines(config, "rl_math"))    # starts from, base, task, data, actions, writes to
launch = begin(config, "rl_math")        # claims the folder
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from cola_ray.runs import checkpoints, provenance, resume, run_folder
from cola_ray.runs.display import current
from cola_ray.runs.run_folder import RunFolder
from cola_ray.settings import combinations, relevance
from cola_ray.settings.config import Config, ConfigError, override

_FROM_A_MODEL = ("rl_math", "rl_preference", "rl_agent", "sweep", "evaluate", "diversity", "atlas", "capabilities",
                 "train_q")  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A run that has begun: its folder, and its settings with absolute paths and the start model's sizes."""

    config: Config
    job: str
    start: Path | None
    """The model that the run starts from; None if there is none, or only a plain base."""
    folder: RunFolder
    resumes: bool = False
    """Whether the run continues from a checkpoint."""
    began: float = field(default_factory=time.time)
    """Seconds since the epoch."""


def refusals(config: Config, job: str) -> list[str]:
    """Return why the job may not begin, one line per reason: settings without effect, the start model, the folder."""
    config, job = _as_run(config, job)
    start = _start(config, job)
    sized, known = _sized(config, start), combinations.refused(config)
    lines = relevance.unread(config, job, sized)
    own = [line for line in combinations.refused(sized, job) if line not in known]
    if job not in run_folder.WRITES:
        return lines + own
    if job in _FROM_A_MODEL or config.model.path:
        lines += provenance.refusals(config, job)
    lines += own
    resolved = provenance.resolve(config, job)
    found = run_folder.refusals(resolved, job, start)
    return lines + (found or resume.refusals(_sized(resolved, start), job))


def first_lines(config: Config, job: str) -> str:
    """Return lines on what a run starts from, its base, task and data, and where it writes; "" if the job is no run."""
    if job not in run_folder.WRITES:
        return ""
    config, job = _as_run(config, job)
    start = _start(config, job)
    return provenance.first_lines(_sized(provenance.resolve(config, job), start), job, start)


def _sized(config: Config, start: Path | None) -> Config:
    """The settings with the sizes of the model that the run starts from, also where it pre-trains that further."""
    model = start or (Path(config.model.path) if config.model.path else None)
    return config if model is None else provenance.with_sizes_of(config, model)


def begin(config: Config, job: str) -> Launch:
    """Claim the folder, print where the run continues from, and remove checkpoints that a kill left unfinished.

    Raises:
        ConfigError: the run may not begin; see :func:`refusals`.
    """
    lines = refusals(config, job)
    if lines:
        raise ConfigError("\n".join(lines))
    config, job = _as_run(config, job)
    start = _start(config, job)
    config = _sized(provenance.resolve(config, job), start)
    is_new = run_folder.read_record(Path(config.output_dir)) is None
    folder = run_folder.claim(config, job, start)
    if not config.resume or checkpoints.FOLDER not in run_folder.WRITES[job]:
        return Launch(config, job, start, folder)
    checkpoints.remove_unfinished(folder.path)
    found = resume.newest_checkpoint(folder.path)
    for line in resume.announcement(found, folder.path, is_new, config.cluster.learner_ranks):
        current().say(line)
    return Launch(config, job, start, folder, found.checkpoint is not None)


def _as_run(config: Config, job: str) -> tuple[Config, str]:
    """Apply implied changes: preferences are a separate job, and a reproduction resumes automatically."""
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
