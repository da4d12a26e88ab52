"""Several sets as one: their names, their shares, one size a batch, and the same order for any number of hosts."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from avd_jax.data import latents as sets
from avd_jax.data.mixture import WINDOW, Interleaved, NamedSet, fingerprint, named_sets, read_infos, shares
from avd_jax.data.pipeline import training_batches
from avd_jax.data.set_writer import SetWriter
from avd_jax.errors import UserError

PROMPTS = sets.PromptsInfo(text_len=16, text_dim=2, text_encoder="aaaa")
SMALL = sets.LatentsInfo(16, 2, "aaaa", 5, 16, 32, 16.0, (2, 2, 4, 1), "bbbb")
LARGE = replace(SMALL, height=32, latents_shape=(2, 4, 4, 1))


def write(folder, first, count, info):
    """Clip or prompt i, of the numbers from `first` on, has the value i."""
    writer = SetWriter(folder, info, [str(first + i) for i in range(count)], inputs_per_shard=100)
    values = range(first, first + count)
    if info.kind == "prompts":
        records = [sets.prompts_record(text=str(i), prompt_embeds=np.full((1, 2), i)) for i in values]
    else:
        about = {"fps": 16.0, "source": "", "prompt_embeds": np.zeros((1, 2))}
        arrays = [np.full(info.latents_shape, i) for i in values]
        records = [
            sets.latents_record(clip_id=str(i), caption=str(i), latents=array, **about)
            for i, array in zip(values, arrays, strict=True)
        ]
    writer.write_shard(0, records, {})
    writer.finish("", np.zeros((1, 2)))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sets a (0..11) and b (20..25) of one size, c (40..47) of another, and prompts p (100..) and q (120..)."""
    folder = tmp_path_factory.mktemp("sets")
    for name, first, count, info in (
        *(("a", 0, 12, SMALL), ("b", 20, 6, SMALL), ("c", 40, 8, LARGE)),
        *(("p", 100, 10, PROMPTS), ("q", 120, 5, PROMPTS)),
    ):
        write(folder / name, first, count, info)
    return folder


def batches(latents, prompts=None, count=None, **changes):
    options = {"batch_size": 4, "prompt_batches": 1, "seed": 0, "text_len": 3} | changes
    iterator = training_batches(latents, prompts, **options)
    return iterator if count is None else [next(iterator) for _ in range(count)]


def clips(found):
    return [[int(row.flat[0]) for row in batch["latents"]] for batch in found]


def test_how_sets_are_named(tmp_path):
    (tmp_path / "run:2").mkdir()
    found = named_sets(f"a:3, gs_/b:0.5,{tmp_path}/run:2:1e1 ,c/d:2")
    assert found == [("a", 3.0), ("gs_/b", 0.5), (f"{tmp_path}/run:2", 10.0), ("c/d", 2.0)]
    for path in ("a", "C:", "C:/data", "runs/10:30/latents", f"{tmp_path}/run:2"):
        assert named_sets(path) == [NamedSet(path, None)]
    assert [one.path for one in named_sets("a,b")] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:x,b:1", "a:x: the weight 'x' is no number"),
        ("a:0,b:1", "a:0: the weight must be a positive number"),
        ("a:-1,b:1", "must be a positive number"),
        ("a:nan,b:1", "must be a positive number"),
        ("a:inf,b:1", "must be a positive number"),
        ("a:3,b", "b has no weight, others have one"),
        ("s3://bucket/a:3,b:1", "s3://bucket/a"),
    ],
)
def test_weights_that_are_none(text, said):
    with pytest.raises(UserError, match=said):
        named_sets(text)


def test_shares_and_fingerprints(folder):
    assert shares(f"{folder}/a:3,{folder}/c:1") == [0.75, 0.25]
    assert shares(f"{folder}/a,{folder}/b") == pytest.approx([12 / 18, 6 / 18]), "each clip as often as any other"
    a, b = fingerprint(f"{folder}/a"), fingerprint(f"{folder}/b")
    assert fingerprint(f"{folder}/a:7") == a == sets.set_fingerprint(folder / "a")
    assert fingerprint(f"{folder}/a:3,{folder}/b:1") == f"{a}:3,{b}:1"


def test_the_order_holds_the_shares_and_counts_each_number_by_itself():
    order = Interleaved([0.5, 0.3, 0.2 - 1e-6, 1e-6], seed=1)
    found = [order[i] for i in range(2 * WINDOW)]
    for window in range(2):
        counts = Counter(which for which, _ in found[window * WINDOW : (window + 1) * WINDOW])
        assert counts[3] == 1, "the rarest comes too"
        assert [counts[which] for which in range(3)] == pytest.approx([5000, 3000, 2000], abs=1)
    for which in range(4):
        assert [place for one, place in found if one == which] == list(range(sum(one == which for one, _ in found)))
    assert found[:WINDOW] != [(which, place - 5000) for which, place in found[WINDOW:]]
    one, other = (Interleaved([0.5, 0.5], seed=seed) for seed in (1, 2))
    assert [one[i] for i in range(20)] != [other[i] for i in range(20)]


