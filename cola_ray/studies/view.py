"""``cola_ray view RUN``: a self-contained HTML page of a run, with its curves and its samples.

    RUN/log.jsonl ─────────────> curves ───────────────────┐
    RUN/samples/*.parquet ─────> some of all steps ────────┼──> data, as JSON ──> view.html with view.css and view.js
    a model, where one is given ──> tokens of all actions ─┘

Prompts and completions are untrusted data. They are in the page as JSON without markup characters, its script inserts
them only as text, and its content security policy allows no other script.
"""

import argparse
import base64
import hashlib
import html
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from cola_ray.runs import event_log, samples, status
from cola_ray.runs.display import plain
from cola_ray.runs.redaction import redacted, redacted_tree

_MARK = "<!doctype html>\n<!-- cola_ray view -->\n"
_FILES = 48  # of samples, at most
_POINTS = 500  # of a curve
_CELLS = 4_000_000  # tokens under all actions, one per token and action
_LOGITS = 1 << 26  # numbers that are in memory together
_HELP = """
The page has the run's curves; prompts and completions of two steps side by side, each prompt's with their rewards and
advantages; and every completion token by token, with the action that was taken and its probability. It is one file,
which needs neither a network nor a server: open it in a browser, or send it to somebody.

A run keeps samples in RUN/samples: of every samples.every-th step, and of every evaluation. A run that is going on can
be viewed, too.

examples:
  cola_ray view outputs/demo                           writes outputs/demo.html
  cola_ray view outputs/demo --out demo.html           elsewhere
  cola_ray view outputs/demo --samples 2000            more of them, a larger page
  cola_ray view outputs/demo --model                   and which token each of the other actions would have given,
                                                       by the run's own model, outputs/demo/model
  cola_ray view outputs/demo --model MODEL             or by another CoLA checkpoint of the same base and actions
"""


class _RefusedError(ValueError):
    """The run or model cannot be viewed; the message is one line."""


