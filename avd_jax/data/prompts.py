"""Lists of prompts, file names for what is generated from them, and Wan's negative prompt."""
# ruff: noqa: RUF001 - the negative prompt is Chinese and has its own commas

import hashlib
import os
import re
import unicodedata

from avd_jax.data.records import Record, check_text, lower_keys, read_records, read_text
from avd_jax.errors import UserError

# `sample_neg_prompt` of Wan2.1's wan/configs/shared_config.py. It names what a video should not show: garish colours,
# overexposure, stillness, blur, subtitles, low quality, malformed hands and faces, people walking backwards.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

_SLUG_LENGTH = 60
_FIELDS = ("prompt", "caption", "text", "prompt_en")


def read_prompts(path: str | os.PathLike) -> list[str]:
    """Read prompts, in the file's order with repetitions kept; each is stripped and blank ones are left out.

    Args:
      path: UTF-8 file: plain text with one prompt a line, or a list (see `read_records`): JSON, JSON lines, CSV or TSV.
        An entry of a list is a text, or an object or a row whose field `prompt`, `caption`, `text` or `prompt_en`
        (VBench's) is one; the first of them counts.

    Raises:
      UserError: the file cannot be read as such, holds no prompt, or one that has half a character in it.
    """
    return [record.value for record in read_prompt_records(path)]


def read_prompt_records(path: str | os.PathLike) -> list[Record]:
    """Read prompts as `read_prompts` does, each with its file and line (UserError as there)."""
    records = read_records(path, _FIELDS)
    if records is None:
        # Only a newline ends a prompt: `splitlines` would also cut at form feeds and Unicode separators within one.
        records = [Record(f"{path}:{line}", text) for line, text in enumerate(read_text(path).split("\n"), 1)]
    else:
        records = [Record(record.where, _prompt(record)) for record in records]
    prompts = [Record(record.where, stripped) for record in records if (stripped := record.value.strip())]
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


def _prompt(record: Record) -> str:
    if isinstance(record.value, dict):
        fields = lower_keys(record.value)
        prompt = next((fields[name] for name in _FIELDS if isinstance(fields.get(name), str)), None)
    else:
        prompt = record.value
    if not isinstance(prompt, str):
        names = f"{', '.join(map(repr, _FIELDS[:-1]))} or {_FIELDS[-1]!r}"
        raise UserError(f"{record.where}: is no prompt; write a text, or give it a text field {names}")
    check_text(record.where, "the prompt", prompt)
    return prompt
