"""What a model was made from, and which model a run starts from.

    MODEL/provenance.json    {"made_by", "settings": {dotted field: value}, "date", "start": that of the model before}

    start = start_model(config)               # model.path, or where this preset's pre-training leaves its model
    lines = refusals(config, "rl_math")       # the model is missing, or was made with other settings than requested
    print(first_lines(config, "rl_math", start))

The tiny preset makes its own start model, in a folder whose name says which settings differ from the preset. Other
presets have one pre-trained model per seed; a run that requests other settings is refused, with the differences.
"""

import glob
import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from cola_ray.runs.folder_lock import is_in_use
from cola_ray.runs.redaction import redacted_tree
from cola_ray.runs.run_folder import is_finished, read_record, write_json
from cola_ray.settings.config import Config, is_environment, override, results_root, value_at
from cola_ray.settings.relevance import defaults, entries, given, reads
from cola_ray.settings.training import SIZES

FILE = "provenance.json"
PATHS = ("data.path", "task.path", "task.game", "task.reward_model", "model.base", "model.path", "critic.encoder",
         "q.path", "harness.include_path", "diversity.encoder")  # fmt: skip
"""Settings that may be paths."""
MORE_PATHS = ("data.more_paths", "task.more_paths")
"""Settings that may be several paths."""
CACHES = ("data.cache", "pretrain.states_cache")
"""Settings that name a folder which runs create and share; relative to the same folder as ``output_dir``."""
_MADE_FROM = ("seed", "model.", "task.", "data.", "pretrain.")
_NOT_MADE_FROM = ("model.path", "data.date", "data.cache", "data.processes", "data.streaming", "task.reward",
                  "task.reward_weights", "task.right_from", "task.pattern", "task.length",
                  "task.reward_model", "task.oracle", "task.command", "task.tool_parser",
                  "task.reward_timeout_s", "task.max_failed_rewards",
                  "pretrain.save_every", "pretrain.micro_batch_size", "pretrain.max_steps",
                  "pretrain.states_cache", "pretrain.states_gb")  # fmt: skip


# --- which model --------------------------------------------------------------------------------------------------


def pretrained_dir(config: Config) -> Path:
    """Return the folder in which pre-training with these settings leaves the CoLA model that RL starts from."""
    name, task = f"pretrain-{config.preset}", config.task.name
    usual = defaults(config)
    if task != usual.task.name or is_environment(task):
        name += f"-{_slug(task)}"
    elif task == "preference":
        name += "-preference"
    if makes_start_model(config):
        changed = {field: value for field, value in _requested(config).items() if field not in ("seed", "task.name")}
        if changed:
            digest = hashlib.sha256(json.dumps(changed, sort_keys=True, default=str).encode()).hexdigest()[:6]
            name += f"-{'-'.join(f'{_leaf(field)}={_slug(value)}' for field, value in changed.items())[:80]}-{digest}"
    return results_root() / "outputs" / f"{name}-seed{config.seed}" / "model"


def start_model(config: Config) -> Path:
    """Return the folder of the model that a run starts from; it need not exist yet."""
    return Path(config.model.path) if config.model.path else pretrained_dir(config)


def makes_start_model(config: Config) -> bool:
    """Whether a run pre-trains its own start model if that is missing."""
    return config.preset == "tiny" and not config.model.path


def starts_from_base(config: Config) -> bool:
    """Whether a run over tokens starts from a plain base rather than from the base of a CoLA model."""
    if config.rl.action_space != "token" or config.model.path or not config.model.base:
        return False
    return "model.base" in given(config) or not is_made(start_model(config))


def is_made(model: Path) -> bool:
    """Whether pre-training has finished this model."""
    if not (model / "config.json").exists():
        return False
    return read_record(model.parent) is None or is_finished(model.parent)


def resolve(config: Config, job: str) -> Config:
    """Return the settings with absolute paths, a default ``output_dir``, and the chat template's date and options."""
    output = config.output_dir or (
        str(pretrained_dir(config).parent) if job == "pretrain" else f"outputs/{job}-{config.preset}-seed{config.seed}"
    )
    changes: dict[str, Any] = {"output_dir": str((results_root() / output).resolve())}
    for field in PATHS:
        changes |= {field: _absolute(value_at(config, field))}
    for field in MORE_PATHS:
        changes |= {field: tuple(map(_absolute, value_at(config, field)))}
    for field in CACHES:
        if value_at(config, field):
            changes |= {field: str((results_root() / value_at(config, field)).resolve())}
    if config.task.command:
        changes["task.command"] = _with_absolute_paths(config.task.command)
    if not config.data.date:
        changes["data.date"] = _date(Path(changes["output_dir"]), start_model(config), config.resume)
    if not config.data.chat_options and reads(job, "data.chat_options"):
        changes["data.chat_options"] = _chat_options(Path(changes["output_dir"]), start_model(config), config.resume)
    return override(config, changes)


