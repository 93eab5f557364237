"""Resuming a run: from which checkpoint, and with which settings.

    lines = refusals(config, "rl_math")     # changed settings or inputs, or no complete checkpoint
    found = newest_checkpoint(RUN)          # the newest complete checkpoint, and what is wrong with newer ones

A resumed run is the same run. Only the settings in :data:`MAY_CHANGE` may differ: how far it goes, how often it saves
and evaluates, where it runs, and how much it does at a time. If there is no run yet, ``--resume`` begins one and says
so, because a scheduler that restarts a lost job uses the same command again.
"""

import fnmatch
import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_ray.runs import checkpoints
from cola_ray.runs.checkpoints import Newest
from cola_ray.runs.provenance import MORE_PATHS
from cola_ray.runs.redaction import HIDDEN, redacted, redacted_tree
from cola_ray.runs.run_folder import RECORD, WRITES, read_record, write_json
from cola_ray.settings import relevance
from cola_ray.settings.config import Config, ConfigError, flat, is_endpoint, value_at

MAY_CHANGE = (
    "resume", "overwrite", "output_dir",  # the folder may have moved
    "rl.max_steps", "rl.save_every", "rl.eval_every", "pretrain.save_every",
    "report_to", "tracking_uri", "tracking_parent",
    "cluster.*", "hardware.*",
    "rollout.num_workers", "rollout.tensor_parallel_size", "rollout.max_num_seqs", "rollout.kv_cache_mb",
    "rollout.gpu_memory_utilization", "rollout.max_num_batched_tokens", "rollout.prefix_caching",
    "rollout.enforce_eager", "rollout.optimization_level", "rollout.async_scheduling",
    "rollout.environment_processes", "rollout.max_restarts",
    "rl.micro_batch_tokens", "rl.share_prompts", "pretrain.micro_batch_size",
    "data.cache", "data.processes", "pretrain.states_cache", "pretrain.states_gb",
    "task.reward_timeout_s", "task.max_failed_rewards",
    "replay.snapshot_every_s", "critic.replicas", "critic.gpu_share",
    "eval.ways", "eval.problems", "eval.ks", "eval.chunk",  # evaluate answers only what it has no prediction for yet
    "sweep.parallel", "reproduce.*", "samples.*",
)  # fmt: skip
"""Settings, by dotted field, that may differ when a run is resumed. ``rl.max_steps`` must not be below the number of
steps already done."""
_INPUTS = ("model.path", "model.base", "data.path", "task.path", "task.game", "task.reward_model", "q.path",
           "critic.encoder")  # fmt: skip
"""Settings that may name local files or folders that a run is made from."""
_READ_GB = 64  # if a setting's files are larger than this together, only their sizes and times are compared
_MODEL_FILES = ("*.safetensors", "*.bin", "*.gguf", "config.json", "tokenizer.json", "tokenizer_config.json")


def refusals(config: Config, job: str) -> list[str]:
    """Return why the run in ``output_dir`` cannot be resumed, one line per reason; [] if there is nothing to resume.

    Args:
        config: with absolute paths and the sizes of the start model.
        job: the job to resume.
    """
    if not config.resume:
        return []
    folder = Path(config.output_dir)
    record = read_record(folder)
    if record is None or record.get("job") != job:
        return []  # nothing to resume, or a run of another job, which run_folder.refusals reports
    lines = _changed_settings(config, job) + _changed_inputs(record)
    if lines or "checkpoints" not in WRITES[job]:
        return lines
    return _checkpoint_refusals(config, job, newest_checkpoint(folder))


def newest_checkpoint(folder: Path) -> Newest:
    """Return :func:`cola_ray.runs.checkpoints.newest`, which reads all bytes, cached until a file changes."""
    seen = tuple(
        (str(file), stat.st_size, stat.st_mtime_ns)
        for name in (checkpoints.FOLDER, "replay", "stages")
        for file in sorted((folder / name).rglob("*"))
        for stat in [file.lstat()]
        if file.is_file()
    )
    if _NEWEST.get(folder, (None,))[0] != seen:
        _NEWEST[folder] = (seen, checkpoints.newest(folder))
    return _NEWEST[folder][1]


_NEWEST: dict[Path, tuple[Any, Newest]] = {}


def announcement(found: Newest, folder: Path, is_new: bool, ranks: int) -> list[str]:
    """Return what to print about where the run continues from.

    Args:
        ranks: the learner's current number of ranks.
    """
    if is_new:
        return [f"nothing to resume in {folder}: a new run begins"]
    if found.checkpoint is None:
        return [f"no checkpoint in {folder / checkpoints.FOLDER} yet: the run begins again at step 0"]
    skipped = "".join(f"{why}, so it is skipped; " for why in found.damaged)
    saved = found.checkpoint.ranks
    others = "" if saved == ranks else f", which {saved} learner ranks saved, on {ranks}"
    return [f"{skipped}resuming from the checkpoint of step {found.checkpoint.step}{others}"]


def digest(settings: Mapping[str, Any]) -> str:
    """Return a checksum of those recorded settings that must not change."""
    return checkpoints.digest({name: value for name, value in flat(settings).items() if not _may_change(name)})


# --- settings -----------------------------------------------------------------------------------------------------


def _changed_settings(config: Config, job: str) -> list[str]:
    now = flat(json.loads(config.model_dump_json()))
    before = _recorded(Path(config.output_dir))
    if before is None:
        return []  # the settings are compared with the digest in the checkpoint instead
    if before.get("preset", config.preset) != config.preset:
        return [_line("preset", config.preset, before["preset"])]
    names = [name for name in dict.fromkeys((*before, *now)) if not _may_change(name)]
    lines = []
    for name in names:
        branch = name.rpartition(".")[0]
        known = name in now and name in before
        if not relevance.has_effect(config, job, name) or not (known or _has_free_fields(branch)):
            continue  # a field of another version of this package, or one without effect here
        then, value = before.get(name), now.get(name)
        if not _same(value, then):
            lines.append(_line(name, value, then))
    return lines


