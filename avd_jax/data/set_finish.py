"""Finishing an encoded set (schema in `latents.py`): what makes whole shards readable, whoever wrote them.

Several machines may write one set, each its part of the shards, into one folder or into folders whose files are then
copied into one; `merge` finishes it.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import tensorflow_datasets as tfds

from avd_jax.data.atomic import only_writer, write_text
from avd_jax.data.latents import (
    FEATURES,
    NEGATIVE_PROMPT_FILE,
    SCHEMA_VERSION,
    is_whole,
    manifest_path,
    published_lengths,
    read_json,
    shard_path,
    shard_template,
)
from avd_jax.data.set_plan import Plan, stored_plan
from avd_jax.errors import UserError
from avd_jax.parallel.hosts import barrier, from_first, is_first
from avd_jax.paths import any_path

_MODULE = "avd_jax.data.set_writer"  # as TFDS records it; the same in every set, wherever this code lies
_PART_FILE = re.compile(r"shard-(\d+)-of-(\d+)\.json")


@dataclass(frozen=True)
class Part:
    """Which shards of a set one of several machines writes: those whose number leaves `index` when divided by `count`.

    Attributes:
      index: of the machine, from 0.
      count: of the machines.
    """

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


WHOLE = Part()


def read_part(text: str) -> Part:
    """Return the part that `0/3` means (UserError if it means none)."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text!r}: write i/n, i from 0 to n - 1, such as 0/3 on the first of 3 machines.")
    return Part(int(index), int(count))


@dataclass(frozen=True)
class Summary:
    """How a set, or the part of it that was asked for, came out.

    Attributes:
      written: records.
      skipped: input -> reason, of those that were left out.
      finished: whether the set can be read; a part alone cannot.
    """

    written: int
    skipped: dict[str, str]
    finished: bool = True


def part_of_process() -> Part:
    """Return the part of this process of a pod; WHOLE if it is alone."""
    return Part(jax.process_index(), jax.process_count())


def merged_on_pod(summaries: dict[Path, Summary]) -> dict[Path, Summary]:
    """Let the first process of a pod merge the sets once all have written their parts; alone it has nothing to do.

    Without a shared disk it cannot, says what is missing, and leaves that to `merge`.

    Args:
      summaries: folder -> how this process' part came out.

    Returns:
      How the sets came out, of the first process; of the others how their parts did.
    """
    if jax.process_count() == 1:
        return summaries
    barrier("encoded")
    merged = {}
    if is_first():
        try:
            merged = {folder: merge(folder) for folder in summaries}
        except UserError as error:
            print(f"not merged: {error}")
    if not from_first(np.asarray(bool(merged))):
        return summaries
    return merged or {folder: replace(summary, finished=True) for folder, summary in summaries.items()}


def merge(folder: str | os.PathLike) -> Summary:
    """Finish a set whose parts were written by several machines and lie in one folder now; again, it does nothing.

    Raises:
      UserError: there are no parts, one of them was encoded with something else, or a shard is missing.
    """
    folder = any_path(folder)
    path = folder / "metadata.json"
    parts = _part_files(folder)
    if not path.exists() or not (parts or (folder / "dataset_info.json").exists()):
        raise UserError(f"{folder}: holds no parts of a set; run scripts/encode.py with --shard first.")
    metadata = read_json(path)
    plan, inputs_sha256 = stored_plan(folder, metadata)
    check_parts(folder, metadata | {"inputs_sha256": inputs_sha256, "plan_sha256": plan_sha256(plan)}, but=("inputs",))
    shards = [shard for shard, places in enumerate(plan) if places is not None]
    missing = [shard for shard in shards if not _is_there(folder, metadata, shard)]
    if missing:
        counts = {int(_PART_FILE.fullmatch(file.name)[2]) for file in parts}
        whose = f"--shard {missing[0] % min(counts)}/{min(counts)}" if len(counts) == 1 else "the machine that has it"
        raise UserError(
            f"{folder}: {len(missing)} of {len(shards)} files are missing, the first: "
            f"{shard_path(folder, metadata, missing[0]).name}; run {whose} to its end, and copy its folder here."
        )
    if not (folder / NEGATIVE_PROMPT_FILE).exists():
        raise UserError(f"{folder / NEGATIVE_PROMPT_FILE}: is missing; copy it from one of the machines.")
    with only_writer(folder):
        return publish(folder, metadata, plan)


def check_parts(folder: Path, expected: Mapping, *, but: Sequence[str]) -> None:
    """Raise a UserError if a part in a folder was encoded with other settings than expected, those in `but` aside."""
    for file in _part_files(folder):
        if other := difference(read_json(file), expected, but=but):
            raise UserError(f"{file}: that part was encoded from {other}; encode it again as the others.")


