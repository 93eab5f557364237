"""The first-run notebook: its cells in order, in an event loop as in Jupyter, which is not needed itself."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT

NOTEBOOK = ROOT / "examples" / "first_run.ipynb"
SMALL = {
    "pretrain.steps.base": 120, "pretrain.steps.actions": 40, "pretrain.steps.policy": 40, "rl.max_steps": 2,
    "rl.prompts_per_step": 8, "rl.eval_problems": 32, "rl.eval_every": 0, "cluster.learner_ranks": 1,
}  # fmt: skip
IN_A_LOOP = """
import asyncio, json, sys

cells, names = json.load(open(sys.argv[1])), {}

async def run():
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), names)

asyncio.run(run())
print(json.dumps({"summary": names["summary"], "steps": len(names["steps"]), "answers": len(names["both"]),
                  "kinds": sorted(set(names["samples"]["kind"])), "said": names["ask"]("7 - 3 =", temperature=0.0)}))
"""


def code_cells():
    """Sources of the code cells; cells tagged as parameters are followed by the small settings."""
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"])
            if "parameters" in cell["metadata"].get("tags", ()):
                yield f"changes = {SMALL!r}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_run_runs_cell_by_cell(tmp_path):
    (tmp_path / "cells.json").write_text(json.dumps([*code_cells()]))
    assert json.loads((tmp_path / "cells.json").read_text()).count(f"changes = {SMALL!r}") == 1
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_LOOP, "cells.json"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=1790,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["summary"]["state"], found["summary"]["step"], found["steps"]) == ("finished", 2, 3)
    assert found["kinds"] == ["base", "eval", "train"]
    assert found["answers"] > 0
    text, actions = found["said"]
    assert isinstance(text, str)
    assert 1 <= len(actions) <= 6
    assert all(0 <= action < 16 for action in actions)
