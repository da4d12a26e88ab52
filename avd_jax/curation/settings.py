"""The fields of a curation's config: what is measured, which thresholds are applied, who writes the captions."""

import math
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

import ml_collections

from avd_jax.curation.analysis import DEFAULTS
from avd_jax.curation.motion import PRESETS
from avd_jax.curation.selection import HASH_BITS
from avd_jax.data.inputs import check_clip_size
from avd_jax.fields import (
    Check,
    Field,
    Fields,
    all_local,
    anything,
    at_least,
    check_values,
    config_from,
    not_negative,
    on_disk,
    one_of,
    positive,
    require,
)

# Of the paper, section 6, verbatim.
PROMPT = (
    "Please describe the details of this video, focusing on concrete aspects such as objects, people, colors, "
    "actions, and spatial relationships. Do not include any subjective descriptions related to symbolism, "
    "implication, or emotions."
)
VIDEO, IMAGES = "video", "images"


def _kept_share(value: float) -> str | None:
    return None if 0 < value <= 1 else "must be a share, above 0, at most 1; 1 keeps all"


def _bits(value: float) -> str | None:
    return None if 0 <= value < HASH_BITS / 2 else f"must be at least 0 and below {HASH_BITS // 2}"


def _cosine(value: float) -> str | None:
    return None if 0 < value <= 1 else "must be a cosine, above 0, at most 1; 1 finds none"


def _endpoint(value: str) -> str | None:
    if not value:
        return None
    try:
        parts = urlsplit(value)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or (parts.port == 0)
    except ValueError:
        wrong = True
    if wrong or not value.isascii() or any(letter.isspace() for letter in value) or ".." in parts.netloc:
        return "must be the address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1"
    return "must hold no password; config.caption.api_key_env names where the key is" if "@" in parts.netloc else None


def _above_one(value: float) -> str | None:
    return None if 1 < value < math.inf else "must be above 1"


def _spans(values: tuple) -> str | None:
    return None if values and all(value >= 2 for value in values) else "must be whole numbers of at least 2"


def _frames(values: tuple) -> str | None:
    return None if values and all(value >= 0 for value in values) else "must be frames of a clip, counted from 0"


# Of numbers; those that are not here must be positive, whole ones at least 1.
_ANALYSIS_CHECKS: Mapping[str, Check] = {
    "analysis.clips_per_scene": at_least(0),
    "analysis.cuts.quiet_chroma": at_least(0),
    "analysis.cuts.trim_seconds": not_negative,
    "analysis.cuts.gradual.short_spans": _spans,
    "analysis.cuts.gradual.long_spans": _spans,
    "analysis.cuts.gradual.moving_spans": _spans,
    "analysis.cuts.gradual.faded": not_negative,
    "analysis.looks.at": _frames,
    "analysis.looks.of": at_least(2),
    "analysis.colour.base": _above_one,
    "analysis.colour.floor": at_least(0),
    "analysis.motion.still": not_negative,
    "analysis.motion.preset": one_of(PRESETS),
    "analysis.codec_motion": anything,
}


ANALYSIS_HELP: Mapping[str, str] = {
    "frames": "frames of a clip, 4n+1, as the model takes them",
    "fps": "frames a second of a clip; videos are resampled as when they are encoded",
    "clips_per_scene": "most clips of one scene, evenly spread; 0: as many as fit back to back",
    "cuts.short_side": "pixels of the pictures in which hard cuts are looked for",
    "cuts.adaptive_threshold": "a cut changes so many times as much as the frames around it; PySceneDetect's",
    "cuts.min_content_val": "a cut changes so much at least, of 255; PySceneDetect's 15 misses half of the dark ones",
    "cuts.window_width": "frames on either side that are the ones around a cut; PySceneDetect's",
    "cuts.min_scene_frames": "frames of the shortest scene; PySceneDetect's 15 hides a cut close behind another",
    "cuts.quiet_chroma": "levels of chroma below which a pixel counts as grey, whose hue is noise",
    "cuts.trim_seconds": "seconds that are left out on both sides of a cut",
    "cuts.gradual.short_spans": "pictures from one side of a short fade or dissolve to the other, each tried",
    "cuts.gradual.step": "seconds between the pictures that are compared for long fades and dissolves",
    "cuts.gradual.long_spans": "as short_spans, for long ones, counted in steps of cuts.gradual.step",
    "cuts.gradual.moving_spans": "as long_spans, where the scenes may move",
    "cuts.gradual.residual": "of a dissolve: most that is no mixture of both sides, as a share of their difference",
    "cuts.gradual.sum": "of a dissolve: most that the two shares of a mixture are together",
    "cuts.gradual.resemblance": "most correlation between both sides; above it they are one scene",
    "cuts.gradual.around": "most that either side changes in itself, as a share of their difference",
    "cuts.gradual.moving_residual": "as residual, for moving_spans",
    "cuts.gradual.moving_around": "as around, for moving_spans",
    "cuts.gradual.uneven": "of a fade: most by which its contrast is off an even course, as a share of the change",
    "cuts.gradual.contrast": "levels of contrast that one side has at least",
    "cuts.gradual.change": "levels by which most of the picture differs between both sides, from its mean, at least",
    "cuts.gradual.spread": "as change, a share of the mean difference, which a single thing that moves makes larger",
    "cuts.gradual.plain": "levels of contrast below which a picture shows nothing: the end of a fade",
    "cuts.gradual.faded": "as plain, a share of the contrast of the fade's other side: a title on black, say",
    "looks.at": "frames that colour and sharpness are measured in, counted from 0: the paper's",
    "looks.of": "frames of a clip that looks.at is for; of other lengths it is scaled",
    "looks.light": "dark pictures are made brighter before they are measured, by this factor at most",
    "colour.short_side": "pixels of the picture whose hues are counted; so small, the noise of grey averages out",
    "colour.bins": "bins of the histogram of hues",
    "colour.base": "of the entropy's logarithm; e",
    "colour.floor": "levels of chroma, max - min of R'G'B', up to which a pixel counts as grey",
    "colour.grey": "mean chroma above that floor that makes a picture half colourful",
    "sharpness.short_side": "pixels of the picture whose Laplacian is taken",
    "motion.short_side": "pixels at which optical flow is computed; it is told in pixels at 720",
    "motion.still": "levels; where a picture changes by less, it is noise and counts as unmoved",
    "motion.preset": "of OpenCV's DIS flow: ultrafast, fast or medium",
    "codec_motion": "read the codec's motion vectors too, which cost no flow",
    "hash.pictures": "pictures of a clip that are hashed to find copies: evenly spread, first and last included",
}


