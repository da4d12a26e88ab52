"""What vision models say of clips: temporal consistency, aesthetics, and embeddings by which copies are found.

The models are large, so this runs on the one device of the main process, clip by clip, and keeps each result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from avd_jax.curation.selection import BEST, Row
from avd_jax.curation.store import Store
from avd_jax.errors import UserError
from avd_jax.paths import local_path

FEATURES, EMBEDDING = "features", "embedding"


@dataclass(frozen=True)
class Scored:
    """Scores by clip.

    Attributes:
      scores: id -> name -> score, as in a row.
      embeddings: id -> vector.
      missing: stage -> why there are no models for it.
    """

    scores: Mapping[str, Mapping] = field(default_factory=dict)
    embeddings: Mapping[str, Sequence[float]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VisionModels:
    """The models of a folder, as `features` knows them, and what tells them from others: its files."""

    models: object
    files: Sequence


def load(weights: str) -> VisionModels | None:
    """Return the models in the folder `config.features.weights`, or None for an empty name.

    Raises:
      UserError: there is no such folder, or it holds what cannot be loaded.
    """
    if not weights:
        return None
    from avd_jax.curation import features  # JAX, which nothing else here needs

    folder = local_path(weights)
    return VisionModels(features.load(folder), _files(folder))


def score_clips(
    vision: VisionModels | None,
    rows: Sequence[Row],
    *,
    paths: Mapping[str, Path],
    identities: Mapping[str, Mapping],
    store: Store,
    on_progress: Callable[[int], None],
) -> Scored:
    """Score clips, those that are in the store without any model at work.

    Args:
      vision: the models, or None.
      rows: the clips.
      paths: name of a video -> its file.
      identities: name of a video -> what its results are made from.
      store: of finished results.
      on_progress: called with the number of clips that are done.
    """
    if vision is None:
        return Scored(missing=dict.fromkeys(BEST, "no config.features.weights"))
    from avd_jax.curation import features

    scores, embeddings = {}, {}
    for row in rows:
        made_from = {**identities[row["source"]], "frames": row["frames"], "fps": row["fps"], "weights": vision.files}
        found = store.get(FEATURES, row["id"], made_from)
        if found is None:
            clip = (row["start"], row["end"], row["frames"], row["fps"])
            try:
                found = dict(features.score(vision.models, paths[row["source"]], *clip))
            except UserError:
                found = {}  # damaged since its analysis; a clip without a score is rejected by the stage that needs it
            else:
                store.put(FEATURES, row["id"], made_from, found)
        if EMBEDDING in found:
            embeddings[row["id"]] = found[EMBEDDING]["value"]
        scores[row["id"]] = {name: score for name, score in found.items() if name != EMBEDDING}
        on_progress(1)
    return Scored(scores, embeddings, vision.models.missing)


def _files(folder: Path) -> list:
    """Return names, sizes and times of the files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
