"""The networks of VBench's dimensions as functions of uint8 frames, with VBench's preprocessing; all in float32."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avd_jax.evaluation.vbench.measures import TooSmallError
from avd_jax.models import raft, vit_images
from avd_jax.models.raft import RAFT, STEPS
from avd_jax.models.vit import VisionTransformer

BATCH = 16  # frames at a time


def features_of(model: VisionTransformer) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from uint8 frames [F H W 3] to the features [F D] of CLIP or DINO as VBench makes them."""
    side = model.config.image_size
    official = vit_images.VBENCH_CLIP if model.config.clip else vit_images.VBENCH_DINO
    prepared = dataclasses.replace(official, shorter_side=side, crop=official.crop and side)
    graph, state = nnx.split(model)
    apply = jax.jit(lambda state, images: nnx.merge(graph, state)(images))

    def features(frames: np.ndarray) -> np.ndarray:
        # Filled up to whole batches, since each number of frames would be compiled anew.
        filled = np.concatenate([frames, frames[-1:].repeat(-len(frames) % BATCH, 0)])
        parts = (filled[start : start + BATCH] for start in range(0, len(filled), BATCH))
        return np.concatenate([np.asarray(apply(state, prepared(part))) for part in parts])[: len(frames)]

    return features


def flow_of(model: RAFT) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a function from two uint8 frames [H W 3] to the flow of the padded frames, which is what VBench looks at.

    The function raises a TooSmallError for frames that are too small for the network.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def apply(state, first, second):
        pair = (raft.padded(frame[None].astype(jnp.float32)) for frame in (first, second))
        return nnx.merge(graph, state)(*pair, steps=STEPS)[0]

    def flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        height, width = first.shape[:2]
        if min(height, width) <= raft.SMALLEST - raft.SCALE:
            raise TooSmallError(
                f"frames of {width}x{height} are too small for RAFT, which takes {raft.SMALLEST} pixels of a side on; "
                "leave dynamic_degree and temporal_flickering out"
            )
        return np.asarray(apply(state, first, second))

    return flow
