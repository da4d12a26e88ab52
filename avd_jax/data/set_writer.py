"""Writing an encoded set (schema in `latents.py`) so that a killed run loses at most one shard of work."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors.numpy
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from avd_jax.data.atomic import replacing, write_text
from avd_jax.data.latents import (
    BFLOAT16,
    FEATURES,
    NEGATIVE_PROMPT_FILE,
    SCHEMA_VERSION,
    PromptsInfo,
    is_whole,
    manifest_path,
    read_json,
    shard_path,
)
from avd_jax.data.set_finish import WHOLE, Part, Summary, check_parts, difference, plan_sha256, publish, reporting
from avd_jax.data.set_plan import PLAN_FILE, Plan, changed_plan, save_plan, stored_plan
from avd_jax.errors import UserError
from avd_jax.paths import any_path


class SetWriter:
    """Writes a set shard by shard; what a killed run finished is kept, and the same call continues from there.

    A shard is finished once its file has its final name, which it gets when it is complete. The inputs of every
    shard are fixed by the list of inputs, so that a resumed run gives the same files as an uninterrupted one. If the
    list has changed, see `set_plan.py`; the set can be read as it was until it is finished anew.
    Skipped inputs count as done: to try them again, encode into a new folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        info: PromptsInfo,
        inputs: Sequence[str],
        *,
        inputs_per_shard: int,
        part: Part = WHOLE,
    ):
        """Begin a set, or continue it.

        Args:
          folder: where the set lies; made if missing.
          info: what the set is encoded with.
          inputs: one unique text an input, in the order of the records.
          inputs_per_shard: the most records a shard can get.
          part: what this machine writes.

        Raises:
          UserError: there is nothing to encode, or the folder holds something else: a set of quite other inputs, or
            one encoded with other settings.
        """
        if not inputs:
            raise UserError(f"{folder}: there is nothing to encode.")
        if len(set(inputs)) < len(inputs):
            raise ValueError("the inputs of a set must differ")
        self.folder, self.inputs, self.info, self.part = any_path(folder), list(inputs), info, part
        self._owner = f"{part}." if part.count > 1 else ""  # machines may write the same small file at once
        settings = {"kind": info.kind, "schema_version": SCHEMA_VERSION, **json.loads(json.dumps(asdict(info)))}
        settings |= {"inputs_per_shard": inputs_per_shard, "inputs": len(inputs)}
        settings["inputs_sha256"] = hashlib.sha256(json.dumps(self.inputs).encode()).hexdigest()
        path = self.folder / "metadata.json"
        holds_something = self.folder.exists() and any(not _is_hidden(p) for p in self.folder.iterdir())
        if holds_something and not path.exists():  # in this order: another machine may be about to begin the set
            raise UserError(f"{folder}: is not empty and holds no encoded set; give a new folder.")
        with reporting(self.folder):
            if not path.exists() or self._nothing_is_encoded_of_another_list(settings):
                write_text(path, json.dumps(settings, indent=2) + "\n", owner=self._owner)
            self._metadata = read_json(path)
            if other := difference(self._metadata, settings, but=("inputs", "inputs_sha256")):
                raise UserError(
                    f"{self.folder}: holds a set encoded from {other}; give a new folder, or delete this one."
                )
            self._plan, self._copies = self._planned(settings["inputs_sha256"])
            if part.count == 1:  # parts that were copied here may be of other weights
                check_parts(self.folder, settings, but=("inputs", "inputs_sha256"))
            else:
                # What this machine encodes with, to be compared once the parts are together, wherever they were made.
                settings["plan_sha256"] = plan_sha256(self._plan)
                write_text(self.folder / f"shard-{part}.json", json.dumps(settings, indent=2) + "\n")

    def pending(self) -> list[int]:
        """Return the numbers of the shards that are still to be written, of this machine's part."""
        mine = range(self.part.index, len(self._plan), self.part.count)
        return [shard for shard in mine if self._plan[shard] is not None and not self._is_finished(shard)]

    def to_encode(self, shard: int) -> list[int]:
        """Return the indices of the inputs of a shard that have to be encoded; `write_shard` copies the others."""
        return [i for i in self._plan[shard] if self.inputs[i] not in self._copies]

    def write_shard(self, shard: int, records: Iterable[Mapping], skipped: Mapping[str, str]) -> None:
        """Write one shard.

        Args:
          shard: its number.
          records: see `latents_record`, `prompts_record`; of `to_encode`, in this order.
          skipped: input -> reason of the rest.

        Raises:
          UserError: a full disk, or another that cannot be written; the shards before are kept.
        """
        features = FEATURES[self.info.kind]
        serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
        encoded = self.to_encode(shard)
        copied = [i for i in self._plan[shard] if self.inputs[i] in self._copies]
        with reporting(self.folder), replacing(self._path(shard)) as temporary:
            writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")  # as TFDS: each record read by itself
            sizes = []
            for index in copied:
                serialized = self._copy(self.inputs[index])
                writer.write(serialized)
                sizes.append(len(serialized))
            for record in records:
                example = serializer.get_tf_example(features.encode_example(record))
                # Fields in a fixed order: the same inputs give the same bytes.
                serialized = example.SerializeToString(deterministic=True)
                writer.write(serialized)
                sizes.append(len(serialized))
            writer.close()
            manifest = {
                "inputs": [self.inputs[i] for i in (*copied, *encoded)],
                "records": len(sizes),
                "record_bytes": sum(sizes),
                "file_bytes": temporary.stat().st_size,
                "skipped": dict(skipped),
            }
            # Before the shard gets its name, so that no shard is ever without it.
            write_text(manifest_path(self.folder, shard), json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")

    def finish(self, negative_prompt: str, negative_prompt_embeds: np.ndarray) -> Summary:
        """Make the set readable once every shard is written; of a part only say how it came out.

        Args:
          negative_prompt: text of the negative prompt.
          negative_prompt_embeds: its tokens' embeddings [L text_dim].

        Raises:
          UserError: every input was skipped, or a full disk.
        """
        if self.pending():
            raise ValueError(f"{self.folder}: shards {self.pending()} are not written")
        with reporting(self.folder), replacing(self.folder / NEGATIVE_PROMPT_FILE, owner=self._owner) as temporary:
            tensors = {"prompt_embeds": np.ascontiguousarray(negative_prompt_embeds, BFLOAT16)}
            # Not save_file, which lets nobody but the owner read the file.
            temporary.write_bytes(safetensors.numpy.save(tensors, metadata={"text": negative_prompt}))
        if self.part.count == 1:
            return publish(self.folder, self._metadata, self._plan)
        mine = range(self.part.index, len(self._plan), self.part.count)
        manifests = [read_json(manifest_path(self.folder, n)) for n in mine if self._plan[n] is not None]
        skipped = {key: reason for manifest in manifests for key, reason in manifest["skipped"].items()}
        return Summary(sum(manifest["records"] for manifest in manifests), skipped, finished=False)

    def _nothing_is_encoded_of_another_list(self, settings: Mapping) -> bool:
        before = read_json(self.folder / "metadata.json")
        begun = [self.folder / "dataset_info.json", self.folder / PLAN_FILE, self.folder / "manifest"]
        same = difference(before, settings, but=("inputs", "inputs_sha256")) is None
        return same and before != settings and not any(path.exists() for path in begun)

    def _planned(self, inputs_sha256: str) -> tuple[Plan, dict[str, tuple[int, int]]]:
        """Return the plan for the list of inputs, and input -> (shard, position) of records that can be copied."""
        plan, of_list = stored_plan(self.folder, self._metadata)
        if of_list == inputs_sha256 and not (self.folder / PLAN_FILE).exists():
            return plan, {}
        finished = dict(self._finished_shards())
        # Those of the plan before first: what one of them holds may lie in an older one, too.
        order = sorted(finished, key=lambda shard: (shard >= len(plan) or plan[shard] is None, shard))
        if of_list != inputs_sha256:
            listed = set(self.inputs)
            if finished and not any(listed.intersection(manifest["inputs"]) for manifest in finished.values()):
                raise UserError(
                    f"{self.folder}: holds a set encoded from other inputs, none of which is among these; give a new "
                    "folder, or delete this one."
                )
            texts = [(shard, finished[shard]["inputs"]) for shard in order]
            copied = {text for shard in order for text in _records_of(finished[shard], self.info.kind)}
            plan = changed_plan(self.inputs, self._metadata["inputs_per_shard"], texts, copied)
            save_plan(self.folder, plan, inputs_sha256, owner=self._owner)
        left = [shard for shard in order if shard >= len(plan) or plan[shard] is None]
        copies = {
            text: (shard, position)
            for shard in reversed(left)
            for position, text in enumerate(_records_of(finished[shard], self.info.kind))
        }
        return plan, copies

    def _finished_shards(self) -> Iterator[tuple[int, dict]]:
        """Yield the number and the manifest of every shard that is whole, whatever list it is of."""
        for path in sorted((self.folder / "manifest").glob("*.json")):
            shard, manifest = int(path.stem), read_json(path)
            if is_whole(shard_path(self.folder, self._metadata, shard), manifest):
                yield shard, manifest

    def _copy(self, text: str) -> bytes:
        shard, position = self._copies[text]
        path = self._path(shard)
        reader = ArrayRecordReader(os.fspath(path))
        (serialized,) = reader.read([position])
        reader.close()
        record = FEATURES[self.info.kind].deserialize_example_np(serialized)
        texts = {key: record[key].decode() for key in ("clip_id", "caption", "text") if key in record}
        if input_of(texts) != text:
            raise UserError(
                f"{path}: is damaged, record {position} is another one; delete its set and encode it again."
            )
        return serialized

    def _path(self, shard: int) -> Path:
        return shard_path(self.folder, self._metadata, shard)

    def _is_finished(self, shard: int) -> bool:
        path = manifest_path(self.folder, shard)
        if not path.exists():
            return False
        manifest = read_json(path)
        planned = {self.inputs[i] for i in self._plan[shard]}
        return is_whole(self._path(shard), manifest) and set(manifest.get("inputs", ())) == planned


def input_of(record: Mapping[str, str]) -> str:
    """Return the text by which a set knows an input: its prompt, or its clip with the caption.

    A corrected caption is another input.
    """
    return record["text"] if "text" in record else f"{record['clip_id']} {record['caption']}"


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _records_of(manifest: Mapping, kind: str) -> list[str]:
    """Return the inputs of a shard of which it has records, in their order; none if that cannot be told."""
    skipped = tuple(manifest["skipped"]) if kind == "prompts" else tuple(f"{key} " for key in manifest["skipped"])
    texts = [
        text for text in manifest["inputs"] if not (text in skipped or (kind != "prompts" and text.startswith(skipped)))
    ]
    return texts if len(texts) == manifest["records"] else []
