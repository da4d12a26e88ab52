"""Encoded sets: TFDS-format ArrayRecord folders of latents and of prompts, written shard by shard and read back.

A set is a folder that `tfds.builder_from_directory(folder).as_data_source("train")` opens without TensorFlow:

    latents-train.array_record-00000-of-00002 ...   the records; `prompts-train...` for a set of prompts
    features.json  dataset_info.json                what TFDS needs; dataset_info.json is written last of all
    metadata.json                                   what the set was encoded with (LatentsInfo or PromptsInfo)
    negative_prompt_embeds.safetensors              `prompt_embeds` [L text_dim] of the negative prompt, its text
    manifest/00000.json ...                         inputs and skipped inputs of each shard, with its size
    skipped.jsonl                                   every skipped input with the reason

The number behind `-of-` is that of the list with which the set began. Once that list has changed there are also

    plan.json                                       which inputs lie in which file, see `set_plan.py`
    earlier/dataset_info-00001.json ...             dataset_info.json of the set as it was before

and of the files some may be part of the set no longer: dataset_info.json then says that they hold no record.

A record of `latents` holds

    clip_id              text, source and start of the clip
    caption              text
    latents              bytes of bfloat16 [F h w C], normalised as the VAE gives them
    latents_shape        int32 [4]
    prompt_embeds        bytes of bfloat16 [L text_dim], the caption's tokens only, without the padding
    prompt_embeds_shape  int32 [2]
    fps                  float32, frames per second of the encoded video
    source               text, the file the clip was cut from
    scores               text, a JSON object name -> number; {} before curation

and a record of `prompts` holds `text`, `prompt_embeds` and `prompt_embeds_shape`. bfloat16 is stored as little-endian
bytes because neither TFDS nor the tf.Example format has the type.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from safetensors import SafetensorError, safe_open

from avd_jax.errors import UserError
from avd_jax.paths import any_path, bucket_trouble, in_time, on_disk

SCHEMA_VERSION = "1.0.0"
NEGATIVE_PROMPT_FILE = "negative_prompt_embeds.safetensors"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_TEXT = tfds.features.Text()
_BYTES = tfds.features.Scalar(np.object_)
_EMBEDS = {"prompt_embeds": _BYTES, "prompt_embeds_shape": tfds.features.Tensor(shape=(2,), dtype=np.int32)}
FEATURES = {
    "prompts": tfds.features.FeaturesDict({"text": _TEXT, **_EMBEDS}),
    "latents": tfds.features.FeaturesDict(
        {
            "clip_id": _TEXT,
            "caption": _TEXT,
            "latents": _BYTES,
            "latents_shape": tfds.features.Tensor(shape=(4,), dtype=np.int32),
            **_EMBEDS,
            "fps": tfds.features.Scalar(np.float32),
            "source": _TEXT,
            "scores": _TEXT,
        }
    ),
}


@dataclass(frozen=True)
class PromptsInfo:
    """What a set of prompts was encoded with.

    Attributes:
      text_len: tokens that the text encoder saw, padding included; no prompt has more.
      text_dim: width of an embedding.
      text_encoder: fingerprint of the text encoder's weights.
    """

    kind: ClassVar[str] = "prompts"
    text_len: int
    text_dim: int
    text_encoder: str


@dataclass(frozen=True)
class LatentsInfo(PromptsInfo):
    """What a set of latents was encoded with.

    Attributes:
      frames: video frames of each clip.
      height: pixels.
      width: pixels.
      fps: video frames per second.
      latents_shape: [F h w C] of each clip.
      vae: fingerprint of the VAE's weights, the latents' mean and deviation among them.
    """

    kind: ClassVar[str] = "latents"
    frames: int
    height: int
    width: int
    fps: float
    latents_shape: tuple[int, int, int, int]
    vae: str


class EncodedSet:
    """A finished set as a sequence of dicts; a random-access source for grain.

    Each item has the fields of the schema, with texts as str, `latents` and `prompt_embeds` as bfloat16 arrays in
    their stored shapes, and `scores` as a dict.
    """

    def __init__(self, folder: str | os.PathLike, kind: str):
        """Open a set of the given kind, "latents" or "prompts" (UserError if it is not one, whole and finished)."""
        self.folder, self.info = any_path(folder), read_metadata(folder)
        if self.info.kind != kind:
            raise UserError(f"{folder}: is a set of {self.info.kind}, not of {kind}.")
        try:
            builder = tfds.builder_from_directory(os.fspath(self.folder))
            self._source = in_time(self.folder, lambda: builder.as_data_source("train"))
        except Exception as error:  # TFDS and ArrayRecord raise whatever their parsers do
            damaged = UserError(f"{folder}: cannot be opened ({_one_line(error)}); encode the set again.")
            raise bucket_trouble(self.folder, error) or damaged from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]  # an IndexError is what ends a loop over the set; -1 is the last record
        try:
            return self._decode(in_time(self.folder, lambda: self._source[index]))
        except Exception as error:  # ArrayRecord raises RuntimeError, protobuf and NumPy their own
            damaged = UserError(f"{self.folder}: record {index} is damaged ({_one_line(error)}); encode the set again.")
            raise bucket_trouble(self.folder, error) or damaged from error

    def _decode(self, record: Mapping) -> dict:
        decoded = {}
        for key, value in record.items():
            if key.endswith("_shape"):
                continue
            if f"{key}_shape" in record:
                decoded[key] = np.frombuffer(value, BFLOAT16).reshape(record[f"{key}_shape"])
            else:
                decoded[key] = value.decode() if isinstance(value, bytes) else value
        if "scores" in decoded:
            decoded["scores"] = json.loads(decoded["scores"])
        return decoded


def latents_record(
    *,
    clip_id: str,
    caption: str,
    latents: np.ndarray,
    prompt_embeds: np.ndarray,
    fps: float,
    source: str,
    scores: Mapping[str, float] | None = None,
) -> dict:
    """Return one record of a `latents` set from latents [F h w C] and the caption's embeddings [L text_dim]."""
    return {
        "clip_id": clip_id,
        "caption": caption,
        **_array_fields("latents", latents),
        **_array_fields("prompt_embeds", prompt_embeds),
        "fps": fps,
        "source": source,
        "scores": json.dumps(dict(scores or {}), sort_keys=True),
    }


