"""Which clips of the built-in world (`shapes_world.py`) are for what: nothing is measured on what was learnt.

A number decides scene, clip and caption, the same everywhere. Every purpose has numbers of its own:

| numbers | for | first number |
| --- | --- | --- |
| 0 to 499,999 | training: clips, then captions that are prompts; captions of the tiny tokenizer | FIRST_TRAINING_CLIP |
| 500,000 on | evaluation: held-out captions, and their real clips beside them | FIRST_HELD_OUT_CLIP |
| 999,936 to 999,999 | mean and deviation of the tiny VAE's latents | FIRST_VAE_CLIP - VAE_STATISTICS_CLIPS |
| 1,000,000 on | training the tiny VAE | FIRST_VAE_CLIP |
| 2,000,000 on | captions of the tiny text encoder: first to measure, then to train it | FIRST_TEXT_ENCODER_CAPTION |
"""

from collections.abc import Mapping
from functools import partial

import numpy as np

from avd_jax.data import shapes_world
from avd_jax.data.inputs import Clip
from avd_jax.errors import UserError

FIRST_TRAINING_CLIP = 0
FIRST_HELD_OUT_CLIP = 500_000
FIRST_VAE_CLIP = 1_000_000
VAE_STATISTICS_CLIPS = 64  # these are the last ones before FIRST_VAE_CLIP
FIRST_TEXT_ENCODER_CAPTION = 2_000_000

WORLD_SIZE: Mapping[str, float] = {"frames": 17, "height": 64, "width": 64, "fps": 16.0}  # what weights/tiny knows


def training_clips(count: int, *, frames: int, height: int, width: int, style: str = "painted") -> list[Clip]:
    """Return the first training clips; each is drawn when it is read.

    Args:
      count: of clips.
      frames: of each clip.
      height: pixels.
      width: pixels.
      style: one of `shapes_world.STYLES`; the captions are the same in all.

    Raises:
      UserError: so many would reach into the held-out clips.
    """
    source = "shapes_world" if style == "painted" else f"shapes_world_{style}"
    return [
        Clip(
            clip_id=f"{source}@{index:06d}",
            caption=shapes_world.caption(index),
            source=source,
            read=partial(_draw, index, frames=frames, height=height, width=width, style=style),
        )
        for index in _training_numbers(0, count)
    ]


def training_prompts(count: int, *, clips: int) -> list[str]:
    """Return the captions of `count` training clips, those after the first `clips`; each different text once.

    Raises:
      UserError: so many would reach into the held-out clips.
    """
    return list(dict.fromkeys(map(shapes_world.caption, _training_numbers(clips, count))))


def _draw(index: int, **options) -> np.ndarray:
    return shapes_world.clip(index, **options)[0]


def _training_numbers(skipped: int, count: int) -> range:
    first = FIRST_TRAINING_CLIP + skipped
    if first + count > FIRST_HELD_OUT_CLIP:
        raise UserError(
            f"{skipped + count} clips and prompts of the world of shapes are too many: from {FIRST_HELD_OUT_CLIP} on "
            "they are held out for evaluation."
        )
    return range(first, first + count)
