"""The report of a reproduction: each figure of the papers, the paper's number, ours, and whether what it says holds.

    stages/NAME-seedK/summary.json, log.jsonl, *.png ──> values of each figure, one set per seed
        ──> means and claims, with intervals over seeds ──> report/index.html (self-contained),
                                                            report/report.md with pictures, report/report.json

A claim is a difference between values of one seed. It holds, or does not, if the interval of its mean over seeds is on
one side of a threshold; otherwise it cannot be said. Papers: CoLA (Jia et al. 2025), ArCHer (Zhou et al. 2024), ETPO
(Wen et al. 2024).
"""

import base64
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template

from cola_ray.algorithms.intervals import seed_interval
from cola_ray.runs import status
from cola_ray.runs.figures import plot
from cola_ray.runs.run_folder import summary_of, write_json
from cola_ray.settings import matrix
from cola_ray.settings.config import Config
from cola_ray.settings.matrix import folder_of, stage_of
from cola_ray.settings.presets import preset

Summaries = Mapping[str, Mapping[str, Any]]
"""The summaries of one seed's stages, by name."""
Values = Mapping[str, float]
"""A figure's values for one seed, by what they are of."""


def verdict(interval: tuple[float, float] | None, above: float) -> str:
    """Whether something is larger than ``above``, by the interval that it is known within; None: one seed."""
    if interval is None:
        return "cannot be said with one seed"
    low, high = interval
    if low > above:
        return "holds"
    return "does not hold" if high < above else "cannot be said at this scale"


@dataclass(frozen=True)
class Claim:
    """Something that a paper, or a control, says of a figure's values.

    Args:
        says: the sentence.
        difference: how far the values of one seed speak for it.
        above: the sentence holds if the mean difference is above this.
        form: of the difference, for ``str.format``.
    """

    says: str
    difference: Callable[[Values], float]
    above: float = 0.0
    form: str = "{:+.1f}"

    def verdict(self, differences: Sequence[float]) -> str:
        """Whether it holds, from one difference per seed."""
        return verdict(seed_interval(differences), self.above)


@dataclass(frozen=True)
class Figure:
    """A figure or table of a paper, and how to compute it from our stages.

    Args:
        title: what it shows.
        source: the paper, and the place in it.
        paper: the number in the paper.
        values: computes our values from the summaries of one seed's stages; KeyError if a stage is missing.
        differs: what differs between the paper's setting and ours.
        claims: what the paper says of these values, and controls.
        pictures: plots of stages, as ``stage/file``.
        form: of a value, for ``str.format``.
    """

    title: str
    source: str
    paper: str
    values: Callable[[Summaries], Values]
    differs: str
    claims: tuple[Claim, ...] = ()
    pictures: tuple[str, ...] = ()
    form: str = "{:.1f}"


def _percent(shares: Mapping[str, float]) -> Values:
    return {name: 100 * share for name, share in shares.items()}


def _kl_sweep(found: Summaries) -> Values:
    values: dict[str, float] = {}
    for value, figures in found["kl_sweep"]["values"].items():
        at = f"at {float(value):g}"
        values |= {at: 100 * figures["rl_accuracy"], f"KL {at}": figures["kl_last"]}
    return values


def _capabilities(found: Summaries) -> Values:
    ways = {name: scores for name, scores in found["capabilities"].items() if isinstance(scores, dict)}
    tasks = [task for task in ways["base"] if not task.endswith(("_low", "_high"))]
    of = {"base": "base", "CoLA": "marginal"}
    return _percent({f"{task}, {name}": ways[way][task] for task in tasks for name, way in of.items()})


def _lost(values: Values) -> float:
    """The change of the task on which CoLA loses most, in points."""
    return min(value - values[name.replace(", CoLA", ", base")] for name, value in values.items() if ", CoLA" in name)


def _samples(found: Summaries) -> Values:
    known = {name.removeprefix("pass_at_"): share for name, share in found["search"]["sample"].items()}
    return _percent({f"k = {k}": share for k, share in known.items() if k.isdigit()})


