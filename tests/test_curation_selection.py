"""Which clips stay: thresholds, ranks, copies; independent of the order of the rows."""

import random
import uuid

import curation_stand_in
import pytest

from avd_jax.curation import selection
from avd_jax.curation.selection import judge, rows_of
from avd_jax.curation.settings import default_config

THRESHOLDS = default_config().select


def row(name, **values):
    (made,) = rows_of(f"{name}.mp4", curation_stand_in.found(curation_stand_in.clip(**values)))
    return made


def rejected(stage, rows, thresholds=THRESHOLDS, **further):
    verdict = judge(stage, rows, thresholds, **further)
    return {row["source"].removesuffix(".mp4") for row in rows if row["id"] in verdict.rejected}


def test_a_row_is_named_by_its_source_and_its_times():
    clips = (
        curation_stand_in.clip(),
        curation_stand_in.clip(5.0625),
        curation_stand_in.clip(9.9, seconds=1.0, too_short=True),
    )
    rows = rows_of("sub/a.mp4", curation_stand_in.found(*clips, size=(1920, 1080)))
    assert [(row["start"], row["end"]) for row in rows] == [(0.0, 5.062), (5.062, 10.125), (9.9, 10.9)]
    for made in rows:
        text = f"sub/a.mp4_{made['start']}_{made['end']}"
        assert made["id"] == str(uuid.uuid5(uuid.NAMESPACE_URL, text))
        assert made["size"] == [1920, 1080]
        assert made["rejected_by"] is None
    assert judge("length", rows, THRESHOLDS).rejected == {rows[2]["id"]}


def test_thresholds_are_the_papers():
    assert rejected("colour", [row("grey", colour=0.59), row("fine", colour=0.6)]) == {"grey"}
    assert rejected("sharpness", [row("blurred", sharpness=19.9), row("fine", sharpness=20.0)]) == {"blurred"}
    assert rejected("motion", [row("still", motion=0.19), row("fine", motion=0.2)]) == {"still"}
    sizes = {
        "fine": (1280, 720),
        "narrow": (1279, 720),
        "low": (1280, 719),
        "upright": (720, 1280),
        "slim": (719, 1280),
    }
    rows = [
        rows_of(name, curation_stand_in.found(curation_stand_in.clip(), size=size))[0] for name, size in sizes.items()
    ]
    assert rejected("resolution", rows) == {"narrow", "low", "slim"}
    assert judge("resolution", rows, THRESHOLDS).threshold == [1280, 720]


def test_a_clip_without_the_score_is_rejected_by_the_stage_that_needs_it():
    assert rejected("motion", [row("unknown", motion=None), row("nan", motion=float("nan")), row("fine")]) == {
        "unknown",
        "nan",
    }


def test_the_codecs_vectors_are_asked_only_if_the_config_says_so():
    rows = [row("still", codec_motion=0.001), row("moving", codec_motion=0.1), row("untold")]
    assert rejected("motion", rows) == set()
    asked = default_config().select
    asked.codec_motion = 0.01
    assert rejected("motion", rows, asked) == {"still"}
    assert judge("motion", rows, asked).details == {"codec_motion": 0.01}


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (2, 1), (3, 2), (10, 5)])
def test_the_best_half_is_a_rank_over_the_whole_set(count, kept):
    rows = [row(str(i), aesthetics=i / 10) for i in range(count)]
    verdict = judge("aesthetics", rows, THRESHOLDS)
    assert {entry["id"] for entry in rows[: count - kept]} == verdict.rejected
    assert verdict.details["lowest_kept"] == rows[count - kept]["scores"]["aesthetics"]["value"]


def test_equal_ranks_are_decided_by_the_id():
    rows = [row(str(i), aesthetics=5.0) for i in range(6)]
    gone = judge("aesthetics", rows, THRESHOLDS).rejected
    assert gone == {entry["id"] for entry in sorted(rows, key=lambda entry: entry["id"])[3:]}


def test_of_copies_the_largest_and_sharpest_stays():
    rows = [
        row("small", hashes=curation_stand_in.random_hashes(1)),
        row("blurred", hashes=curation_stand_in.random_hashes(1, flipped=3), sharpness=50.0),
        row("good", hashes=curation_stand_in.random_hashes(1, flipped=2)),
        row("other", hashes=curation_stand_in.random_hashes(2)),
        row("unhashed"),
    ]
    rows[0]["size"] = [640, 360]
    verdict = judge("duplicate", rows, THRESHOLDS)
    by_name = {entry["source"]: entry["id"] for entry in rows}
    of_good = by_name["good.mp4"]
    assert verdict.copy_of == {by_name["small.mp4"]: of_good, by_name["blurred.mp4"]: of_good}
    assert verdict.rejected == set(verdict.copy_of)


def test_bits_that_differ_count_in_the_mean_of_the_frames():
    rows = [row("a", hashes=curation_stand_in.random_hashes(1)), row("b", hashes=curation_stand_in.random_hashes(1, 8))]
    assert len(rejected("duplicate", rows)) == 1
    rows[1] = row("b", hashes=curation_stand_in.random_hashes(1, flipped=9))
    assert rejected("duplicate", rows) == set()


def test_clips_of_one_video_are_no_copies_of_each_other():
    clips = [curation_stand_in.clip(5.0625 * i, hashes=curation_stand_in.random_hashes(1)) for i in range(3)]
    rows = rows_of("a.mp4", curation_stand_in.found(*clips))
    assert rejected("duplicate", rows) == set()
    other = row("b", hashes=curation_stand_in.random_hashes(1), sharpness=9.0)
    assert rejected("duplicate", [*rows, other]) == {"b"}


def test_embeddings_find_copies_that_hashes_do_not():
    rows = [
        row("a", hashes=curation_stand_in.random_hashes(1)),
        row("b", hashes=curation_stand_in.random_hashes(2)),
        row("c"),
    ]
    embeddings = dict(zip([entry["id"] for entry in rows], ([1.0, 0.0], [1.0, 0.3], [0.0, 1.0]), strict=True))
    assert rejected("duplicate", rows, embeddings=embeddings) == {"b"}


def test_a_chain_of_likenesses_is_not_one_copy():
    rows = [row(str(i), hashes=curation_stand_in.random_hashes(1, flipped=5 * i)) for i in range(3)]
    assert rejected("duplicate", rows) == {"1"}


def test_the_order_of_the_rows_changes_nothing(monkeypatch):
    monkeypatch.setattr(selection, "BLOCK", 7)  # several blocks
    rows = [
        row(f"{i}", hashes=curation_stand_in.random_hashes(i % 25, flipped=i // 25), sharpness=float(i % 3))
        for i in range(100)
    ]
    verdict = judge("duplicate", rows, THRESHOLDS)
    assert len(verdict.rejected) == 75
    random.Random(0).shuffle(rows)
    assert judge("duplicate", rows, THRESHOLDS) == verdict


def test_no_rows_are_no_matter():
    for stage in selection.STAGES[:-1]:
        assert judge(stage, [], THRESHOLDS).rejected == set()