def _has_free_fields(branch: str) -> bool:
    """Whether the user chooses the names of the fields of this branch, as in ``task.options``."""
    return branch in ("task.options", "task.columns", "task.splits", "pretrain.steps", "data.chat_options")


def _same(now: Any, recorded: Any) -> bool:
    """Whether two values agree; secrets are not recorded, so any value matches a secret."""
    if isinstance(now, str) and isinstance(recorded, str) and HIDDEN in recorded:
        return re.fullmatch(".*".join(map(re.escape, recorded.split(HIDDEN))), now) is not None
    return bool(now == recorded)


def _line(field: str, now: Any, before: Any) -> str:
    began = "without it" if before is None else f"with {before!r}"
    line = f"{field} = {now!r}: the run began {began}; use that to continue it, or another --output-dir for a new run"
    return redacted(line)


def _may_change(field: str) -> bool:
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in MAY_CHANGE)


def _recorded(folder: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return flat(tree) if isinstance(tree, dict) else None


# --- checkpoints --------------------------------------------------------------------------------------------------


def _checkpoint_refusals(config: Config, job: str, found: Newest) -> list[str]:
    folder, checkpoint = Path(config.output_dir), found.checkpoint
    if checkpoint is None:
        if not found.damaged:
            return []
        damage = "; ".join(found.damaged)
        return [f"resume = True: no checkpoint in {folder / checkpoints.FOLDER} is intact ({damage}); restore one from "
                "a copy, or begin again with --overwrite"]  # fmt: skip
    lines = []
    if job.startswith("rl_") and config.rl.max_steps < checkpoint.step:
        lines.append(f"rl.max_steps = {config.rl.max_steps}: the run has made {checkpoint.step} steps; use at least as "
                     "many")  # fmt: skip
    if _recorded(folder) is None and digest(redacted_tree(json.loads(config.model_dump_json()))) != checkpoint.settings:
        lines.append(f"resume = True: {folder / 'config.json'} is missing, and the settings are not those of "
                     f"{checkpoint.folder}; give all settings that the run began with")  # fmt: skip
    return lines


# --- what a run is made from --------------------------------------------------------------------------------------


def check_inputs(config: Config, start: Path | None) -> None:
    """Record size, time and checksum of the files that the run is made from; for a resumed run, compare them.

    Args:
        config: with absolute paths.
        start: the model that it starts from.

    Raises:
        ConfigError: a file has changed since the run began.
    """
    folder = Path(config.output_dir)
    record = read_record(folder) or {}
    if "inputs" in record:
        if lines := _changed_inputs(record):
            raise ConfigError("\n".join(lines))
        return
    places = {field: [str(value_at(config, field))] for field in _INPUTS}
    if start is not None:
        places["model.path"] = [str(start)]
    places |= {field: list(value_at(config, field)) for field in MORE_PATHS}
    files = {
        field: [file for value in values if value and not is_endpoint(value) for file in _files(value, field)]
        for field, values in places.items()
    }
    inputs = {field: _stamps(found) for field, found in files.items() if found}
    write_json(folder / RECORD, record | {"inputs": inputs})


def start_of(record: Mapping[str, Any]) -> Path | None:
    """The folder of the model that a run began with; None if it began with a plain base, or if this is not known.

    Args:
        record: the run's record.
    """
    files = record.get("inputs", {}).get("model.path", {})
    return Path(next(iter(files))).parent if files else None


def changed_start(record: Mapping[str, Any]) -> list[str]:
    """Return a line if the model or base that a run began with has changed since."""
    inputs = record.get("inputs", {})
    field = "model.path" if "model.path" in inputs else "model.base"
    return _changed_inputs({"inputs": {field: inputs.get(field, {})}})


def _files(value: str, field: str) -> list[Path]:
    place = Path(value)
    if place.is_file():
        return [place]
    if not place.exists():
        return sorted(file for file in map(Path, glob.glob(value, recursive=True)) if file.is_file())
    patterns: Sequence[str] = ("*",) if field.startswith(("data.", "task.path", "task.more_paths")) else _MODEL_FILES
    return sorted({file for pattern in patterns for file in place.glob(pattern) if file.is_file()})


def _stamps(files: Sequence[Path]) -> dict[str, list[Any]]:
    """Return size, time and checksum of each file; no checksums if reading all of them would take long."""
    seen = {file: file.stat() for file in files}
    whole = sum(stat.st_size for stat in seen.values()) <= _READ_GB << 30
    return {str(file): [stat.st_size, stat.st_mtime_ns, checkpoints.checksum(file) if whole else ""]
            for file, stat in seen.items()}  # fmt: skip


def _changed_inputs(record: Mapping[str, Any]) -> list[str]:
    """Return one line for each input that has changed since the run began."""
    lines = []
    for field, files in record.get("inputs", {}).items():
        for name, (size, changed, content) in files.items():
            file = Path(name)
            if not file.exists():
                why = "is missing"
            else:
                seen = file.stat()
                same = seen.st_size == size and (seen.st_mtime_ns == changed or checkpoints.checksum(file) == content)
                if same:
                    continue
                why = "has changed since the run began"
            lines.append(f"{field} = {os.path.dirname(name)!r}: {name} {why}; restore it to continue, or begin another "
                         "run with another --output-dir")  # fmt: skip
            break
    return lines