def prompts_record(*, text: str, prompt_embeds: np.ndarray) -> dict:
    """Return one record of a `prompts` set from a prompt and its embeddings [L text_dim]."""
    return {"text": text, **_array_fields("prompt_embeds", prompt_embeds)}


def pad_prompt_embeds(prompt_embeds: np.ndarray, text_len: int) -> np.ndarray:
    """Pad [L text_dim] with zeros to [text_len text_dim], as the text encoder leaves them; longer ones are cut."""
    padded = np.zeros((text_len, prompt_embeds.shape[1]), prompt_embeds.dtype)
    padded[: len(prompt_embeds)] = prompt_embeds[:text_len]
    return padded


def read_metadata(folder: str | os.PathLike) -> LatentsInfo | PromptsInfo:
    """Return what a set was encoded with, having checked that the set is finished and none of its files is cut short.

    Raises:
      UserError: the folder holds no set, or an unfinished or damaged one.
    """
    folder = any_path(folder)
    path = folder / "metadata.json"
    if not path.exists():
        raise UserError(f"{folder}: holds no encoded set (no metadata.json); make one with scripts/encode.py.")
    metadata = read_json(path)
    again = "run scripts/encode.py again with the same flags"
    if not (folder / "dataset_info.json").exists():
        raise UserError(f"{folder}: the set is not finished; {again} and it goes on.")
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder}: has schema {metadata.get('schema_version')}, not {SCHEMA_VERSION}; encode it again."
        )
    info_class = {"latents": LatentsInfo, "prompts": PromptsInfo}.get(metadata.get("kind"))
    if info_class is None or any(field.name not in metadata for field in fields(info_class)):
        raise UserError(f"{path}: is damaged; encode the set again.")
    for shard, records in enumerate(published_lengths(folder)):
        if not records:
            continue
        file, manifest = shard_path(folder, metadata, shard), manifest_path(folder, shard)
        if not file.exists() or not manifest.exists():
            raise UserError(f"{file if manifest.exists() else manifest}: is missing; {again}.")
        if not is_whole(file, read_json(manifest)):
            raise UserError(f"{file}: is cut short or changed; {again}.")
    values = {field.name: metadata[field.name] for field in fields(info_class)}
    if "latents_shape" in values:
        values["latents_shape"] = tuple(values["latents_shape"])
    return info_class(**values)


