"""The report of a reproduction: each figure of the papers, the paper's number, our number, and what differs.

    stages/<name>/summary.json, log.jsonl, *.png ──> report/index.html (self-contained), report/report.md with pictures

Papers: CoLA (Jia et al. 2025), ArCHer (Zhou et al. 2024), ETPO (Wen et al. 2024).
"""

import base64
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Template

from cola_ray.runs import status
from cola_ray.runs.figures import plot
from cola_ray.runs.run_folder import summary_of

Summaries = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A figure or table of a paper, and how to compute it from our stages.

    Args:
        title: what it shows.
        source: the paper, and the place in it.
        paper: the number in the paper.
        ours: computes our number from the summaries of the stages; KeyError if a stage is missing.
        differs: what differs between the paper's setting and ours.
        pictures: plots of stages, as ``stage/file``.
    """

    title: str
    source: str
    paper: str
    ours: Callable[[Summaries], str]
    differs: str
    pictures: tuple[str, ...] = ()


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _each(values: Sequence[str]) -> str:
    return " / ".join(values)


def _kl_sweep(found: Summaries) -> str:
    values = found["kl_sweep"]["values"]
    return _each([f"{_percent(figures['rl_accuracy'])} (KL {figures['kl_last']:.2f}) at {value}"
                  for value, figures in values.items()])  # fmt: skip


def _capabilities(found: Summaries) -> str:
    ways = {name: scores for name, scores in found["capabilities"].items() if isinstance(scores, dict)}
    tasks = [task for task in ways["base"] if not task.endswith(("_low", "_high"))]
    return "; ".join(f"{task}: base {_percent(ways['base'][task])}, CoLA {_percent(ways['marginal'][task])}"
                     for task in tasks)  # fmt: skip


_TASK = "the preset's own task and base in place of math500 and Llama-3.1-8B; see config.json"

FIGURES = (
    Figure(
        "Right answers after RL: latent actions / tokens", "CoLA, math500", "42.4 / 38.2",
        lambda f: _each([_percent(f[name]["rl_accuracy"]) for name in ("rl_latent", "rl_token")]),
        _TASK, ("rl_latent/reward.png", "rl_token/reward.png"),
    ),
    Figure(
        "Before RL: base / behaviour-cloned policy / after fine-tuning under action guidance", "CoLA, stages 1 and 2",
        "figures of the paper's section 4 are of other bases",
        lambda f: _each([_percent(f["rl_latent"]["base_accuracy"]), _percent(f["rl_latent"]["bc_accuracy"]),
                         _percent(f["rl_fta"]["bc_accuracy"])]),
        "a few hundred steps in place of 1.1 T tokens",
    ),
    Figure(
        "Search: greedy / best of samples / MCTS / MCTS-Q", "CoLA, math500", "42.4 / - / - / 68.2",
        lambda f: _each([_percent(f["search"]["greedy"]["accuracy"]),
                         *(_percent(f["search"][way]["best"]) for way in ("sample", "mcts", "mcts_q"))]),
        "the paper has no control with as many samples; " + _TASK, ("search/accuracy.png",),
    ),
    Figure(
        "pass@k of samples", "CoLA, figure", "rises with k",
        lambda f: _each([f"{name.removeprefix('pass_at_')}: {_percent(value)}" for name, value in
                         f["search"]["sample"].items() if name.removeprefix("pass_at_").isdigit()]),
        _TASK,
    ),
    Figure(
        "KL coefficients", "CoLA, beta 0.00 and 0.01", "CoLA holds at 0.00, tokens need 0.01", _kl_sweep,
        "a verifier in place of reward models; one seed", ("kl_sweep/frontier.png",),
    ),
    Figure(
        "Countdown: seconds a step, latent / token, and reward at the end", "CoLA", "half of the computation",
        lambda f: _each([f"{f[name]['seconds_per_step']:.1f} s, {f[name]['reward_last']:.2f}"
                         for name in ("countdown_latent", "countdown_token")]),
        "tiny: the base is most of the work, it is the same for both, and stages run two at a time",
        ("countdown_latent/reward.png", "countdown_token/reward.png"),
    ),
    Figure(
        "Diversity: random latent actions / base's samples / random tokens", "CoLA", "1.92 / 1.54 / 1.30",
        lambda f: _each([f"{f['diversity'][name]['diversity']:.2f}"
                         for name in ("random_actions", "base", "random_tokens")]),
        "another encoder (MiniLM in place of BGE-M3), and texts of the preset's task",
    ),
    Figure(
        "Kept capabilities", "CoLA: MMLU / MathQA / CMMLU", "65.39 / 37.02 / 52.24", _capabilities,
        "tiny: sums in place of those tasks",
    ),
    Figure(
        "Twenty Questions, return at the end: ArCHer / PPO", "ArCHer, figure 3", "-13.0 / -17.3",
        lambda f: _each([f"{f[name]['reward_last']:.1f}" for name in ("agent_archer", "agent_ppo")]),
        "latent actions in place of GPT-2's tokens; tiny: 12 objects in place of 157, a thousand episodes in place of "
        "77 000",
        ("agent_archer/reward.png", "agent_ppo/reward.png"),
    ),
    Figure(
        "ETPO: right answers before / after", "ETPO", "above PPO on data-science code",
        lambda f: _each([_percent(f["etpo"]["bc_accuracy"]), _percent(f["etpo"]["rl_accuracy"])]),
        "over latent actions, on the preset's own task", ("etpo/reward.png",),
    ),
)  # fmt: skip


def write_report(output: Path) -> Path:
    """Write the report of the stages in ``output/stages``, which names missing ones; returns the HTML page."""
    folder = output / "stages"
    summaries = {file.parent.name: summary_of(file.parent) for file in sorted(folder.glob("*/summary.json"))}
    found = {name: summary for name, summary in summaries.items() if summary is not None}
    report = output / "report"
    report.mkdir(parents=True, exist_ok=True)
    _plot_both_spaces(folder, report / "latent_and_token.png")
    rows = []
    for figure in FIGURES:
        try:
            ours = figure.ours(found)
        except KeyError as missing:
            ours = f"not there yet: {missing.args[0]}"
        pictures = [_copied(folder / name, report) for name in figure.pictures if (folder / name).exists()]
        rows.append({"figure": figure, "ours": ours, "pictures": pictures})
    stages = [
        {"name": file.parent.name, "exists": file.parent.name in found,
         "seconds": found.get(file.parent.name, {}).get("wall_seconds", 0.0)}
        for file in sorted(folder.glob("*/log.txt"))
    ]  # fmt: skip
    config = json.loads((output / "config.json").read_text())
    title = f"cola_ray: the papers' figures with the preset {config['preset']}"
    lead = [report / "latent_and_token.png"] if (report / "latent_and_token.png").exists() else []
    (report / "report.md").write_text(_markdown(title, rows, lead))
    page = Template((files("cola_ray.studies") / "report.html").read_text(), autoescape=True)
    text = page.render(title=title, rows=rows, stages=stages, lead=lead, picture=_inline)
    (report / "index.html").write_text(text)
    return report / "index.html"


def _plot_both_spaces(folder: Path, path: Path) -> None:
    """Plot held-out accuracy over steps for both action spaces."""
    curves = {}
    for name in ("rl_latent", "rl_token"):
        if (folder / name / "log.jsonl").exists():
            events = [event for event in status.read(folder / name).events if "eval/accuracy" in event]
            curves[name.removeprefix("rl_")] = ([e["version"] for e in events], [e["eval/accuracy"] for e in events])
    if curves:
        plot(path, "right answers (held out) while RL goes on", curves, {})


def _copied(picture: Path, report: Path) -> Path:
    """Copy a picture into the report's folder, so that the folder is complete."""
    return Path(shutil.copyfile(picture, report / f"{picture.parent.name}-{picture.name}"))


def _inline(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _markdown(title: str, rows: Sequence[Mapping[str, Any]], lead: Sequence[Path]) -> str:
    lines = [f"# {title}", "", "| figure | paper | ours | what differs |", "| --- | --- | --- | --- |"]
    for row in rows:
        figure = row["figure"]
        lines.append(f"| {figure.title} ({figure.source}) | {figure.paper} | {row['ours']} | {figure.differs} |")
    pictures = [*lead, *(path for row in rows for path in row["pictures"])]
    lines += ["", *(f"![{path.stem}]({path.name})" for path in pictures), ""]
    return "\n".join(lines)
