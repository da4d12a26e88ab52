"""The two suites as data: dimensions, folders, samples a prompt, file names, and what makes a total of their scores.

After Vchitect/VBench at 45e79ec: `evaluate.sh`, `vbench/__init__.py`, `scripts/constant.py`,
`scripts/cal_final_score.py`, and the same files under `VBench-2.0/` (there `vbench2/__init__.py`). The prompts are
theirs and not in this project: a user names their list.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from avd_jax.data.records import check_text
from avd_jax.errors import UserError, closest
from avd_jax.paths import any_path

LONGEST_NAME = 255  # bytes, of most file systems
TEMPORARY = len(".") + len(".tmp")  # what a file's name is longer by while it is written (data/atomic.py)


@dataclass(frozen=True)
class Suite:
    """What one of the two expects.

    Attributes:
      name: as `--suite` has it.
      title: as its authors write it.
      info: name of its list of prompts.
      prompts: dimension -> how many prompts its list has, in the order of the suite's own report.
      digest: of these prompts with their dimensions, see `Info.digest`.
      folders: dimension -> folder of its videos.
      samples: videos a prompt.
      more_samples: folder -> videos a prompt, where it has others.
      judged: results a prompt, where they are fewer than its videos: dimension -> how many.
      name_length: characters of the prompt that a file's name keeps; None for all.
      bounds: dimension -> (min, max) of the normalisation, where it is not (0, 1).
      weights: dimension -> its weight in its group, where it is not 1.
      groups: group -> its dimensions.
      group_weights: group -> its weight in the total.
      percent: dimensions whose results a video are 100 times what counts.
    """

    name: str
    title: str
    info: str
    prompts: Mapping[str, int]
    digest: str
    folders: Mapping[str, str]
    samples: int
    more_samples: Mapping[str, int]
    judged: Mapping[str, int]
    name_length: int | None
    bounds: Mapping[str, tuple[float, float]]
    weights: Mapping[str, float]
    groups: Mapping[str, tuple[str, ...]]
    group_weights: Mapping[str, float]
    percent: frozenset[str] = frozenset()

    @property
    def dimensions(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self.prompts)

    def samples_in(self, folder: str) -> int:
        """Return how many videos of a prompt lie in a folder."""
        return self.more_samples.get(folder, self.samples)

    def results_of(self, dimension: str) -> int:
        """Return how many results the official tool writes for a dimension, if it finds every video."""
        return self.prompts[dimension] * self.judged.get(dimension, self.samples)

    def file_name(self, prompt: str, index: int) -> str:
        """Return the name under which the official tool looks for a video.

        Raises:
          UserError: no file can have this name.
        """
        name = f"{prompt[: self.name_length]}-{index}.mp4"
        bad = next((letter for letter in ("/", "\0") if letter in name), None)
        length = len(name.encode())
        if bad or length + TEMPORARY > LONGEST_NAME:
            raise UserError(
                f"prompt {prompt[:60]!r}: {self.title} names the file after it, and no file's name may have "
                f"{repr(bad) if bad else f'{length} bytes'}; get the suite's own list"
            )
        return name

    def check_dimensions(self, names: list[str]) -> tuple[str, ...]:
        """Return dimensions that a user names, in the suite's order (UserError for one that it does not have)."""
        for name in names:
            if name not in self.prompts:
                other = next((suite for suite in SUITES.values() if name in suite.prompts), None)
                hint = f": it is one of {other.title}" if other else closest(name, self.prompts)
                raise UserError(f"--dimensions {name}: {self.title} has none of this name{hint}")
        return tuple(name for name in self.prompts if name in names)


_VBENCH_GROUPS = {
    "Quality": (
        *("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness"),
        *("aesthetic_quality", "imaging_quality", "dynamic_degree"),
    ),
    "Semantic": (
        *("object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene"),
        *("appearance_style", "temporal_style", "overall_consistency"),
    ),
}
_VBENCH_PROMPTS = {
    "subject_consistency": 72,
    "background_consistency": 86,
    "temporal_flickering": 75,
    "motion_smoothness": 72,
    "dynamic_degree": 72,
    "aesthetic_quality": 93,
    "imaging_quality": 93,
    "object_class": 79,
    "multiple_objects": 82,
    "human_action": 100,
    "color": 85,
    "spatial_relationship": 84,
    "scene": 86,
    "appearance_style": 90,
    "temporal_style": 100,
    "overall_consistency": 93,
}
VBENCH = Suite(
    name="vbench",
    title="VBench",
    info="VBench_full_info.json",
    prompts=_VBENCH_PROMPTS,
    digest="9205ad3c10aa1480",
    folders={name: name for name in _VBENCH_PROMPTS}
    | dict.fromkeys(("motion_smoothness", "dynamic_degree"), "subject_consistency")
    | dict.fromkeys(("aesthetic_quality", "imaging_quality"), "overall_consistency")
    | {"background_consistency": "scene"},
    samples=5,
    more_samples={"temporal_flickering": 25},  # of which the static filter keeps 5
    judged={},
    name_length=None,
    bounds={
        "subject_consistency": (0.1462, 1.0),
        "background_consistency": (0.2615, 1.0),
        "temporal_flickering": (0.6293, 1.0),
        "motion_smoothness": (0.706, 0.9975),
        "scene": (0.0, 0.8222),
        "appearance_style": (0.0009, 0.2855),
        "temporal_style": (0.0, 0.364),
        "overall_consistency": (0.0, 0.364),
    },
    weights={"dynamic_degree": 0.5},
    groups=_VBENCH_GROUPS,
    group_weights={"Quality": 4.0, "Semantic": 1.0},
    percent=frozenset({"imaging_quality"}),
)

