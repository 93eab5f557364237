"""Rows from whatever a path names, a file, a folder of files of one kind or a hub id; and which one is wrong, and why.

    rows = open_rows("DATA", "data.path")                       a ``datasets`` table
    read_rows(rows, "DATA", "data.path", read)                  what ``read`` makes of each row
    peek("DATA", "data.path", read)                             lines about the first rows, before anything is loaded

``read`` takes a row and raises ValueError. Lines have the form ``data.path = 'DATA': train.jsonl, row 3, field answer:
null; text is wanted``; rows and lines count from 1.
"""

import codecs
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_PEEKED = 200
_WHOLE_MB = 16  # a .json file of more is not parsed just to look at it
_READ = TypeVar("_READ")
Row = Mapping[str, Any]


def open_rows(path: str, field: str, **hub: str) -> Any:
    """A ``datasets`` table.

    Args:
        field: the setting that ``path`` was given in, for the message.
        hub: ``name`` and ``split`` of a data set on the hub; else its split train.

    Raises:
        ValueError: nothing in it can be read; the message names the file, and the line where there is one.
    """
    import datasets

    if not Path(path).exists():
        return datasets.load_dataset(path, **{"split": "train", **hub})
    try:
        kind, files = _files(Path(path))
    except ValueError as error:
        raise ValueError(f"{field} = {path!r}: {error}") from None
    try:
        rows = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")
    except Exception as error:  # of any library below
        raise ValueError(f"{field} = {path!r}: {_why(files, error)}") from None
    if not len(rows):
        raise ValueError(f"{field} = {path!r}: no rows; one or more are needed")
    return rows


def read_rows(rows: Any, path: str, field: str, read: Callable[[Row], _READ]) -> list[_READ]:
    """All rows, in the table's order.

    Raises:
        ValueError: names the first row that cannot be read, and says how many there are.
    """
    found, wrong = list[_READ](), list[tuple[int, str]]()
    try:
        for index, row in enumerate(rows):
            try:
                found.append(read(row))
            except ValueError as error:
                wrong.append((index, str(error)))
    except UnicodeDecodeError as error:  # Arrow takes any bytes for text, until they are looked at
        raise ValueError(f"{field} = {path!r}: {_why(_files(Path(path))[1], error)}") from None
    if wrong:
        more = f" ({len(wrong)} of {len(rows)} rows are wrong)" if len(wrong) > 1 else ""
        raise ValueError(f"{field} = {path!r}: {_placed(Path(path), *wrong[0])}{more}")
    return found


def peek(path: str, field: str, read: Callable[[Row], object]) -> list[str]:
    """At most one line: what is wrong in the first rows of the first file. Imports neither datasets nor pandas."""
    try:
        _, files = _files(Path(path))
    except ValueError as error:
        return [f"{field} = {path!r}: {error}"]
    try:
        rows = list(itertools.islice(_first(files[0]), _PEEKED))
    except ValueError as error:
        return [f"{field} = {path!r}: {error}"]
    for index, row in enumerate(rows):
        try:
            read(row)
        except ValueError as error:
            return [f"{field} = {path!r}: {_placed(Path(path), index, str(error))}"]
    known = rows or files[0].stat().st_size > _WHOLE_MB << 20
    return [] if known else [f"{field} = {path!r}: {files[0].name} has no rows; one or more are needed"]


def cell(row: Row, name: str, read: Callable[[Any], _READ]) -> _READ:
    """One field of a row; ValueError says which, what is there, and what is wanted."""
    if name not in row:
        raise ValueError(f"field {name}: missing; the row has {', '.join(row) or 'nothing'}")
    try:
        return read(row[name])
    except ValueError as error:
        raise ValueError(f"field {name}: {error}") from None


