"""Folders that stages of pre-training pass on: complete, sealed, and put in place by one rename."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cola_ray.learner.engine import Report
from cola_ray.runs.checkpoints import fault_of_stage, seal_stage

DONE = "done.json"
"""Written by a finished stage: its last metrics, and its files' checksums."""


def is_done(stage: Path, report: Report) -> bool:
    """Whether a stage has left its complete folder; a collective. A damaged one is reported, and made again."""
    found = [True]
    if torch.distributed.get_rank() == 0:
        found = [(stage / DONE).exists()]
        if found[0] and (fault := fault_of_stage(stage, DONE)):
            report.say(f"{stage}: {fault}; the stage is made again")
            found = [False]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def staging_for(target: Path) -> Path:
    """An empty folder beside ``target``."""
    staging = target.with_name(target.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def finish(staging: Path, target: Path, metrics: Mapping[str, Any]) -> None:
    """Seal ``staging`` as the folder of a finished stage, and put it at ``target``."""
    seal_stage(staging, DONE, metrics)
    put(staging, target)


def put(source: Path, target: Path) -> None:
    """Put ``source`` at ``target`` by one rename; ``source`` is copied, not moved, unless it is a staging folder."""
    if source.suffix != ".tmp":
        staging = staging_for(target)
        shutil.copytree(source, staging, dirs_exist_ok=True)
        source = staging
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)
