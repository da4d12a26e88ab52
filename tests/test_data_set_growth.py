"""Sets whose list of inputs changes: what is written anew, what stays, and what a training sees of it."""

import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_data_latents import INFO, INPUTS, NEGATIVE, contents, record

from avd_jax.data.latents import EncodedSet, PromptsInfo, latents_record, prompts_record, read_metadata, set_fingerprint
from avd_jax.data.set_plan import changed_plan, first_plan
from avd_jax.data.set_writer import SetWriter
from avd_jax.errors import UserError


def text_of(name):
    """A clip's input is its name with its caption."""
    return f"{name} a caption of {name}"


def write(folder, names, *, skip=(), shards=None, per_shard=3):
    """Write what is not there yet; return the names of what was encoded, and the writer."""
    writer = SetWriter(folder, INFO, [text_of(name) for name in names], inputs_per_shard=per_shard)
    encoded = []
    for shard in writer.pending()[:shards]:
        chosen = [names[i] for i in writer.to_encode(shard)]
        records = [clip(name) for name in chosen if name not in skip]
        writer.write_shard(shard, records, {name: f"{name}: broken" for name in chosen if name in skip})
        encoded += chosen
    return encoded, writer


def clip(name):
    about = {"clip_id": name, "caption": f"a caption of {name}", "source": f"{name}.mp4", "fps": 16.0}
    generator = np.random.default_rng(sum(map(ord, name)))
    arrays = {"latents": generator.standard_normal((2, 2, 4, 16)), "prompt_embeds": generator.standard_normal((3, 6))}
    return latents_record(**about, **arrays)


def names_in(folder):
    encoded = EncodedSet(folder, "latents")
    for found in encoded:
        assert found["latents"].tobytes() == clip(found["clip_id"])["latents"]
    return [found["clip_id"] for found in encoded]


def finish(writer):
    return writer.finish("ugly", NEGATIVE)


@pytest.fixture
def begun(tmp_path):
    """A finished set of a to e, of which d was skipped."""
    finish(write(tmp_path / "set", "abcde", skip="d")[1])
    return tmp_path / "set"


def test_a_set_grows_and_its_files_stay(begun):
    before, fingerprint, opened = contents(begun), set_fingerprint(begun), EncodedSet(begun, "latents")
    encoded, writer = write(begun, "xabcyzde")
    assert encoded == ["x", "y", "z"], "neither what is there nor what was skipped is tried again"
    # Until the end it is the set that it was.
    assert (set_fingerprint(begun), names_in(begun)) == (fingerprint, ["a", "b", "c", "e"])
    summary = finish(writer)
    assert (summary.written, summary.skipped) == (7, {"d": "d: broken"})
    assert names_in(begun) == ["a", "b", "c", "e", "x", "y", "z"]
    assert set_fingerprint(begun) != fingerprint
    assert read_metadata(begun) == INFO
    after = contents(begun)
    assert {name for name in before if before[name] != after[name]} == {"dataset_info.json"}
    assert set(after) - set(before) == {
        "latents-train.array_record-00002-of-00002",
        "manifest/00002.json",
        "plan.json",
        "earlier/dataset_info-00001.json",
    }
    source = tfds.builder_from_directory(begun).as_data_source("train")
    assert [source[i]["clip_id"] for i in range(len(source))] == [name.encode() for name in "abcexyz"]
    assert [found["clip_id"] for found in opened] == ["a", "b", "c", "e"], "who had it open reads on"

    encoded, writer = write(begun, "xabcyzde")
    assert encoded == []
    finish(writer)
    assert contents(begun) == after, "the same command again changes nothing"


def test_the_set_of_before_can_be_had_back(begun, tmp_path):
    """As docs/data.md says: for a run that began with it."""
    fingerprint = set_fingerprint(begun)
    finish(write(begun, "abcdexyz")[1])
    finish(write(begun, "abxyz")[1])
    shutil.copytree(begun, tmp_path / "before", copy_function=os.link)
    shutil.copy(begun / "earlier" / "dataset_info-00001.json", tmp_path / "new")
    os.replace(tmp_path / "new", tmp_path / "before" / "dataset_info.json")
    assert names_in(tmp_path / "before") == ["a", "b", "c", "e"]
    assert set_fingerprint(tmp_path / "before") == fingerprint
    assert sorted(names_in(begun)) == ["a", "b", "x", "y", "z"]


