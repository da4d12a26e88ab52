"""Drawn scenes that look natural to the curation's measures, and what is wrong with others."""

import cv2
import numpy as np
import video_cases as cases

SIZE = (144, 256)  # height, width
SETTINGS = {"frames": 17, "fps": 16.0}
LAST = 28  # source frames at 25 a second that hold one such clip


def scene(seed, frames=LAST, size=SIZE, speed=2):
    """Return uint8 [F H W 3]: a window that slides over a coloured landscape with details of all sizes."""
    rng = np.random.default_rng(seed)
    height, width = size[0], size[1] + speed * frames
    canvas = np.zeros((height, width, 3), np.float32)
    for cell in (64, 24, 8, 3):
        grid = rng.normal(size=(height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        canvas += cell**0.5 * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    canvas = np.clip(128 + 40 * canvas / canvas.std(), 0, 255).astype(np.uint8)
    return np.stack([canvas[:, speed * i : speed * i + size[1]] for i in range(frames)])


def write(path, images, rate=25, crf=20, **track):
    """Write the pictures as H.264; `track` as `video_cases.Track`."""
    return cases.write(path, cases.Track(images, rate=rate, crf=str(crf), preset="veryfast", **track))


def blurred(images, sigma=8):
    return np.stack([cv2.GaussianBlur(image, (0, 0), sigma) for image in images])


def grey(images):
    return np.repeat(np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images])[..., None], 3, -1)


def mixed(before, after, length, at):
    """Dissolve one scene into another, over `length` frames around frame `at`."""
    share = np.clip((np.arange(len(before)) - at + length / 2) / length, 0, 1)[:, None, None, None]
    return ((1 - share) * before + share * after).astype(np.uint8)
