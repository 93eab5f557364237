"""One table from whatever a path names: a file, a folder of files of one kind, a hub id."""

from pathlib import Path
from typing import Any

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def open_rows(path: str, field: str) -> Any:
    """A ``datasets`` table.

    Args:
        field: the setting that ``path`` was given in, for the message.

    Raises:
        ValueError: nothing in it can be read.
    """
    import datasets

    source = Path(path)
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.suffix in _LOADERS)
        if not files:
            raise ValueError(f"{field} = {path!r}: no .jsonl, .json, .parquet or .txt file in this folder")
        kinds = {_LOADERS[file.suffix] for file in files} - {"text"} or {"text"}  # a README beside tables is no table
        if len(kinds) > 1:
            raise ValueError(f"{field} = {path!r}: has files of {' and '.join(sorted(kinds))}; keep one kind in it")
        (kind,) = kinds
        found = [str(file) for file in files if _LOADERS[file.suffix] == kind]
        return datasets.load_dataset(kind, data_files=found, split="train")
    if source.is_file():
        if source.suffix not in _LOADERS:
            raise ValueError(f"{field} = {path!r}: cannot read {source.suffix!r}; use .jsonl, .json, .parquet or .txt")
        return datasets.load_dataset(_LOADERS[source.suffix], data_files=str(source), split="train")
    return datasets.load_dataset(path, split="train")