def test_one_size_a_batch_and_each_set_its_share_of_the_examples(folder):
    found = batches(f"{folder}/a:2,{folder}/b:1,{folder}/c:1", count=100, prompt_batches=0)
    rows = clips(found)
    sizes = Counter(batch["latents"].shape[1:] for batch in found)
    assert set(sizes) == {SMALL.latents_shape, LARGE.latents_shape}
    assert all((min(row) >= 40) == (max(row) >= 40) for row in rows)
    assert all(batch["canvas"].shape == (4, 0, *batch["latents"].shape[1:]) for batch in found)
    drawn = Counter("a" if clip < 20 else "b" if clip < 40 else "c" for row in rows for clip in row)
    # A share p of n independent draws of batches has a deviation of sqrt(p (1 - p) / n), here at most 0.05.
    assert [drawn[name] / 400 for name in "abc"] == pytest.approx([0.5, 0.25, 0.25], abs=0.15)


def test_each_set_keeps_its_epochs(folder):
    rows = [
        clip
        for row in clips(batches(f"{folder}/a:1,{folder}/b:1,{folder}/c:2", count=40, prompt_batches=0))
        for clip in row
    ]
    for first, count in ((0, 12), (20, 6), (40, 8)):
        own = [clip for clip in rows if first <= clip < first + 20]
        epochs = [own[i : i + count] for i in range(0, len(own) - count, count)]
        assert len(epochs) > 2
        assert all(sorted(epoch) == list(range(first, first + count)) for epoch in epochs)


def test_the_order_is_that_of_the_seed_for_any_hosts_and_from_any_position(folder):
    named = f"{folder}/a:2,{folder}/b:1,{folder}/c:1", f"{folder}/p:1,{folder}/q:2"
    whole = batches(*named, count=12)
    assert clips(batches(*named, count=12, seed=1)) != clips(whole)
    hosts = [batches(*named, rows=[0, 2]), batches(*named, rows=[1, 3])]
    for i, batch in enumerate(whole):
        if i == 5:  # as after a kill, on one host
            state = json.loads(json.dumps(hosts[0].get_state()))
            hosts = [batches(*named, rows=[0, 1, 2, 3])]
            hosts[0].set_state(state)
        parts = [next(host) for host in hosts]
        order = [0, 2, 1, 3] if len(hosts) == 2 else [0, 1, 2, 3]
        for name in ("latents", "canvas"):
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name][order])
        embeds = [part["prompts"]["prompt_embeds"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(embeds), batch["prompts"]["prompt_embeds"][order])


def test_prompts_of_several_sets_have_their_shares(folder):
    found = batches(f"{folder}/a", f"{folder}/p:1,{folder}/q:3", count=40)
    drawn = [int(row[0, 0, 0]) for batch in found for row in batch["prompts"]["prompt_embeds"]]
    assert np.mean([value >= 120 for value in drawn]) == pytest.approx(0.75, abs=0.12)
    assert set(drawn) == {*range(100, 110), *range(120, 125)}


def test_one_set_has_the_order_that_it_has_alone(folder):
    """So the first of several is shuffled as before there were several, and a weight alone changes nothing."""
    assert clips(batches(f"{folder}/a", count=6)) == clips(batches(f"{folder}/a:3", count=6))


def test_sets_that_do_not_go_together(folder, tmp_path):
    named = f"{folder}/a:1,{tmp_path}/other:1"
    for change, said in (
        ({"vae": "cccc"}, "vae is cccc, that of .*/a is bbbb; encode both with the same --weights"),
        ({"text_encoder": "cccc"}, "text_encoder is cccc"),
        ({"fps": 24.0}, "fps is 24.0, that of .*/a is 16.0; encode both with the same --fps"),
    ):
        write(tmp_path / "other" / next(iter(change)), 60, 4, replace(SMALL, **change))
        with pytest.raises(UserError, match=said):
            read_infos(named.replace("other", f"other/{next(iter(change))}"), "latents")
    with pytest.raises(UserError, match=r"/a: is the same set as .*/a; name it once"):
        read_infos(f"{folder}/a:1,{folder}/../{folder.name}/a:1", "latents")
    with pytest.raises(UserError, match="p: is a set of prompts, not of latents"):
        read_infos(f"{folder}/a,{folder}/p", "latents")
    write(tmp_path / "few", 60, 3, replace(SMALL, width=64, latents_shape=(2, 2, 8, 1)))
    with pytest.raises(UserError, match=r"few: 3 clips of 5x16x64 do not fill a batch of that size"):
        batches(f"{folder}/a,{tmp_path}/few")
