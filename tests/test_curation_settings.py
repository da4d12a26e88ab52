"""The config of a curation: the file holds the defaults, and what is wrong is named."""

import runpy
from pathlib import Path

import pytest

from avd_jax.curation.analysis import DEFAULTS
from avd_jax.curation.settings import ANALYSIS_HELP, FIELDS, default_config, validate
from avd_jax.errors import UserError
from avd_jax.fields import WIDEST, describe, flatten

CONFIG = Path(__file__).parents[1] / "configs" / "curation.py"


def test_the_config_file_holds_the_papers_settings_which_are_the_defaults():
    config = runpy.run_path(str(CONFIG))["get_config"]()
    assert config.to_dict() == default_config().to_dict()
    assert config.analysis.to_dict() == DEFAULTS
    select = config.select
    assert (select.width, select.height, select.colour, select.sharpness, select.motion) == (1280, 720, 0.6, 20.0, 0.2)
    assert (select.temporal_consistency, select.aesthetics) == (0.5, 0.5)
    validate(config)
    assert all(field.help for field in FIELDS.values())


def test_every_field_of_the_analysis_is_explained():
    assert list(flatten(DEFAULTS)) == list(ANALYSIS_HELP), "one help a field, and none of a field that is gone"
    assert len(set(ANALYSIS_HELP.values())) == len(ANALYSIS_HELP)


def test_a_long_value_does_not_push_the_help_of_the_others_away():
    lines = {line.split(" = ")[0]: line for line in describe(default_config(), FIELDS).splitlines()}
    assert lines["caption.prompt"].endswith(f"or emotions.  {FIELDS['caption.prompt'].help}")
    del lines["caption.prompt"]
    starts = {line.rindex(FIELDS[name].help) for name, line in lines.items()}
    assert len(starts) == 1
    assert starts.pop() <= WIDEST + 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("analysis.frames", 80, "config.analysis.frames 80 is not 4n"),
        ("analysis.fps", -1.0, "config.analysis.fps=-1.0 must be positive"),
        ("analysis.fps", float("nan"), "config.analysis.fps=nan must be positive"),
        ("analysis.cuts.trim_seconds", -1.0, "config.analysis.cuts.trim_seconds=-1.0 must be 0 or a positive number"),
        ("analysis.cuts.short_side", 0, "config.analysis.cuts.short_side=0 must be at least 16"),
        ("analysis.cuts.gradual.long_spans", (4, 1), "must be whole numbers of at least 2"),
        ("analysis.looks.at", (1, 81), "must be below looks.of=81"),
        ("analysis.motion.preset", "slow", "must be one of ultrafast, fast, medium"),
        ("analysis.hash.pictures", 0, "config.analysis.hash.pictures=0 must be at least 1"),
        ("select.aesthetics", 0.0, "config.select.aesthetics=0.0 must be a share"),
        ("select.duplicate_bits", 40.0, "config.select.duplicate_bits=40.0 must be at least 0 and below 32"),
        ("select.motion", float("nan"), "config.select.motion=nan must be 0 or a positive number"),
        ("caption.endpoint", "127.0.0.1:8000", "must be the address of an OpenAI-compatible server"),
        ("caption.endpoint", "http://a..b/v1", "must be the address of an OpenAI-compatible server"),
        ("caption.endpoint", "http://host/v1 x", "must be the address of an OpenAI-compatible server"),
        ("caption.endpoint", "http://host/v\u00f6", "must be the address of an OpenAI-compatible server"),
        ("caption.endpoint", "http://[::1", "must be the address of an OpenAI-compatible server"),
        ("caption.endpoint", "http://me:secret@host/v1", "must hold no password"),
        ("caption.endpoint", "http://host/v1", "config.caption.model='' is empty: name the model"),
        ("caption.send", "gif", "must be one of video, images"),
        ("features.weights", "gs://weights", "gs:// is not supported"),
    ],
)
def test_what_is_wrong_is_named(field, value, message):
    config = default_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        validate(config)
    assert message in str(error.value)