def starting_from(config: Config, model: Path) -> Config:
    """Return the settings with this start model and its sizes, without the settings that it should be made with.

    How long an action lasts is left to each run, since in those over tokens none lasts.
    """
    usual = defaults(config)
    data = usual.data.model_copy(update={"date": config.data.date, "chat_options": config.data.chat_options})
    settled = config.model_copy(update={"pretrain": usual.pretrain, "data": data})
    changes = {"model.path": str(model.resolve()), "model.base": usual.model.base, "model.family": ""}
    return override(with_sizes_of(override(settled, changes), model), _of_model(_UNRECORDED))


def with_sizes_of(config: Config, model: Path) -> Config:
    """Return the settings with the model's own number of actions and layers instead of the preset's. For RL over tokens
    an action gives one token, whatever the model's own actions are."""
    over_tokens = _UNRECORDED if config.rl.action_space == "token" else {}
    return override(config, _of_model(_sizes(model) | over_tokens))


def _of_model(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"model.{name}": size for name, size in sizes.items()}


def _date(output: Path, model: Path, resumes: bool) -> str:
    """Return the date of the run that is resumed, else the one on which the model was made, else today's."""
    if resumes:
        before = _read(output / "config.json").get("data", {}).get("date")
        if before:
            return str(before)
    return str(read(model).get("date") or date.today().isoformat())


def _chat_options(output: Path, model: Path, resumes: bool) -> dict[str, Any]:
    """Return the chat template's options of the run that is resumed, else those with which the model was made."""
    prefix, made = "data.chat_options.", read(model).get("settings", {})
    before = _read(output / "config.json").get("data", {}).get("chat_options") if resumes else None
    return before or {name.removeprefix(prefix): value for name, value in made.items() if name.startswith(prefix)}


# --- what it was made from ----------------------------------------------------------------------------------------


def write(folder: Path, config: Config, job: str, start: Path | None = None) -> None:
    """Write provenance.json beside the weights of a model that a job made.

    Args:
        folder: of the model.
        config: the job's settings.
        job: its name.
        start: the model that this one was made from, whose provenance is included.
    """
    content: dict[str, Any] = {
        "made_by": job,
        "preset": config.preset,
        "date": config.data.date,
        "settings": made_from(config),
    }
    if job != "pretrain":
        content["settings"] |= {f: v for f, v in given(config).items() if f.startswith(("rl.", "rollout."))}
    if start is not None:
        content |= {"start_path": str(start), "start": read(start)}
    write_json(folder / FILE, content)


def read(model: Path) -> dict[str, Any]:
    """Return the provenance of a model; {} if nothing is known of it."""
    return _read(model / FILE)


def made_from(config: Config) -> dict[str, Any]:
    """Return the settings that determine the pre-trained model, with absolute paths and without secrets."""
    steps = {stage: config.pretrain.num_steps(stage) for stage in config.pretrain.stages}
    pretraining = config.pretrain.model_copy(update={"steps": steps, "max_steps": None})
    settings = entries(config.model_copy(update={"pretrain": pretraining}))
    whole = {field: _plain(value) for field, value in settings.items()}
    for field in ("data.path", "task.path", "task.game", "model.base"):
        whole[field] = _absolute(whole[field])
    for field in MORE_PATHS:
        whole[field] = list(map(_absolute, whole[field]))
    reads_task = not config.data.path or not (config.model.base or config.model.path)
    return {
        field: value for field, value in redacted_tree(whole).items()
        if field.startswith(_MADE_FROM) and field not in _NOT_MADE_FROM
        and (reads_task or not field.startswith("task."))
    }  # fmt: skip


def _requested(config: Config) -> dict[str, Any]:
    """Return those settings of ``made_from`` that differ from the preset's."""
    usual = made_from(override(defaults(config), {"seed": config.seed}))
    return {field: value for field, value in made_from(config).items() if usual.get(field) != value}


def refusals(config: Config, job: str) -> list[str]:
    """Return why the run cannot start from its start model, one line per reason."""
    if config.model.path:
        return _size_refusals(config)
    model = start_model(config)
    if starts_from_base(config):
        return []
    if not is_made(model):
        if makes_start_model(config) and job in ("rl_math", "rl_preference", "rl_agent", "sweep"):
            if not is_in_use(model.parent):
                return []
            return [
                f"model.path = {str(model)!r}: another run is pre-training it; wait for its end, or give another --seed"
            ]
        there = "its pre-training has not finished" if (model / "config.json").exists() else "no CoLA model there"
        more = (
            f" --task.name {config.task.name}"
            if model.parent.name.split("-seed")[0] != f"pretrain-{config.preset}"
            else ""
        )
        again = " --resume" if read_record(model.parent) else ""
        return [
            f"model.path = {str(model)!r}: {there}; make one with `cola_ray pretrain --preset {config.preset}"
            f"{more}{again}` or give the path of one"
        ]
    made = read(model).get("settings")
    if not isinstance(made, dict):
        return [f"model.path = {str(model)!r}: has no {FILE}, so its settings are unknown; give it as --model.path "
                "to use it anyway"]  # fmt: skip
    made = {f"model.{name}": value for name, value in _UNRECORDED.items()} | made
    lines = []
    for field, value in _requested(config).items():
        option = (
            field.startswith(("task.options.", "task.columns.", "task.splits.")) and "task.name" in made
        )  # an option that was not given is not recorded
        dtype = field == "model.dtype" and not makes_start_model(
            config
        )  # the run may use another dtype than the model's file
        if (field in made or option) and made.get(field) != value and not dtype:
            had = f"with {made[field]!r}" if field in made else "without it"
            lines.append(
                f"{field} = {value!r}: {model} was made {had}; pre-train with {_flag(field)} "
                "into another --output-dir and give its model/ as --model.path, or leave this out"
            )
    return lines


