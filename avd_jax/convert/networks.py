"""The network that is wanted, among the tensors of a file that may wrap it, hold several, or hold something else.

A file's keys are the network's own behind a prefix that its trainer or packager chose: `model.`, `pipe.dit.`,
`generator_ema.model.`, `model.diffusion_model.`. So no list of prefixes is needed: the prefix is what stands before
the keys that the conversion table knows. Several prefixes with about as many known keys are several networks.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from avd_jax.convert.architectures import ARCHITECTURES, SCORING, Architecture
from avd_jax.convert.files import LORA, NotHereError, Stored, TensorFile, is_matrix
from avd_jax.errors import UserError, closest, note

DEFAULT = "generator"

# Parts that wrappers put into keys, at the front or once a block: FSDP, activation checkpointing, torch.compile,
# DeepSpeed, DistributedDataParallel. No key of a network has one of its own.
_WRAPPERS = {
    *("_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"),
    *("_orig_mod", "_forward_module", "module"),
}

# Keys of adapters, in the spellings of kohya, PEFT, diffusers, ComfyUI, LyCORIS and DiffSynth.
_ADAPTER = re.compile(
    r"(^|[._])lora([._]|$)|lora_(up|down|mid|[ab]|te|unet)|(hada|lokr)_[wt]\d|(^|\.)b?oft_(blocks|diag|r)"
    r"|dora_scale|\.diff(_b|_m)?$|\.(set|reshape)_weight$|vera_lambda|(^|\.)ia3_l",
    re.IGNORECASE,
)
# Of a float8 matrix `X.weight`: `X.scale_weight` (ComfyUI), or `X.weight_scale` (later ComfyUI, compressed tensors).
_SCALES = ("scale_weight", "weight_scale")
# What lies beside such matrices and is not needed: marks of the format, and scales of activations.
_BESIDE_FLOAT8 = re.compile(r"(^|\.)(scaled_fp8|comfy_quant|scale_input|input_scale)$")

# A student that makes its frames one after another: what its config, its file's metadata or its path says.
_CAUSAL_ENTRIES = ("num_frame_per_block", "local_attn_size", "sink_size", "independent_first_frame", "causal")
_NAMING_ENTRIES = ("_class_name", "generator_name", "generator_type", "model_name")
_CAUSAL_NAME = re.compile(r"causal|causvid|autoregressive|(self|rolling)[-_. ]?forcing|longlive", re.IGNORECASE)
_NOT_CAUSAL_NAME = re.compile(r"bidirect|non[-_. ]?causal", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class _Found:
    """One network in a file: the prefix of its keys, and what a user calls it."""

    prefix: str
    name: str


def network_in(
    tensors: Mapping[str, Stored], architecture: Architecture, key: str, *, name: str, asked: str, strict: bool
) -> dict[str, Stored]:
    """Return the tensors of one network under its own keys.

    Args:
      tensors: of the file, or of all files of a folder.
      architecture: the network that is wanted.
      key: which, if there are several: "generator", which is also the only one by another name, or another name; ""
        for the only one.
      name: what messages call the source.
      asked: the path that the user gave, for messages about `key`.
      strict: whether `key` must be there if there is only one.

    Raises:
      UserError: a LoRA, quantised weights, or several networks of which `key` names none.
      NotHereError: another network.
    """
    _check_adapter(tensors, name)
    plain = {_without_wrappers(stored_key): tensor for stored_key, tensor in tensors.items()}
    counts = _prefixes(plain, architecture)
    if not counts:
        _check_other(plain, architecture, name)
    prefix = _choose(counts, key, asked, strict)
    start = f"{prefix}." if prefix else ""
    inside = {k.removeprefix(start): tensor for k, tensor in plain.items() if k.startswith(start)}
    known = _known(architecture)
    homes = {tensor.home for k, tensor in inside.items() if _pattern(k) in known}
    inside = {k: tensor for k, tensor in inside.items() if tensor.home in homes or not homes}
    for other, own in architecture.aliases:
        if own not in inside and other in inside:
            inside[own] = inside.pop(other)
    inside = {k: tensor for k, tensor in inside.items() if not k.startswith(architecture.ignored)}
    return _weights_only(inside, known, name)


def holds(file: TensorFile, architecture: Architecture) -> bool:
    """Whether a file has such a network, to tell the files of a folder apart."""
    return bool(_prefixes({_without_wrappers(key): None for key in file.leaves}, architecture))


def most_like(keys: Iterable[str], architectures: Iterable[Architecture]) -> Architecture | None:
    """Return the network that most of the keys are of, or None."""
    keys = [_without_wrappers(key) for key in keys]
    counts = {one: max(_prefixes(keys, one).values(), default=0) for one in architectures}
    best = max(counts, key=counts.get)
    return best if counts[best] else None


def is_causal(entries: Mapping, metadata: Mapping, path) -> bool:
    """Whether a transformer was trained to make its frames one after another.

    Args:
      entries: of its config.json.
      metadata: what its file says of itself or of its training.
      path: of its file, whose own and folder's name may say so.
    """
    for said in (entries, metadata):
        if any(said.get(field) not in (None, False, -1, 0, "-1") for field in _CAUSAL_ENTRIES):
            return True
    names = " ".join(str(said.get(field, "")) for said in (entries, metadata) for field in _NAMING_ENTRIES)
    names += f" {path.parent.name}/{path.name}"
    return bool(_CAUSAL_NAME.search(names)) and not _NOT_CAUSAL_NAME.search(names)


def note_causal(name: str) -> None:
    """Say that a causal student is run in another way than it was trained."""
    note(
        f"{name}: looks like a causal student, which was trained to make its frames one after another; here every "
        "frame sees all others, so its videos may be worse"
    )


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _pattern(key: str) -> str:
    """Return a key with all numbers alike, layers' and others'."""
    return ".".join("{}" if part.isdigit() else part for part in key.split("."))


@functools.cache
def _known(architecture: Architecture) -> frozenset[str]:
    config = architecture.config_class()
    tables = (architecture.native_rules(config), architecture.diffusers_rules(config))
    return frozenset(_pattern(rule.source) for table in tables for rule in table)


def _prefixes(keys: Iterable[str], architecture: Architecture) -> dict[str, int]:
    """Return prefix -> number of known keys behind it, of the networks that are there, in the file's order.

    A few keys are also known behind a longer prefix, such as `conv1.weight` in `encoder.conv1.weight`; so a prefix
    counts if most of the keys that the best one has are behind it.
    """
    known, counts = _known(architecture), Counter()
    for key in keys:
        parts = _pattern(key).split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in known:
                counts[".".join(key.split(".")[:i])] += 1
    most = max(counts.values(), default=0)
    enough = {prefix: count for prefix, count in counts.items() if 2 * count > most}
    least = min(4, len(known))  # fewer are chance
    return enough if most >= least else {}


def _named(prefixes: Iterable[str]) -> list[_Found]:
    """Return the networks with the names by which they differ: parts that all have at front or end are left out."""
    split = {prefix: prefix.split(".") if prefix else [] for prefix in prefixes}
    named = {prefix: list(parts) for prefix, parts in split.items()}
    if len(named) > 1:
        for end in (0, -1):
            while all(len(parts) > 1 for parts in named.values()) and len({p[end] for p in named.values()}) == 1:
                for parts in named.values():
                    parts.pop(end)
    firsts = [parts[0] if parts else "" for parts in named.values()]
    short = len(set(firsts)) == len(firsts)
    return [
        _Found(prefix, first if short else ".".join(parts))
        for (prefix, parts), first in zip(named.items(), firsts, strict=True)
    ]


def _choose(counts: Mapping[str, int], key: str, name: str, strict: bool) -> str:
    """Return the prefix of the network that `key` asks for."""
    found = _named(counts)
    asked = [one for one in found if key and key in (one.name, one.prefix)]
    asked = asked or [one for one in found if key and key in one.prefix.split(".")]
    if len(asked) == 1:
        return asked[0].prefix
    if len(found) <= 1 and (key in (DEFAULT, "", *_WRAPPERS) or not strict):
        return found[0].prefix if found else ""
    held = ", ".join(one.name or "one without a name" for one in found)
    if key in (DEFAULT, ""):
        raise UserError(f"{name}: holds several networks: {held}; choose one with --which NAME")
    if len(found) == 1 and found[0].name:
        raise UserError(f"{name}: holds no {key!r}, but only {held}{closest(key, [held])}; leave --which out")
    if len(found) <= 1:
        raise UserError(f"{name}: holds no {key!r}, but one network only; leave --which out")
    close = closest(key, [one.name for one in found])
    raise UserError(f"{name}: holds no {key!r}, but {held}{close}; choose one with --which NAME")


def _check_adapter(tensors: Mapping[str, Stored], name: str) -> None:
    marked = next((key for key in tensors if _ADAPTER.search(key)), None)
    if marked is not None:
        raise UserError(f"{name}: is a LoRA ({marked}), which changes a model and is none; {LORA}")


def _check_other(keys: Iterable[str], architecture: Architecture, name: str) -> None:
    """Say so when the weights are another network's, rather than list every key as unknown."""
    for other in (*ARCHITECTURES, *SCORING):
        if other is not architecture and _prefixes(keys, other):
            raise NotHereError(f"{name}: holds a {other.label}, not a {architecture.label}")


