"""How a run is gone on with: from which checkpoint, and with which settings.

    lines = refusals(config, "rl_math")     # other settings or inputs, or no checkpoint that is whole
    found = looked_at(RUN)                  # the newest whole checkpoint, and what is wrong with newer ones

A run that is resumed is the same run. What may differ is in :data:`MAY_CHANGE`, and nothing else: how far it goes, how
often it saves and evaluates, where it runs, and how much it does at a time. Where there is no run yet, ``resume``
begins one and says so: a scheduler that starts a lost job again gives it the same command.
"""

import fnmatch
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_ray.runs import saved
from cola_ray.runs.redaction import HIDDEN, redacted, redacted_tree
from cola_ray.runs.run_folder import RECORD, WRITES, read_record, write_json
from cola_ray.runs.saved import Found
from cola_ray.settings import relevance
from cola_ray.settings.config import Config, ConfigError, flat, is_endpoint, value_at

MAY_CHANGE = (
    "resume", "overwrite", "output_dir",  # which is where the folder is now
    "rl.max_steps", "rl.save_every", "rl.eval_every", "pretrain.save_every",
    "tracking_uri", "tracking_parent",
    "cluster.*", "hardware.*",
    "rollout.num_workers", "rollout.tensor_parallel_size", "rollout.max_num_seqs", "rollout.kv_cache_mb",
    "rollout.environment_processes", "rollout.max_restarts",
    "rl.micro_batch_tokens", "rl.gradient_checkpointing", "pretrain.micro_batch_size",
    "task.reward_timeout_s", "task.max_failed_rewards",
    "replay.snapshot_every_s", "critic.replicas",
    "eval.ways", "eval.problems", "eval.ks", "eval.chunk",  # of evaluate, which answers what has no prediction yet
    "sweep.parallel", "reproduce.*",
)  # fmt: skip
"""Settings that a resumed run may be given anew, by dotted field. ``cluster.learner_ranks`` is checked against the
checkpoint, whose optimizer state is cut over so many ranks; ``rl.max_steps`` may not be less than the steps made."""
_INPUTS = ("model.path", "model.base", "data.path", "task.path", "task.game", "task.reward_model", "q.path",
           "critic.encoder")  # fmt: skip
"""Settings that may be local files or folders which a run is made from."""
_MODEL_FILES = ("*.safetensors", "*.bin", "*.gguf", "config.json", "tokenizer.json", "tokenizer_config.json")


def refusals(config: Config, job: str) -> list[str]:
    """Why the run in ``output_dir`` cannot be gone on with, a line each; none where nothing is to be resumed.

    Args:
        config: with absolute paths, and the sizes of the start model.
    """
    if not config.resume:
        return []
    folder = Path(config.output_dir)
    record = read_record(folder)
    if record is None or record.get("job") != job:
        return []  # nothing to go on with, or what run_folder refuses
    lines = _changed_settings(config, job) + _changed_inputs(record)
    if lines or "checkpoints" not in WRITES[job]:
        return lines
    return _of_checkpoints(config, job, looked_at(folder))


def looked_at(folder: Path) -> Found:
    """:func:`cola_ray.runs.saved.newest`, which reads all bytes, once for as long as no file changes."""
    seen = tuple(
        (str(file), stat.st_size, stat.st_mtime_ns)
        for name in (saved.FOLDER, "replay", "stages")
        for file in sorted((folder / name).rglob("*"))
        for stat in [file.lstat()]
        if file.is_file()
    )
    if _LOOKED.get(folder, (None,))[0] != seen:
        _LOOKED[folder] = (seen, saved.newest(folder))
    return _LOOKED[folder][1]


_LOOKED: dict[Path, tuple[Any, Found]] = {}


def words(found: Found, folder: Path, is_new: bool) -> list[str]:
    """What is said of the checkpoint that a run goes on from, one line."""
    if is_new:
        return [f"nothing to resume in {folder}: a new run begins"]
    if found.checkpoint is None:
        return [f"no checkpoint in {folder / saved.FOLDER} yet: the run begins again at step 0"]
    passed = "".join(f"{why}, so it is passed over; " for why in found.damaged)
    return [f"{passed}resuming from the checkpoint of step {found.checkpoint.step}"]


def digest(settings: Mapping[str, Any]) -> str:
    """Of recorded settings, those that must not change."""
    return saved.digest({name: value for name, value in flat(settings).items() if not _may_change(name)})


# --- settings -----------------------------------------------------------------------------------------------------


