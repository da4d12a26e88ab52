"""What CLIP and DINO are given: pictures scaled, cut and normalised as their authors do it, and as VBench does.

| | source | shorter side | by | centre cut out |
| --- | --- | --- | --- | --- |
| `CLIP` | `clip/clip.py`, transformers' CLIPImageProcessor | 224 | Pillow's bicubic, on bytes | 224 x 224 |
| `DINO` | `eval_knn.py` | 256 | Pillow's bicubic, on bytes | 224 x 224 |
| `VBENCH_CLIP` | VBench's `clip_transform` | 224 | bicubic without antialiasing, on floats | 224 x 224 |
| `VBENCH_DINO` | VBench's `dino_transform` | 224 | bilinear without antialiasing, on floats | no |

The longer side is rounded down. VBench's filters skip pixels of what they shrink: they are here for its figures, and
Pillow's, with which the models were trained, for all else.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from avd_jax.models.resampling import resampled, taps

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become a model's input.

    Attributes:
      mean: of red, green and blue in [0, 1], which becomes 0.
      std: likewise, which becomes 1.
      shorter_side: pixels after scaling.
      crop: pixels of a side of the square that is cut out of the centre; None to keep all.
      antialias: whether Pillow scales, which filters what it shrinks, or the interpolation of PyTorch.
      cubic: whether that interpolation is bicubic, or bilinear.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    shorter_side: int = 224
    crop: int | None = 224
    antialias: bool = True
    cubic: bool = True

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Return float32 [F h w 3] for uint8 frames [F H W 3]."""
        height, width = frames.shape[1:3]
        shorter = min(height, width)
        size = tuple(self.shorter_side * side // shorter for side in (height, width))
        scale = self._pillow if self.antialias else self._interpolated
        return self.normalised(centre(np.stack([scale(frame, size) for frame in frames]), self.crop))

    def normalised(self, frames: np.ndarray) -> np.ndarray:
        """Return float32 frames with this mean and std for frames in 0..255."""
        mean, std = (np.asarray(value, np.float32) for value in (self.mean, self.std))
        return (frames.astype(np.float32) / 255 - mean) / std

    def _pillow(self, frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(frame))
        return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))

    def _interpolated(self, frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        frame = frame.astype(np.float32)
        for axis in (0, 1):
            frame = resampled(frame, axis, *taps(frame.shape[axis], size[axis], cubic=self.cubic))
        return frame


CLIP = Preprocessing(CLIP_MEAN, CLIP_STD)
DINO = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, shorter_side=256)
VBENCH_CLIP = Preprocessing(CLIP_MEAN, CLIP_STD, antialias=False)
VBENCH_DINO = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, crop=None, antialias=False, cubic=False)


def centre(frames: np.ndarray, side: int | None) -> np.ndarray:
    """Return the square of `side` pixels in the centre of frames [F H W 3]; all of them for None."""
    if side is None:
        return frames
    # An odd rest is halved as torchvision's CenterCrop does it: to an even number of pixels.
    top, left = (round((size - side) / 2) for size in frames.shape[1:3])
    return frames[:, top : top + side, left : left + side]