def _k(of: tuple[str, float]) -> int:
    return int(of[0].removeprefix("k = "))


_TASK = "the preset's own task and base in place of math500 and Llama-3.1-8B; see config.json"

FIGURES = (
    Figure(
        "Right answers after RL", "CoLA, math500", "latent 42.4 / token 38.2",
        lambda f: _percent({name: f[f"rl_{name}"]["rl_accuracy"] for name in ("latent", "token")}),
        _TASK,
        (Claim("RL over latent actions ends higher than RL over tokens", lambda v: v["latent"] - v["token"]),),
        ("rl_latent/reward.png", "rl_token/reward.png"),
    ),
    Figure(
        "Gains of RL, in points", "CoLA, math500", "-",
        lambda f: {"latent": 100 * (f["rl_latent"]["rl_accuracy"] - f["rl_latent"]["bc_accuracy"]),
                   "token": 100 * (f["rl_token"]["rl_accuracy"] - f["rl_token"]["base_accuracy"])},
        "over latent actions from the cloned policy, over tokens from the base",
        (Claim("RL over latent actions gains right answers", lambda v: v["latent"]),
         Claim("RL over tokens gains right answers", lambda v: v["token"])),
    ),
    Figure(
        "Before RL: base, cloned policy, and after fine-tuning under action guidance", "CoLA, stages 1 and 2",
        "figures of the paper's section 4 are of other bases",
        lambda f: _percent({"base": f["rl_latent"]["base_accuracy"], "cloned": f["rl_latent"]["bc_accuracy"],
                            "fine-tuned": f["rl_fta"]["bc_accuracy"]}),
        "a few hundred steps in place of 1.1 T tokens",
    ),
    Figure(
        "Search", "CoLA, math500", "greedy 42.4 / MCTS-Q 68.2",
        lambda f: _percent({"greedy": f["search"]["greedy"]["accuracy"],
                            **{says: f["search"][way]["best"] for way, says in
                               (("sample", "best of samples"), ("mcts", "MCTS"), ("mcts_q", "MCTS-Q"))}}),
        "the paper has no control with as many samples; " + _TASK,
        (Claim("MCTS-Q finds more right answers than greedy decoding", lambda v: v["MCTS-Q"] - v["greedy"]),
         Claim("MCTS-Q finds more than the best of as many samples (a control)",
               lambda v: v["MCTS-Q"] - v["best of samples"])),
        ("search/accuracy.png",),
    ),
    Figure(
        "pass@k of samples", "CoLA, figure", "rises with k", _samples, _TASK,
        (Claim("pass@k rises with k", lambda v: max(v.items(), key=_k)[1] - min(v.items(), key=_k)[1]),),
    ),
    Figure(
        "Right answers by KL coefficient", "CoLA, beta 0.00 and 0.01", "CoLA holds at 0.00, tokens need 0.01",
        _kl_sweep, "a verifier in place of reward models",
        (Claim("without a penalty, latent actions lose at most 2 points against a coefficient of 0.01",
               lambda v: v["at 0"] - v["at 0.01"], above=-2.0),),
        ("kl_sweep/frontier.png",), "{:.2f}",
    ),
    Figure(
        "Countdown: seconds a step", "CoLA", "half of the computation",
        lambda f: {name: f[f"countdown_{name}"]["seconds_per_step"] for name in ("latent", "token")},
        "tiny: the base is most of the work, it is the same for both, and stages run two at a time",
        (Claim("a step over tokens takes at least twice as long", lambda v: v["token"] / v["latent"], 2.0, "{:.2f}"),),
    ),
    Figure(
        "Countdown: reward at the end", "CoLA", "-",
        lambda f: {name: f[f"countdown_{name}"]["reward_last"] for name in ("latent", "token")},
        _TASK,
        (Claim("latent actions end higher", lambda v: v["latent"] - v["token"], form="{:+.2f}"),),
        ("countdown_latent/reward.png", "countdown_token/reward.png"), "{:.2f}",
    ),
    Figure(
        "Diversity", "CoLA", "random latent actions 1.92 / base's samples 1.54 / random tokens 1.30",
        lambda f: {says: f["diversity"][name]["diversity"] for name, says in
                   (("random_actions", "random latent actions"), ("base", "base's samples"),
                    ("random_tokens", "random tokens"))},
        "another encoder (MiniLM in place of BGE-M3), and texts of the preset's task",
        (Claim("random latent actions vary more than the base's samples",
               lambda v: v["random latent actions"] - v["base's samples"], form="{:+.2f}"),
         Claim("random latent actions vary more than random tokens",
               lambda v: v["random latent actions"] - v["random tokens"], form="{:+.2f}")),
        form="{:.2f}",
    ),
    Figure(
        "Kept capabilities", "CoLA", "MMLU 65.39 / MathQA 37.02 / CMMLU 52.24", _capabilities,
        "tiny and smollm2-135m: sums in place of those tasks",
        (Claim("CoLA loses at most a point on each task", _lost, above=-1.0),),
    ),
    Figure(
        "Twenty Questions, return at the end", "ArCHer, figure 3", "ArCHer -13.0 / PPO -17.3",
        lambda f: {says: f[f"agent_{name}"]["reward_last"] for name, says in (("archer", "ArCHer"), ("ppo", "PPO"))},
        "latent actions in place of GPT-2's tokens; tiny: 12 objects in place of 157; a thousand episodes in place "
        "of 77 000 (smollm2-135m: five hundred)",
        (Claim("ArCHer ends higher than PPO", lambda v: v["ArCHer"] - v["PPO"]),),
        ("agent_archer/reward.png", "agent_ppo/reward.png"),
    ),
    Figure(
        "ETPO: right answers", "ETPO", "above PPO on data-science code",
        lambda f: _percent({"before": f["etpo"]["bc_accuracy"], "after": f["etpo"]["rl_accuracy"]}),
        "over latent actions, on the preset's own task",
        (Claim("ETPO gains right answers", lambda v: v["after"] - v["before"]),), ("etpo/reward.png",),
    ),
)  # fmt: skip


