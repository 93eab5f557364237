"""Pictures of curves, as PNG files beside the figures in docs/results."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def picture(path: Path, panels: int = 1, size: tuple[float, float] = (8, 4.5), **options: Any) -> Iterator[list[Any]]:
    """Yield the axes of panels side by side, and write them to a file at the end of the block.

    Args:
        size: of the whole picture, in inches.
        options: further arguments of ``matplotlib.pyplot.subplots``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (row,) = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False, **options)
    for axes in row:
        axes.grid(alpha=0.3)
    yield list(row)
    figure.savefig(path, dpi=120)
    plt.close(figure)