def _weights_only(inside: dict[str, Stored], known: frozenset[str], name: str) -> dict[str, Stored]:
    """Join float8 matrices with their scales, and leave out what is no weight: counters, random states, marks."""
    weights, joined = {}, set()
    for key, tensor in inside.items():
        if _pattern(key) in known:
            scales = [f"{key.removesuffix('weight')}{scale}" for scale in _SCALES]
            scale_key = next((k for k in scales if key.endswith(".weight") and k in inside), None)
            if tensor.stored_dtype.kind in "iub" and is_matrix(tensor.shape):
                raise UserError(
                    f"{name}: is quantised ({key} is {tensor.stored_dtype}); get the bf16 or fp16 .safetensors of the "
                    "model"
                )
            if scale_key is not None:
                scale = inside[scale_key]
                joined.add(scale_key)
                if scale.shape not in ((), (1,), (1, 1), tensor.shape[:1], (*tensor.shape[:1], 1)):
                    raise UserError(
                        f"{name}: {scale_key} has shape {scale.shape}, a scale a block; get the bf16 or fp16 "
                        ".safetensors of the model"
                    )
                tensor = dataclasses.replace(tensor, scale=scale)
            weights[key] = tensor
        elif not _BESIDE_FLOAT8.search(key) and tensor.stored_dtype.kind not in "iub" and tensor.shape:
            weights[key] = tensor  # unknown: the engine names it
    return {key: tensor for key, tensor in weights.items() if key not in joined}
