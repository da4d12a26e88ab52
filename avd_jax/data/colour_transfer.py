"""Colours of high dynamic range or of a wider gamut, mapped to what an SDR display of BT.709 shows.

Video models are trained on SDR video in BT.709, so this is what they must see. The chain is display-referred:

  code value --EOTF--> light of each channel, cd/m2 --tone curve--> 0..1 --matrix--> BT.709's channels
             --inverse of BT.1886--> code value

- PQ: EOTF of BT.2100-2, table 4 (SMPTE ST 2084). HLG: inverse OETF and OOTF of BT.2100-2, table 5, on a display of
  1000 cd/m2, whose system gamma is 1.2.
- Tone curve: the EETF of BT.2390-8, section 5.4.1, from 1000 cd/m2 to a display whose white is HDR's reference white,
  203 cd/m2 (BT.2408-4). It leaves what is below 90 cd/m2 as it is and rolls off what is above: 203 cd/m2 becomes 230 of
  255, 1000 becomes 255. It is applied to the largest channel, and all three are scaled alike, so that hues stay.
- BT.2020 without HDR and Display P3: the inverse of BT.2087-0, with BT.1886's gamma and no tone curve.
- Gamuts: matrices from the chromaticities of BT.709-6, BT.2020-2 and SMPTE EG 432-1, all with white D65; what BT.709
  cannot show is clipped.
"""

from functools import cache

import numpy as np

REFERENCE_WHITE = 203.0  # cd/m2, BT.2408-4, table 1
PEAK = 1000.0  # cd/m2; the nominal peak of HLG, and of most of what is graded in PQ
PQ_PEAK = 10_000.0  # cd/m2
HLG_SYSTEM_GAMMA = 1.2
SDR_GAMMA = 2.4  # BT.1886
CODES = 65_536  # code values of 16 bits, and entries of each table

# Numbers of ITU-T H.273, which are FFmpeg's.
PQ, HLG = 16, 18
BT2020, DCI_P3, DISPLAY_P3 = 9, 11, 12

WHITE_D65 = (0.3127, 0.3290)
BT709_XY = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
P3_XY = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
WIDE_XY = {BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)), DCI_P3: P3_XY, DISPLAY_P3: P3_XY}


def is_hdr(transfer: int) -> bool:
    """Whether the transfer characteristic is PQ or HLG."""
    return transfer in (PQ, HLG)


def is_wide(primaries: int) -> bool:
    """Whether the primaries are wider than BT.709's and known here."""
    return primaries in WIDE_XY


def to_bt709(codes: np.ndarray, *, transfer: int, primaries: int) -> np.ndarray:
    """Map pictures to BT.709, see the module's docstring.

    Args:
      codes: uint16 [H W 3], R'G'B' over the full range of 16 bits.
      transfer: `PQ`, `HLG`, or anything else for SDR.
      primaries: one of `WIDE_XY`; anything else is BT.2020 with HDR, which BT.2100 demands, and BT.709 without.

    Returns:
      uint8 [H W 3], R'G'B' over the full range.
    """
    if is_hdr(transfer):
        light = _display_light(codes, transfer)
        # Faster than a maximum over the last axis.
        largest = np.maximum(np.maximum(light[..., 0], light[..., 1]), light[..., 2])
        light *= _tone_gain(largest)[..., None]
        primaries = primaries if is_wide(primaries) else BT2020
    else:
        light = _sdr_table()[codes]
    if is_wide(primaries):
        light = light @ bt709_matrix(primaries).T.astype(np.float32)
    # The table is over the root of the light, which gives dark colours more entries.
    position = np.sqrt(np.clip(light, 0.0, 1.0)) * (CODES - 1) + 0.5
    return _code_table()[position.astype(np.uint16)]


def pq_eotf(signal: np.ndarray) -> np.ndarray:
    """Return the light, cd/m2, of PQ signals in 0..1."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = np.power(signal, 1 / m2)
    return PQ_PEAK * np.power(np.maximum(power - c1, 0.0) / (c2 - c3 * power), 1 / m1)


def pq_inverse_eotf(light: np.ndarray) -> np.ndarray:
    """Return the PQ signal in 0..1 of light in cd/m2."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = np.power(np.asarray(light) / PQ_PEAK, m1)
    return np.power((c1 + c2 * power) / (1 + c3 * power), m2)


def hlg_inverse_oetf(signal: np.ndarray) -> np.ndarray:
    """Return the light of the scene in 0..1 of HLG signals in 0..1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, np.square(signal) / 3, (np.exp((signal - c) / a) + b) / 12)


def tone_curve(light: np.ndarray) -> np.ndarray:
    """Return what light of 0..`PEAK` cd/m2 becomes on an SDR display, 0..1: BT.2390's EETF, black unchanged."""
    peak, white = pq_inverse_eotf(PEAK), pq_inverse_eotf(REFERENCE_WHITE)
    signal, most = pq_inverse_eotf(np.minimum(light, PEAK)) / peak, white / peak
    knee = 1.5 * most - 0.5
    t = np.maximum(signal - knee, 0.0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    return pq_eotf(np.where(signal < knee, signal, spline) * peak) / REFERENCE_WHITE


def bt709_matrix(primaries: int) -> np.ndarray:
    """Return float64 [3 3], from linear channels of `primaries` to BT.709's."""
    return np.linalg.inv(_to_xyz(BT709_XY)) @ _to_xyz(WIDE_XY[primaries])


def _to_xyz(chromaticities: tuple) -> np.ndarray:
    """Return the matrix from linear channels to CIE XYZ, by SMPTE RP 177."""
    columns = np.array([(x / y, 1.0, (1 - x - y) / y) for x, y in chromaticities]).T
    x, y = WHITE_D65
    return columns * np.linalg.solve(columns, [x / y, 1.0, (1 - x - y) / y])


def _display_light(codes: np.ndarray, transfer: int) -> np.ndarray:
    """Return float32 [H W 3], cd/m2."""
    if transfer == PQ:
        return _pq_table()[codes]
    scene = _hlg_table()[codes]
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593], np.float32)
    return scene * (PEAK * np.power(luminance, HLG_SYSTEM_GAMMA - 1))[..., None]


def _tone_gain(light: np.ndarray) -> np.ndarray:
    """Return what to multiply light by whose largest channel is `light` (cd/m2), so that it becomes 0..1."""
    position = np.sqrt(np.minimum(light, PEAK) / PEAK) * (CODES - 1) + 0.5
    return np.where(light > PEAK, 1 / np.maximum(light, PEAK), _gain_table()[position.astype(np.uint16)])


def _signals() -> np.ndarray:
    return np.arange(CODES) / (CODES - 1)


@cache
def _pq_table() -> np.ndarray:
    return pq_eotf(_signals()).astype(np.float32)


@cache
def _hlg_table() -> np.ndarray:
    return hlg_inverse_oetf(_signals()).astype(np.float32)


@cache
def _sdr_table() -> np.ndarray:
    return np.power(_signals(), SDR_GAMMA).astype(np.float32)


@cache
def _gain_table() -> np.ndarray:
    light = np.maximum(np.square(_signals()) * PEAK, 1e-4)
    return (tone_curve(light) / light).astype(np.float32)


@cache
def _code_table() -> np.ndarray:
    return np.rint(255 * np.power(_signals(), 2 / SDR_GAMMA)).astype(np.uint8)