def test_what_is_listed_no_longer_leaves_the_set(begun):
    before, opened = contents(begun), EncodedSet(begun, "latents")
    encoded, writer = write(begun, "zacde")  # without b
    assert encoded == ["z"], "a and c are copied"
    assert names_in(begun) == ["a", "b", "c", "e"]
    assert finish(writer).skipped == {"d": "d: broken"}
    assert names_in(begun) == ["e", "a", "c", "z"]
    after = contents(begun)
    assert {name for name in before if before[name] != after[name]} == {"dataset_info.json"}
    assert [found["clip_id"] for found in opened] == ["a", "b", "c", "e"]
    # What the set no longer needs may be deleted, and a copy that is lost is then encoded.
    (begun / "latents-train.array_record-00000-of-00002").unlink()
    assert names_in(begun) == ["e", "a", "c", "z"]
    (begun / "latents-train.array_record-00002-of-00002").unlink()
    encoded, writer = write(begun, "zacde")
    assert sorted(encoded) == ["a", "c", "z"]
    finish(writer)
    assert sorted(names_in(begun)) == ["a", "c", "e", "z"]


def test_back_to_the_list_of_before(begun):
    finish(write(begun, "acde")[1])
    encoded, writer = write(begun, "abcde")
    assert encoded == [], "b lies in a file that was left, or is copied from there"
    finish(writer)
    assert sorted(names_in(begun)) == ["a", "b", "c", "e"]


def test_killed_while_it_grows_and_again_gives_the_same_files(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "whole")
    listed = "cdexyzuvwst"  # a and b leave
    finish(write(tmp_path / "whole", listed)[1])
    for _ in range(3):
        write(begun, listed, shards=1)
        assert names_in(begun) == ["a", "b", "c", "e"]
    finish(write(begun, listed)[1])
    assert contents(begun) == contents(tmp_path / "whole")


def test_a_list_that_changes_before_the_set_is_finished(tmp_path):
    write(tmp_path / "set", "abcdef", shards=1)
    encoded, writer = write(tmp_path / "set", "abcxdef")
    assert encoded == ["x", "d", "e", "f"]
    finish(writer)
    assert names_in(tmp_path / "set") == ["a", "b", "c", "x", "d", "e", "f"]
    # With nothing encoded yet it is a new set, as if the first list had not been.
    SetWriter(tmp_path / "empty", INFO, ["another"], inputs_per_shard=3)
    finish(write(tmp_path / "empty", "abc")[1])
    finish(write(tmp_path / "new", "abc")[1])
    assert contents(tmp_path / "empty") == contents(tmp_path / "new")


def test_another_list_altogether_is_refused(begun):
    before = contents(begun)
    with pytest.raises(UserError, match="set: holds a set encoded from other inputs, none of which is among these"):
        write(begun, "xyz")
    assert contents(begun) == before


def test_prompts_are_copied_by_their_whole_text(tmp_path):
    """A prompt may begin with another one that was skipped."""
    info = PromptsInfo(text_len=16, text_dim=6, text_encoder="aaaa")

    def encode(texts):
        writer, encoded = SetWriter(tmp_path / "p", info, texts, inputs_per_shard=8), []
        for shard in writer.pending():
            chosen = [texts[i] for i in writer.to_encode(shard)]
            kept = [text for text in chosen if text != "a"]
            records = [prompts_record(text=text, prompt_embeds=np.full((2, 6), len(text))) for text in kept]
            writer.write_shard(shard, records, {"a": "a: bad"} if "a" in chosen else {})
            encoded += chosen
        finish(writer)
        return encoded

    encode(["a", "a b", "c"])
    assert encode(["a", "a b", "d"]) == ["a", "d"]
    assert [found["text"] for found in EncodedSet(tmp_path / "p", "prompts")] == ["a b", "d"]


def test_a_set_made_before_sets_could_grow(tmp_path):
    """Whatever the inputs are called: these have no caption."""
    writer = SetWriter(tmp_path / "set", INFO, INPUTS, inputs_per_shard=3)
    for shard in writer.pending():
        writer.write_shard(shard, [record(i) for i in writer.to_encode(shard)], {})
    finish(writer)
    assert not (tmp_path / "set" / "plan.json").exists()
    assert set_fingerprint(tmp_path / "set") == "05a6050f015f4138", "as before; a run resumes on it"


def test_plans():
    assert [list(places) for places in first_plan(5, 2)] == [[0, 1], [2, 3], [4]]
    finished = [(0, "ab"), (2, "cd")]
    assert changed_plan("abcdefg", 2, finished) == [[0, 1], [4, 5], [2, 3], [6]], "a gap is filled"
    assert changed_plan("acdef", 2, finished, copied="ab") == [None, [0, 3], [1, 2], [4]]
    assert changed_plan("abcd", 2, [*finished, (3, "bc")]) == [[0, 1], None, [2, 3], None], "nothing is there twice"
