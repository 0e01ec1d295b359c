"""Rows from files, folders and the hub, each with its origin."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from mopcompress.errors import DataError, InputNotFoundError, UnavailableError

SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """The columns of one row, and its origin for messages: `train.jsonl: line 3`."""

    where: str
    fields: Mapping[str, object]


def read_splits(data: str) -> dict[str, list[Row]]:
    """Read rows by split: those of `train`, `validation` and `test` that exist, or a single split of any name.

    Raises `DataError`, `InputNotFoundError` or `UnavailableError`.
    """
    path = local_path(data)
    if path is None:
        return _name_splits(short_name(data), hub_splits(data))
    if path.is_dir():
        return {split: read_rows(file) for split, file in _split_files(path).items()}
    return {"all": read_rows(path)}


def local_path(source: str) -> Path | None:
    """Return the file or folder that `source` names, or None when it can only be a hub id.

    Raises `InputNotFoundError` when the name can only be a path and nothing exists there.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = source.partition(":")[0]  # a configuration or file patterns of a hub data set follow the colon
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in (*TABLE_SUFFIXES, ".txt")
    if not is_path:
        return None
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    nearest = get_close_matches(path.name, names, n=1)
    hint = f"did you mean '{folder / nearest[0]}'?" if nearest else "check the path"
    raise InputNotFoundError(f"{source}: no such file or folder; {hint}")


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a .jsonl, .json, .csv or .parquet file, at least one. Raises `DataError` naming the line."""
    readers = {".jsonl": _read_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: cannot read '{path.suffix}' files as rows; use one of {', '.join(TABLE_SUFFIXES)}")
    rows = readers[path.suffix](path)
    if not rows:
        raise DataError(f"{path}: the file holds no rows; give one with at least one row")
    return rows


def read_utf8(path: Path) -> str:
    """Read a whole text without its byte-order mark, line ends unchanged. Raises `DataError` naming the line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputNotFoundError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from error


def short_name(source: str) -> str:
    """Return a hub id for messages and reports: with its configuration, without its file patterns."""
    name, _, part = source.partition(":")
    return name if "/" in part else source


def hub_splits(source: str) -> dict[str, Iterable[Mapping[str, object]]]:
    """Load all splits of a hub data set, under the hub's names.

    `id:configuration` chooses a configuration, `id:pattern,pattern` the files that match, as one split. Raises
    `UnavailableError` when the hub does not give it.
    """
    import datasets  # takes a second to import

    name, _, part = source.partition(":")
    patterns = [pattern.strip() for pattern in part.split(",")] if "/" in part else None
    try:
        if patterns:
            return dict(datasets.load_dataset(name, data_files=patterns))
        return dict(datasets.load_dataset(name, part or None))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnavailableError(
            f"{source}: no such file or folder here, and the hub does not give it as a data set ({reason}); "
            "check the name and the network, or download it and give its path"
        ) from error


def _name_splits(source: str, splits: Mapping[str, Iterable[Mapping[str, object]]]) -> dict[str, list[Row]]:
    """Return hub splits under our names, with the origin of each row."""
    hub_names = {SPLIT_NAMES[split]: split for split in splits if split in SPLIT_NAMES}
    if len(splits) == 1:
        hub_names = {split: split for split in splits}
    elif "train" not in hub_names:
        raise DataError(
            f"{source}: no split is called train; the splits are {', '.join(splits) or 'none'}; "
            "download the one you want and give its path"
        )
    rows = {
        split: [Row(f"{source}: {hub_name} row {number}", row) for number, row in enumerate(splits[hub_name], start=1)]
        for split, hub_name in hub_names.items()
    }
    for split, split_rows in rows.items():
        if not split_rows:
            raise DataError(
                f"{source}: split {hub_names[split]} holds no rows; give data with at least one row per split"
            )
    return rows


def _split_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = SPLIT_NAMES.get(path.stem)
        if split is None or path.suffix not in TABLE_SUFFIXES:
            continue
        if split in files:
            raise DataError(f"{folder}: {files[split].name} and {path.name} are both the {split} split; keep one")
        files[split] = path
    if not files or (len(files) > 1 and "train" not in files):
        names = ", ".join(path.name for path in files.values()) or "none of them"
        raise DataError(
            f"{folder}: needs files called train, validation and test ({' '.join(TABLE_SUFFIXES)}), found {names}; "
            "add or rename them, or name one file"
        )
    return files


def _row_from(where: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, not an object with columns; correct or remove it")
    return Row(where, value)


def _read_lines(path: Path) -> list[Row]:
    rows = []
    # not splitlines(): U+2028 and similar characters may be unescaped inside a JSON string
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({error}); correct or remove it") from error
        rows.append(_row_from(where, value))
    return rows


def _read_json(path: Path) -> list[Row]:
    """Read a list of objects. Many files called .json hold one object per line instead, and are read that way."""
    text = read_utf8(path)
    if not text.lstrip().startswith("["):
        return _read_lines(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); correct it") from error
    return [_row_from(f"{path}: row {number}", value) for number, value in enumerate(values, start=1)]


def _read_csv(path: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        repeated = sorted({column for column in header if header.count(column) > 1})
        if repeated:
            raise DataError(f"{path}: line 1 names the column '{repeated[0]}' twice; rename one")
        last_line = reader.line_num  # a quoted cell can span lines
        for cells in reader:
            where, last_line = f"{path}: line {last_line + 1}", reader.line_num
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{where} has {len(cells)} cells, the header has {len(header)}; quote commas, or correct it"
                )
            if cells:
                rows.append(Row(where, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is not CSV ({error}); correct it") from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]  # takes half a second to import
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a whole Parquet file ({reason}); write it again") from error
    return [Row(f"{path}: row {number}", value) for number, value in enumerate(values, start=1)]
