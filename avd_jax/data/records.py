"""What users list in files, captions or prompts: JSON, JSON lines, CSV or TSV as records, each with its line."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from avd_jax.errors import UserError
from avd_jax.paths import any_path

_JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
_TABLE_SUFFIXES = frozenset({".csv", ".tsv"})
_DELIMITERS = (",", "\t", ";")  # a semicolon is what spreadsheets write where the comma is a decimal point
# A line that is nothing but brackets and commas, or begins as an object or a list of texts does.
_JSON_LINE = re.compile(r"[\[\]{},\s]*[\[\]{}][\[\]{},\s]*$|[\[{]\s*[\[{\"']")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


class Record(NamedTuple):
    """One entry of a list.

    Attributes:
      where: file and line, for messages.
      value: what JSON has there; a row of a table is a dict of texts, None where its cell is missing.
    """

    where: str
    value: object


def read_text(path: str | os.PathLike) -> str:
    """Return the text of a UTF-8 file, a mark at its beginning left out.

    Raises:
      UserError: it cannot be read, is binary, or is not UTF-8.
    """
    path = any_path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a text file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path}: is a binary file; name a text file")
    return text


def read_records(path: str | os.PathLike, columns: Sequence[str]) -> list[Record] | None:
    """Return the records of a file, in its order; blank lines are none.

    The kind is told by the file's name, else by what is in it.

    Args:
      path: JSON (a list), JSON lines (one value a line), or CSV or TSV with a header.
      columns: names of which a table's header has one at least.

    Returns:
      The records; None for a file that is plain text.

    Raises:
      UserError: it cannot be read, or is of none of these kinds and not clearly plain text; names the line.
    """
    text, suffix = read_text(path), any_path(path).suffix.lower()
    delimiter = _delimiter(text, columns, least=1 if suffix in _TABLE_SUFFIXES else 2)
    if delimiter and suffix not in _JSON_SUFFIXES:
        return list(_rows(path, text, delimiter))
    if suffix in _JSON_SUFFIXES or _looks_like_json(text):
        return _json_values(path, text)
    return list(_rows(path, text, ",")) if suffix in _TABLE_SUFFIXES else None


def check_text(where: str, what: str, text: str) -> None:
    """Raise a UserError if a text cannot be written in UTF-8, as half an emoji cannot.

    Args:
      where: file and line.
      what: names the text.
      text: any.
    """
    if found := _LONE_SURROGATE.search(text):
        raise UserError(f"{where}: {what} is no UTF-8 (\\u{ord(found[0]):04x} is half a character); mend it")


def printable(text: str) -> str:
    """Return a text that any terminal and file takes: what UTF-8 cannot write becomes an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def lower_keys(record: dict) -> dict:
    """Return a record with its names in lower case and stripped, as headers of tables may not be."""
    return {str(key).strip().lower(): value for key, value in record.items()}


def _json_values(path: str | os.PathLike, text: str) -> list[Record]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return _json_lines(path, text)
    begin = _after_space(text, 0)
    line, counted = 1 + text.count("\n", 0, begin), begin
    if not isinstance(whole, list):
        return [Record(f"{path}:{line}", whole)]
    records, place = [], begin + 1
    for _ in whole:
        place = _after_space(text, place)
        line, counted = line + text.count("\n", counted, place), place
        value, end = _DECODER.raw_decode(text, place)
        records.append(Record(f"{path}:{line}", value))
        place = _after_space(text, end) + 1  # behind the comma
    return records


def _json_lines(path: str | os.PathLike, text: str) -> list[Record]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            records.append(Record(where, json.loads(line)))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: is not JSON ({error.msg}, column {error.colno}); write a list, or one object a line, or text"
            ) from error
        except RecursionError:
            raise UserError(f"{where}: is no list of texts; write a list, or one object a line, or text") from None
    return records


def _rows(path: str | os.PathLike, text: str, delimiter: str) -> Iterator[Record]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header, first = None, 1
    try:
        for row in rows:
            where, first = f"{path}:{first}", rows.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = row
                names = [name.strip().lower() for name in header if name.strip()]
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise UserError(f"{where}: has two columns {twice[0]!r}; leave one out")
                continue
            if len(row) > len(header):
                raise UserError(f"{where}: has {len(row)} cells, the header {len(header)}; quote texts with commas")
            yield Record(where, dict.fromkeys(header) | dict(zip(header, row, strict=False)))
    except csv.Error as error:
        raise UserError(f"{path}:{first}: is not CSV ({error}); put texts into double quotes") from error


def _delimiter(text: str, columns: Sequence[str], *, least: int) -> str | None:
    """Return what separates the names of a header that has one of `columns`; None if the first line is no header.

    Args:
      text: of the file.
      columns: see `read_records`.
      least: names that a header has; with 2 each is a word, as in prose few lines are.
    """
    first = next((line for line in text.split("\n") if line.strip()), "")
    for delimiter in _DELIMITERS:
        names = [name.strip().strip('"').lower() for name in first.split(delimiter)]
        words = least == 1 or all(re.fullmatch(r"\w+", name) for name in names)
        if len(names) >= least and words and set(names) & set(columns):
            return delimiter
    return None


def _looks_like_json(text: str) -> bool:
    """Whether a file is meant as JSON, damaged or not: prose may begin with a bracket, too."""
    lines = (line.strip() for line in text.split("\n"))
    return _is_enclosed(text.strip()) or any(_JSON_LINE.match(line) for line in lines)


def _is_enclosed(text: str) -> bool:
    """Whether the bracket with which a text begins closes at its end, or never."""
    if not text.startswith(("[", "{")):
        return False
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "[{") - (letter in "]}")
        if depth == 0:
            return place == len(text) - 1
    return True


def _after_space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()
