"""Training texts against a benchmark's list: read from files and sets, told by their lines."""

import json

import numpy as np
import pytest
from vbench_cases import write_info

from avd_jax.data import latents as sets
from avd_jax.data.leakage import leakage, read_texts
from avd_jax.data.set_writer import SetWriter
from avd_jax.errors import UserError
from avd_jax.evaluation.vbench.suites import VBENCH

EMBEDS = np.ones((2, 6))


def write_set(folder, info, inputs, records, skipped=()):
    writer = SetWriter(folder, info, inputs, inputs_per_shard=2)
    for shard in writer.pending():
        own = [inputs[i] for i in writer.to_encode(shard)]
        writer.write_shard(
            shard, [records[x] for x in own if x not in skipped], {x: "bad" for x in own if x in skipped}
        )
    writer.finish("ugly", EMBEDS)
    return folder


def test_texts_of_lists_and_sets(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read_texts(tmp_path / "a.txt") == [(f"{tmp_path}/a.txt:1", "one"), (f"{tmp_path}/a.txt:3", "two")]
    (tmp_path / "c.jsonl").write_text('{"file": "a.mp4", "caption": "three"}\n')
    assert read_texts(tmp_path / "c.jsonl") == [(f"{tmp_path}/c.jsonl:1", "three")]

    info = {"text_len": 16, "text_dim": 6, "text_encoder": "a"}
    texts = ["a", "b/c", "d"]
    prompts = {text: sets.prompts_record(text=text, prompt_embeds=EMBEDS) for text in texts}
    folder = write_set(tmp_path / "prompts", sets.PromptsInfo(**info), texts, prompts, skipped=["b/c"])
    assert [record.value for record in read_texts(folder)] == ["a", "d"]
    assert read_texts(folder)[1].where == f"{folder}:record 1"

    # A set that has changed: the file of what left it is still there, and counts nothing.
    texts = ["d", "e"]
    prompts = {text: sets.prompts_record(text=text, prompt_embeds=EMBEDS) for text in texts}
    write_set(folder, sets.PromptsInfo(**info), texts, prompts)
    assert [record.value for record in read_texts(folder)] == texts

    shape = (1, 2, 2, 4)
    video = {"frames": 1, "height": 16, "width": 16, "fps": 8.0, "latents_shape": shape, "vae": "b"}
    clip = {"latents": np.ones(shape), "prompt_embeds": EMBEDS, "fps": 8.0, "source": "x"}
    clips = {f"{x} caption": sets.latents_record(clip_id=x, caption=f"shows {x}", **clip) for x in "xyz"}
    folder = write_set(tmp_path / "latents", sets.LatentsInfo(**info, **video), list(clips), clips)
    assert [record.value for record in read_texts(folder)] == ["shows x", "shows y", "shows z"]

    for bad, message in ((tmp_path, "holds no encoded set"), (tmp_path / "none.txt", "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_texts(bad)


def test_report_names_lines_and_counts_each_text_once(tmp_path):
    path = write_info(tmp_path, VBENCH)
    prompts = list(dict.fromkeys(entry["prompt_en"] for entry in json.loads(path.read_text())))
    own = [*(f"a caption of clip {i}" for i in range(4)), *prompts, "SCENE OF PROMPT 7", "scene of a prompt 7."]
    (tmp_path / "train.txt").write_text("\n".join(own))
    found = leakage(read_texts(tmp_path / "train.txt"), path)
    assert found.touched == set(range(4, len(own)))
    lines = found.report().splitlines()
    assert lines[0] == f"VBench_full_info.json: {len(own) - 4} of {len(own)} texts touch 946 of its 946 prompts"
    assert lines[1] == "  exact: 946 texts, 946 prompts that nothing is closer to"
    assert lines[2].startswith(f"    {tmp_path}/train.txt:5: {prompts[0]!r} = {path}:")
    assert lines[5] == "  normalised: 1 texts, 0 prompts that nothing is closer to"
    assert lines[7] == "  one word: 1 texts, 0 prompts that nothing is closer to"
    pairs = found.as_record()["pairs"]
    assert {"kind": "normalised", "text": "SCENE OF PROMPT 7", "prompt": "scene of prompt 7."}.items() <= next(
        pair for pair in pairs if pair["kind"] == "normalised"
    ).items()

    clean = leakage(read_texts(tmp_path / "train.txt")[:4], path)
    assert clean.report() == "VBench_full_info.json: 0 of 4 texts touch 0 of its 946 prompts"
