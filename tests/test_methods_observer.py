"""What a run says at its start: which lists that it will be judged by its prompts are like."""

import pytest
from training_cases import make_config, write_sets

from avd_jax.errors import UserError
from avd_jax.methods import observer
from avd_jax.methods.avd.config import FIELDS


def test_a_run_tells_of_prompts_that_it_will_be_judged_by(tmp_path):
    latents, prompts = write_sets(tmp_path, clips=5, prompts=7)  # with "prompt 0" and so on, and "caption 0"
    lists = {"seen.txt": "Prompt 3.\nprompt 9\nanother\n", "unseen.txt": "a dog runs\n", "captions.txt": "caption 1"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    told = []

    def tell(held_out, data=("prompts", "latents")):
        told.clear()
        folders = {f"data__{kind}": str({"prompts": prompts, "latents": latents}[kind]) for kind in data}
        observer._tell_of_leakage(make_config(data__held_out=held_out, **folders), told.append)
        return told

    assert tell("") == tell(f"{tmp_path}/unseen.txt") == []
    (line,) = tell(f"{tmp_path}/unseen.txt, {tmp_path}/seen.txt")
    assert line == (
        f"leakage: seen.txt: 7 of 7 texts touch 2 of its 3 prompts ({prompts}); scripts/vbench.py leakage --prompts "
        f"{prompts} --against {tmp_path}/seen.txt shows them"
    )
    (line,) = tell(f"{tmp_path}/captions.txt", data=("latents",))
    assert line.startswith("leakage: captions.txt: 5 of 5 texts touch 1 of its 1 prompts")
    with pytest.raises(UserError, match=r"nowhere.txt: cannot be read"):
        tell("nowhere.txt")


def test_lists_are_paths():
    assert FIELDS["data.held_out"].check("~/a.json, /b.json") is None
    assert "s3:// is not supported" in FIELDS["data.held_out"].check("/a.json,s3://bucket/b")
