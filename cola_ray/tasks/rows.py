"""Reads rows of data sets (a file, a folder or glob of files of one kind, or a hub id), with errors that name the row.

    rows = open_rows("DATA", "data.path")                       a ``datasets`` table
    read_rows(rows, "DATA", "data.path", read)                  ``read`` applied to each row
    peek("DATA", "data.path", read)                             what is wrong in the files, before anything is loaded

``read`` takes a row and raises ValueError. Errors have the form ``data.path = 'DATA': train.jsonl, row 3, field answer:
null; text is expected``; rows and lines count from 1.

Cells of CSV files are text. Files of up to 16 MB are checked line by line first, since Arrow converts a number or an
object to text if other rows have text, rounds long integers, and crashes the process on lists that are nested too deep.
"""

import codecs
import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cola_ray.tasks import csv_table

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
ENDINGS = tuple(_LOADERS)
"""Endings of files with rows."""
LISTED = ".jsonl, .json, .parquet, .csv or .txt"
_PEEKED = 200  # rows
WHOLE_MB = 16  # files up to this size are checked entirely; a larger .json list is not parsed for its first rows
_READ = TypeVar("_READ")
Row = Mapping[str, Any]


def open_rows(path: str, field: str, **hub: str) -> Any:
    """Load a ``datasets`` table.

    Args:
        path: a file, a folder, a glob, or a hub id.
        field: the setting that ``path`` comes from, for messages.
        hub: ``name`` and ``split`` of a data set on the hub; by default the split is train.

    Raises:
        ValueError: the data cannot be read; the message names the file, and the line if possible.
    """
    import datasets

    if not is_local(path):
        return datasets.load_dataset(path, **{"split": "train", **hub})
    try:
        kind, files = files_of(path)
        for _ in _checked_rows(files):  # refuses lines nested so deep that the loader's C code would crash on them
            pass
    except ValueError as error:
        raise ValueError(f"{field} = {path!r}: {error}") from None
    try:
        as_text = _as_text(files[0]) if kind == "csv" else {}
        rows = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", **as_text)
    except Exception as error:  # from any of the libraries that the loader uses
        raise ValueError(f"{field} = {path!r}: {_why(files, error)}") from None
    if not len(rows):
        raise ValueError(f"{field} = {path!r}: no rows; one or more are needed")
    return rows


def read_rows(rows: Any, path: str, field: str, read: Callable[[Row], _READ]) -> list[_READ]:
    """Apply ``read`` to all rows, in the table's order.

    Where Arrow has changed a value of a local file, ``read`` gets what the file says: Arrow turns numbers and objects
    into text if other rows have text there, and rounds long integers.

    Raises:
        ValueError: names the first row that cannot be read, and says how many there are.
    """
    found, wrong = list[_READ](), list[tuple[int, str]]()
    try:
        own_rows = _rows_as_written(path)
        for index, row in enumerate(rows):
            own = next(own_rows, None)
            written = row if own is None else {name: own[name] for name in row if name in own}
            try:
                found.append(read(row if row == written else written))
            except ValueError as error:
                wrong.append((index, str(error)))
    except _NoRowError as error:
        raise ValueError(f"{field} = {path!r}: {error}") from None
    except UnicodeDecodeError as error:  # Arrow accepts any bytes as text until they are used
        raise ValueError(f"{field} = {path!r}: {_why(files_of(path)[1], error)}") from None
    if wrong:
        more = f" ({len(wrong)} of {len(rows)} rows are wrong)" if len(wrong) > 1 else ""
        raise ValueError(f"{field} = {path!r}: {_found(path, *wrong[0])}{more}")
    return found


def peek(path: str, field: str, read: Callable[[Row], object]) -> list[str]:
    """Return at most one line, about what is wrong in the files' rows. Imports neither datasets nor pandas.

    Checks all rows of the first files, as many as fit into :data:`WHOLE_MB` together, and the first rows of the others.
    """
    alone = Path(path).is_file()
    try:
        for file, number, row in _checked_rows(files_of(path)[1]):
            try:
                read(row)
            except ValueError as error:
                raise ValueError(placed(file, number, str(error), named=not alone)) from None
    except ValueError as error:
        return [f"{field} = {path!r}: {error}"]
    except OSError as error:
        return [f"{field} = {path!r}: cannot be read ({error.strerror or error}); check its permissions"]
    return []


class _NoRowError(Exception):
    """A line of a file is not a row; the message names it."""


def _rows_as_written(path: str) -> Iterator[Row]:
    """Yield the rows of local files as they are written; nothing if they are too large, or text files."""
    files = files_of(path)[1] if is_local(path) else []
    if sum(file.stat().st_size for file in files) > WHOLE_MB << 20:
        return
    try:
        for file in files:
            if file.suffix != ".txt":
                yield from rows_in(file)
    except ValueError as error:
        raise _NoRowError(str(error)) from None


