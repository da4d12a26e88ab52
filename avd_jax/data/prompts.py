"""Lists of prompts, file names for what is generated from them, and Wan's negative prompt."""
# ruff: noqa: RUF001 - the negative prompt is Chinese and has its own commas

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from avd_jax.errors import UserError

# `sample_neg_prompt` of Wan2.1's wan/configs/shared_config.py. It names what a video should not show: garish colours,
# overexposure, stillness, blur, subtitles, low quality, malformed hands and faces, people walking backwards.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

_SLUG_LENGTH = 60
_FIELDS = ("prompt", "caption")


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts, in the file's order with repetitions kept; each is stripped and blank ones are left out.

    Args:
      path: UTF-8 file; `.jsonl` (one object a line) and `.csv` (with a header) hold them in a field `prompt` or
        `caption`, every other file one prompt a line.

    Raises:
      UserError: when the file cannot be read as such, or holds no prompt.
    """
    path = Path(path)
    text = _read_text(path)
    readers = {".jsonl": _from_jsonl, ".csv": _from_csv}
    # Only a newline ends a prompt: `splitlines` would also cut at form feeds and Unicode separators within one.
    suffix = path.suffix.lower()
    lines = readers[suffix](path, text) if suffix in readers else text.split("\n")
    prompts = [stripped for line in lines if (stripped := line.strip())]
    if not prompts:
        raise UserError(f"{path}: no prompts in it; write one a line")
    return prompts


def file_stem(prompt: str, *numbers: int) -> str:
    """Return a file name without extension for what a prompt gives: readable, short, safe, and the same every time.

    Args:
      prompt: any text; also the empty one, one with slashes, or one longer than a file name may be.
      numbers: what else tells files of the same prompt apart, e.g. the seed.

    Returns:
      Up to 60 characters of the prompt, a hash of all of it and the numbers, joined by `-`. Only ASCII letters,
      digits, `_` and `-`, beginning with a letter or digit.
    """
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9]+", "_", ascii_text).strip("_")[:_SLUG_LENGTH].strip("_")
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return "-".join([*([slug] if slug else []), digest, *map(str, numbers)])


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a text file with one prompt a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a text file with one prompt a line"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8, one prompt a line") from error
    if "\0" in text:
        raise UserError(f"{path}: a binary file, not a list of prompts; name a text file with one prompt a line")
    return text


def _from_jsonl(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error.msg}); write one object a line") from error
        yield _field(path, number, record if isinstance(record, dict) else {})


def _from_csv(path: Path, text: str) -> Iterator[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            yield _field(path, rows.line_num, row)
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num + 1} is not CSV ({error}); quote the prompts") from error


def _field(path: Path, number: int, record: dict) -> str:
    for name in _FIELDS:
        if isinstance(record.get(name), str):
            return record[name]
    raise UserError(f"{path}: line {number} has no text field {' or '.join(map(repr, _FIELDS))}; add one of them")
