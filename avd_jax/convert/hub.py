"""Weights on the Hugging Face Hub, `hf://ORG/NAME[@REVISION]`: downloaded once into its cache, and published there.

Only the files of the network that is asked for are fetched, by the names under which `layouts.py` looks for them.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from avd_jax.errors import UserError
from avd_jax.paths import any_path, hub_name, is_bucket, local_path

# Sizes, indices and settings; small, and what says which layout it is.
_ALWAYS = ("*.json",)
_FILES = {
    "transformer": ("transformer/*", "diffusion_pytorch_model*", "model.pt"),
    "vae": ("vae/*", "Wan2.1_VAE.*"),
    "text_encoder": ("text_encoder/*", "models_t5_umt5-xxl-enc-bf16.*"),
    "tokenizer": ("tokenizer/*", "google/umt5-xxl/*"),
    "interpolator": ("interpolator/*", "model.pt"),
}
_NEVER = ("*.msgpack", "*.h5", "*.onnx", "assets/*", "examples/*")  # what no reader takes


def fetched(path: str | os.PathLike, component: str | None = None) -> Path:
    """Return the local path of weights; those on the Hub are downloaded first, if they are not in its cache.

    Args:
      path: local, or `hf://ORG/NAME[@REVISION]`.
      component: whose files are wanted, such as "vae"; None: only the settings.

    Raises:
      UserError: as `any_path`, or the Hub does not give the files: says why and what to do.
    """
    named = hub_name(path)
    return any_path(path) if named is None else _snapshot(*named, component)


_commits: dict[str, str] = {}  # repository -> the commit that this process took first, if none was named


@functools.cache  # so that a run sees one commit, even if the branch moves
def _snapshot(repo: str, revision: str | None, component: str | None) -> Path:
    with _reporting(repo, revision) as hub:
        folder = hub.snapshot_download(
            repo,
            revision=revision or _commits.get(repo),
            allow_patterns=[*_ALWAYS, *_FILES.get(component, ())],
            ignore_patterns=list(_NEVER),
        )
    if revision is None:
        _commits.setdefault(repo, Path(folder).name)
    return Path(folder)


def check_push(folder: str | os.PathLike, target: str) -> None:
    """Raise a UserError if `push` would refuse its arguments, before anything is written to the folder."""
    if hub_name(target) is None:
        raise UserError(f"--push={target}: write hf://ORG/NAME or hf://ORG/NAME@BRANCH")
    if is_bucket(folder):
        raise UserError(f"--push publishes from a disk, and {folder} is in a bucket; give a local --dst")


def push(folder: str | os.PathLike, target: str) -> str:
    """Publish a folder, its model card (README.md) among the files, and return the page's address.

    Args:
      folder: from `export_dit`.
      target: `hf://ORG/NAME`, which is made if it is not there, or a branch of it, `hf://ORG/NAME@BRANCH`.

    Raises:
      UserError: it is not taken: says why and what to do.
    """
    repo, revision = hub_name(target)
    with _reporting(repo, revision, write=True) as hub:
        api = hub.HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=local_path(folder), revision=revision, commit_message="Export of avd_jax"
        )
        return f"{api.endpoint}/{repo}"


@contextmanager
def _reporting(repo: str, revision: str | None, *, write: bool = False) -> Iterator:
    """Yield huggingface_hub; what it raises becomes one line."""
    shown = f"hf://{repo}" + (f"@{revision}" if revision else "")
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise UserError(f'{shown}: needs another package; pip install -e ".[hub]"') from None
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield hub
    except errors.GatedRepoError as error:
        raise UserError(f"{shown}: is gated; accept its terms on {_page(constants, repo)}, and {login}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{shown}: has no revision {revision!r}; see {_page(constants, repo)}/commits/main") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{shown}: there is no such repository; or it is private: {login}") from error
    except errors.HFValidationError as error:
        raise UserError(
            f"{shown}: is no name of a repository; write hf://ORG/NAME or hf://ORG/NAME@REVISION"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{shown}: is not in the cache, and {_page(constants, repo)} cannot be reached "
            f"({_cause(error)}); connect to the network, or download it elsewhere and give the folder"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        if status in (401, 403):
            right = "write to" if write else "read"
            raise UserError(
                f"{shown}: no right to {right} it (HTTP {status}); {login} of an account that may"
            ) from error
        raise UserError(f"{shown}: the Hub answered HTTP {status}; try again later") from error
    except OSError as error:  # no disk left, or no network while publishing
        raise UserError(f"{shown}: {_cause(error)}; put that right and run the same command again") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        raise UserError(
            f"{shown}: {_page(constants, repo)} cannot be reached ({_cause(error)}); try again later"
        ) from error


def _page(constants, repo: str) -> str:
    return f"{constants.ENDPOINT}/{repo}"


def _cause(error: BaseException) -> str:
    """Return the first line of what was at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:150] if lines else type(error).__name__