def _checked_rows(files: Sequence[Path]) -> Iterator[tuple[Path, int, Row]]:
    """Yield rows with their file and number; ValueError for anything that is not a row, or if there are no rows."""
    left, found = WHOLE_MB << 20, False
    for file in files:
        left -= file.stat().st_size
        for number, row in enumerate(itertools.islice(rows_in(file), None if left >= 0 else _PEEKED), 1):
            found = True
            yield file, number, row
    if not found and left >= 0:
        raise ValueError(f"{files[0].name} has no rows; one or more are needed")


def cell(row: Row, name: str, read: Callable[[Any], _READ]) -> _READ:
    """Read one field of a row; the ValueError names the field, its value, and what is expected."""
    if name not in row:
        raise ValueError(f"field {name}: missing; the row has {', '.join(row) or 'nothing'}")
    try:
        return read(row[name])
    except ValueError as error:
        raise ValueError(f"field {name}: {error}") from None


def plain_text(value: object) -> str:
    """Read text, or a number as text."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) != float("inf"):
        return str(int(value)) if value == int(value) else str(value)
    raise ValueError(f"{shown(value)}; text is expected")


def shown(value: object) -> str:
    """Return a value as JSON, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- files --------------------------------------------------------------------------------------------------------


def is_local(path: str) -> bool:
    """Whether a source is a file, a folder or a glob here, rather than a hub id."""
    return Path(path).exists() or glob.has_magic(path)


def files_of(path: str) -> tuple[str, list[Path]]:
    """Return the loader and all files of its kind, sorted; ValueError if there are none, or several kinds."""
    source = Path(path)
    if source.is_file():
        if source.suffix not in _LOADERS:
            raise ValueError(f"cannot read {source.suffix!r}; use {LISTED}")
        return _LOADERS[source.suffix], [source]
    found = source.iterdir() if source.is_dir() else map(Path, glob.glob(path, recursive=True))
    files = sorted(file for file in found if file.suffix in _LOADERS)
    if not files:
        where = "in this folder; put one in it" if source.is_dir() else "matches; change the pattern"
        raise ValueError(f"no {LISTED} file {where}")
    for file in files:
        if not file.is_file():
            what = "a folder" if file.is_dir() else "a broken link" if file.is_symlink() else "not a regular file"
            raise ValueError(f"{file.name} is {what}; remove it, or name another folder")
    kinds = {_LOADERS[file.suffix] for file in files} - {"text"} or {"text"}  # a README beside tables is not data
    if len(kinds) > 1:
        raise ValueError(f"has files of {' and '.join(sorted(kinds))}; keep one kind in it")
    (kind,) = kinds
    return kind, [file for file in files if _LOADERS[file.suffix] == kind]


def _found(path: str, index: int, why: str) -> str:
    """Return ``why`` after the place of row ``index`` of a table: the file, if there are several, and the row in it."""
    if not is_local(path) or Path(path).is_file():
        return placed(Path(path), index + 1, why, named=False)
    for file in files_of(path)[1]:
        count = _count(file)
        if index < count:
            break
        index -= count
    return placed(file, index + 1, why, named=True)


def placed(file: Path, number: int, why: str, named: bool) -> str:
    """Return e.g. ``train.jsonl, row 3, field answer: null``, with the line's number if it differs from the row's."""
    line = _line_of(file, number) if file.suffix == ".jsonl" else number
    place = f"row {number} (line {line})" if line != number else f"row {number}"
    return f"{f'{file.name}, ' if named else ''}{place}{', ' if why.startswith('field ') else ': '}{why}"


def _line_of(file: Path, row: int) -> int:
    """Return the line of a row; empty lines are not rows."""
    if not file.is_file():
        return row
    with file.open("rb") as lines:
        filled = (number for number, line in enumerate(lines, 1) if line.strip())
        return next(itertools.islice(filled, row - 1, None), row)


def _count(file: Path) -> int:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
    if file.suffix in (".json", ".csv"):
        return sum(1 for _ in rows_in(file))
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip() or file.suffix == ".txt")


def rows_in(file: Path) -> Iterator[Row]:
    """Yield the rows of a file; the ValueError for anything that is not a row begins with the file's name."""
    if file.suffix == ".parquet":
        yield from _of_parquet(file)
    elif file.suffix == ".csv":
        yield from _of_csv(file)
    elif file.suffix == ".txt":
        yield from ({"text": line} for _, line in _lines(file))
    elif file.suffix == ".json" and not is_of_lines(file):
        if file.stat().st_size > WHOLE_MB << 20:
            return
        rows = _parsed(file, "", "\n".join(line for _, line in _lines(file, marked=True)))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{file.name}: not a list of objects; use one, or .jsonl with one object per line")
        yield from rows
    else:
        for number, line in _lines(file):
            if not line.strip():
                continue
            row = _parsed(file, f", line {number}", line)
            if not isinstance(row, dict):
                raise ValueError(f"{file.name}, line {number}: {shown(row)}; an object with fields is expected")
            yield row