def set_fingerprint(folder: str | os.PathLike) -> str:
    """Return a short text that identifies a finished set: how it was encoded, and which inputs in which order.

    A set that was added to is another one, and so is one from which something was taken away.
    """
    folder = any_path(folder)
    said = [read_json(folder / "metadata.json")]
    for shard, records in enumerate(published_lengths(folder)):
        path = manifest_path(folder, shard)
        manifest = read_json(path) if records or path.exists() else {"records": 1}
        if records == manifest["records"]:  # else the shard is part of the set no longer
            said.append(manifest)
    digest = hashlib.sha256()
    for values in said:
        digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def published_lengths(folder: Path) -> list[int]:
    """Return how many records of each shard are part of a finished set, as dataset_info.json says."""
    path = folder / "dataset_info.json"
    try:
        (split,) = json.loads(path.read_text(encoding="utf-8"))["splits"]
        return [int(length) for length in split["shardLengths"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be opened ({_one_line(error)}); encode the set again.") from error


def read_negative_prompt_embeds(folder: str | os.PathLike, text_len: int) -> np.ndarray:
    """Return the embeddings of the negative prompt, bfloat16 [text_len text_dim], zeros after the last token."""
    path = any_path(folder) / NEGATIVE_PROMPT_FILE
    try:
        with on_disk(path) as local, safe_open(local, "numpy") as tensors:
            return pad_prompt_embeds(tensors.get_tensor("prompt_embeds"), text_len)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); encode the set again.") from error


def _array_fields(name: str, array: np.ndarray) -> dict:
    array = np.ascontiguousarray(array, BFLOAT16)
    return {name: array.tobytes(), f"{name}_shape": np.asarray(array.shape, np.int32)}


def shard_template(folder: Path, metadata: Mapping, shards: int) -> tfds.core.ShardedFileTemplate:
    """Return TFDS's naming scheme for so many shards of a set."""
    first = _first_shards(metadata)
    # Files keep their names while a set grows, since a training may be reading them.
    template = f"{{DATASET}}-{{SPLIT}}.{{FILEFORMAT}}-{{SHARD_INDEX}}-of-{first:05d}" if shards != first else None
    return tfds.core.ShardedFileTemplate(
        dataset_name=metadata["kind"],
        data_dir=folder,
        split="train",
        filetype_suffix="array_record",
        **({"template": template} if template else {}),
    )


def shard_path(folder: Path, metadata: Mapping, shard: int) -> Path:
    """Return where a shard of a set lies."""
    return folder / f"{metadata['kind']}-train.array_record-{shard:05d}-of-{_first_shards(metadata):05d}"


def is_whole(shard: Path, manifest: Mapping) -> bool:
    """Return whether the file of a shard is there and of the size that its manifest states."""
    return shard.exists() and shard.stat().st_size == manifest["file_bytes"]


def _first_shards(metadata: Mapping) -> int:
    return -(-metadata["inputs"] // metadata["inputs_per_shard"])


def manifest_path(folder: Path, shard: int) -> Path:
    """Return where the manifest of a shard lies."""
    return folder / "manifest" / f"{shard:05d}.json"


def read_json(path: Path) -> dict:
    """Read one of the JSON files of a set (UserError if it cannot be read)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); delete its set and encode it again.") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