def _analysis(defaults: Mapping, path: str = "analysis") -> Iterator[tuple[str, Field]]:
    for name, default in defaults.items():
        place = f"{path}.{name}"
        if isinstance(default, Mapping):
            yield from _analysis(default, place)
        else:
            usual = at_least(16 if name == "short_side" else 1) if isinstance(default, int) else positive
            check = _ANALYSIS_CHECKS.get(place, usual)
            yield place, Field(default, ANALYSIS_HELP[place.removeprefix("analysis.")], check)


FIELDS: Fields = {
    **dict(_analysis(DEFAULTS)),
    "select.width": Field(
        1280, "pixels that a video has at least, as it is shown; upright ones are measured on their side", at_least(1)
    ),
    "select.height": Field(720, "likewise", at_least(1)),
    "select.colour": Field(0.60, "least entropy of the hues; below it a clip is monochrome", not_negative),
    "select.sharpness": Field(20.0, "least variance of the Laplacian; below it a clip is blurred", not_negative),
    "select.motion": Field(0.2, "least mean optical flow; below it a clip is still", not_negative),
    "select.codec_motion": Field(0.0, "least mean of the codec's motion vectors; 0: not asked", not_negative),
    "select.temporal_consistency": Field(0.5, "share of the clips left that stays, the most consistent", _kept_share),
    "select.aesthetics": Field(0.5, "share of the clips left that stays, the most beautiful", _kept_share),
    "select.duplicate_bits": Field(8.0, "most bits of 64 that differ between copies, mean over their frames", _bits),
    "select.duplicate_cosine": Field(0.95, "two clips with more, between their CLIP embeddings, are copies", _cosine),
    "features.weights": Field("", "folder with CLIP, DINO and the aesthetic head; empty: these are skipped", on_disk),
    "features.all": Field(False, "score clips too that an earlier stage rejects; dear, and for looking only"),
    "caption.endpoint": Field("", "base address of an OpenAI-compatible server, ends in /v1; empty: none", _endpoint),
    "caption.model": Field("", "name of the model there"),
    "caption.prompt": Field(PROMPT, "what it is asked; the default is the paper's"),
    "caption.api_key_env": Field("CAPTION_API_KEY", "environment variable that holds the key, if one is needed"),
    "caption.keep_given": Field(True, "keep captions that came with the videos, and ask for the others only"),
    "caption.keep_truncated": Field(False, "take captions that max_tokens has cut off"),
    "caption.send": Field(
        VIDEO, "the clip as a video, or as images for servers that know none", one_of((VIDEO, IMAGES))
    ),
    "caption.held_out": Field(
        "",
        "lists of prompts that a model will be judged by, separated by commas; clips whose captions are like one of "
        "them are rejected",
        all_local,
    ),
    "caption.images": Field(8, "how many images, evenly spread", at_least(1)),
    "caption.height": Field(480, "pixels to which the clip is shrunk", at_least(16)),
    "caption.fps": Field(4.0, "frames a second of what is sent, at most the clip's; models look at about 2", positive),
    "caption.max_tokens": Field(512, "length of a caption", at_least(1)),
    "caption.temperature": Field(0.0, "of the model's sampling; 0: its likeliest words", not_negative),
    "caption.concurrency": Field(8, "clips asked for at once", at_least(1)),
    "caption.timeout": Field(120.0, "seconds for an answer", positive),
    "caption.tries": Field(3, "times that a clip is asked for", at_least(1)),
    "caption.wait": Field(1.0, "seconds before the second try; doubled before each further one", not_negative),
    "limits.seconds": Field(21600.0, "for one video; what takes longer is left out", positive),
    "limits.memory_gib": Field(4.0, "of a worker; a video that needs more is left out", positive),
    "report.pictures": Field(12, "clips of each kind that report.html shows", at_least(0)),
    "report.picture_width": Field(224, "pixels", at_least(16)),
}


def default_config() -> ml_collections.ConfigDict:
    """Return a config with every field at its default; fields can be set, not added."""
    return config_from(FIELDS)


def validate(config) -> None:
    """Check all that can be checked without files (UserError names the field)."""
    flat = check_values(config, FIELDS)
    check_clip_size(frames=config.analysis.frames, height=16, width=16, prefix="config.analysis.")
    if max(config.analysis.looks.at) >= config.analysis.looks.of:
        require("analysis.looks.at", config.analysis.looks.at, f"must be below looks.of={config.analysis.looks.of}")
    if flat["caption.endpoint"] and not flat["caption.model"]:
        require("caption.model", "", "is empty: name the model that config.caption.endpoint serves")
