"""The training pipeline: epochs, exact resume, and one global order for any number of hosts."""

import json
from dataclasses import replace

import grain
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from avd_jax.data import latents as sets
from avd_jax.data.pipeline import training_batches
from avd_jax.data.set_writer import SetWriter
from avd_jax.errors import UserError

PROMPTS = sets.PromptsInfo(text_len=16, text_dim=2, text_encoder="aaaa")
LATENTS = sets.LatentsInfo(16, 2, "aaaa", 5, 16, 32, 16.0, (2, 2, 4, 1), "bbbb")
NEGATIVE = np.zeros((1, 2))


def write_sets(folder, clips=11, prompts=13, latents_info=LATENTS, prompts_info=PROMPTS):
    """Clip i has latents i and a caption of i % 3 + 1 tokens of value i; prompt j has one token of value 100 + j."""
    writer = SetWriter(folder / "latents", latents_info, [str(i) for i in range(clips)], inputs_per_shard=4)
    for shard in writer.pending():
        records = [
            sets.latents_record(
                clip_id=str(i),
                caption=str(i),
                latents=np.full((2, 2, 4, 1), i),
                prompt_embeds=np.full((i % 3 + 1, 2), i),
                fps=16.0,
                source="",
            )
            for i in writer.to_encode(shard)
        ]
        writer.write_shard(shard, records, {})
    writer.finish("", NEGATIVE)
    writer = SetWriter(folder / "prompts", prompts_info, [str(i) for i in range(prompts)], inputs_per_shard=20)
    records = [sets.prompts_record(text=str(j), prompt_embeds=np.full((1, 2), 100 + j)) for j in range(prompts)]
    writer.write_shard(0, records, {})
    writer.finish("", NEGATIVE)
    return folder / "latents", folder / "prompts"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


def batches(folders, count=None, **kwargs):
    iterator = training_batches(*folders, **{"batch_size": 4, "prompt_batches": 1, "seed": 0, "text_len": 5, **kwargs})
    return iterator if count is None else [next(iterator) for _ in range(count)]


def numbers(batch):
    """(clip, prompt) of each row."""
    pairs = zip(batch["latents"], batch["prompts"]["prompt_embeds"], strict=True)
    return [(int(z.flat[0]), int(p.flat[0])) for z, p in pairs]


def rows(found):
    return [row for batch in found for row in numbers(batch)]


def test_a_batch_may_be_one_row(folders):
    """Grain rounds the number of batches as a float, which was once too large for an index."""
    assert rows(batches(folders, 3, batch_size=1)) == rows(batches(folders, 1, batch_size=3))


def test_what_a_batch_holds(folders):
    (batch,) = batches(folders, 1)
    assert jax.tree.map(np.shape, batch) == {
        "prompts": {"prompt_embeds": (4, 1, 5, 2)},
        "latents": (4, 2, 2, 4, 1),
        "canvas": (4, 0, 2, 2, 4, 1),
        "captions": {"prompt_embeds": (4, 5, 2)},
    }
    assert all(value.dtype == ml_dtypes.bfloat16 for value in jax.tree.leaves(batch))
    for (clip, prompt), row in zip(numbers(batch), range(4), strict=True):
        assert (batch["latents"][row] == clip).all()
        length = clip % 3 + 1
        caption = batch["captions"]["prompt_embeds"][row]
        assert (caption[:length] == clip).all()
        assert (caption[length:] == 0).all()
        assert (batch["prompts"]["prompt_embeds"][row, 0] == [[prompt] * 2] + [[0] * 2] * 4).all()