def write_report(output: Path) -> Path:
    """Write the report of the stages in ``output/stages``, which names missing ones; returns the HTML page."""
    folder = output / "stages"
    report = output / "report"
    report.mkdir(parents=True, exist_ok=True)
    of_seeds = _summaries(folder)
    lead = _plot_both_spaces(folder, of_seeds, report / "latent_and_token.png")
    config = json.loads((output / "config.json").read_text())
    absent = _names(preset("tiny")) - _names(Config.model_validate(config))
    every = [(figure, row_of(figure, of_seeds)) for figure in FIGURES]
    figures, rows = zip(*((figure, row) for figure, row in every if row["missing"] not in absent), strict=True)
    pictures = [
        [
            _copied(picture, report)
            for name in figure.pictures
            for stage, _, file in (name.partition("/"),)
            for picture in sorted(folder.glob(f"{folder_of(stage, '*')}/{file}"))
        ]
        for figure in figures
    ]
    stages = []
    for file in sorted(folder.glob("*/log.txt")):
        name, seed = stage_of(file.parent.name)
        done = of_seeds.get(seed, {}).get(name)
        stages.append(
            {"name": file.parent.name, "exists": done is not None, "seconds": (done or {}).get("wall_seconds", 0.0)}
        )
    title = f"cola_ray: the papers' figures with the preset {config['preset']}"
    shown = [
        {**row, "figure": figure, "pictures": its} for row, figure, its in zip(rows, figures, pictures, strict=True)
    ]
    write_json(report / "report.json", {"preset": config["preset"], "figures": rows})
    (report / "report.md").write_text(_markdown(title, shown, lead))
    page = Template((files("cola_ray.studies") / "report.html").read_text(), autoescape=True)
    text = page.render(title=title, rows=shown, stages=stages, lead=lead, picture=_inline)
    (report / "index.html").write_text(text)
    return report / "index.html"


