"""Writing an encoded set (schema in `latents.py`) so that a killed run loses at most one shard of work."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from avd_jax.data.atomic import replacing, write_text
from avd_jax.data.latents import (
    BFLOAT16,
    FEATURES,
    NEGATIVE_PROMPT_FILE,
    SCHEMA_VERSION,
    PromptsInfo,
    manifest_path,
    read_json,
    shard_template,
)
from avd_jax.errors import UserError
from avd_jax.paths import local_path


@dataclass(frozen=True)
class Summary:
    """How a set came out: the number of records, and input -> reason for those that were left out."""

    written: int
    skipped: dict[str, str]


class SetWriter:
    """Writes a set shard by shard; what a killed run finished is kept, and the same call continues from there.

    A shard is finished once its file has its final name, which it gets when it is complete. The inputs of every
    shard are fixed by the list of inputs, so that a resumed run gives the same files as an uninterrupted one.
    Skipped inputs count as done: to try them again, encode into a new folder.
    """

    def __init__(self, folder: str | os.PathLike, info: PromptsInfo, inputs: Sequence[str], *, inputs_per_shard: int):
        """Begin a set, or continue it.

        Args:
          folder: where the set lies; made if missing.
          info: what the set is encoded with.
          inputs: one unique text an input, in the order of the records.
          inputs_per_shard: the most records a shard can get.

        Raises:
          UserError: there is nothing to encode, or the folder holds something else: another set, other inputs, or
            one encoded with other settings.
        """
        if not inputs:
            raise UserError(f"{folder}: there is nothing to encode.")
        if len(set(inputs)) < len(inputs):
            raise ValueError("the inputs of a set must differ")
        self.folder, self.inputs = local_path(folder), list(inputs)
        self.info, self.inputs_per_shard = info, inputs_per_shard
        self.shards = -(-len(inputs) // inputs_per_shard)
        settings = {
            "kind": info.kind,
            "schema_version": SCHEMA_VERSION,
            **json.loads(json.dumps(asdict(info))),
            "inputs_per_shard": inputs_per_shard,
            "inputs": len(inputs),
            "inputs_sha256": hashlib.sha256(json.dumps(self.inputs).encode()).hexdigest(),
        }
        path = self.folder / "metadata.json"
        if path.exists():
            _check_same_settings(self.folder, read_json(path), settings)
        else:
            if self.folder.exists() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
                raise UserError(f"{folder}: is not empty and holds no encoded set; give a new folder.")
            with _reporting(self.folder):
                write_text(path, json.dumps(settings, indent=2) + "\n")

    def pending(self) -> list[int]:
        """Return the numbers of the shards that are still to be written."""
        return [shard for shard in range(self.shards) if not self._is_finished(shard)]

    def range_of(self, shard: int) -> range:
        """Return the indices of the inputs of a shard."""
        first = shard * self.inputs_per_shard
        return range(first, min(first + self.inputs_per_shard, len(self.inputs)))

    def write_shard(self, shard: int, records: Iterable[Mapping], skipped: Mapping[str, str]) -> None:
        """Write one shard from records (see `latents_record`, `prompts_record`) and input -> reason of the rest.

        Raises:
          UserError: a full disk, or another that cannot be written; the shards before are kept.
        """
        features = FEATURES[self.info.kind]
        serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
        with _reporting(self.folder), replacing(self._shard_path(shard)) as temporary:
            writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")  # as TFDS: each record read by itself
            sizes = []
            for record in records:
                example = serializer.get_tf_example(features.encode_example(record))
                # Fields in a fixed order: the same inputs give the same bytes.
                serialized = example.SerializeToString(deterministic=True)
                writer.write(serialized)
                sizes.append(len(serialized))
            writer.close()
            manifest = {
                "inputs": [self.inputs[i] for i in self.range_of(shard)],
                "records": len(sizes),
                "record_bytes": sum(sizes),
                "file_bytes": temporary.stat().st_size,
                "skipped": dict(skipped),
            }
            # Before the shard gets its name, so that no shard is ever without it.
            write_text(manifest_path(self.folder, shard), json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")

    def finish(self, negative_prompt: str, negative_prompt_embeds: np.ndarray) -> Summary:
        """Make the set readable once every shard is written.

        Args:
          negative_prompt: text of the negative prompt.
          negative_prompt_embeds: its tokens' embeddings [L text_dim].

        Raises:
          UserError: every input was skipped, or a full disk.
        """
        if self.pending():
            raise ValueError(f"{self.folder}: shards {self.pending()} are not written")
        manifests = [read_json(manifest_path(self.folder, shard)) for shard in range(self.shards)]
        skipped = {key: reason for manifest in manifests for key, reason in manifest["skipped"].items()}
        written = sum(manifest["records"] for manifest in manifests)
        if not written:
            reason = next(iter(skipped.values()))
            raise UserError(f"{self.folder}: all {len(skipped)} inputs were skipped; the first: {reason}")
        with _reporting(self.folder):
            self._finish(manifests, skipped, negative_prompt, negative_prompt_embeds)
        return Summary(written, skipped)

    def _finish(
        self,
        manifests: Sequence[Mapping],
        skipped: Mapping[str, str],
        negative_prompt: str,
        negative_prompt_embeds: np.ndarray,
    ) -> None:
        lines = [json.dumps({"input": key, "reason": reason}, ensure_ascii=False) for key, reason in skipped.items()]
        write_text(self.folder / "skipped.jsonl", "".join(f"{line}\n" for line in lines))
        with replacing(self.folder / NEGATIVE_PROMPT_FILE) as temporary:
            tensors = {"prompt_embeds": np.ascontiguousarray(negative_prompt_embeds, BFLOAT16)}
            # Not save_file, which lets nobody but the owner read the file.
            temporary.write_bytes(safetensors.numpy.save(tensors, metadata={"text": negative_prompt}))
        self._write_dataset_info(manifests)

    def _write_dataset_info(self, manifests: Sequence[Mapping]) -> None:
        kind = self.info.kind
        identity = tfds.core.DatasetIdentity(
            name=kind, version=tfds.core.Version(SCHEMA_VERSION), data_dir=self.folder, module_name=__name__
        )
        dataset_info = tfds.core.DatasetInfo(
            builder=identity, features=FEATURES[kind], description=f"Encoded {kind}; see metadata.json."
        )
        dataset_info.set_file_format("array_record")
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[manifest["records"] for manifest in manifests],
            num_bytes=sum(manifest["record_bytes"] for manifest in manifests),
            filename_template=shard_template(self.folder, kind),
        )
        dataset_info.set_splits(tfds.core.splits.SplitDict([split]))
        staging = self.folder / ".staging"
        staging.mkdir(exist_ok=True)
        dataset_info.write_to_directory(staging)
        # The last of the files, since its presence is what says that the set is complete.
        for name in ("features.json", "dataset_info.json"):
            os.replace(staging / name, self.folder / name)
        staging.rmdir()

    def _shard_path(self, shard: int) -> Path:
        template = shard_template(self.folder, self.info.kind)
        return Path(template.sharded_filepath(shard_index=shard, num_shards=self.shards))

    def _is_finished(self, shard: int) -> bool:
        path, manifest = self._shard_path(shard), manifest_path(self.folder, shard)
        return path.exists() and manifest.exists() and path.stat().st_size == read_json(manifest)["file_bytes"]


@contextlib.contextmanager
def _reporting(folder: Path) -> Iterator[None]:
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


def _check_same_settings(folder: Path, before: Mapping, now: Mapping) -> None:
    different = [key for key in now if before.get(key) != now[key]]
    if not different:
        return
    key = different[0]
    what = {
        "inputs": f"{before.get('inputs')} inputs, not these {now['inputs']}",
        "inputs_sha256": "other inputs",
        "text_encoder": "other weights of the text encoder",
        "vae": "other weights of the VAE",
    }.get(key, f"{key} {before.get(key)}, not {now[key]}")
    raise UserError(f"{folder}: holds a set encoded from {what}; give a new folder, or delete this one.")
