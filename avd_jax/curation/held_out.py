"""Clips whose captions say what a model will be judged by: they must not be trained on."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from avd_jax.data.leakage import leakage, short_text
from avd_jax.data.records import Record


def held_out(captions: Mapping[str, str], lists: Iterable[str]) -> dict[str, str]:
    """Return clip's id -> which prompt its caption is like, of the clips that are like one (`data.overlap.overlaps`).

    Args:
      captions: clip's id -> caption.
      lists: files of prompts, or encoded sets; see `data.leakage.read_texts`.

    Raises:
      UserError: a list cannot be read.
    """
    texts = [Record(name, caption) for name, caption in captions.items()]
    reasons: dict[str, str] = {}
    for path in lists:
        found = leakage(texts, path)
        for pair in found.pairs:  # of a text, the closest comes first
            prompt = found.others[pair.other]
            reason = f"like {Path(prompt.where).name} ({pair.kind}): {short_text(prompt.value)}"
            reasons.setdefault(texts[pair.text].where, reason)
    return reasons
