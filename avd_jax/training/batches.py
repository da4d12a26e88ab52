"""Batches that are made from their number, for methods whose data no file holds."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np


class CountedBatches:
    """Endless batches, `make(number)` for 0, 1, 2, ...; the position is the number of the next one."""

    def __init__(self, make: Callable[[int], Mapping[str, np.ndarray]], rows: Sequence[int]):
        """Start with batch 0.

        Args:
          make: number -> field -> the global batch, the same on every host.
          rows: of it that this host holds, such as `parallel.hosts.batch_rows` gives.
        """
        self._make, self._rows, self._number = make, list(rows), 0

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self._make(self._number)
        self._number += 1
        return {name: array[self._rows] for name, array in batch.items()}

    def get_state(self) -> dict:
        """Return the position."""
        return {"batch": self._number}

    def set_state(self, state: Mapping) -> None:
        """Go to a position."""
        self._number = state["batch"]