def _names(config: Config) -> set[str]:
    return {stage.name for stage in matrix.stages(config)}


def _summaries(folder: Path) -> dict[int, Summaries]:
    """The summaries of the stages that are done, by seed."""
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    for file in sorted(folder.glob("*/summary.json")):
        name, seed = stage_of(file.parent.name)
        summary = summary_of(file.parent)
        if summary is not None:
            found.setdefault(seed, {})[name] = summary
    return dict(sorted(found.items()))


def row_of(figure: Figure, of_seeds: Mapping[int, Summaries]) -> dict[str, Any]:
    """A figure's values and claims over the seeds whose stages are all there.

    Returns:
        ``seeds``; ``values``, a list of one value per seed by name; ``ours``, their means and intervals in words;
        ``missing``, the stage that is not there, if there are no values; and ``claims``, each with ``says``,
        ``verdict``, ``differences`` (one per seed) and ``found``, their mean in words.
    """
    values: dict[int, Values] = {}
    missing = "no stage"
    for seed, summaries in of_seeds.items():
        try:
            values[seed] = figure.values(summaries)
        except KeyError as error:
            missing = str(error.args[0])
    names = list(next(iter(values.values()), {}))
    by_name = {name: [of_seed[name] for of_seed in values.values()] for name in names}
    ours = " / ".join(f"{name} {_mean(its, figure.form)}" for name, its in by_name.items())
    claims = []
    for claim in figure.claims if values else ():
        differences = [claim.difference(of_seed) for of_seed in values.values()]
        claims.append({"says": claim.says, "verdict": claim.verdict(differences), "differences": differences,
                       "found": _mean(differences, claim.form)})  # fmt: skip
    return {"title": figure.title, "seeds": list(values), "values": by_name, "claims": claims,
            "ours": ours or f"not there yet: {missing}", "missing": "" if values else missing}  # fmt: skip


def _mean(values: Sequence[float], form: str) -> str:
    """A mean with its interval over seeds, if there are several: ``85.2 [83.1, 87.3]``."""
    interval = seed_interval(values)
    said = form.format(float(np.mean(values)))
    return said if interval is None else f"{said} [{form.format(interval[0])}, {form.format(interval[1])}]"


def _plot_both_spaces(folder: Path, of_seeds: Mapping[int, Summaries], path: Path) -> list[Path]:
    """Plot held-out accuracy over steps for both action spaces and all seeds; no picture if there is no curve."""
    curves = {}
    for seed in of_seeds:
        for space in ("latent", "token"):
            where = folder / folder_of(f"rl_{space}", seed)
            if (where / "log.jsonl").exists():
                events = [event for event in status.read(where).events if "eval/accuracy" in event]
                name = f"{space}, seed {seed}" if len(of_seeds) > 1 else space
                curves[name] = ([e["version"] for e in events], [e["eval/accuracy"] for e in events])
    if not curves:
        return []
    plot(path, "right answers (held out) while RL goes on", curves, {})
    return [path]


def _copied(picture: Path, report: Path) -> Path:
    """Copy a picture into the report's folder, so that the folder is complete."""
    return Path(shutil.copyfile(picture, report / f"{picture.parent.name}-{picture.name}"))


def _inline(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _markdown(title: str, rows: Sequence[Mapping[str, Any]], lead: Sequence[Path]) -> str:
    lines = [
        f"# {title}",
        "",
        "| figure | paper | ours | claims | what differs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figure = row["figure"]
        claims = "; ".join(f"{one['says']}: **{one['verdict']}** ({one['found']})" for one in row["claims"])
        cells = [f"{figure.title} ({figure.source})", figure.paper, row["ours"], claims or "-", figure.differs]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    lines += ["", f"Seeds: {', '.join(map(str, seeds)) or 'none'}. Intervals are 95 %, Student's t over seeds."]
    pictures = [*lead, *(path for row in rows for path in row["pictures"])]
    lines += ["", *(f"![{path.stem}]({path.name})" for path in pictures), ""]
    return "\n".join(lines)
