"""Which texts of one list, such as prompts to train on, say the same as texts of another, such as a benchmark's.

Four kinds, the closest counts:

    exact       the same text
    normalised  the same words: case, punctuation, accents and spaces do not count
    one word    one word changed, left out or put in, if a word that says something stays
    8-gram      eight words in a row in common

No two texts are compared. Those of the benchmark are looked up by their words, by their words with each in turn left
out or open, and by their 8-grams. Most texts need not try: if one word differs, the first or the last half is whole.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

EXACT, NORMALISED, ONE_WORD, NGRAM = KINDS = ("exact", "normalised", "one word", "8-gram")
NGRAM_WORDS = 8
# With nothing else left, two texts of a word each would be alike in "a dog" and "a cat".
_SAY_NOTHING = frozenset(("a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "is", "are", "with", "by"))
_WORD = re.compile(r"\w+")
_APOSTROPHES = re.compile(r"['’`]")  # noqa: RUF001 - both kinds
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word is lost in the powers of it
_CHUNK = 5_000  # texts whose 8-grams are in memory at a time


@dataclass(frozen=True)
class Overlap:
    """A text and one of the benchmark that it is alike: their numbers, and a member of KINDS."""

    text: int
    other: int
    kind: str


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text without what may differ between two spellings of it; a Chinese text is one word."""
    plain = _APOSTROPHES.sub("", text).casefold()
    if not plain.isascii():
        letters = unicodedata.normalize("NFKD", plain)
        plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return tuple(_WORD.findall(plain))


def overlaps(texts: Sequence[str], others: Sequence[str]) -> list[Overlap]:
    """Return every pair that is alike, each once with its closest kind, by the number of the text.

    Args:
      texts: such as prompts to train on, 100,000 or more.
      others: such as a benchmark's, some thousands.
    """
    index = _Index(others)
    found: dict[tuple[int, int], str] = {}
    for first in range(0, len(texts), _CHUNK):
        chunk = [words(text) for text in texts[first : first + _CHUNK]]
        for number, own in enumerate(chunk):
            for other, kind in index.near(texts[first + number], own):
                found.setdefault((first + number, other), kind)
        for number, other in index.sharing_ngrams(chunk):
            found.setdefault((first + number, other), NGRAM)
    pairs = sorted(found.items(), key=lambda item: (item[0][0], KINDS.index(item[1]), item[0][1]))
    return [Overlap(*pair, kind) for pair, kind in pairs]


class _Index:
    """The benchmark's texts by all that they are looked up by."""

    def __init__(self, others: Sequence[str]):
        self._others, self._words = list(others), [words(text) for text in others]
        self._same, self._open, self._shorter = defaultdict(list), defaultdict(list), defaultdict(list)
        self._halves: set[tuple] = set()
        self._ids: dict[str, int] = {}
        for number, own in enumerate(self._words):
            if not own:
                continue
            self._same[own].append(number)
            half = len(own) // 2
            self._halves |= {(len(own), True, own[:half]), (len(own), False, own[len(own) - half :])}
            for place, shorter in _each_left_out(own):
                self._shorter[shorter].append(number)
                self._open[place, shorter].append(number)
            for word in own:
                self._ids.setdefault(word, len(self._ids) + 1)
        self._ngrams = defaultdict(set)
        for number, hashed in self._hashed(self._words):
            self._ngrams[hashed].add(number)
        self._known = np.array(sorted(self._ngrams), np.uint64)

    def near(self, text: str, own: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        """Yield (number, kind) of those that are the same but for spelling or a word; `own` are the text's words."""
        same = self._same.get(own, ())
        for number in same:
            yield number, EXACT if self._others[number] == text else NORMALISED
        alike = set(self._shorter.get(own, ()))
        if self._may_be(own, len(own)):
            alike.update(*(self._open.get(key, ()) for key in _each_left_out(own)))
        if self._may_be(own, len(own) - 1):
            alike.update(*(self._same.get(shorter, ()) for _, shorter in _each_left_out(own)))
        for number in alike.difference(same):
            yield number, ONE_WORD

    def _may_be(self, own: tuple[str, ...], length: int) -> bool:
        """Whether a text here of so many words may be these words but for one."""
        half = length // 2
        return (length, True, own[:half]) in self._halves or (length, False, own[len(own) - half :]) in self._halves

    def sharing_ngrams(self, chunk: Sequence[tuple[str, ...]]) -> Iterator[tuple[int, int]]:
        """Yield (number in the chunk, number here) of texts with an 8-gram in common."""
        for number, hashed in self._hashed(chunk, self._known):
            yield from ((number, other) for other in self._ngrams[hashed])

    def _hashed(self, texts: Sequence[tuple[str, ...]], known: np.ndarray | None = None) -> Iterable[tuple[int, int]]:
        """Return (number of a text, hash of an 8-gram in it), each once; only hashes that are `known`, if it is given.

        Texts with an 8-gram of the same 64 bits have it in common, but for one chance in 10^10 with 10^5 of each.
        """
        ids = [[self._ids.get(word, 0) for word in text] for text in texts]
        flat = np.fromiter((one for own in ids for one in own), np.uint64)
        owners = np.repeat(np.arange(len(ids)), [len(own) for own in ids])
        starts = len(flat) - NGRAM_WORDS + 1
        if starts < 1:
            return []
        hashed, whole = np.zeros(starts, np.uint64), owners[:starts] == owners[NGRAM_WORDS - 1 :]
        for offset in range(NGRAM_WORDS):
            part = flat[offset : offset + starts]
            hashed = (hashed ^ part) * _BASE  # wraps around
            hashed ^= hashed >> np.uint64(29)
            whole &= part > 0  # a word that the benchmark does not have
        if known is not None:
            whole &= np.isin(hashed, known)
        return dict.fromkeys(zip(owners[:starts][whole].tolist(), hashed[whole].tolist(), strict=True))


def _each_left_out(own: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (place of a word, the words without it) for each word without which something is still said."""
    for place in range(len(own)):
        rest = own[:place] + own[place + 1 :]
        if not _SAY_NOTHING.issuperset(rest):
            yield place, rest
