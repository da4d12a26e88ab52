"""Perceptual hashes, by which the same pictures are found again in another encoding."""

import cv2
import numpy as np

SIDE = 32  # pixels of the square that is transformed
KEPT = 8  # of its lowest frequencies a side; 8 x 8 bits
METHOD = f"pHash: luma {SIDE}x{SIDE}, DCT, signs of the lowest {KEPT}x{KEPT} coefficients against their median"


def perceptual_hash(grey: np.ndarray) -> str:
    """Return 64 bits as 16 hex digits: whether each low frequency of a picture is above their median.

    Args:
      grey: uint8 [32 32].
    """
    low = cv2.dct(grey.astype(np.float32))[:KEPT, :KEPT].ravel()
    # The mean is no detail: it would move the median of a dark picture.
    bits = low > np.median(low[1:])
    return f"{int(''.join('01'[int(bit)] for bit in bits), 2):016x}"


def distance(one: list[str], other: list[str]) -> int:
    """Return in how many bits two lists of as many hashes differ."""
    return sum((int(a, 16) ^ int(b, 16)).bit_count() for a, b in zip(one, other, strict=True))
