"""What vision models say of a clip: its temporal consistency, its aesthetics, and an embedding to find copies by.

The frames are those that would be encoded (`data.video.read_video`), scaled with Pillow's Lanczos filter. DINO sees
the whole picture, its shorter side 224 pixels and its longer side a multiple of 16 up to 448; CLIP sees the 224 x 224
pixels in its centre. VBench shrinks without a filter (`models/vit_images.py`), so its figures differ a little.

Matrix products are in bfloat16 on an accelerator and in float32 on a CPU; norms, softmax and the residual stream are
float32 everywhere.
"""

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avd_jax.convert.aesthetic_head import AestheticHead
from avd_jax.convert.vision_folder import checked_folder, find
from avd_jax.convert.weights import Weights, load_module
from avd_jax.data.video import frame_rate_and_size, read_video
from avd_jax.models import vit_images
from avd_jax.models.vit import VIT_MODELS
from avd_jax.models.vit_features import CONSISTENCY, consistencies, linear_scores, unit

SIDE, LONGEST = 224, 448  # pixels
BATCH = 32  # frames at a time, at most
AESTHETIC_FRAMES = 8  # as the paper has it
DINO, CLIP_B, CLIP_L = "DINO ViT-B/16", "CLIP ViT-B/32", "CLIP ViT-L/14"
# Those that come first are preferred: VBench's subject consistency has DINO, its background consistency CLIP ViT-B/32.
_FOR_CONSISTENCY, _FOR_EMBEDDING = (DINO, CLIP_B, CLIP_L), (CLIP_L, CLIP_B)


