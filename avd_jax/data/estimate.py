"""What encoding will take, said before it begins: disk from the sizes, time from the first batches."""

import time
from collections.abc import Callable, Iterable

TOKENS_PER_WORD = 1.4  # a rough figure for umT5 and English prose


def disk_size(*, records: int, values: int, texts: Iterable[str], text_len: int, text_dim: int) -> float:
    """Return about how many bytes a set takes on disk.

    Args:
      records: of the set.
      values: bfloat16 numbers of a record beside its text's embeddings.
      texts: of the records, from whose words the number of tokens is estimated.
      text_len: the most tokens of a text.
      text_dim: width of an embedding.
    """
    tokens = sum(min(text_len, 1 + TOKENS_PER_WORD * len(text.split())) for text in texts)
    return 2.0 * (records * values + tokens * text_dim)


class Estimate:
    """Says once how long the rest will take."""

    def __init__(self, count: int, say: Callable[[str], object]):
        """Begin to measure.

        Args:
          count: how much there is to do.
          say: called with the estimate, in words.
        """
        self._left, self._say = count, say
        self._batches, self._since = 0, 0.0

    def done(self, count: int) -> None:
        """Note that a batch of so many is done. The first one compiles, so the second and the third are measured."""
        now = time.perf_counter()
        self._left -= count
        self._batches += 1
        if self._batches == 1:
            self._since = now
        elif self._batches == 3 and self._left > 0:
            each = (now - self._since) / (2 * count)
            self._say(f"about {in_words(each * self._left)} to go ({in_words(1000 * each)} for 1,000)")


def in_words(seconds: float) -> str:
    """Return a time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def size_in_words(size: float) -> str:
    """Return a number of bytes as a person says it, in powers of 1000 as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
