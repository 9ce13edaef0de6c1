"""Paths and hub ids to rows; every row knows where it came from, so that a bad one can be named."""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nrt_fast.types import UserError

UTF8_BOM = b"\xef\xbb\xbf"
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
BATCH_ROWS = 1000


class Row(NamedTuple):
    """One row of a data set: its fields, and "file, row N" for messages."""

    fields: dict[str, Any]
    where: str


def read_rows(name: str, split: str = "train") -> Iterator[Row]:
    """Open a data set and return its rows one by one.

    Rows are numbered from 1: by the line they start on in JSONL and CSV (its header is line 1), by position elsewhere.

    Args:
        name: a path ending in .jsonl, .json, .csv or .parquet, each also with .gz; a folder of data files or one saved
            by datasets; or a hub id, "owner/name" or "owner/name:config".
        split: split of a folder or of a hub data set.

    Raises:
        UserError: at once if there is no such data set; while reading if a row cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _read_datasets(name, lambda: _load_folder(path, split))
    if path.is_file():
        return _read_file(path, name)
    hub_id = HUB_ID.fullmatch(name)
    if hub_id and not _suffix(path):
        return _read_datasets(name, lambda: _load_hub(hub_id["id"], hub_id["config"], split))
    raise UserError(_describe_missing(path, name))


def has_splits(name: str) -> bool:
    """Whether a data set has splits to choose from; a file has none, nor has one data set saved by datasets."""
    path = Path(name).expanduser()
    return not path.is_file() and not (path / "state.json").exists()


def one_line(error: Exception) -> str:
    """A library's message as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _suffix(path: Path) -> str:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in READERS else ""


def _describe_missing(path: Path, name: str) -> str:
    if not path.parent.is_dir():
        return f"{name}: no such file; its folder {path.parent} does not exist either"
    close = get_close_matches(path.name, (child.name for child in path.parent.iterdir()), n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{name}: no such file in {path.parent.resolve()}{hint}"


def _read_file(path: Path, name: str) -> Iterator[Row]:
    suffix = _suffix(path)
    if not suffix:
        raise UserError(f"{name}: unknown kind of file; one of {' '.join(READERS)}, also .gz, is expected")
    return _read_open(path, name, READERS[suffix])


def _read_open(path: Path, name: str, reader: Callable[[BinaryIO, str], Iterator[Row]]) -> Iterator[Row]:
    with _readable(name), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        yield from reader(file, name)


@contextmanager
def _readable(name: str):
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error})") from error


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON object with named fields is expected, not {_kind(value)}")
    return Row(value, where)


def _kind(value: Any) -> str:
    names = {str: "a string", list: "a list", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: invalid UTF-8 (byte 0x{line[error.start]:02x} at offset {error.start})") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON ({error})") from error


def _decoded_lines(file: BinaryIO, name: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        yield _decode(line.removeprefix(UTF8_BOM) if number == 1 else line, f"{name}, row {number}")


def _read_jsonl(file: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(_decoded_lines(file, name), 1):
        if not line.isspace():
            where = f"{name}, row {number}"
            yield _row(_parse_json(line, where), where)


def _read_json(file: BinaryIO, name: str) -> Iterator[Row]:
    value = _parse_json("".join(_decoded_lines(file, name)), name)
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f'{name}: a list of objects, or {{"data": [...]}}, is expected')
    for number, row in enumerate(rows, 1):
        yield _row(row, f"{name}, row {number}")


def _read_csv(file: BinaryIO, name: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # of the process, and 128 KiB at first; strict finds a quote that is left open
    reader = csv.reader(_decoded_lines(file, name), strict=True)
    start = 1
    try:
        header = _checked_header(next(reader, []), name)
        for start, cells in _with_start_lines(reader):
            yield Row(_named_cells(header, cells, f"{name}, row {start}"), f"{name}, row {start}")
    except csv.Error as error:
        raise UserError(f"{name}, after row {start}: invalid CSV ({error})") from error


def _checked_header(header: list[str], name: str) -> list[str]:
    for column in filter(None, header):
        if header.count(column) > 1:
            raise UserError(f"{name}: {header.count(column)} columns are named {column!r}; each needs its own name")
    return header


def _with_start_lines(reader) -> Iterator[tuple[int, list[str]]]:
    start = reader.line_num + 1
    for cells in reader:
        if cells:
            yield start, cells
        start = reader.line_num + 1


def _named_cells(header: list[str], cells: list[str], where: str) -> dict[str, str]:
    if len(cells) != len(header):
        raise UserError(f"{where}: {len(cells)} cells, but the header names {len(header)} ({', '.join(header)})")
    return dict(zip(header, cells, strict=True))


def _read_parquet(file: BinaryIO, name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    if isinstance(file, gzip.GzipFile):
        file = io.BytesIO(file.read())  # Parquet is read from its end, where gzip cannot seek.
    try:
        batches = parquet.ParquetFile(file).iter_batches(BATCH_ROWS)
        yield from _number_rows((batch.to_pylist() for batch in batches), name)
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: invalid Parquet ({one_line(error)})") from error


def _number_rows(batches: Iterator[list[dict]], name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for fields in batch:
            number += 1
            yield Row(fields, f"{name}, row {number}")


def _read_datasets(name: str, load: Callable) -> Iterator[Row]:
    from datasets.exceptions import DatasetsError
    from datasets.table import CastError

    try:
        dataset = load()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{name}: neither a file here nor a data set that datasets can load ({one_line(error)})"
        ) from error
    except DatasetsError as error:
        cause = error.__cause__ or error
        reason = f"its columns differ: {cause.details()}" if isinstance(cause, CastError) else one_line(cause)
        raise UserError(f"{name}: datasets cannot read it ({reason})") from error
    return _number_rows((table.to_pylist() for table in dataset.with_format("arrow").iter(BATCH_ROWS)), name)


def _load_folder(path: Path, split: str):
    import datasets

    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))[split]
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path), split=split)


def _load_hub(hub_id: str, config: str | None, split: str):
    import datasets

    return datasets.load_dataset(hub_id, config, split=split)


READERS: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
