"""Requests to a bucket of Google Cloud Storage: how long they are tried again, and what cannot succeed in one line.

One file system serves our own paths, and Orbax and TFDS, which come to it through epath. TensorStore, in Orbax, and
ArrayRecord, in TFDS, make requests of their own; here TensorStore is told how long, and `trouble` explains both.
"""

import asyncio
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import aiohttp
import fsspec
import gcsfs.core
import google.auth.exceptions
from gcsfs.retry import HttpError, is_retriable
from orbax.checkpoint._src.serialization import tensorstore_utils

from avd_jax.errors import UserError

# So long a request is tried again: a mistake is told within a minute, but a run that works outlasts a bad spell.
_PATIENCE_AT_FIRST, _PATIENCE = 30.0, 300.0
_LONGEST_PAUSE = 16.0
_SILENCE = 30.0  # seconds without a byte, after which a request is given up and made again

# TensorStore's own would be a quarter of an hour, and a connection that says nothing would be waited for without end.
# These are 5 minutes: 1 + 2 + 4 + 8 + 16 + 8 x 32 seconds.
_TENSORSTORE_RETRIES = {"max_retries": 13, "initial_delay": "1s", "max_delay": "32s"}
for _context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
    _context["gcs_request_retries"] = _TENSORSTORE_RETRIES
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(int(2 * _SILENCE)))


class FileSystem(gcsfs.core.GCSFileSystem):
    """gcsfs' file system without its cache of listings, which never sees what other hosts write."""

    # Of all of them: bucket -> whether it has answered, and not stayed away since.
    _answered: dict[str, bool] = {}  # noqa: RUF012

    def __init__(self, *args, **options):
        silence = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_SILENCE)
        super().__init__(*args, **{"use_listings_cache": False, "requests_timeout": silence, **options})

    async def _mkdir(self, path, *args, **kwargs):
        """Do nothing; gcsfs would make a bucket that is missing."""

    async def _makedirs(self, path, *args, **kwargs):
        """Do nothing."""

    async def _request(self, method, path, *args, **kwargs):
        """Make a request until it succeeds, cannot succeed, or has been tried for long enough.

        Raises:
          FileNotFoundError: no such object.
          FileExistsError: a condition on the object's generation does not hold.
          UserError: everything else.
        """
        bucket, name = _named(self._format_path(path, args), kwargs)
        until = time.monotonic() + (_PATIENCE if self._answered.get(bucket) else _PATIENCE_AT_FIRST)
        for attempt in range(1_000):
            try:
                answer = await _request_once(self, method, path, *args, **kwargs)
                self._answered[bucket] = True
                return answer
            except FileNotFoundError:
                await self._check_bucket(bucket)
                raise FileNotFoundError(2, "no such object", name) from None
            except FileExistsError:
                raise
            except Exception as error:
                passes = is_retriable(error) or isinstance(error, (TimeoutError, asyncio.TimeoutError))
                # A token that expires is refreshed with the next request; without any there is nothing to wait for.
                pause = min(0.5 * 2**attempt, _LONGEST_PAUSE) * (0.5 + random.random())
                if (
                    not passes
                    or time.monotonic() + pause > until
                    or (_is_401(error) and not self._answered.get(bucket))
                ):
                    if passes:  # what a run does at its end need not wait as long again
                        self._answered[bucket] = False
                    raise _explained(error, name, bucket) from error
            await asyncio.sleep(pause)
        raise AssertionError("the loop above ends by itself")

    async def _check_bucket(self, bucket: str) -> None:
        """Raise a UserError if it is the bucket that is missing; asked once, and no more after an answer."""
        if not bucket or self._answered.get(bucket):
            return
        try:
            await _request_once(self, "GET", f"b/{bucket}/o", maxResults=1)
        except FileNotFoundError:
            raise UserError(
                f"gs://{bucket}: there is no such bucket; correct the name, or make it (gcloud storage buckets create "
                f"gs://{bucket})"
            ) from None
        except Exception:
            return  # what comes next says what it is
        self._answered[bucket] = True


# Without the retries around it, whose end is a printed traceback.
_request_once = gcsfs.core.GCSFileSystem._request.__wrapped__