def view(argv: Sequence[str]) -> int:
    """Run ``cola_ray view RUN [--out FILE] [--samples N] [--model [MODEL]]``; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="cola_ray view", description="a run as a page: its curves, and what it said", epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="a run's folder, e.g. outputs/demo")
    parser.add_argument("--out", type=Path, help="file to write; by default beside the folder, RUN.html")
    parser.add_argument("--samples", type=int, default=400, metavar="N", help="completions in the page, about 400")
    parser.add_argument(
        "--model", nargs="?", const="", help="CoLA model to ask for other actions' tokens; alone: RUN/model"
    )
    given = parser.parse_args(argv)
    out = given.out or given.run.resolve().with_suffix(given.run.resolve().suffix + ".html")
    try:
        _check(given.run, out, given.samples)
        data = page_data(given.run, given.samples)
        if given.model is not None:
            add_other_tokens(data, given.model or str(given.run / "model"))
        out.write_text(page(given.run.resolve().name, data), encoding="utf-8")
    except _RefusedError as error:
        print(plain(redacted(str(error))), file=sys.stderr)
        return 2
    except OSError as error:
        print(plain(redacted(f"{out}: not written: {error.strerror or error}")), file=sys.stderr)
        return 1
    print(plain(f"{out}: {len(data['curves'])} curves, {len(data['samples'])} completions; open it in a browser"))
    return 0


def _check(run: Path, out: Path, count: int) -> None:
    if not status.is_run(run):
        raise _RefusedError(f"{run}: no run there; give a run's --output-dir, e.g. outputs/demo")
    if count < 1:
        raise _RefusedError(f"--samples {count}: out of range; use a whole number of at least 1")
    if out.is_dir():
        raise _RefusedError(f"--out {out}: is a folder; give a file")
    if not out.parent.is_dir():
        raise _RefusedError(f"--out {out}: no such folder {out.parent}; make it, or give another file")
    if out.exists() and not _is_page(out):
        raise _RefusedError(f"--out {out}: exists, and no `cola_ray view` wrote it; give another file")


def _is_page(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_MARK)) == _MARK.encode()


# --- data ---------------------------------------------------------------------------------------------------------


def page_data(run: Path, count: int) -> dict[str, Any]:
    """The page's data: ``run``, ``curves``, ``samples`` with their ``prompts``, and ``kept``, a line about the samples.

    Args:
        run: the run's folder.
        count: approximate number of completions; groups are whole, and each file contributes equally many.
    """
    one = status.read(run)
    config = redacted_tree(one.config)
    rl, last = config["rl"], one.steps[-1]["version"] if one.steps else 0
    about = {"state": one.state, "step": f"{last} of {rl['max_steps']}", "preset": config.get("preset", ""),
             "task": config.get("task", {}).get("name", ""), "algorithm": rl.get("algorithm", ""),
             "actions": rl.get("action_space", ""), "seed": config.get("seed", "")}  # fmt: skip
    rows, kept = _some_rows(run, count)
    prompts = {row["prompt"]: None for row in rows}
    places = {prompt: place for place, prompt in enumerate(prompts)}
    return {
        "run": {name: value for name, value in about.items() if value != ""},
        "space": rl.get("action_space", "latent"),
        "curves": curves(event_log.history(one.events)),
        "kept": kept,
        "prompts": list(prompts),
        "samples": [{**row, "prompt": places[row["prompt"]]} for row in rows],
    }


def curves(history: Mapping[int, Mapping[str, float]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each metric; long curves are thinned out."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for step in sorted(history):
        for name, value in history[step].items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return {name: (_evenly(steps, _POINTS), _evenly(values, _POINTS)) for name, (steps, values) in found.items()}


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """All items, or ``most`` of them at equal distances, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _some_rows(run: Path, count: int) -> tuple[list[dict[str, Any]], str]:
    """Rows of the run's samples, equally many of each step; and a line saying how many of all samples these are."""
    there = samples.files(run)
    opened = _evenly(there, min(_FILES, count))
    rows, damaged, left = list[dict[str, Any]](), list[str](), count
    for place, file in enumerate(opened):
        try:
            some = samples.read(file, most=max(left // (len(opened) - place), 1))
        except ValueError as error:
            damaged.append(str(error))
            continue
        rows += some
        left -= len(some)
    if not there:
        return [], "no samples: the run keeps none (samples.prompts = 0), has not come to any yet, or trains no policy"
    kept = f"{len(rows)} completions, from {len(opened)} of {len(there)} steps and evaluations with samples"
    return rows, ". ".join([kept + ("; --samples N shows more" if left <= 0 else ""), *damaged])


def add_other_tokens(data: dict[str, Any], model_path: str) -> None:
    """Compute, for each token of the samples, which token each of the model's actions would give there.

    RL over latent actions does not change base, world model and codebook, so any checkpoint of the run gives the same
    tokens. ``vocabulary`` has the tokens' texts, and a sample's ``others`` holds (L, K) indices into it.

    Raises:
        _RefusedError: the actions are tokens, or the model does not reproduce these samples' tokens.
    """
    if data["space"] != "latent":
        raise _RefusedError("--model: the run's actions are its tokens; leave --model out")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from cola_ray.model.conversion import load, load_tokenizer

    disable_progress_bar()
    try:
        model, tokenizer = load(model_path), load_tokenizer(model_path)
    except (OSError, ValueError) as error:
        there = Path(model_path).exists()
        why = str(error).splitlines()[0] if there else "no such folder, and no model of the hub that can be reached"
        raise _RefusedError(f"--model {model_path}: {why}") from None
    told, right, left = 0, 0, _CELLS
    found: dict[int, int] = {}
    for sample in data["samples"]:
        left -= len(sample["token_ids"]) * model.config.num_actions
        if sample["actions"] is None or left < 0:
            continue
        with torch.no_grad():
            tokens = _tokens_of_all_actions(model, sample)
        own = sample["by_policy"] or [True] * len(tokens)
        taken = [row[action] for row, action in zip(tokens, sample["actions"], strict=True)]
        same = [one == other for one, other, mine in zip(taken, sample["token_ids"], own, strict=True) if mine]
        told, right = told + len(same), right + sum(same)
        sample["others"] = [
            [found.setdefault(token, len(found)) for token in row] if mine else None
            for row, mine in zip(tokens, own, strict=True)
        ]
    if told and right < 0.9 * told:
        raise _RefusedError(
            f"--model {model_path}: under the actions that were taken it gives {right} of {told} tokens that were said;"
            " give a checkpoint of this run"
        )
    data["vocabulary"] = [tokenizer.decode([token]) for token in found]
    data["kept"] += f". Other actions' tokens by {model_path}, which gives {right} of {told} tokens that were said"


def _tokens_of_all_actions(model: Any, sample: Mapping[str, Any]) -> list[list[int]]:
    """The most probable token at each of the sample's positions under each action, (L, K)."""
    import torch

    prompt, said, count = sample["prompt_ids"], sample["token_ids"], model.config.num_actions
    ids = torch.tensor([prompt + said])
    if ids.max() >= model.config.vocab_size or max(sample["actions"], default=0) >= count:
        raise _RefusedError(f"--model: of {model.config.vocab_size} tokens and {count} actions, which are too few here")
    states = model.encode(ids)[0, len(prompt) - 1 : -1]
    rows = max(_LOGITS // (count * model.config.vocab_size), 1)
    every = torch.arange(count)
    found: list[list[int]] = []
    for some in states.split(rows):
        tried = some[:, None].expand(-1, count, -1)
        found += model.world_model_logits(tried, every.expand(len(some), -1)).argmax(-1).tolist()
    return found


# --- the page -----------------------------------------------------------------------------------------------------


def page(title: str, data: Mapping[str, Any]) -> str:
    """The whole page, from :func:`page_data`."""
    folder = files("cola_ray.studies")
    text, style, script = ((folder / f"view.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    parts = {
        "title": html.escape(plain(title)), "style": style, "script": script, "data": as_json(_for_the_page(data)),
        "style_hash": _hash(style), "script_hash": _hash(script),
    }  # fmt: skip
    return re.sub(r"{{ (\w+) }}", lambda found: parts[found[1]], text)


def _for_the_page(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data without fields that the script does not read; one advantage if all of a sample's are the same."""
    shown = []
    for sample in data["samples"]:
        weights = sample["advantages"]
        one = None if not weights else weights[0] if len({*weights}) == 1 else weights
        unread = ("prompt_ids", "token_ids")
        shown.append({name: value for name, value in sample.items() if name not in unread} | {"advantages": one})
    return {**data, "samples": shown}


def as_json(value: Any) -> str:
    """JSON that can be embedded in a page: ASCII without markup characters; null for NaN and infinity."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.6g}") if abs(value) < 1e6 else float(f"{value:.0f}")
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
