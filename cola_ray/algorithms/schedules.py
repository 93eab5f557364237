"""Learning rates over a run: a pure function of the step, so that a resumed run goes on as if it had not stopped.

factor
  1 |      ____________________  constant
    |    /  ` - . _
    |  /            ` - . _     linear, cosine
    |/                      ` - final_ratio
    +-----|-------------------|
       warmup               total
"""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def lr_factor(schedule: Schedule, step: int, total: int, warmup: int, final_ratio: float) -> float:
    """The factor on the peak rate in a step: linear to 1 over ``warmup`` steps, then as the schedule says.

    Args:
        step: from 0.
        total: steps of the run, after which a falling rate has reached ``final_ratio``.

    Example: linear, 10 steps, 2 of warm-up, final ratio 0: 0.5, 1, 1, 0.875, 0.75, ...
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final_ratio + (1 - final_ratio) * left
