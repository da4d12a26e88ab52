"""PQ, HLG and wide gamuts in numbers: against the standards' tables, and what becomes of known light."""

import numpy as np
import pytest

from avd_jax.data import colour_transfer as transfer


@pytest.mark.parametrize(
    ("light", "signal"), [(0, 0.0), (0.1, 0.0623), (1, 0.1499), (100, 0.5081), (203, 0.5807), (1000, 0.7518), (1e4, 1)]
)
def test_pq_is_that_of_the_standard(light, signal):
    """Signals of SMPTE ST 2084; 203 cd/m2 is 58% in BT.2408, table 1."""
    assert transfer.pq_inverse_eotf(light) == pytest.approx(signal, abs=5e-4)
    assert transfer.pq_eotf(transfer.pq_inverse_eotf(light)) == pytest.approx(light, rel=1e-6)


def test_hlg_is_that_of_the_standard():
    """BT.2100, table 5; and 75% is reference white, 203 cd/m2 on a display of 1000 (BT.2408, table 1)."""
    scene = transfer.hlg_inverse_oetf(np.array([0.0, 0.5, 0.75, 1.0]))
    np.testing.assert_allclose(scene, [0, 1 / 12, 0.2650, 1], atol=1e-4)
    assert 1000 * scene[2] ** 1.2 == pytest.approx(203, abs=1)


def test_matrix_from_bt2020():
    """The inverse of BT.2087's matrix, as BT.2407 prints it."""
    printed = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    np.testing.assert_allclose(transfer.bt709_matrix(transfer.BT2020), printed, atol=2e-4)
    np.testing.assert_allclose(transfer.bt709_matrix(transfer.DISPLAY_P3).sum(1), 1, atol=1e-9)


def test_tone_curve():
    light = np.linspace(0, 1000, 2001)
    shown = transfer.tone_curve(light)
    assert (np.diff(shown) > 0).all()
    assert (shown[0], shown[-1]) == (pytest.approx(0, abs=1e-6), pytest.approx(1))
    below = light < 85
    np.testing.assert_allclose(shown[below], light[below] / 203, atol=1e-6)


@pytest.mark.parametrize("kind", [transfer.PQ, transfer.HLG])
def test_greys_become_brighter_and_stay_grey(kind):
    codes = np.arange(0, 65_536, 16, np.uint16)[None, :, None].repeat(3, -1)
    grey = transfer.to_bt709(codes, transfer=kind, primaries=2)
    assert grey.dtype == np.uint8
    assert np.ptp(grey.astype(int), axis=-1).max() <= 1
    assert (np.diff(grey[0, :, 1].astype(int)) >= 0).all()
    assert (grey[0, 0].max(), grey[0, -1].min()) == (0, 255)
    assert np.diff(grey[0, :, 1].astype(int)).max() <= 3, "no steps that show"


def test_brighter_than_the_peak_is_the_brightest_of_its_hue():
    codes = np.uint16(65_535 * transfer.pq_inverse_eotf(np.array([4000.0, 4000.0, 400.0])))[None, None]
    colour = transfer.to_bt709(codes, transfer=transfer.PQ, primaries=transfer.DISPLAY_P3)[0, 0]
    assert colour[1] >= 250
    assert colour[2] < 120


def test_sdr_of_a_wide_gamut():
    code = np.uint16(0.5 * 65_535)
    grey, red = np.full((1, 1, 3), code), np.array([[[65_535, 0, 0]]], np.uint16)
    for primaries in (transfer.BT2020, transfer.DCI_P3, transfer.DISPLAY_P3):
        np.testing.assert_allclose(transfer.to_bt709(grey, transfer=1, primaries=primaries), 128, atol=1)
        assert transfer.to_bt709(red, transfer=1, primaries=primaries).ravel().tolist() == [255, 0, 0]
    # BT.709's red in BT.2020, by BT.2087: 0.6274, 0.0691, 0.0164 of the light.
    codes = np.uint16(65_535 * np.array([0.6274, 0.0691, 0.0164]) ** (1 / 2.4))[None, None]
    np.testing.assert_allclose(transfer.to_bt709(codes, transfer=14, primaries=9)[0, 0], [255, 0, 0], atol=5)
