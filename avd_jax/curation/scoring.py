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


def score_clips(
    weights: str,
    rows: Sequence[Row],
    *,
    paths: Mapping[str, Path],
    identities: Mapping[str, Mapping],
    store: Store,
    on_progress: Callable[[int], None],
) -> Scored:
    """Score clips, those that are in the store without any model at work.

    Args:
      weights: `config.features.weights`.
      rows: the clips.
      paths: name of a video -> its file.
      identities: name of a video -> what its results are made from.
      store: of finished results.
      on_progress: called with the number of clips that are done.

    Raises:
      UserError: the folder holds what cannot be loaded.
    """
    if not weights:
        return Scored(missing=dict.fromkeys(BEST, "no config.features.weights"))
    from avd_jax.curation import features  # JAX, which nothing else here needs

    folder = local_path(weights)
    models = features.load(folder)
    files = _files(folder)
    scores, embeddings = {}, {}
    for row in rows:
        made_from = {**identities[row["source"]], "frames": row["frames"], "fps": row["fps"], "weights": files}
        found = store.get(FEATURES, row["id"], made_from)
        if found is None:
            clip = (row["start"], row["end"], row["frames"], row["fps"])
            try:
                found = dict(features.score(models, paths[row["source"]], *clip))
            except UserError:
                found = {}  # damaged since its analysis; a clip without a score is rejected by the stage that needs it
            else:
                store.put(FEATURES, row["id"], made_from, found)
        if EMBEDDING in found:
            embeddings[row["id"]] = found[EMBEDDING]["value"]
        scores[row["id"]] = {name: score for name, score in found.items() if name != EMBEDDING}
        on_progress(1)
    return Scored(scores, embeddings, models.missing)


def _files(folder: Path) -> list:
    """Return names, sizes and times of the files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
