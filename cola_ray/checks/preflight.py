"""What a job needs from files and the hub: paths, checkpoints, rows; machine.py has what it needs from this machine.

    faults(config, "rl_math")             a line for each: ``field = value: why; fix``
    further_faults(config, "rl_math")     slower checks, for settings without other faults

Files are inspected, not loaded; the hub is queried with a short timeout, and only about what the job will read.
"""

import glob
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cola_ray.checks import machine
from cola_ray.checks.machine import GENERATING, TRAINING
from cola_ray.learner.corpus import document
from cola_ray.model import checkpoints, families, hub
from cola_ray.runs import provenance
from cola_ray.settings.config import Config, is_endpoint, value_at
from cola_ray.settings.training import OWN_BASE_POSITIONS, TaskConfig
from cola_ray.tasks import dataset, inspection, preference
from cola_ray.tasks.chat import as_prompt, unknown_options
from cola_ray.tasks.logged import logged
from cola_ray.tasks.rows import ENDINGS, LISTED, Row, cell, files_of, peek
from cola_ray.tasks.verifiable import Gsm8k, Math500

_TABLES = ENDINGS
_LOOKED_AT = 1000  # rows
LOGGED = ("prompt_ids", "token_ids", "actions", "rewards")
"""Columns of the answers that `cola_ray train-q` learns from."""


def faults(config: Config, job: str) -> list[str]:
    """All faults that can be found quickly. Without a ``job``, only the given paths, whichever job reads them."""
    lines = [*_paths(config, job), *_checkpoints(config, job), *_lengths(config, job)]
    if job == "data":
        lines += _rows(config, job)
    elif job and job != "plan":
        lines += [*machine.folders(config, job), *machine.addresses(config, job), *machine.machine(config, job)]
        lines += _rows(config, job)
    return lines


def further_faults(config: Config, job: str) -> list[str]:
    """Faults of hub ids, of options of generators and environments, and of user classes, which are tried out."""
    if job in ("", "plan"):
        return []
    if job == "reproduce":
        return list(machine.silent(config, job))
    asked = _asks_task(config, job) and not (config.task.name == "jericho" and not config.task.game)
    return [*_hub(config, job), *machine.silent(config, job), *(inspection.faults(config.task) if asked else [])]


def unseen(config: Config) -> list[str]:
    """A line for each path that the system refuses to look up: forbidden, or too long."""
    lines = []
    named = ("output_dir", "tracking_uri", *provenance.PATHS, *provenance.CACHES)
    paths = [(field, value_at(config, field)) for field in named]
    for field, value in [*paths, *_further_paths(config), *_further_tasks(config)]:
        try:
            Path(value).exists()
        except OSError as error:
            lines.append(f"{field} = {value!r}: {str(error.strerror).lower()}; give another")
    try:
        Path.cwd()
    except OSError:
        lines.append(f"output_dir = {config.output_dir!r}: the folder that this was started in is gone; go to another")
    return lines


# --- paths --------------------------------------------------------------------------------------------------------


def looks_local(path: str) -> bool:
    """Whether a path is local: a hub id is ``name`` or ``org/name`` without a file ending; all else is local."""
    endings = (*_TABLES, ".gguf", ".csv", ".safetensors", ".bin", ".pt", ".zip", ".gz")
    written = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(endings) or glob.has_magic(path)
    return written or Path(path).exists()


def _further_paths(config: Config) -> list[tuple[str, str]]:
    return [("data.more_paths", path) for path in config.data.more_paths]


def _further_tasks(config: Config) -> list[tuple[str, str]]:
    return [("task.more_paths", path) for path in config.task.more_paths]


