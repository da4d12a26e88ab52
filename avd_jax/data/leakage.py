"""Do the texts of a training say what a benchmark asks for? Lists and encoded sets, compared by `overlap.py`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from avd_jax.data.latents import EncodedSet, manifest_path, published_lengths, read_json, read_metadata
from avd_jax.data.overlap import KINDS, Overlap, overlaps
from avd_jax.data.prompts import read_prompt_records
from avd_jax.data.records import Record, printable
from avd_jax.paths import any_path

EXAMPLES = 3
_SHOWN = 100  # characters


@dataclass(frozen=True)
class Leakage:
    """What a training's texts and a benchmark's list have in common.

    Attributes:
      benchmark: the list.
      texts: of the training.
      others: of the benchmark, each different one once.
      pairs: which are alike.
    """

    benchmark: Path
    texts: Sequence[Record]
    others: Sequence[Record]
    pairs: Sequence[Overlap]

    @property
    def touched(self) -> set[int]:
        """Numbers of the training's texts that are alike to one of the benchmark."""
        return {pair.text for pair in self.pairs}

    def summary(self) -> str:
        """Return how much there is, in a line."""
        mine, theirs = len(self.touched), len({pair.other for pair in self.pairs})
        name = self.benchmark.name
        return f"{name}: {mine} of {len(self.texts)} texts touch {theirs} of its {len(self.others)} prompts"

    def report(self) -> str:
        """Return how much there is of each kind, with examples."""
        lines = [self.summary()]
        # A text counts with its closest kind; so does a prompt.
        texts, others = ({}, {})
        for pair in sorted(self.pairs, key=lambda pair: KINDS.index(pair.kind)):
            texts.setdefault(pair.text, pair)
            others.setdefault(pair.other, pair.kind)
        for kind in KINDS:
            pairs = [pair for pair in texts.values() if pair.kind == kind]
            if not pairs:
                continue
            count = Counter(others.values())[kind]
            lines.append(f"  {kind}: {len(pairs)} texts, {count} prompts that nothing is closer to")
            for pair in pairs[:EXAMPLES]:
                own, other = self.texts[pair.text], self.others[pair.other]
                lines.append(f"    {own.where}: {short_text(own.value)} = {other.where}: {short_text(other.value)}")
        return "\n".join(lines)

    def as_record(self) -> dict:
        """Return every pair, as JSON takes it."""
        pairs = []
        for pair in self.pairs:
            own, other = self.texts[pair.text], self.others[pair.other]
            described = {"where": own.where, "text": own.value, "prompt_where": other.where, "prompt": other.value}
            pairs.append({"kind": pair.kind} | described)
        return {"benchmark": str(self.benchmark), "texts": len(self.texts), "prompts": len(self.others), "pairs": pairs}


def leakage(texts: Sequence[Record], benchmark: str | Path) -> Leakage:
    """Compare texts of a training with a benchmark's list of prompts (UserError if it cannot be read)."""
    benchmark = any_path(benchmark)
    others: dict[str, Record] = {}
    for record in read_texts(benchmark):
        others.setdefault(record.value, record)
    pairs = overlaps([record.value for record in texts], list(others))
    return Leakage(benchmark, texts, list(others.values()), pairs)


def read_texts(path: str | Path) -> list[Record]:
    """Return the texts of a list of prompts (see `read_prompts`) or of an encoded set, each with its place.

    The captions of a set of latents stand in its records, so that the whole set is read for them.

    Raises:
      UserError: neither, or one that cannot be read.
    """
    path = any_path(path)
    if not path.is_dir():
        return read_prompt_records(path)
    if read_metadata(path).kind == "latents":
        texts = [record["caption"] for record in EncodedSet(path, "latents")]
    else:
        texts = _prompts_of(path)
    return [Record(f"{path}:record {number}", text) for number, text in enumerate(texts)]


def _prompts_of(folder: Path) -> list[str]:
    """Return the texts of a set of prompts: from its manifests, where `encode_prompts` writes them, if they are there.

    The records hold a megabyte of embeddings each.
    """
    records, texts = EncodedSet(folder, "prompts"), []
    for shard, length in enumerate(published_lengths(folder)):
        manifest = read_json(manifest_path(folder, shard)) if length else {"inputs": []}
        texts += [text for text in manifest["inputs"] if text not in manifest["skipped"]]
    if len(texts) == len(records) and all(records[place]["text"] == texts[place] for place in (0, -1)):
        return texts
    return [record["text"] for record in records]


def short_text(text: str) -> str:
    """Return the beginning of a text in one line, in quotes."""
    text = printable(" ".join(text.split()))
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
