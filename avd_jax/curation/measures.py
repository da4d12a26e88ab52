"""The scores of one clip, collected while its pictures pass by."""

from collections.abc import Mapping

import numpy as np

from avd_jax.curation.hashes import METHOD as HASH_METHOD
from avd_jax.curation.hashes import SIDE, perceptual_hash
from avd_jax.curation.looks import (
    colour_method,
    hue_entropy,
    in_even_light,
    laplacian_variance,
    sharpness_method,
)
from avd_jax.curation.motion import CODEC_METHOD, COMPARED, CYCLE, MEASURED, Flow, codec_motion
from avd_jax.curation.pictures import Picture, shrunk, small_size
from avd_jax.data.picture import display_matrix, is_on_its_side, shown
from avd_jax.data.video_file import VideoFile


class Tools:
    """What all clips share: settings, the flow algorithm, and which frames of a clip are looked at."""

    def __init__(self, settings: Mapping):
        self.settings = settings
        self.flow = Flow(settings["motion"])
        last, looks, count = settings["frames"] - 1, settings["looks"], settings["hash"]["pictures"]
        self.looked_at = {round(at * last / (looks["of"] - 1)) for at in looks["at"]}
        self.hashed = np.rint(np.linspace(0, last, count)).astype(int).tolist()


class ClipMeasures:
    """Takes the frames of one clip in order."""

    def __init__(self, tools: Tools, file: VideoFile, shape: tuple[int, int]):
        """Begin a clip of a file whose pictures have this (width, height) in square pixels."""
        self._tools, self._file, self._shape = tools, file, shape
        self._flow_size = small_size(*shape, tools.settings["motion"]["short_side"])
        self._before = self._grey = None
        self._entropies: dict[int, float] = {}
        self._sharpness: dict[int, float] = {}
        self._sizes: dict[str, list[int]] = {}
        self._flow: list[float] = []
        self._codec: list[float] = []
        self._hashes: list[str] = []

    def frame(self, number: int, picture: Picture) -> None:
        """Take frame `number` of the clip."""
        measured = number % CYCLE in MEASURED
        if number and measured:
            same = picture is self._before
            self._flow.append(0.0 if same else self._tools.flow.between(self._grey, self._grey_of(picture)))
        self._before = picture
        if number % CYCLE in COMPARED:
            self._grey = self._grey_of(picture)
        if measured and self._tools.settings["codec_motion"]:
            found = codec_motion(picture.frame)
            if found is not None:
                self._codec.append(found)
        if number in self._tools.looked_at:
            self._look(number, picture)
        if repeats := self._tools.hashed.count(number):
            self._hashes += [perceptual_hash(shrunk(self._grey_of(picture), (SIDE, SIDE)))] * repeats

    def scores(self) -> dict:
        """Return the scores: name -> value, method, size [width, height] of the picture measured, and details."""
        settings = self._tools.settings
        light = settings["looks"]["light"]
        scores = {
            "colour": self._looks("colour", self._entropies, colour_method(settings["colour"], light)),
            "sharpness": self._looks("sharpness", self._sharpness, sharpness_method(settings["sharpness"], light)),
            "hash": {"value": self._hashes, "method": HASH_METHOD, "size": [SIDE, SIDE]},
        }
        if self._flow:
            value = round(float(np.mean(self._flow)), 4)
            scores["motion"] = {"value": value, "method": self._tools.flow.method, "size": list(self._flow_size)}
        if self._codec:
            value = float(np.mean(self._codec))
            scores["codec_motion"] = {"value": value, "method": CODEC_METHOD, "size": list(self._shape)}
            scores["codec_motion"]["pictures"] = len(self._codec)
        return scores

    def _grey_of(self, picture: Picture) -> np.ndarray:
        return picture.grey(self._flow_size)

    def _looks(self, name: str, values: dict[int, float], method: str) -> dict:
        frames = sorted(values)
        score = {"value": float(np.median(list(values.values()))), "method": method, "size": self._sizes[name]}
        return score | {"frames": frames, "values": [values[frame] for frame in frames]}

    def _look(self, number: int, picture: Picture) -> None:
        """Measure colour and sharpness on the picture as the encoder will see it."""
        settings = self._tools.settings
        pixels = shown(picture.frame, self._file.tags, self._file.path)
        # `shown` has turned it the right way up.
        on_its_side = is_on_its_side(display_matrix(picture.frame))
        shape = self._shape[::-1] if on_its_side else self._shape
        pixels = self._shrunk("sharpness", pixels, shape)
        pixels = in_even_light(pixels, settings["looks"]["light"])
        self._sharpness[number] = laplacian_variance(pixels)
        self._entropies[number] = hue_entropy(self._shrunk("colour", pixels, shape), settings["colour"])

    def _shrunk(self, name: str, pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        size = small_size(*shape, min(self._tools.settings[name]["short_side"], *shape))
        self._sizes[name] = list(size)
        return shrunk(pixels, size)