def _changed_settings(config: Config, job: str) -> list[str]:
    now = flat(json.loads(config.model_dump_json()))
    before = _recorded(Path(config.output_dir))
    if before is None:
        return []  # the checkpoint has a digest
    if before.get("preset", config.preset) != config.preset:
        return [_line("preset", config.preset, before["preset"])]
    names = [name for name in dict.fromkeys((*before, *now)) if not _may_change(name)]
    lines = []
    for name in names:
        branch = name.rpartition(".")[0]
        known = name in now and name in before
        if not relevance.reads(job, name) or not (known or _is_open(branch, now, before)):
            continue  # a field that another version of this program has, or a branch that is not read
        then, value = before.get(name), now.get(name)
        if not _same(value, then):
            lines.append(_line(name, value, then))
    return lines


def _is_open(branch: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether the fields of a branch are what a user names, e.g. ``task.options``."""
    return branch in ("task.options", "pretrain.steps")


def _same(now: Any, recorded: Any) -> bool:
    """Secrets are not recorded: what stands in their place may be anything."""
    if isinstance(now, str) and isinstance(recorded, str) and HIDDEN in recorded:
        return re.fullmatch(".*".join(map(re.escape, recorded.split(HIDDEN))), now) is not None
    return bool(now == recorded)


def _line(field: str, now: Any, before: Any) -> str:
    began = "without" if before is None else f"with {before!r}"
    said = f"{field} = {now!r}: the run began {began}; give that to go on, or another --output-dir for another run"
    return redacted(said)


def _may_change(field: str) -> bool:
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in MAY_CHANGE)


def _recorded(folder: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return flat(tree) if isinstance(tree, dict) else None


# --- checkpoints --------------------------------------------------------------------------------------------------


def _of_checkpoints(config: Config, job: str, found: Found) -> list[str]:
    folder, checkpoint = Path(config.output_dir), found.checkpoint
    if checkpoint is None:
        if not found.damaged:
            return []
        return [f"resume = True: no checkpoint in {folder / saved.FOLDER} is whole ({'; '.join(found.damaged)}); put a "
                "copy of one there, or use --overwrite to begin anew"]  # fmt: skip
    lines = []
    ranks = config.cluster.learner_ranks
    if ranks != checkpoint.ranks:
        lines.append(f"cluster.learner_ranks = {ranks}: the optimizer's state in {checkpoint.folder} is cut over "
                     f"{checkpoint.ranks} ranks; use {checkpoint.ranks}")  # fmt: skip
    if job.startswith("rl_") and config.rl.max_steps < checkpoint.step:
        lines.append(f"rl.max_steps = {config.rl.max_steps}: the run has made {checkpoint.step} steps; use at least as "
                     "many")  # fmt: skip
    if _recorded(folder) is None and digest(redacted_tree(json.loads(config.model_dump_json()))) != checkpoint.settings:
        lines.append(f"resume = True: {folder / 'config.json'} is gone, and the settings are not those of "
                     f"{checkpoint.folder}; give all that the run began with")  # fmt: skip
    return lines


# --- what a run is made from --------------------------------------------------------------------------------------


def check_inputs(config: Config, start: Path | None) -> None:
    """Record what the run is made from, in size, time and checksum of its files; of one that goes on, compare.

    Args:
        start: the model that it starts from.

    Raises:
        ConfigError: something is no longer what the run began with.
    """
    folder = Path(config.output_dir)
    record = read_record(folder) or {}
    if "inputs" in record:
        if lines := _changed_inputs(record):
            raise ConfigError("\n".join(lines))
        return
    places = {field: str(value_at(config, field)) for field in _INPUTS}
    places = {field: value for field, value in places.items() if value and not is_endpoint(value)}
    if start is not None:
        places["model.path"] = str(start)
    inputs = {
        field: {str(file): _stamp(file) for file in _files(Path(value), field)}
        for field, value in places.items()
        if Path(value).exists()
    }
    write_json(folder / RECORD, record | {"inputs": inputs})


def _files(place: Path, field: str) -> list[Path]:
    if place.is_file():
        return [place]
    patterns: Sequence[str] = ("*",) if field.startswith(("data.", "task.path")) else _MODEL_FILES
    return sorted({file for pattern in patterns for file in place.glob(pattern) if file.is_file()})


def _stamp(file: Path) -> list[Any]:
    seen = file.stat()
    return [seen.st_size, seen.st_mtime_ns, saved.checksum(file)]


def _changed_inputs(record: Mapping[str, Any]) -> list[str]:
    """A line for each input that is no longer what the run began with."""
    lines = []
    for field, files in record.get("inputs", {}).items():
        for name, (size, changed, content) in files.items():
            file = Path(name)
            if not file.exists():
                why = "is gone"
            else:
                seen = file.stat()
                same = seen.st_size == size and (seen.st_mtime_ns == changed or saved.checksum(file) == content)
                if same:
                    continue
                why = "has changed since the run began"
            lines.append(f"{field} = {os.path.dirname(name)!r}: {name} {why}; put it back to go on, or begin another "
                         "run with another --output-dir")  # fmt: skip
            break
    return lines