def _paths(config: Config, job: str) -> Iterator[str]:
    """Check that paths exist, are readable, and are a file or a folder as required."""
    task = config.task
    rows = f"a file, folder or glob of {LISTED}, or a hub id"
    for field, source in [("data.path", config.data.path), *_further_paths(config), *_further_tasks(config)]:
        yield from _path(field, source, rows, _TABLES)
    if task.name == "data_science":
        yield from _path("task.path", task.path, "a CSV file", (".csv", ".tsv", ".txt"), folder=False)
    elif task.name == "gsm8k":
        yield from _path("task.path", task.path, "a folder with train.jsonl and test.jsonl, or openai/gsm8k", ())
    else:
        yield from _path("task.path", task.path, rows, _TABLES)
    if not is_endpoint(task.reward_model):
        yield from _path("task.reward_model", task.reward_model, "a model's folder, a hub id or an endpoint", ())
    yield from _path("model.base", config.model.base, "a base's folder, a .gguf file or a hub id", (".gguf",))
    yield from _path("model.path", config.model.path, "a CoLA model's folder", (), hub=False)
    yield from _path("q.path", config.q.path, "the folder model/ that `cola_ray train-q` left", (), hub=not job)
    if config.rl.algorithm in ("archer", "archer_soft"):
        yield from _path("critic.encoder", config.critic.encoder, "an encoder's folder or a hub id", ())
    if job == "diversity":
        yield from _path("diversity.encoder", config.diversity.encoder, "an encoder's folder or a hub id", ())
    if job == "capabilities":
        yield from _path("harness.include_path", config.harness.include_path, "a folder of task files", (), hub=False)
    wanted = {"gsm8k": ("train.jsonl", "test.jsonl"), "math500": ("test.jsonl",)}.get(task.name, ())
    if Path(task.path).is_dir() and task.path:
        missing = [name for name in wanted if not (Path(task.path) / name).is_file()]
        if missing:
            yield f"task.path = {task.path!r}: no {' and no '.join(missing)} in this folder; {task.name} needs them"
    if config.q.path and Path(config.q.path).is_dir() and not (Path(config.q.path) / "q.safetensors").is_file():
        yield f"q.path = {config.q.path!r}: no q.safetensors in it; give the folder model/ of `cola_ray train-q`"


def _path(
    field: str, value: str, wanted: str, endings: tuple[str, ...], folder: bool = True, hub: bool = True
) -> Iterator[str]:
    """One line if a path is not what it should be.

    Args:
        endings: endings of accepted files; empty: no file is accepted.
    """
    if not value or (hub and not looks_local(value)):
        return
    path, named = Path(value), f"{field} = {value!r}"
    if endings == _TABLES and not path.exists() and glob.has_magic(value):
        try:
            for file in files_of(value)[1]:
                yield from _path(field, str(file), wanted, endings)
        except ValueError as error:
            yield f"{named}: {error}"
    elif not path.exists():
        near = f"; is {path.expanduser()} meant?" if value.startswith("~") else ""
        yield f"{named}: no such file or folder; give {wanted}{near}"
    elif path.is_dir() and not folder:
        yield f"{named}: a folder; give {wanted}"
    elif path.is_file() and path.suffix not in endings:
        yield f"{named}: a file{f' of type {path.suffix!r}' if endings else ''}; give {wanted}"
    elif not (path.is_file() or path.is_dir()):
        yield f"{named}: neither a file nor a folder; give {wanted}"
    elif not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        yield f"{named}: may not be read; change its permissions or give {wanted}"
    elif path.is_file() and path.stat().st_size == 0:
        yield f"{named}: empty; give {wanted}"
    elif path.is_dir() and endings == _TABLES and not any(file.suffix in _TABLES for file in path.iterdir()):
        yield f"{named}: no {', '.join(_TABLES[:-1])} or {_TABLES[-1]} file in this folder; give {wanted}"


# --- checkpoints --------------------------------------------------------------------------------------------------


def _in_use(config: Config, job: str) -> Iterator[tuple[str, str, bool]]:
    """(field, checkpoint, whether it must be a CoLA model) of each that the job reads, the served one first."""
    model, start = config.model, provenance.start_model(config)
    if not job:
        yield from ((field, path, False) for field, path in (("model.path", model.path), ("model.base", model.base)))
        return
    tokens = config.rl.action_space == "token" and job in (*TRAINING, "evaluate")
    if job in ("pretrain", "reward_model"):
        yield ("model.path", model.path, job == "pretrain") if model.path else ("model.base", model.base, False)
    elif job not in ("plan", "reproduce"):
        there = start.exists()
        yield ("model.path", str(start) if there else "", not tokens) if there else ("model.base", model.base, False)


def _checkpoints(config: Config, job: str) -> Iterator[str]:
    for field, value, cola in _in_use(config, job):
        path = _local(value)
        if path is None:
            continue
        named = f"{field} = {value!r}"
        try:
            shape = checkpoints.shape_of(path)
        except checkpoints.UnreadableError as error:
            if job or (path / "config.json").exists() or path.suffix == ".gguf":
                yield f"{named}: {error}"
            continue
        yield from (f"{named}: {fault}" for fault in _of_shape(config, shape, cola))
        if job:
            yield from (f"{named}: {fault}" for fault in checkpoints.faults(path))
        if job and path.is_dir() and config.data.chat_options:
            yield from unknown_options(config.data.chat_options, checkpoints.chat_template(path))
        if not job:
            break
    yield from _q(config, job)
    reward_model = _local("" if is_endpoint(config.task.reward_model) else config.task.reward_model)
    if reward_model is not None and job in ("rl_preference", "rl_math", "evaluate"):
        found = checkpoints.faults(reward_model) or checkpoints.reward_model_faults(reward_model)
        yield from (f"task.reward_model = {config.task.reward_model!r}: {fault}" for fault in found)