def plain_text(value: object) -> str:
    """Text, or a number as one writes it."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) != float("inf"):
        return str(int(value)) if value == int(value) else str(value)
    raise ValueError(f"{shown(value)}; text is wanted")


def shown(value: object) -> str:
    """A value as it stands in a file, short."""
    said = json.dumps(value, ensure_ascii=False, default=str)
    return said if len(said) <= 60 else f"{said[:57]}..."


# --- files --------------------------------------------------------------------------------------------------------


def _files(source: Path) -> tuple[str, list[Path]]:
    """What loads them, and all files of that kind; ValueError where there are none, or several kinds."""
    if source.is_file():
        if source.suffix not in _LOADERS:
            raise ValueError(f"cannot read {source.suffix!r}; use .jsonl, .json, .parquet or .txt")
        return _LOADERS[source.suffix], [source]
    files = sorted(file for file in source.iterdir() if file.suffix in _LOADERS)
    if not files:
        raise ValueError("no .jsonl, .json, .parquet or .txt file in this folder")
    kinds = {_LOADERS[file.suffix] for file in files} - {"text"} or {"text"}  # a README beside tables is no table
    if len(kinds) > 1:
        raise ValueError(f"has files of {' and '.join(sorted(kinds))}; keep one kind in it")
    (kind,) = kinds
    return kind, [file for file in files if _LOADERS[file.suffix] == kind]


def _placed(path: Path, index: int, why: str) -> str:
    """``train.jsonl, row 3, field answer: null``; the file only where a folder has several."""
    name = ""
    if path.is_dir():
        for file in _files(path)[1]:
            count = _count(file)
            if index < count:
                name = f"{file.name}, "
                break
            index -= count
    return f"{name}row {index + 1}{', ' if why.startswith('field ') else ': '}{why}"


def _count(file: Path) -> int:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
    if file.suffix == ".json":
        return sum(1 for _ in _first(file))
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip() or file.suffix == ".txt")


def _first(file: Path) -> Iterator[Row]:
    """Rows of a file, one after the other; ValueError, beginning with the file's name, for what is no row."""
    if file.suffix == ".parquet":
        yield from _of_parquet(file)
    elif file.suffix == ".txt":
        yield from ({"text": line} for _, line in _lines(file))
    elif file.suffix == ".json" and not _is_of_lines(file):
        if file.stat().st_size > _WHOLE_MB << 20:
            return
        rows = _parsed(file, "", file.read_text("utf-8-sig"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{file.name}: no list of objects; use one, or .jsonl with an object a line")
        yield from rows
    else:
        for number, line in _lines(file):
            row = _parsed(file, f", line {number}", line) if line.strip() else None
            if row is not None and not isinstance(row, dict):
                raise ValueError(f"{file.name}, line {number}: {shown(row)}; an object with fields is wanted")
            if row is not None:
                yield row


def _of_parquet(file: Path) -> Iterable[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(_PEEKED):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file.name}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def _is_of_lines(file: Path) -> bool:
    """Whether a .json file holds an object a line, not one list."""
    with file.open("rb") as opened:
        start = opened.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return start.startswith(b"{")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{file.name}, line 1: begins with a byte order mark; save it as UTF-8 without one")
            try:
                yield number, line.decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                byte = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
                raise ValueError(f"{file.name}, line {number}: not UTF-8 ({byte}); save it as UTF-8") from None


def _parsed(file: Path, where: str, said: str) -> Any:
    try:
        return json.loads(said)
    except json.JSONDecodeError as error:
        at = where or f", line {error.lineno}"
        raise ValueError(f"{file.name}{at}: not JSON ({error.msg}, column {error.colno}); mend or remove it") from None


def _why(files: list[Path], error: Exception) -> str:
    """What is wrong with the first file that has a fault; else what the loader says."""
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return next(filter(None, map(_fault, files)), f"cannot be read ({said}); write it again")


def _fault(file: Path) -> str:
    """Why a loader could not read a file, found by reading it row by row; empty where nothing is found."""
    kinds: dict[str, tuple[str, int]] = {}
    number = 0
    try:
        for number, row in enumerate(_first(file), 1):
            for name, value in row.items():
                kind, first = kinds.setdefault(name, (_kind(value), number))
                if value is not None and kind == "null":
                    kinds[name] = (_kind(value), number)
                elif value is not None and _kind(value) != kind:
                    return (
                        f"{file.name}, row {number}, field {name}: {_kind(value)}, and row {first} has {kind}; "
                        "keep one kind in a field"
                    )
    except ValueError as error:
        return str(error)
    return "" if number else f"{file.name}: no rows; one or more are needed"


def _kind(value: object) -> str:
    kinds = {str: "text", bool: "true or false", list: "a list", dict: "an object", type(None): "null"}
    return kinds.get(type(value), "a number")