def _of_csv(file: Path) -> Iterator[Row]:
    try:
        lines = csv_table.lines_of(file, WHOLE_MB << 20)
        header = next(lines)
        yield from (dict(zip(header, cells, strict=True)) for cells in lines)
    except ValueError as error:
        comma = str(error).startswith(("row ", "line ", "field "))
        raise ValueError(f"{file.name}{', ' if comma else ': '}{error}") from None


def _as_text(file: Path) -> dict[str, Any]:
    """Options with which the loader of CSV files leaves cells as they are."""
    import datasets

    header = next(csv_table.lines_of(file))
    return {
        "features": datasets.Features({name: datasets.Value("string") for name in header}),
        "keep_default_na": False,
    }


def _of_parquet(file: Path) -> Iterable[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{file.name}, field {twice}: there are two columns of this name; rename one")
        for batch in table.iter_batches(_PEEKED):
            for row in range(len(batch)):
                yield batch.slice(row, 1).to_pylist()[0]
                number += 1
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise ValueError(f"{file.name}, row {number + 1}: text that is not UTF-8 ({byte}); write it again") from None
    except (pyarrow.ArrowException, OSError) as error:
        message = (str(error).splitlines() or ["no message"])[0]
        raise ValueError(f"{file.name}: cannot be read as Parquet ({message}); write it again") from None


def is_of_lines(file: Path) -> bool:
    """Whether a .json file holds one object per line rather than one list."""
    with file.open("rb") as opened:
        start = opened.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return start.startswith(b"{")


def _lines(file: Path, marked: bool = False) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers from 1; a UTF-8 byte order mark is removed if ``marked``, otherwise refused."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and marked:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, decoded(line, number == 1)
            except ValueError as error:
                raise ValueError(f"{file.name}, line {number}: {error}") from None


def decoded(line: bytes, is_first: bool) -> str:
    """Return a line of a file as text, without its end; ValueError if it is not UTF-8, or has a byte order mark."""
    if is_first and line.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("begins with a byte order mark; save it as UTF-8 without one")
    try:
        return line.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
        raise ValueError(f"not UTF-8 ({byte}); save it as UTF-8") from None


def _parsed(file: Path, where: str, text: str) -> Any:
    """Parse JSON, and refuse what Arrow would misread or crash on, naming its place."""
    try:
        return parsed(text)
    except ValueError as error:
        cause = error.__cause__
        at = where or (f", line {cause.lineno}" if isinstance(cause, json.JSONDecodeError) else "")
        raise ValueError(f"{file.name}{at}: {error}") from None


def parsed(text: str) -> Any:
    """Parse JSON, and refuse what Arrow would misread or crash on."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole, parse_float=_decimal)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno}); fix or remove it") from error
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair (\\ud...); write the character itself") from None
    except RecursionError:
        raise ValueError("nested too deep; fields are text, numbers or messages") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)} appears twice; keep one")
    return row


def _whole(digits: str) -> int | float:
    if len(digits) > 19 or not -(1 << 63) <= int(digits) < 1 << 63:
        raise ValueError(f"the number {digits[:20]}... has more than 64 bits; put it in quotes")
    return int(digits)


def _decimal(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), -float("inf")):
        raise ValueError(f"the number {digits[:20]} is too large; put it in quotes")
    return value


def _why(files: list[Path], error: Exception) -> str:
    """Return what is wrong with the files, found by reading them row by row; else the loader's own message."""
    kinds: dict[str, tuple[str, str]] = {}
    names = set[str]()  # column names of the first file
    try:
        for file in files:
            own = set[str]()
            for number, row in enumerate(rows_in(file), 1):
                own |= row.keys()
                for name, value in row.items():
                    here = f"{file.name}, row {number}"
                    kind, first = kinds.setdefault(name, (_kind(value), here))
                    if value is not None and kind == "null":
                        kinds[name] = (_kind(value), here)
                    elif value is not None and _kind(value) != kind:
                        why = f"field {name}: {_kind(value)}, and {first} has {kind}; keep one kind in a field"
                        return placed(file, number, why, named=True)
            names = names or own
            if own and own != names:
                odd = sorted(own ^ names)[0]
                where, other = (file, files[0]) if odd in own else (files[0], file)
                return f"{where.name} has a field {odd}, and {other.name} has none; keep the same fields in all files"
    except ValueError as fault:
        return str(fault)
    message = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
    return f"cannot be read ({message}); write it again"


def _kind(value: object) -> str:
    kinds = {str: "text", bool: "true or false", list: "a list", dict: "an object", type(None): "null"}
    return kinds.get(type(value), "a number")