def _q(config: Config, job: str) -> Iterator[str]:
    """Check that MCTS-Q's values belong to the model's own actions."""
    file, model = Path(config.q.path) / "q.safetensors", provenance.start_model(config)
    if job != "evaluate" or not config.q.path or not file.is_file() or not (model / "config.json").is_file():
        return
    try:
        known, actions = checkpoints.q_actions(file), checkpoints.shape_of(model).actions
    except checkpoints.UnreadableError as error:
        yield f"q.path = {config.q.path!r}: {error}"
        return
    if actions and known != actions:
        yield f"q.path = {config.q.path!r}: values of {known} actions, and the model has {actions}; train a Q on it"


def _local(value: str) -> Path | None:
    """A checkpoint's folder or file, possibly in the hub's cache; None if there is nothing to inspect yet."""
    if not value:
        return None
    path = Path(value)
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    return None if path.exists() or looks_local(value) else hub.cached(value, "model")


def _of_shape(config: Config, shape: checkpoints.Shape, cola: bool) -> Iterator[str]:
    whose = shape.settings.get("base_family", "") if shape.kind == "cola" else config.model.family
    if fault := families.fault(shape.settings, whose):
        yield fault
        return
    if cola and shape.kind != "cola":
        yield f"a plain {shape.kind} model; make a CoLA model of it with `cola_ray pretrain --model.base`"
        return
    kind = str(shape.settings["model_type"])  # the base's
    if config.rl.steering != "off" and not families.family(kind, whose).mlp_bias:
        yield f"a {kind} model, whose MLPs have no biases, as rl.steering needs; use a llama, or rl.lora_rank instead"
    if 0 < shape.head < 32 and not config.cluster.use_gpu:
        yield f"heads of {shape.head}; vLLM on CPU needs 32 or more: use another base or a GPU"
    if shape.quantised:
        yield f"quantised by {shape.quantised}; what trains needs plain weights: use the checkpoint that it was made of"
    if shape.actions and config.rl.action_space == "latent" and config.rollout.top_k > shape.actions:
        yield f"its codebook has {shape.actions} actions; let rollout.top_k be at most that"


def _lengths(config: Config, job: str) -> Iterator[str]:
    """Check that texts fit into the context of the served model."""
    rollout, whose, limit = config.rollout, "the base that this preset makes", OWN_BASE_POSITIONS
    for field, value, _ in _in_use(config, job):
        path = _local(value)
        try:
            shape = checkpoints.shape_of(path) if path is not None else None
        except checkpoints.UnreadableError:
            return
        if shape is not None:
            whose, limit = f"{field} = {value!r}", shape.positions
            break
        if value:
            return  # on the hub, or not there
    else:
        if config.preset != "tiny" or not job:
            return
    if limit and (not job or job in GENERATING) and rollout.max_prompt_tokens + rollout.max_new_tokens > limit:
        yield (
            f"rollout.max_new_tokens = {rollout.max_new_tokens}: with rollout.max_prompt_tokens = "
            f"{rollout.max_prompt_tokens} more than the {limit} positions of {whose}; lower one of them"
        )
    if limit and job == "pretrain" and config.pretrain.sequence_length > limit:
        yield (
            f"pretrain.sequence_length = {config.pretrain.sequence_length}: more than the {limit} positions of "
            f"{whose}; use at most {limit}"
        )


# --- rows ---------------------------------------------------------------------------------------------------------


def _reads_texts(config: Config, job: str) -> bool:
    """Whether the job reads ``data.path`` as texts."""
    makes = job in TRAINING and provenance.makes_start_model(config) and not provenance.start_model(config).exists()
    return makes or job in ("pretrain", "diversity", "atlas")


def _asks_task(config: Config, job: str) -> bool:
    """Whether the job needs the task itself."""
    if job in ("pretrain", "diversity", "atlas"):
        own_tokenizer = job != "pretrain" or config.model.base or config.model.path
        return not (config.data.path and own_tokenizer)
    return job in (*TRAINING, "evaluate", "reward_model", "data")


