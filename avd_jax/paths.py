"""Paths as a user writes them, in flags, config fields and lists of files: the one place that says what they may be."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from avd_jax.errors import UserError

# `hf://ORG/NAME[@REVISION]`, with one slash or two as above.
_HUB = re.compile(r"hf:/{1,2}([^/@\s]+/[^/@\s]+)(?:@(\S+))?/?$")

# Two letters at least: `C:/` is no scheme. One slash is enough, since `Path` makes `gs:/bucket` of `gs://bucket`.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def local_path(path: str | os.PathLike) -> Path:
    """Return the local path that is meant: `~` is the home folder, `file:///x` is `/x`.

    Args:
      path: as it was written; also one that has been through here, or through `Path`.

    Raises:
      UserError: another scheme, such as `gs://`, a `file://` of another machine, or the home of an unknown user.
    """
    text = os.fspath(path)
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() != "file":
        raise UserError(
            f"{text}: {scheme[1]}:// is not supported, only local paths are; copy it to a local disk, or mount it there"
        )
    if scheme:
        text = text[len("file:") :]
        if text.startswith("//"):
            host, _, rest = text[2:].partition("/")
            if host not in ("", "localhost"):
                raise UserError(f"{path}: is on another machine; a local path has three slashes, as file:///data")
            text = f"/{rest}"
        text = unquote(text)
    try:
        local = Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError:
        name = Path(text).parts[0]
        raise UserError(
            f"{text}: there is no home folder of {name}; for a folder of that name write ./{name}"
        ) from None
    # Of `./~x` and `./gs:/x` only `~x` and `gs:/x` are left, which would mean something else next time.
    return local.absolute() if str(local).startswith("~") or _SCHEME.match(str(local)) else local


def hub_name(path: str | os.PathLike) -> tuple[str, str | None] | None:
    """Return repository and revision, or None, of weights on the Hugging Face Hub; None for any other path.

    Raises:
      UserError: an `hf://` that names no repository.
    """
    text = os.fspath(path)
    if not text.lower().startswith("hf:/"):
        return None
    found = _HUB.match(text)
    if not found:
        raise UserError(f"{text}: names no repository of weights; write hf://ORG/NAME or hf://ORG/NAME@REVISION")
    return found[1], found[2]


def weights_path(path: str | os.PathLike) -> str:
    """Return a path of weights as a text: a local one by `local_path`, one on the Hub as it is."""
    return str(local_path(path)) if hub_name(path) is None else os.fspath(path)
