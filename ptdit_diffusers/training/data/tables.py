"""Tables of captions: metadata.jsonl and metadata.csv. A row is read right, or refused with file and line."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptdit_diffusers.core.documents import parse_json

TABLES = ("metadata.jsonl", "metadata.csv")
OTHER_TABLES = ("metadata.parquet", "metadata.json", "metadata.tsv", "metadata.xlsx")
FILE_KEYS = ("file_name", "filename", "file", "file_path", "image", "image_path", "video", "path")
CAPTION_KEYS = ("text", "caption", "prompt", "description")
SEPARATORS = (",", ";", "\t")


@dataclass(frozen=True)
class Facts:
    """What stands beside a picture: captions with their weights, its quality (None = not given), its licence, and the
    name that it shares with others of its group ("" = none).
    """

    captions: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    quality: float | None = None
    licence: str = ""
    group: str = ""

    @property
    def caption(self) -> str:
        """The first caption; "" = there is none."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True)
class Row:
    """A row: the name of its file as it stands there, what it says of it, and the line of the table."""

    name: str
    facts: Facts
    line: int


def read_facts(
    values: Mapping[str, Any],
    captions: tuple[str, ...] = CAPTION_KEYS,
    licence_column: str = "",
    group_column: str = "",
) -> Facts:
    """Return what values by name say of a picture.

    Args:
        values: The names are in small letters.
        captions: Names of the caption or list of captions; the first that is not empty counts.
        licence_column: Name of the licence; "" = it is not read.
        group_column: Name of the group; "" = it is not read.

    Raises:
        ValueError: A value is not what it should be; the message continues a sentence.
    """
    given = next((values[key] for key in captions if values.get(key) not in (None, "", [])), [])
    listed = given if isinstance(given, list) else [given]
    if not all(isinstance(each, str | int | float) and not isinstance(each, bool) for each in listed):
        raise ValueError(f"a caption that is no text ({json.dumps(given)[:60]})")
    texts = [text for each in listed if (text := str(each).strip())]
    weights, quality = values.get("weights") or [1.0] * len(texts), values.get("quality")
    try:
        weights = tuple(float(weight) for weight in weights)
        quality = None if quality in (None, "") else float(quality)
    except (TypeError, ValueError):
        raise ValueError("weights or a quality that are no numbers") from None
    if len(weights) != len(texts) or any(weight < 0 for weight in weights):
        raise ValueError(f"{len(weights)} weights for {len(texts)} captions, or negative ones")
    named = (values.get(column.strip().lower()) if column else None for column in (licence_column, group_column))
    licence, group = ("" if value is None else str(value).strip() for value in named)
    return Facts(tuple(texts), weights, quality, licence, group)


def read_table(table: Path, caption_column: str = "", licence_column: str = "", group_column: str = "") -> list[Row]:
    """Return the rows of a table.

    Args:
        table: A .jsonl file, one object per line, or a .csv file with a line of names above. In a .jsonl file the
            caption may be a list of captions, with `weights` beside it. `quality` is a number.
        caption_column: Name of the column of captions; "" takes the first of CAPTION_KEYS that a row has.
        licence_column: Name of the column of licences; "" = they are not read.
        group_column: Name of the column of groups; "" = they are not read.

    Raises:
        ValueError: It cannot be read, or a row is not what it should be; names file and line.
        OSError: It cannot be opened.
    """
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ValueError(f"{table}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8.") from error
    captions = (caption_column.strip().lower(),) if caption_column else CAPTION_KEYS
    rows = _csv_rows(table, text, captions) if table.suffix.lower() == ".csv" else _json_rows(table, text)
    return [_row(table, line, values, captions, licence_column, group_column) for line, values in rows]


def find_table(names: set[str], folder: Path) -> Path | None:
    """Return the table among the files of a folder.

    Raises:
        ValueError: There are two, or one of a kind that is not read.
    """
    found = [name for name in TABLES if name in names]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(found)}; keep one of them.")
    other = [name for name in OTHER_TABLES if name in names]
    if other and not found:
        raise ValueError(f"{folder / other[0]} is not read; save it as metadata.jsonl or metadata.csv.")
    return folder / found[0] if found else None


def _json_rows(table: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # only these end a line: text may hold U+2028 and others
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{table}, line {number}: this is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{table}, line {number}: it is a {type(values).__name__}, not an object with names.")
        yield number, {str(key).strip().lower(): value for key, value in values.items()}


def _csv_rows(table: Path, text: str, captions: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    head = text.lstrip("\r\n").split("\n", 1)[0]
    separator = next((each for each in SEPARATORS if _has_both(head, each, captions)), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    names: list[str] = []
    begun = 1
    try:
        for values in reader:
            line, begun = begun, reader.line_num + 1  # a row with line breaks in quotes has several
            if not any(value.strip() for value in values):
                continue
            if not names:
                names = [value.strip().lower() for value in values]
                _check_names(table, line, names, captions)
            elif len(values) != len(names):
                raise ValueError(
                    f"{table}, line {line}: {len(values)} fields, the first line has {len(names)} "
                    f"({', '.join(names)}); put a caption with {separator!r} into double quotes."
                )
            else:
                yield line, dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{table}, line {reader.line_num}: this is not CSV: {error}.") from error


def _has_both(head: str, separator: str, captions: tuple[str, ...]) -> bool:
    names = {name.strip().strip('"').lower() for name in head.split(separator)}
    return bool(names & set(FILE_KEYS)) and bool(names & set(captions))


def _check_names(table: Path, line: int, names: list[str], captions: tuple[str, ...]) -> None:
    for what, known in (("file names", FILE_KEYS), ("captions", captions)):
        if not set(names) & set(known):
            option = "; --caption-column names another" if what == "captions" else ""
            raise ValueError(
                f"{table}, line {line}: no column of {what} among {', '.join(map(repr, names))}; it is called "
                f"{' or '.join(known)}{option}."
            )
    twice = next((name for name in names if names.count(name) > 1 and name in (*FILE_KEYS, *captions)), None)
    if twice:
        raise ValueError(f"{table}, line {line}: two columns are called {twice!r}.")


def _row(table: Path, line: int, values: dict[str, Any], captions: tuple[str, ...], *columns: str) -> Row:
    name = next((values[key] for key in FILE_KEYS if values.get(key)), None)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"{table}, line {line}: no file name; give one of {', '.join(FILE_KEYS)}.")
    given = [key for key in captions if key in values]
    if not given and set(values) - set(FILE_KEYS):
        raise ValueError(
            f"{table}, line {line}: no caption among {', '.join(map(repr, values))}; it is called "
            f"{' or '.join(captions)}; --caption-column names another."
        )
    try:
        return Row(name.strip(), read_facts(values, captions, *columns), line)
    except ValueError as error:
        raise ValueError(f"{table}, line {line}: the row has {error}.") from error
