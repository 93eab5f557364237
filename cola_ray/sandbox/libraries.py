"""What confined processes can read: the interpreter and libraries, without the data that come with libraries."""

import functools
import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

_DATA_FOLDERS = {"tests", "data", "descr", "images"}
"""Folders of a distribution that hold tables (such as scikit-learn's) or tests on them."""


def all_libraries() -> list[str]:
    """Return paths of the interpreter, what it can import, the system's shared libraries, and sources of randomness."""
    own = [sys.prefix, sys.base_prefix, *(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))]
    system = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    return [*sorted({os.path.realpath(path) for path in [*own, *system]} - {"/", "/usr"}), "/dev/urandom"]


@functools.cache
def libraries_of(distributions: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the paths that programs using these distributions may read, and the folders that they may only list."""
    hidden = set[str]()
    for root in all_libraries():
        for depth in ("*-packages", "*/*-packages", "*/*/*-packages"):
            hidden |= {str(path) for path in Path(root).glob(depth) if path.is_dir() and not path.is_symlink()}
    readable, listable = set[str](), set[str]()
    for root in all_libraries():
        _add_without(root, hidden, readable, listable)
    for path in _modules(distributions):
        tables = {folder for folder, _, _ in os.walk(path) if os.path.basename(folder) in _DATA_FOLDERS}
        _add_without(path, tables, readable, listable)
    return sorted(readable), sorted(listable | hidden)


def _add_without(path: str, hidden: set[str], readable: set[str], listable: set[str]) -> None:
    """Add a folder to ``readable``: as a whole, or entry by entry if something in it is hidden."""
    if path in hidden:
        return
    if not any(one.startswith(f"{path}/") for one in hidden):
        readable.add(path)
        return
    listable.add(path)
    for entry in os.scandir(path):
        _add_without(os.path.realpath(entry.path), hidden, readable, listable)


def _modules(distributions: Iterable[str]) -> Iterator[str]:
    """Yield the files and folders that distributions and their requirements installed."""
    left, seen = list(distributions), set[str]()
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted = (Requirement(text) for text in found.requires or ())
        left += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            yield os.path.realpath(str(found.locate_file(top)))