def _rows(config: Config, job: str) -> Iterator[str]:
    """Check the first rows of local files, reading them as the job will."""
    task, path = config.task, Path(config.task.path)
    for field, source in [("data.path", config.data.path), *_further_paths(config)]:
        if _reads_texts(config, job) and _has_rows(source) and not config.data.max_broken:
            yield from peek(source, field, lambda row: document(row, config.data))
    if job == "train_q" and _has_rows(config.data.path):
        yield from peek(config.data.path, "data.path", _logged)
    if _reads_texts(config, job) and not config.data.path and (why := inspection.undemonstrated(task)):
        has_model = job in ("diversity", "atlas")
        yield why if has_model else f"{why}, or the model to start from as --model.path"
    if not task.path or not _asks_task(config, job):
        return
    if task.name in ("gsm8k", "math500"):
        read: Callable[[Row], object] = Gsm8k.read if task.name == "gsm8k" else Math500.read
        files = [path / "train.jsonl", path / "test.jsonl"] if path.is_dir() else [path]
        for file in files:
            if file.is_file() and _has_rows(str(file)):
                yield from peek(str(file), "task.path", read)
    if task.name in ("dataset", "tools") and any(map(_has_rows, (task.path, *task.more_paths))):
        found = dataset.faults(task)
        yield from found
        if not found and task.name == "dataset" and _reads_texts(config, job) and not config.data.path:
            yield from _without_responses(task)
    if task.name == "preference" and _has_rows(task.path):
        yield from _preferences(config, job)


def _without_responses(task: TaskConfig) -> Iterator[str]:
    if not any(one.response for one in dataset.first_examples(task, _LOOKED_AT)):
        yield _nothing_to_clone(task, "response", "name their column with task.columns response NAME, or give")


def _preferences(config: Config, job: str) -> Iterator[str]:
    has_pair = set[bool]()
    read = _pair if job == "reward_model" else preference.read
    found = peek(config.task.path, "task.path", lambda row: has_pair.add(isinstance(read(row), preference.Pair)))
    yield from found
    if has_pair == {False} and not found and _reads_texts(config, job) and not config.data.path:
        yield _nothing_to_clone(config.task, "column chosen", "give")


def _nothing_to_clone(task: TaskConfig, what: str, instead: str) -> str:
    return (
        f"task.path = {task.path!r}: no row has a {what}, and the first policy is cloned from those; {instead} texts "
        "as --data.path, or the model to start from as --model.path"
    )


def _has_rows(path: str) -> bool:
    """Whether there is something to inspect that :func:`_paths` has not refused."""
    source = Path(path)
    if source.is_file():
        return source.suffix in _TABLES and source.stat().st_size > 0 and os.access(source, os.R_OK)
    if glob.has_magic(path) and not source.exists():
        return any(Path(file).suffix in _TABLES for file in glob.glob(path, recursive=True))
    return bool(path) and source.is_dir() and any(file.suffix in _TABLES for file in source.iterdir())


def _pair(row: Row) -> object:
    for name in ("chosen", "rejected"):
        cell(row, name, as_prompt)
    return preference.read(row)


def _logged(row: Row) -> None:
    missing = [name for name in LOGGED if name not in row]
    if missing:
        raise ValueError(f"field {missing[0]}: missing; give a folder that evaluate.py left, predictions/sample")
    logged(row)


# --- the hub ------------------------------------------------------------------------------------------------------


def _hub(config: Config, job: str) -> list[str]:
    """Check the ids that the job will fetch from the hub, all at the same time."""
    task, used = config.task, list[tuple[str, str, hub.Kind]]()
    if _reads_texts(config, job) or job == "train_q":
        used += [("data.path", config.data.path, "dataset")]
        used += [(field, source, "dataset") for field, source in _further_paths(config)]
    if _asks_task(config, job) and task.name in ("gsm8k", "math500", "preference", "dataset", "tools"):
        used.append(("task.path", task.path, "dataset"))
        used += [(field, source, "dataset") for field, source in _further_tasks(config)]
    used += [(field, value, "model") for field, value, _ in _in_use(config, job) if field == "model.base"]
    if job in ("rl_math", "rl_preference", "evaluate") and not is_endpoint(task.reward_model):
        used.append(("task.reward_model", task.reward_model, "model"))
    if job in TRAINING and config.rl.algorithm in ("archer", "archer_soft"):
        used.append(("critic.encoder", config.critic.encoder, "model"))
    if job == "diversity":
        used.append(("diversity.encoder", config.diversity.encoder, "model"))
    ids = [one for one in used if one[1] and not looks_local(one[1])]
    if not ids:
        return []
    with ThreadPoolExecutor(len(ids)) as pool:
        found = list(pool.map(lambda one: hub.fault(one[1], one[2]), ids))
    return [f"{field} = {value!r}: {why}" for (field, value, _), why in zip(ids, found, strict=True) if why]