def test_each_epoch_holds_everything_once_in_an_order_of_its_own(folders):
    found = rows(batches(folders, 11 * 13 // 4 + 1))
    clips, prompts = [clip for clip, _ in found], [prompt for _, prompt in found]
    clip_epochs = [clips[i : i + 11] for i in range(0, 132, 11)]
    prompt_epochs = [prompts[i : i + 13] for i in range(0, 130, 13)]
    assert all(sorted(epoch) == list(range(11)) for epoch in clip_epochs)
    assert all(sorted(epoch) == list(range(100, 113)) for epoch in prompt_epochs)
    assert len(set(map(tuple, clip_epochs))) == len(clip_epochs)
    assert len(set(map(tuple, prompt_epochs))) == len(prompt_epochs)


def test_several_batches_of_prompts_come_with_one_of_latents(folders):
    one, three = batches(folders, 6), batches(folders, 2, prompt_batches=3)
    embeds = [batch["prompts"]["prompt_embeds"] for batch in three]
    assert [batch.shape for batch in embeds] == [(4, 3, 5, 2)] * 2
    in_order = [int(batch[row, i, 0, 0]) for batch in embeds for row in range(4) for i in range(3)]
    assert in_order == [prompt for _, prompt in rows(one)], "no prompt is passed over"
    assert [int(z.flat[0]) for batch in three for z in batch["latents"]] == [clip for clip, _ in rows(one[:2])]


def test_seeds(folders):
    assert rows(batches(folders, 5)) == rows(batches(folders, 5))
    assert rows(batches(folders, 5)) != rows(batches(folders, 5, seed=1))


def test_captions_serve_as_prompts(folders):
    found = rows(batches((folders[0], None), 11))
    assert sorted(prompt for _, prompt in found) == sorted(clip for clip, _ in found)
    assert sum(prompt == clip for clip, prompt in found) < 15, "prompts are not the captions of the same rows"


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0, 3], [1, 2]], [[3], [0], [1], [2]], [[1, 2], [1, 2]]])
def test_global_batches_do_not_depend_on_the_number_of_hosts(folders, shares):
    """Nor on which rows a host has: a mesh may order devices as it likes, and hosts may share rows."""
    alone = batches(folders, 9)
    hosts = [batches(folders, 9, rows=share) for share in shares]
    for i, whole in enumerate(alone):
        whole = numbers(whole)
        assert [numbers(host[i]) for host in hosts] == [[whole[row] for row in share] for share in shares]


def test_the_state_fits_any_host_and_any_number_of_hosts(folders):
    expected = [numbers(batch) for batch in batches(folders, 9)]
    one = batches(folders, rows=[1])
    for _ in range(5):
        next(one)
    state = json.loads(json.dumps(one.get_state()))
    for shares in ([None], [[0, 1], [2, 3]], [[0], [1], [2], [3]]):
        hosts = [batches(folders, rows=share) for share in shares]
        for host in hosts:
            host.set_state(state)
        for i in range(5, 9):
            assert rows([next(host) for host in hosts]) == expected[i]


def test_saved_with_orbax_and_restored_exactly(folders, tmp_path):
    iterator = batches(folders)
    for _ in range(7):
        next(iterator)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    expected = rows([next(iterator) for _ in range(6)])
    again = batches(folders)
    next(again)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(again)))
    assert rows([next(again) for _ in range(6)]) == expected


def test_a_set_of_one_fills_a_batch(tmp_path):
    folders = write_sets(tmp_path, clips=1, prompts=1)
    assert rows(batches(folders, 2)) == [(0, 100)] * 8


def test_text_len_below_the_stored_length_cuts(folders):
    (batch,) = batches(folders, 1, text_len=1)
    assert batch["captions"]["prompt_embeds"].shape == (4, 1, 2)


def test_what_a_user_can_do_wrong(folders, tmp_path):
    with pytest.raises(UserError, match="is a set of latents, not of prompts"):
        batches((folders[0], folders[0]))
    with pytest.raises(UserError, match="nowhere: holds no encoded set"):
        batches((tmp_path / "nowhere", folders[1]))
    other = write_sets(tmp_path, prompts_info=replace(PROMPTS, text_encoder="cccc"))
    with pytest.raises(UserError, match=r"text_encoder is cccc, that of .* is aaaa; encode both"):
        batches(other)


def test_latents_of_another_shape_are_named(tmp_path):
    folders = write_sets(tmp_path, latents_info=replace(LATENTS, latents_shape=(2, 4, 4, 1)))
    with pytest.raises(UserError, match=r"latents: \d+ has latents of shape \(2, 2, 4, 1\)"):
        batches(folders, 1)
