"""Divides a source of rows into parts, which processes read independently, row by row, including broken rows.

    parts_of("DATA", streaming=False)        local files by bytes or row groups, hub data sets by rows or files
    for row in read_part(part): ...          a ValueError in place of a broken row, so that all rows are counted

Parts keep the source's order, and so do the rows in a part: where a source is divided does not change the order.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from cola_ray.tasks import csv_table
from cola_ray.tasks.rows import (
    WHOLE_MB,
    Row,
    decoded,
    files_of,
    is_local,
    is_of_lines,
    open_rows,
    parsed,
    rows_in,
    shown,
)

PART_MB = 64
"""Megabytes of text in a part."""
_MOST = 8192  # parts of a source; a larger source has larger parts
_TABLE_ROWS = 20_000  # rows in a part of a table
_AT_ONCE = 200  # rows of Parquet read at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes, row groups or rows from ``first`` to ``end`` of one file; in a stream, file ``first`` of ``end``."""

    source: str  # as the setting names it
    kind: Literal["jsonl", "text", "csv", "list", "parquet", "table", "stream"]
    file: str  # empty: from the hub
    first: int
    end: int


def parts_of(source: str, streaming: bool = False, part_mb: int = PART_MB) -> list[Part]:
    """Divide a source into parts.

    Args:
        source: a file, a folder, a glob or a hub id.
        streaming: read data from the hub while it is downloaded; otherwise it is downloaded first.

    Raises:
        ValueError: there are no files, or a file cannot be opened.
    """
    if not is_local(source):
        if not streaming:
            return _ranges(source, "table", "", len(open_rows(source, "data.path")), _TABLE_ROWS)
        files = _stream(source).num_shards
        return [Part(source, "stream", "", number, files) for number in range(files)]
    paths = files_of(source)[1]
    size = max(part_mb << 20, sum(path.stat().st_size for path in paths) // _MOST)
    return [part for path in paths for part in _of_file(source, path, size)]


def _of_file(source: str, path: Path, size: int) -> list[Part]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            groups = pyarrow.parquet.ParquetFile(path).metadata
        except (pyarrow.ArrowException, OSError) as error:
            reason = (str(error).splitlines() or ["no message"])[0]
            raise ValueError(f"{path.name}: cannot be read as Parquet ({reason}); write it again") from None
        sizes = [groups.row_group(number).total_byte_size for number in range(groups.num_row_groups)]
        ends = [*itertools.accumulate(sizes, initial=0)]
        firsts = [n for n in range(len(sizes)) if n == 0 or ends[n] // size != ends[n - 1] // size]
        return [Part(source, "parquet", str(path), *pair) for pair in itertools.pairwise([*firsts, len(sizes)])]
    if path.suffix == ".csv":  # a cell may hold line ends
        return [Part(source, "csv", str(path), 0, 1)]
    if path.suffix == ".json" and not is_of_lines(path):
        if path.stat().st_size <= WHOLE_MB << 20:
            return [Part(source, "list", str(path), 0, 1)]
        return _ranges(source, "table", str(path), len(open_rows(str(path), "data.path")), _TABLE_ROWS)
    return _ranges(source, "text" if path.suffix == ".txt" else "jsonl", str(path), path.stat().st_size, size)


def _ranges(source: str, kind: Any, file: str, count: int, size: int) -> list[Part]:
    return [Part(source, kind, file, first, min(first + size, count)) for first in range(0, count, size)]


def read_part(part: Part, fields: Collection[str] = ()) -> Iterator[Row | ValueError]:
    """Yield each row, or a ValueError for a broken one.

    Args:
        fields: if a Parquet file has any of these fields, only they are read.
    """
    if part.kind in ("jsonl", "text"):
        return _of_lines(part)
    if part.kind == "csv":
        return _of_csv(part)
    return _of_parquet(part, fields) if part.kind == "parquet" else _of_table(part)


def _of_lines(part: Part) -> Iterator[Row | ValueError]:
    with open(part.file, "rb") as file:
        if part.first:  # a line belongs to the part in which it begins
            file.seek(part.first - 1)
            file.readline()
        place = file.tell()
        while place < part.end and (line := file.readline()):
            is_first, place = place == 0, place + len(line)
            if part.kind == "jsonl" and not line.strip():
                continue
            try:
                text = decoded(line, is_first)
                yield {"text": text} if part.kind == "text" else _object(text)
            except ValueError as error:
                yield error


def _object(text: str) -> Row:
    row = parsed(text)
    if not isinstance(row, dict):
        raise ValueError(f"{shown(row)}; an object with fields is expected")
    return row


def _of_csv(part: Part) -> Iterator[Row | ValueError]:
    file = Path(part.file)
    try:
        lines = csv_table.lines_of(file, WHOLE_MB << 20, checked=False)
        header = next(lines)
        for cells in lines:
            whole = len(cells) == len(header)
            yield dict(zip(header, cells, strict=True)) if whole else ValueError(csv_table.unequal(header, cells))
    except ValueError as error:  # rows after this cannot be separated
        raise ValueError(f"{file.name}: {error}") from None


def _of_parquet(part: Part, fields: Collection[str]) -> Iterator[Row | ValueError]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(part.file)
    columns = [name for name in table.schema_arrow.names if name in fields] or None
    for batch in table.iter_batches(_AT_ONCE, row_groups=range(part.first, part.end), columns=columns):
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:  # raised before the first row is created
            yield from (_row_of(batch.slice(index, 1)) for index in range(len(batch)))


def _row_of(batch: Any) -> Row | ValueError:
    try:
        row: Row = batch.to_pylist()[0]
        return row
    except UnicodeDecodeError as error:
        return ValueError(f"text that is not UTF-8 (byte 0x{error.object[error.start]:02x})")


def _of_table(part: Part) -> Iterator[Row]:
    if part.kind == "stream":
        yield from _stream(part.source).shard(num_shards=part.end, index=part.first)
        return
    if part.kind == "list":
        yield from rows_in(Path(part.file))
        return
    rows = open_rows(part.file or part.source, "data.path")
    yield from rows.select(range(part.first, part.end))


def _stream(source: str) -> Any:
    import datasets

    return datasets.load_dataset(source, split="train", streaming=True)
