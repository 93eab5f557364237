"""TensorBoard's and Weights & Biases' copies of a run's ``log.jsonl``, each written by its own thread.

    follower = Follower("tensorboard", folder, job, params)
    follower.wake()                     there is more in the log
    line = follower.finish("finished")  what the tracker still lacks after a few seconds; "" if nothing

    RUN/tensorboard/...   event files;      `tensorboard --logdir RUN`
    RUN/wandb/...         an offline run;   `wandb sync RUN/wandb/offline-run-*`, or online with WANDB_MODE=online

As with MLflow's copy (mirror.py), the log is the source of truth: a tracker that fails or hangs neither delays nor ends
a run. ``sent.json`` in the tracker's folder records how many bytes of the log have been copied, and a resumed run
continues from there. A step that is in the log twice, because a resumed run repeated it, is written once.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cola_ray.runs import event_log
from cola_ray.runs.log_copy import LogCopy
from cola_ray.runs.redaction import redacted_tree
from cola_ray.runs.run_folder import State, write_json

_CLOSING_S = 10.0  # how long the end of a run waits
_PAUSE_S = 10.0  # pause after a failure


class _Sink(Protocol):
    """A tracker's own writer."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self, state: str) -> None: ...


class TensorBoard:
    """Event files; anything that an earlier process wrote from step ``first`` on is discarded and written again."""

    def __init__(self, folder: Path, job: str, params: Mapping[str, Any], run: str, first: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        if first is None:
            table = "\n".join(f"| {name} | {value} |" for name, value in params.items())
            self.writer.add_text("settings", f"| {job} | |\n| --- | --- |\n{table}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self, state: str) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One run, with the id from the log; its metrics are plotted over ``train/global_step``, as in TRL."""

    def __init__(self, folder: Path, job: str, params: Mapping[str, Any], run: str, first: int | None) -> None:
        import wandb

        self.folder = folder / "wandb"
        settings = wandb.Settings(console="off", symlink=False, disable_git=True, save_code=False, silent=True)
        self.run = wandb.init(
            project="cola_ray", group=job, name=folder.name, id=run, resume="allow", dir=str(folder),
            config=dict(params), mode=os.environ.get("WANDB_MODE", "offline"), settings=settings,
        )  # fmt: skip
        self.run.define_metric("*", step_metric="train/global_step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"train/global_step": step, **metrics})

    def flush(self) -> None:
        """Do nothing: W&B's own process writes to disk."""

    def close(self, state: str) -> None:
        self.run.finish(exit_code=int(state == "failed"))
        for path in self.folder.rglob("*"):  # links to logs of W&B's own process, which change after the run
            if path.is_symlink():
                path.unlink()


_SINKS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
TRACKERS = tuple(_SINKS)
"""The trackers; each name is also that of the package that it needs."""


class Follower(LogCopy):
    """Writes the log of one run to one tracker.

    Args:
        name: tensorboard or wandb.
        folder: of the run.
        job: its name.
        params: settings, by dotted field.
    """

    def __init__(self, name: str, folder: Path, job: str, params: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.name, self.folder, self.job, self.params = name, folder, job, redacted_tree(params)
        self.sent_file = folder / name / "sent.json"
        self.sink: _Sink | None = None
        self.seen: set[tuple[int, str]] = set()  # (step, metric) pairs that the tracker has
        self.upto = 0  # bytes of the log
        self.thread.start()

    def end(self, state: State) -> None:
        """Tell the thread that the log is complete."""
        self.state = state
        self.wake()

    def finish(self, state: State) -> str:
        """Wait a while for the rest; return a line about what the tracker lacks, or ""."""
        self.end(state)
        if self.done.wait(_CLOSING_S) and not self.fault:
            return ""
        why = self.fault or "no answer in time"
        return f"{self.name} lacks the end of this run ({why}); log.jsonl has all of it"

    def _copy(self, last: bool) -> None:
        self._write()
        if last and self.sink is not None:
            self.sink.close(self.state)

    def _drop(self) -> None:
        self.sink = None

    def _pause_s(self) -> float:
        return _PAUSE_S

    def _complaint(self) -> str:
        return f"{self.name}: {self.fault}; the run goes on without it"

    def _write(self) -> None:
        if self.sink is None:
            self._open()
        assert self.sink is not None
        wrote = False
        for end, event in event_log.read_from(self.folder, self.upto):
            for step, metrics in event_log.history([event]).items():
                fresh = {name: value for name, value in metrics.items() if (step, name) not in self.seen}
                if fresh:
                    self.sink.write(step, fresh)
                    self.seen |= {(step, name) for name in fresh}
            self.upto, wrote = end, True
        if wrote:
            self.sink.flush()
            write_json(self.sent_file, {"bytes": self.upto})

    def _open(self) -> None:
        """Continue where the tracker's record ends; event files go back to the step that may be half written."""
        self.sent_file.parent.mkdir(exist_ok=True)
        sent, self.upto, self.seen = self._sent(), 0, set()
        for end, event in event_log.read_from(self.folder, 0):
            if end > sent:
                break
            self.upto = end
            self.seen |= {(step, name) for step, of in event_log.history([event]).items() for name in of}
        first = max((step for step, _ in self.seen), default=None)
        if self.name == "tensorboard" and first is not None:
            self.upto, self.seen = 0, {pair for pair in self.seen if pair[0] < first}
        run = event_log.EventLog(self.folder).run
        self.sink = _SINKS[self.name](self.folder, self.job, self.params, run, first)

    def _sent(self) -> int:
        try:
            return int(json.loads(self.sent_file.read_text())["bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0