class Encoder:
    """One vision transformer; its weights are read when it is first used.

    Attributes:
      name: which model, of VIT_MODELS.
      description: the same with its file and the dtype of its matrix products.
      sees_all: whether it takes pictures of any size, or squares.
    """

    def __init__(self, name: str, weights: Weights):
        self.name, self._weights = name, weights
        self.sees_all = not weights.config.clip
        self._dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.description = f"{name} ({weights.files[0].name}) in {jnp.dtype(self._dtype).name}"

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Return float32 [F D] for uint8 frames [F H W 3], of which CLIP takes the centre."""
        frames = self._seen(frames)
        size = math.ceil(len(frames) / math.ceil(len(frames) / BATCH))  # no part is much smaller than the others
        padded = np.concatenate([frames, frames[-1:].repeat(-len(frames) % size, 0)])
        parts = [self._apply(padded[start : start + size]) for start in range(0, len(padded), size)]
        return np.concatenate([np.asarray(part) for part in parts])[: len(frames)]

    def size(self, frames: np.ndarray) -> list[int]:
        """Return [width, height] of what it sees of frames [F H W 3]."""
        return list(self._seen(frames).shape[2:0:-1])

    def _seen(self, frames: np.ndarray) -> np.ndarray:
        return frames if self.sees_all else vit_images.centre(frames, self._weights.config.image_size)

    @functools.cached_property
    def _apply(self):
        graph, state = nnx.split(load_module(self._weights, self._dtype))
        normalised = (vit_images.CLIP if self._weights.config.clip else vit_images.DINO).normalised
        apply = jax.jit(lambda state, frames: nnx.merge(graph, state)(normalised(frames)))
        return functools.partial(apply, state)


@dataclass(frozen=True)
class Models:
    """The models of a folder.

    Attributes:
      consistency: for temporal consistency, or None.
      clip_l: CLIP ViT-L/14 for aesthetics, or None.
      head: on its embeddings, or None.
      embedding: for the embedding, or None.
      missing: "temporal_consistency" or "aesthetics" -> why it cannot be told.
    """

    consistency: Encoder | None = None
    clip_l: Encoder | None = None
    head: AestheticHead | None = None
    embedding: Encoder | None = None
    missing: dict[str, str] = field(default_factory=dict)


def load(folder: str | Path) -> Models:
    """Find the models in a folder and the folders within, by their keys and shapes; their weights are read later.

    Args:
      folder: holds any of CLIP ViT-L/14, CLIP ViT-B/32, DINO ViT-B/16 and an aesthetic head, in the files that
        `convert.load_vit` and `load_aesthetic_head` know.

    Raises:
      UserError: no such folder; or a model is missing, and a file whose name is like one of theirs is damaged.
    """
    folder = checked_folder(folder)
    files = find(folder, VIT_MODELS)
    found = {name: Encoder(name, weights) for name, weights in files.vits.items()}
    width = VIT_MODELS[CLIP_L].feature_dim
    fitting = [head for head in files.heads if len(head.weight) == width]
    unfit = [head for head in files.heads if len(head.weight) != width]
    others = files.others + [f"an aesthetic head for {len(head.weight)} features" for head in unfit]
    missing = _missing(folder, found, bool(fitting), others)
    if missing and files.damaged:
        raise files.damaged[0]
    return Models(
        consistency=next((found[name] for name in _FOR_CONSISTENCY if name in found), None),
        clip_l=found.get(CLIP_L),
        head=fitting[0] if fitting else None,
        embedding=next((found[name] for name in _FOR_EMBEDDING if name in found), None),
        missing=missing,
    )


def temporal_consistency(features: np.ndarray) -> float:
    """Return VBench's consistency of features [F D], in 0..1.

    It is the mean of `models/vit_features.py`'s `consistencies`.

    Raises:
      ValueError: fewer than two frames.
    """
    return float(np.mean(consistencies(features)))


def aesthetic(embeds: np.ndarray, head: AestheticHead) -> float:
    """Return the mean over frames of the head's score of the unit-norm embeddings [F D].

    VBench's aesthetic quality is a tenth of it, with the linear head.
    """
    return float(np.mean(_aesthetics(embeds, head)))


def sampled(frames: int, count: int = AESTHETIC_FRAMES) -> np.ndarray:
    """Return the indices of `count` uniformly sampled frames: the middle ones of so many equal parts of the clip."""
    return ((np.arange(count) + 0.5) * frames / count).astype(int)


def score(models: Models, path: str | Path, start: float, end: float, frames: int, fps: float) -> dict:
    """Return the scores of a clip for which there are models.

    Args:
      models: from `load`.
      path: the video.
      start, end: seconds; the clip ends where its frames do.
      frames: of the clip.
      fps: of the clip.

    Returns:
      "temporal_consistency", "aesthetics" and "embedding" -> {"value", "method", "size": [width, height] of what the
      model sees, ...}. Those of the first two hold "values", a number a frame. The embedding is the unit-norm mean of
      the unit-norm embeddings of 8 frames.

    Raises:
      UserError: the video cannot be read, or ends before the clip does.
    """
    del end
    if models.consistency is None and models.embedding is None:
        return {}
    clip = _read(path, start, frames, fps, whole=models.consistency is not None and models.consistency.sees_all)
    scores = {}
    if models.consistency is not None:
        values = consistencies(models.consistency(clip))
        scores["temporal_consistency"] = {
            "value": _rounded(np.mean(values)),
            "method": f"VBench's consistency: {CONSISTENCY}; {models.consistency.description}; all frames",
            "size": models.consistency.size(clip),
            "values": [_rounded(value) for value in values],
        }
    if models.embedding is not None:
        chosen = sampled(frames)
        embeds = models.embedding(clip[chosen])
        mean = unit(unit(embeds).mean(0))
        scores["embedding"] = {
            "value": [_rounded(value) for value in mean],
            "method": f"mean of the unit-norm embeddings of {len(chosen)} frames; {models.embedding.description}",
            "size": models.embedding.size(clip),
        }
        if models.embedding is models.clip_l and models.head is not None:
            values = _aesthetics(embeds, models.head)
            head = f"{models.head.name} ({models.head.file})"
            scores["aesthetics"] = {
                "value": _rounded(np.mean(values)),
                "method": f"{head} on {models.clip_l.description}; mean of {len(chosen)} frames",
                "size": models.clip_l.size(clip),
                "frames": chosen.tolist(),
                "values": [_rounded(value) for value in values],
            }
    return scores


def _read(path: str | Path, start: float, frames: int, fps: float, *, whole: bool) -> np.ndarray:
    """Return uint8 [F H W 3]: the clip as DINO sees it, or the square in its centre."""
    height = width = SIDE
    if whole:
        _, height, width = frame_rate_and_size(path)
        patch = VIT_MODELS[DINO].patch_size
        shorter = min(height, width)
        # Few different sizes, since the network is compiled for each.
        height, width = (min(LONGEST, SIDE * side // shorter // patch * patch) for side in (height, width))
    video = read_video(path, frames=frames, fps=fps, height=height, width=width, start=start)
    return np.rint((video + 1) * 127.5).astype(np.uint8)


def _missing(folder: Path, found: dict, head: bool, others: list[str]) -> dict[str, str]:
    beside = f" ({'; '.join(others)})" if others else ""
    missing = {}
    if not found:
        missing["temporal_consistency"] = f"no {DINO} in {folder}, nor {CLIP_B} or {CLIP_L}{beside}"
    lacking = [name for name, there in ((CLIP_L, CLIP_L in found), ("aesthetic head for it", head)) if not there]
    if lacking:
        missing["aesthetics"] = f"no {' and no '.join(lacking)} in {folder}{beside}"
    return missing


def _aesthetics(embeds: np.ndarray, head: AestheticHead) -> np.ndarray:
    return linear_scores(embeds, weight=head.weight, bias=head.bias)


def _rounded(value: float) -> float:
    return round(float(value), 6)
