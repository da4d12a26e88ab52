"""Beam: the same files, byte for byte, as the process pool's."""

import os
import sys

import curation_stand_in
import pytest
from test_curation_pipeline import VIDEOS, curate, files

from avd_jax.curation import pipeline
from avd_jax.curation.settings import default_config
from avd_jax.errors import UserError

pytest.importorskip("apache_beam", reason="Apache Beam is an extra: pip install -e '.[beam]'")
from avd_jax.curation import beam


def test_beam_in_several_processes_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "THUMBNAIL", "builtins:len")
    monkeypatch.setattr(pipeline, "ANALYSE", "curation_stand_in:analyse")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    folder = curation_stand_in.write(tmp_path / "videos", **VIDEOS)
    curate(folder, tmp_path / "pool")
    curate(folder, tmp_path / "beam", run=beam.beam_runner(default_config(), 2, ""))
    assert files(tmp_path / "beam") == files(tmp_path / "pool")


def test_beam_args_that_are_none_are_one_line():
    with pytest.raises(UserError, match="is no command line"):
        beam.beam_runner(default_config(), 2, "--runner='Direct")