def _size_refusals(config: Config) -> list[str]:
    """Refuse sizes that differ from those of the given model."""
    model, requested, lines = Path(config.model.path), given(config), list[str]()
    there = _sizes(model)
    for name in SIZES:
        value = requested.get(f"model.{name}")
        if value is not None and not there and (model / "config.json").exists():
            lines.append(f"model.{name} = {value!r}: {config.model.path} is a plain model and has none; leave it out")
        elif value is not None and value != there.get(name, value):
            lines.append(f"model.{name} = {value!r}: {config.model.path} has {there[name]}; leave it out")
    return lines


_RELEASED = {"num_actions": "num_code", "num_idm_layers": "num_action_layer",
             "num_world_model_layers": "num_dyna_layer", "num_policy_layers": "num_policy_layer"}  # fmt: skip


_UNRECORDED = {"action_every": 1, "learnt_ends": False}
"""Values of checkpoints that are older than these sizes, and of RL over tokens."""


def _sizes(model: Path) -> dict[str, int]:
    """Read the sizes of a CoLA checkpoint, under this package's names; {} for another model."""
    raw = _read(model / "config.json")
    found = {name: raw.get(name, raw.get(_RELEASED.get(name, name))) for name in SIZES}
    sizes = {name: size for name, size in found.items() if isinstance(size, int)}
    return _UNRECORDED | sizes if sizes else {}


# --- the first lines ----------------------------------------------------------------------------------------------


def first_lines(config: Config, job: str, start: Path | None = None) -> str:
    """Return one line each for what a run starts from, its base, task, data and actions, and where it writes."""
    made = read(start) if start else {}
    origin = made
    while origin.get("start"):
        origin = origin["start"]
    settings = origin.get("settings", {})
    rows: dict[str, str] = {}
    if start is not None:
        rows["starts from"] = str(start)
        if not is_made(start) and makes_start_model(config):
            rows["starts from"] += " (made first)"
            settings = made_from(config)
    elif config.model.path or config.model.base:
        rows["starts from"] = config.model.path or config.model.base
    base = settings.get("model.base", config.model.base)
    rows["base"] = (
        str(base) if base else "inside the model" if config.model.path and not settings else "a small Llama, made here"
    )
    rows["task"] = _task(config)
    if settings.get("data.path") or (job in ("pretrain", "train_q", "atlas", "diversity") and config.data.path):
        rows["data"] = str(config.data.path or settings["data.path"])
    elif job in ("pretrain", "atlas", "diversity") or settings:
        rows["data"] = f"demonstrations of {settings.get('task.name', config.task.name)}"
    token = config.rl.action_space == "token" and job not in ("pretrain", "train_q")
    lasting = f", each of {every} tokens" if (every := config.model.action_every) > 1 else ""
    if config.model.learnt_ends:
        lasting = ", each until the policy ends it"
    rows["actions"] = "tokens of the vocabulary" if token else f"{config.model.num_actions} latent actions{lasting}"
    if job == "reward_model":
        rows.pop("actions")
    rows["writes to"] = config.output_dir
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _task(config: Config) -> str:
    task = config.task
    options = ", ".join(f"{name} {value}" for name, value in redacted_tree(task.options).items())
    parts = [
        task.name,
        *(part for part in (task.path, task.game, task.command, options, "thinking" if task.thinking else "") if part),
    ]
    return ", ".join(parts)


# --- helpers ------------------------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _plain(value: Any) -> Any:
    """Return a value as JSON represents it."""
    return list(value) if isinstance(value, tuple) else value


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path and (Path(path).exists() or glob.has_magic(path)) else path


def _with_absolute_paths(command: str) -> str:
    """Make a command's paths absolute, for processes that start elsewhere; unchanged if a shell cannot parse it."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    # Links are not resolved: the Python of a virtual environment is a link.
    return shlex.join(os.path.abspath(word) if Path(word).is_file() else word for word in words)


def _leaf(field: str) -> str:
    return field.removeprefix("pretrain.").rpartition(".")[2]


def _slug(value: object) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^\w.+]+", ".", Path(text).stem if "/" in text else text)


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"