# What TensorStore and ArrayRecord say, without a status, of what might succeed later.
_TRANSIENT = r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|attempts failed|[Rr]etry policy"

for _protocol in FileSystem.protocol:
    fsspec.register_implementation(_protocol, FileSystem, clobber=True)


def _named(url: str, query: dict) -> tuple[str, str]:
    """Return the bucket of a request, and in words what it is about."""
    bucket = re.search(r"/b/([^/?]+)", url)
    key = re.search(r"/o/([^?]+)", url) or re.search(r"/o\?(?:.*&)?name=([^&]+)", url)
    body = query.get("json")
    said = unquote(key[1]) if key else query.get("name") or (body.get("name") if isinstance(body, dict) else None)
    said = said or query.get("prefix") or ""
    return (bucket[1], f"gs://{bucket[1]}/{said}".rstrip("/")) if bucket else ("", url)


def in_time(call: Callable[[], Any]) -> Any:
    """Return `call()`, a TimeoutError after 5 minutes; it goes on then, since ArrayRecord tries for longer."""
    try:
        return _readers.submit(call).result(_PATIENCE)
    except TimeoutError:
        raise TimeoutError(f"no answer for {_PATIENCE:.0f} s") from None


_readers = ThreadPoolExecutor(64, "bucket")  # more than read at once


def trouble(path: os.PathLike, error: BaseException) -> UserError | None:
    """Return in one line what kept Orbax, TFDS or grain from a bucket; None if the error is about something else.

    Args:
      path: in the bucket; a longer one that the error names is shown instead.
      error: an error of ours within theirs, or one of TensorStore or ArrayRecord, known by its text.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for one in chain:
        if isinstance(one, UserError):
            return one
    said = " ".join(str(chain[0]).split())
    bucket = re.match(r"gs:/+([^/]+)", os.fspath(path))[1]
    named = [name.rstrip(".") for name in re.findall(rf"gs://{re.escape(bucket)}/[^\s'\":;,)]+", said)]
    name = unquote(max((os.fspath(path), *named), key=len))
    status = re.search(r"http_response_code='(\d+)'|\"code\": ?(\d+)", said)
    if status:
        message = re.search(r'message\W*": ?\W*"([^"\\]+)', said)
        return _told(int(status[1] or status[2]), name, bucket, message[1] if message else said[:200])
    if re.search(r"UNAUTHENTICATED|[Cc]redentials|invalid_grant", said):
        return _told(401, name, bucket, said[:200])
    if isinstance(chain[0], TimeoutError) or re.search(_TRANSIENT, said):
        return _told(503, name, bucket, said[:200])
    return None


def _is_401(error: Exception) -> bool:
    return isinstance(error, HttpError) and str(error.code) == "401"


def _explained(error: Exception, name: str, bucket: str) -> UserError:
    said = re.sub(r"(Forbidden: )?https?://\S+", "", str(getattr(error, "message", "") or error))
    said = " ".join(said.split())[:200] or type(error).__name__
    status = int(error.code) if isinstance(error, HttpError) and str(error.code).isdigit() else 0
    if isinstance(error, google.auth.exceptions.GoogleAuthError):
        status = 401
    elif str(error).startswith("Forbidden"):
        status = 403
    elif is_retriable(error) or isinstance(error, TimeoutError):
        status = status if status == 401 else 503
    return _told(status, name, bucket, said)


def _told(status: int, name: str, bucket: str, said: str) -> UserError:
    """Return the error for an answer of the bucket; `said` is what came with it."""
    if status == 401:
        return UserError(
            f"{name}: there are no valid credentials for it ({said}); log in (gcloud auth application-default login), "
            "or name a key file in GOOGLE_APPLICATION_CREDENTIALS"
        )
    if status == 403:
        return UserError(
            f"{name}: the account has no right to this ({said}); grant it roles/storage.objectUser and "
            f"roles/storage.legacyBucketReader on gs://{bucket}"
        )
    if status in (408, 429) or status >= 500:
        return UserError(f"{name}: the bucket does not answer ({said}); run the same command again later")
    return UserError(f"{name}: the bucket refuses this ({said}); correct the path or the bucket's settings")
