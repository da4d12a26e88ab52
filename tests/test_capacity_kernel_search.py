"""Bundles of a kernel counted from a schedule written out by hand, and what the estimate of a candidate prints."""

import jax.numpy as jnp
import pytest

from avd_jax.capacity.devices import find_kind
from avd_jax.capacity.kernel_search import Estimate, Runs, _limits, _runs, count_bundles
from avd_jax.models.pipelined import cut_keys
from avd_jax.models.placement import AttentionBlocks


def schedule(*parts):
    """Return a dump: (label, depth, bundles, text of the first bundle, text of the others) after another."""
    rows = []
    for label, depth, bundles, first, others in parts:
        for i in range(bundles):
            number = f"{len(rows):#x}" if rows else "0"
            text = first if i == 0 else others
            rows.append(f"{number:>6} {label if i == 0 else '':2} : {'>' * depth} {{ {text} }} /* a comment */")
    return "\n".join(["= control target key start", "LB: loop body", *rows])


PRODUCT = "%1 = vmatmul.mubr.bf16.gmra.mxu0 %v2  ;;  %v3 = vld [vmem:[#allocation2] sm:$0xff]"
# Branches act five bundles behind themselves, and name the number of the bundle where they go on.
FLAT = (
    ("", 0, 10, "%0 = smov 1", "%0 = smov 1"),  # once
    ("LB", 1, 7, "%1 = sbr.rel (%p0) target bundleno = 217", ""),  # over all of a cell
    ("", 1, 5, "%1 = sbr.rel (%p1) target bundleno = 52", ""),  # over what begins a row
    ("", 1, 30, "%1 = vst [vmem:[#allocation4]] %v0", ""),
    ("PF", 1, 98, PRODUCT, ""),
    ("", 1, 5, "%1 = sbr.rel (%p2) target bundleno = 195", ""),  # over what ends a row
    ("", 1, 40, "%1 = vst [vmem:[#allocation4]] %v0", ""),
    ("PF", 1, 22, "", ""),
    ("", 0, 3, "%0 = sbr.rel (!%p3) target bundleno = 10", ""),
)


def test_what_begins_and_ends_a_row_counts_once_a_row():
    once, per_row, per_cell = 10 + 3, 30 + 40, 7 + 5 + 98 + 5 + 22
    assert count_bundles(schedule(*FLAT), Runs(cells=8, rows=2)) == once + 2 * per_row + 8 * per_cell


def test_a_loop_in_a_cell_counts_as_often_as_it_runs_and_waiting_counts():
    looped = (*FLAT[:1], ("LB", 1, 20, PRODUCT, ""), ("LB", 2, 50, PRODUCT, ""), ("LE", 1, 30, PRODUCT, ""))
    assert count_bundles(schedule(*looped), Runs(cells=4, rows=4, trips=15)) == 10 + 4 * (20 + 15 * 50 + 30)


def test_runs_of_a_whole_clip():
    about = {"heads": 12, "tokens": 32_760, "padded": 32_768, "head_dim": 128}
    blocks = AttentionBlocks()
    # 32 chunks: the first scores stand before the loop of two chunks, the last two stages behind it.
    assert _runs("pipelined_attention", blocks, **about) == Runs(12 * 32, 12 * 32, 15)
    assert _runs("splash_mha_fwd", blocks, **about) == Runs(12 * 32 * 16, 12 * 32)
    assert _runs("splash_mha_dkv", blocks, **about) == Runs(12 * 32 * 16, 12 * 16)
    assert _runs("splash_mha_dq", blocks, **about) == Runs(12 * 32 * 16, 12 * 32)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (32_760, (1024, 32, 1)),
        (75_776, (1024, 37, 2)),
        (512, (256, 2, 1)),  # the text
        (60, (128, 1, 1)),
        (41 * 1024, (640, 33, 2)),  # 41 chunks have no half
    ],
)
def test_keys_are_cut_into_like_parts_that_fit(keys, expected):
    chunk, chunks, parts = cut_keys(keys, 1024, 128, jnp.bfloat16)
    assert (chunk, chunks, parts) == expected
    assert 0 <= chunk * chunks * parts - keys < chunk
    assert chunk * chunks <= 40_960


def test_an_estimate_is_printed_in_ms_and_as_a_ratio_to_the_limit():
    limits = _limits(find_kind("TPU v5e"), 12, 32_768, 128)
    assert limits == pytest.approx({"forward": 33.49, "backward": 83.73}, rel=1e-3)
    found = Estimate("pipelined", AttentionBlocks(), {"forward": 35.0, "backward": 92.1}, limits, 1.5).as_dict()
    assert found["forward"] == {"ms": 35.0, "ratio": 1.045}
    assert found["backward"] == {"ms": 92.1, "ratio": 1.1}
    assert (found["kernel"], found["forward_blocks"]) == ("pipelined", [1024, 1024])
    failed = Estimate("splash", AttentionBlocks(), {}, {}, error="too large").as_dict()
    assert failed["error"] == "too large"
    assert "forward" not in failed