def _part_files(folder: Path) -> list[Path]:
    """Return the files in which machines say what they encode with."""
    return sorted(file for file in folder.glob("shard-*-of-*.json") if _PART_FILE.fullmatch(file.name))


def merge_all(out: str | os.PathLike) -> dict[Path, Summary]:
    """Merge the set in a folder, or all those in its subfolders if it has several; see `merge`."""
    out = any_path(out)
    several = [path.parent for path in sorted(out.glob("*/metadata.json"))]
    return {folder: merge(folder) for folder in ([out] if (out / "metadata.json").exists() else several or [out])}


def _is_there(folder: Path, metadata: Mapping, shard: int) -> bool:
    manifest = manifest_path(folder, shard)
    return manifest.exists() and is_whole(shard_path(folder, metadata, shard), read_json(manifest))


def publish(folder: Path, metadata: Mapping, plan: Plan) -> Summary:
    """Write what makes a set of whole shards readable; the last file of it replaces what could be read before."""
    live = [places is not None for places in plan]
    manifests = [read_json(manifest_path(folder, shard)) if live[shard] else None for shard in range(len(plan))]
    skipped = {key: reason for manifest in filter(None, manifests) for key, reason in manifest["skipped"].items()}
    lengths = [manifest["records"] if manifest else 0 for manifest in manifests]
    if not sum(lengths):
        reason = next(iter(skipped.values()))
        raise UserError(f"{folder}: all {len(skipped)} inputs were skipped; the first: {reason}")
    lines = [json.dumps({"input": key, "reason": reason}, ensure_ascii=False) for key, reason in skipped.items()]
    with reporting(folder):
        write_text(folder / "skipped.jsonl", "".join(f"{line}\n" for line in lines))
        _keep_earlier(folder, lengths)
        num_bytes = sum(manifest["record_bytes"] for manifest in filter(None, manifests))
        _write_dataset_info(folder, metadata, lengths, num_bytes)
        for file in _part_files(folder):
            file.unlink()
    return Summary(sum(lengths), skipped)


def _keep_earlier(folder: Path, lengths: Sequence[int]) -> None:
    """Keep the dataset_info.json of a set that is about to change: a training may have begun with it."""
    path = folder / "dataset_info.json"
    try:
        if not path.exists() or published_lengths(folder) == list(lengths):
            return
    except UserError:
        return  # a damaged one is written anew
    earlier = folder / "earlier"
    number = sum(1 for _ in earlier.glob("dataset_info-*.json")) + 1
    write_text(earlier / f"dataset_info-{number:05d}.json", path.read_text(encoding="utf-8"))


def _write_dataset_info(folder: Path, metadata: Mapping, lengths: Sequence[int], num_bytes: int) -> None:
    kind = metadata["kind"]
    identity = tfds.core.DatasetIdentity(
        name=kind, version=tfds.core.Version(SCHEMA_VERSION), data_dir=folder, module_name=_MODULE
    )
    dataset_info = tfds.core.DatasetInfo(
        builder=identity, features=FEATURES[kind], description=f"Encoded {kind}; see metadata.json."
    )
    dataset_info.set_file_format("array_record")
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=list(lengths),
        num_bytes=num_bytes,
        filename_template=shard_template(folder, metadata, len(lengths)),
    )
    dataset_info.set_splits(tfds.core.splits.SplitDict([split]))
    with tempfile.TemporaryDirectory() as staging:
        dataset_info.write_to_directory(staging)
        # The last of the files, since its presence is what says that the set is complete.
        for name in ("features.json", "dataset_info.json"):
            write_text(folder / name, (Path(staging) / name).read_text(encoding="utf-8"))


def difference(before: Mapping, now: Mapping, *, but: Sequence[str]) -> str | None:
    """Return in words the first setting in which two sets differ, those in `but` aside."""
    key = next((key for key in now if key not in but and before.get(key) != now[key]), None)
    if key is None:
        return None
    named = {
        "inputs_sha256": "other inputs",
        "plan_sha256": "another state of the set",
        "text_encoder": "other weights of the text encoder",
        "vae": "other weights of the VAE",
    }
    return named.get(key, f"{key} {before.get(key)}, not {now[key]}")


def plan_sha256(plan: Plan) -> str:
    """Return what identifies a plan."""
    files = [None if places is None else list(places) for places in plan]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


@contextlib.contextmanager
def reporting(folder: Path) -> Iterator[None]:
    """Turn what a disk reports while a set is written into a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            raise UserError(
                f"{folder}: the disk is full; free some space, then the same command goes on where it stopped"
            ) from error
        if isinstance(error, RuntimeError):  # ArrayRecord's, which says in words what the system said
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); give another folder") from error