_VBENCH2_PROMPTS = {
    "Human_Anatomy": 120,
    "Human_Identity": 46,
    "Human_Clothes": 75,
    "Diversity": 10,
    "Composition": 53,
    "Dynamic_Spatial_Relationship": 69,
    "Dynamic_Attribute": 91,
    "Motion_Order_Understanding": 99,
    "Human_Interaction": 100,
    "Complex_Landscape": 30,
    "Complex_Plot": 60,
    "Camera_Motion": 108,
    "Motion_Rationality": 58,
    "Instance_Preservation": 57,
    "Mechanics": 57,
    "Thermotics": 50,
    "Material": 50,
    "Multi-View_Consistency": 97,
}
_VBENCH2_GROUPS = {
    "Creativity": ("Composition", "Diversity"),
    "Commonsense": ("Instance_Preservation", "Motion_Rationality"),
    "Controllability": (
        *("Camera_Motion", "Complex_Landscape", "Complex_Plot", "Dynamic_Attribute"),
        *("Dynamic_Spatial_Relationship", "Human_Interaction", "Motion_Order_Understanding"),
    ),
    "Human Fidelity": ("Human_Anatomy", "Human_Clothes", "Human_Identity"),
    "Physics": ("Material", "Mechanics", "Multi-View_Consistency", "Thermotics"),
}
VBENCH2 = Suite(
    name="vbench2",
    title="VBench-2.0",
    info="VBench2_full_info.json",
    prompts=_VBENCH2_PROMPTS,
    digest="03f61ad0f9352213",
    folders={name: name for name in _VBENCH2_PROMPTS},
    samples=3,
    more_samples={"Diversity": 20},
    judged={"Diversity": 1},
    name_length=180,
    bounds={},
    weights={},
    groups=_VBENCH2_GROUPS,
    group_weights=dict.fromkeys(_VBENCH2_GROUPS, 1.0),
)

SUITES = {suite.name: suite for suite in (VBENCH, VBENCH2)}


@dataclass(frozen=True)
class Row:
    """An entry of a list of prompts: the text, and the dimensions that it is for."""

    prompt: str
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class Info:
    """A suite's list of prompts.

    Attributes:
      path: the file.
      rows: in its order.
      digest: identifies prompts and dimensions; their order and all else in the file do not count.
      other_version: what tells this list from the suite's own; None if it is that one.
    """

    path: Path
    rows: tuple[Row, ...]
    digest: str
    other_version: str | None


def read_info(path: str | Path, suite: Suite) -> Info:
    """Read a suite's list of prompts.

    Raises:
      UserError: it cannot be read, is no such list, or is the other suite's. Another version of the list is none.
    """
    path = any_path(path)
    get = f"get {suite.info} from {suite.title}'s repository"
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "is not JSON"
        raise UserError(f"--info {path}: cannot be read ({reason}); {get}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--info {path}: is no list of prompts; {get}")
    rows = []
    for number, entry in enumerate(entries, 1):
        prompt, dimensions = (entry.get(key) if isinstance(entry, dict) else None for key in ("prompt_en", "dimension"))
        texts = isinstance(dimensions, list) and dimensions and all(isinstance(name, str) for name in dimensions)
        if not (isinstance(prompt, str) and prompt and texts):
            raise UserError(f"--info {path}: entry {number} has no text 'prompt_en' with a list 'dimension'; {get}")
        check_text(f"--info {path}", f"the prompt of entry {number}", prompt)
        rows.append(Row(prompt, tuple(dimensions)))
    counts = Counter(name for row in rows for name in row.dimensions)
    for other in SUITES.values():
        if not counts.keys() & suite.prompts.keys() and counts.keys() & other.prompts.keys():
            raise UserError(f"--info {path}: is the list of {other.title}; give --suite {other.name}, or {suite.info}")
    unknown = [name for name in counts if name not in suite.prompts]
    if unknown:
        raise UserError(f"--info {path}: its dimension {unknown[0]!r} is none of {suite.title}; {get}")
    found = sorted({(row.prompt, name) for row in rows for name in row.dimensions})
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
    return Info(path, tuple(rows), digest, None if digest == suite.digest else _difference(suite, counts))


def _difference(suite: Suite, counts: Mapping[str, int]) -> str:
    for name, expected in suite.prompts.items():
        if counts.get(name, 0) != expected:
            return f"{name} has {counts.get(name, 0)} prompts, not {expected}"
    return "as many prompts of each dimension, but other ones"
