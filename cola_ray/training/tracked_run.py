"""A run from start to end, however it ends: MLflow, summary, plot and model card."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cola_ray.cluster import head
from cola_ray.model.conversion import describe
from cola_ray.runs.display import current
from cola_ray.runs.failure import explained_failures
from cola_ray.runs.launch import Launch
from cola_ray.runs.run_folder import State, write_json
from cola_ray.runs.tracking import Tracker
from cola_ray.settings.config import Config, flat
from cola_ray.settings.relevance import given

_ON_CARDS = ("rl.lr", "rl.kl_coef", "rl.algorithm", "rl.group_size", "rl.prompts_per_step", "rl.max_steps",
             "rl.action_space", "rl.lora_rank", "rl.steering", "pretrain.stages", "pretrain.lr", "pretrain.batch_size",
             "pretrain.steps", "rollout.temperature", "rollout.max_new_tokens")  # fmt: skip
"""Settings that a model card names if they differ from the preset's; none of them may be a path or a secret."""
OnStep = Callable[[int, Mapping[str, Any]], None]
"""Called after every learner step with its number and metrics."""


@contextlib.contextmanager
def tracked(
    begun: Launch,
    summarise: Callable[[Tracker], dict[str, Any]],
    draw: Callable[[Tracker], None] = lambda _: None,
    on_step: OnStep | None = None,
) -> Iterator[Tracker]:
    """Track a run from here to its end, however it ends; summary and plot show how far it came.

    Args:
        summarise: returns what is known of the run; its end state and duration are added.
        draw: draws the run's plots, if there is anything to show.
    """
    config, folder = begun.config, begun.folder
    output, params = folder.path, flat(config.model_dump())
    current().doing("opening trackers")
    tracker = Tracker(
        config.tracking_uri, begun.job, output, params, config.tracking_parent, on_step, config.report_to
    )  # fmt: skip
    error: BaseException | None = None
    try:
        with explained_failures(output), head.blamed():
            yield tracker
    except BaseException as caught:
        error = caught
        raise
    finally:
        state = _state(error)
        with contextlib.suppress(Exception) if error else contextlib.nullcontext():
            ended = {"state": state, "step": tracker.step, **({"reason": str(error)} if str(error or "") else {})}
            tracker.summary = ended | summarise(tracker) | {"wall_seconds": round(time.time() - begun.began, 1)}
            write_json(output / "summary.json", tracker.summary)
            _describe(output / "model", config, begun.job, tracker.summary)
        with contextlib.suppress(Exception) if error else contextlib.nullcontext():
            draw(tracker)
        with contextlib.suppress(Exception) if error else contextlib.nullcontext():
            tracker.finish(state)
            folder.end(state, tracker.step)


def _describe(model: Path, config: Config, job: str, summary: Mapping[str, Any]) -> None:
    """Add the run's part to its model card."""
    if not (model / "config.json").exists():
        return
    cost = ("_seconds", "_gb", "_mb", "_per_step")
    figures = {
        f"{job}: {name}": round(value, 4) for name, value in summary.items()
        if isinstance(value, float) and not name.endswith(cost)
    }  # fmt: skip
    describe(model, card_facts(config, job), figures)


def card_facts(config: Config, job: str) -> dict[str, Any]:
    """What a model card says about its run. Only the last part of a path is shown: cards go to other machines."""
    facts = {job: f"preset {config.preset}, seed {config.seed}, task {config.task.name}"}
    own = {field: value for field, value in given(config).items() if field.startswith(_ON_CARDS)}
    if own:
        facts[f"{job}: settings"] = ", ".join(f"{field} {value}" for field, value in own.items())
    if job == "pretrain":
        facts["data"] = Path(config.data.path).name if config.data.path else f"the demonstrations of {config.task.name}"
        if not (config.model.base or config.model.path):
            facts["base"] = "a small Llama that was trained from nothing"
        elif config.pretrain.stages[0] == "base":
            facts["base"] = config.model.base  # not the folder that the stage wrote
    return facts


def _state(error: BaseException | None) -> State:
    return "finished" if error is None else "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
