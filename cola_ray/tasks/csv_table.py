"""CSV files with a header, as rows of text, or as columns of text and of numbers; errors name row and field."""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

_MISSING = {"", "na", "n/a", "#n/a", "nan", "null", "none", "-nan"}


def read_columns(path: str, field: str) -> dict[str, list[str]]:
    """Return cells by the name of their column; "" if a value is missing.

    Args:
        path: of the file.
        field: the setting that ``path`` comes from, for messages.

    Raises:
        ValueError: it is not a valid CSV file; names row and field, counted from 1 without the header.
    """
    try:
        header, rows = _read(Path(path))
    except ValueError as error:
        raise ValueError(f"{field} = {path!r}: {error}") from None
    except OSError as error:
        raise ValueError(f"{field} = {path!r}: cannot be read ({error.strerror or error}); name a CSV file") from None
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def as_numbers(cells: Sequence[str], name: str) -> np.ndarray:
    """Return (N,) float64: numbers, with NaN for missing ones; for text, the index of its value in sorted order.

    Raises:
        ValueError: a number is not finite; begins with its row and the column's ``name``.
    """
    numbers = [_number(cell) for cell in cells]
    if None in numbers or not any(cells):
        return np.unique(np.array(cells), return_inverse=True)[1].astype(float)
    for row, (cell, number) in enumerate(zip(cells, numbers, strict=True), 1):
        if number is not None and math.isinf(number):
            raise ValueError(f"row {row}, field {name}: {cell[:40]} is not a finite number; fix or empty it")
    return np.array(numbers, float)


def _number(cell: str) -> float | None:
    """Return the cell's number, NaN if it is empty, None for text."""
    try:
        return float(cell) if cell and "_" not in cell else math.nan if not cell else None
    except ValueError:
        return None


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    header, *cells = lines_of(path)
    rows = [["" if cell.strip().lower() in _MISSING else cell.strip() for cell in row] for row in cells]
    if not rows:
        raise ValueError("no rows below the header; one or more are needed")
    return header, rows


def lines_of(path: Path, cell_bytes: int = 1 << 17, checked: bool = True) -> Iterator[list[str]]:
    """Yield the header, then the cells of each row, each of at most ``cell_bytes``.

    Args:
        checked: refuse rows whose number of cells differs from the header's.

    Raises:
        ValueError: names the row, counted from 1 without the header, and what is wrong with it.
    """
    csv.field_size_limit(cell_bytes)
    with path.open("rb") as file:
        lines = csv.reader(_decoded(file), strict=True)
        number = 0
        try:
            header = [name.strip() for name in next(lines, [])]
            _check_header(header)
            yield header
            for number, row in enumerate(filter(None, lines), 1):
                if checked and len(row) != len(header):
                    raise ValueError(f"row {number}: {unequal(header, row)}")
                yield row
        except csv.Error as error:
            raise ValueError(f"row {number + 1}: not CSV ({error}); fix or remove it") from None


def unequal(header: Sequence[str], row: Sequence[str]) -> str:
    """Return what is wrong with a row whose number of cells differs from the header's."""
    many = "" if len(header) > 1 else "; columns are separated by commas"
    return f"{len(row)} cells, and the header has {len(header)}{many}; fix or remove it"


def _check_header(header: Sequence[str]) -> None:
    if not header:
        raise ValueError("empty; a header with the names of columns, and rows below it, are expected")
    for place, name in enumerate(header, 1):
        if not name:
            raise ValueError(f"column {place} of the header has no name; give it one")
        if header.index(name) + 1 < place:
            raise ValueError(f"field {name}: there are two columns of this name; rename one")


def _decoded(lines: Iterator[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
            raise ValueError(f"line {number}: not UTF-8 ({byte}); save it as UTF-8") from None
        if "\0" in text:
            raise ValueError(f"line {number}: has a zero byte; save it as CSV in UTF-8")
        yield text
