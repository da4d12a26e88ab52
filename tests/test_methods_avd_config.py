"""The config's fields, and the one line that each wrong value gets."""

import re

import pytest
from training_cases import make_config

from avd_jax.errors import UserError
from avd_jax.fields import describe, flags_parser, flatten
from avd_jax.methods.avd.config import FIELDS, default_config, validate, validate_values

GOOD = {"init_from": "weights", "data__latents": "latents"}


def test_the_papers_values():
    flat = flatten(default_config())
    expected = {
        "student.timesteps": (1000.0, 900.0, 757.0, 522.0),
        "score.shift": 5.0,
        "score.min_timestep": 20.0,
        "score.max_timestep": 980.0,
        "guidance_scale": 5.0,
        "fake_score_updates": 5,
        "loss.distribution_matching": 1.0,
        "loss.regression": 2.0,
        "loss.temporal": 0.05,
        "loss.temporal_clip": 0.6,
        "loss.adaptive_k": 3.0,
        "loss.adaptive_alpha": 0.95,
        "loss.adaptive_uses": "before",
        "loss.regression_weighting": "adaptive",
        "optimizer.learning_rate": 2e-6,
        "optimizer.fake_score_learning_rate": 2e-6,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.999,
        "optimizer.max_grad_norm": 10.0,
        "compute_dtype": "bfloat16",
    }
    assert {name: flat[name] for name in expected} == expected
    assert set(flat) == set(FIELDS)


def test_every_field_is_explained():
    lines = describe(default_config(), FIELDS).splitlines()
    assert len(lines) == len(FIELDS)
    for (name, field), line in zip(sorted(FIELDS.items()), sorted(lines), strict=True):
        assert re.fullmatch(rf"{re.escape(f'{name} = {field.default}')} +{re.escape(field.help)}", line)
        assert len(field.help) > 10
        assert field.check(field.default) is None, name


def test_a_field_cannot_be_added_or_change_its_type():
    config = default_config()
    with pytest.raises(AttributeError):
        config.batchsize = 4
    with pytest.raises((TypeError, ValueError)):
        config.batch_size = "four"


def test_good_values():
    for fields in (
        {},
        {"loss__temporal_clip": -float("inf")},
        {"checkpoint_every": 0, "sample_every": 0, "fake_score_updates": 0},
        {"loss__regression": 0.0, "loss__temporal": 0.0},
        {"batch_size": 6, "accumulation_steps": 3},
        {"student__timesteps": (999.0,)},
        {"seed": 2**32 - 1},
    ):
        validate(make_config(**GOOD | fields))
    validate_values(make_config(half_rate__steps=2))  # to compile needs neither weights nor sets


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "config.num_steps=0 must be at least 1"),
        ({"batch_size": -1}, "config.batch_size=-1 must be at least 1"),
        ({"batch_size": 4, "accumulation_steps": 3}, "config.accumulation_steps=3 must divide batch_size=4"),
        ({"max_nonfinite": 0}, "config.max_nonfinite=0 must be at least 1"),
        ({"checkpoint__keep": 0}, "config.checkpoint.keep=0 must be at least 1"),
        ({"sample__prompts": 0}, "config.sample.prompts=0 must be at least 1; sample_every=0 samples nothing"),
        ({"checkpoint_every": -1}, "config.checkpoint_every=-1 must be 0 or a positive number"),
        ({"loss__regression": -2.0}, "config.loss.regression=-2.0 must be 0 or a positive number"),
        ({"loss__temporal": float("nan")}, "config.loss.temporal=nan must be 0 or a positive number"),
        ({"loss__temporal_clip": float("nan")}, "config.loss.temporal_clip=nan must be a number"),
        ({"optimizer__learning_rate": float("inf")}, "config.optimizer.learning_rate=inf must be 0 or a positive"),
        ({"optimizer__beta2": -0.5}, "config.optimizer.beta2=-0.5 must be 0 or a positive number"),
        ({"optimizer__beta1": 1.0}, "config.optimizer.beta1=1.0 must be at least 0 and below 1"),
        ({"loss__regression_weighting": "fix"}, "must be one of adaptive, fixed (did you mean 'fixed'?)"),
        ({"loss__adaptive_uses": "never"}, "config.loss.adaptive_uses='never' must be one of before, after"),
        ({"compute_dtype": "bf16"}, "config.compute_dtype='bf16' must be one of float32, bfloat16"),
        ({"remat": "full"}, "config.remat='full' must be one of none, block, save_attention"),
        ({"checkpoint__best_mode": "lowest"}, "config.checkpoint.best_mode='lowest' must be one of min, max"),
        ({"ema_decay": 1.0}, "config.ema_decay=1.0 must be at least 0 and below 1"),
        ({"loss__adaptive_alpha": 1.5}, "config.loss.adaptive_alpha=1.5 must be at least 0 and below 1"),
        ({"score__min_timestep": 990.0}, "config.score.min_timestep=990.0 and score.max_timestep=980.0 must rise in"),
        ({"score__max_timestep": 1001.0}, "score.max_timestep=1001.0 must rise in 0..1000"),
        ({"score__shift": 0.0}, "config.score.shift=0.0 must be positive"),
        ({"score__shift": float("inf")}, "config.score.shift=inf must be positive"),
        ({"guidance_scale": float("nan")}, "config.guidance_scale=nan must be a number"),
        ({"lora__targets": ("q", 1)}, "config.lora.targets=('q', 1) must be names, as in ('q', 'k', 'v'"),
        ({"student__timesteps": ("a",)}, "config.student.timesteps=('a',) must be numbers, as in (1000.0, 900.0"),
        ({"meters__saturation": (1,)}, "config.meters.saturation=(1,) must be two numbers, below and above 1"),
        ({"attention__forward_blocks": (128, None, 128)}, "config.attention.forward_blocks=(128, None, 128) must be"),
        ({"seed": -1}, "config.seed=-1 must be 0..2^32 - 1"),
        ({"student__timesteps": (900.0, 1000.0)}, "timesteps are [900.0, 1000.0]: give decreasing numbers"),
        ({"student__timesteps": ()}, "timesteps are []"),
        ({"init_from": ""}, "config.init_from='' must name the teacher's weights"),
        ({"data__latents": ""}, "config.data.latents is empty: give the folder that scripts/encode.py --videos wrote"),
        (
            {"loss__distribution_matching": 0.0, "loss__regression": 0.0, "loss__temporal": 0.0},
            "config.loss: every term has weight 0",
        ),
    ],
)
def test_wrong_values_are_named(fields, message):
    with pytest.raises(UserError) as error:
        validate(make_config(**GOOD | fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.py"], "--config nowhere.py: there is no such file"),
        (["--config", "nowhere.py"], "--config nowhere.py: there is no such file"),
        (["--config", __file__, "--config.num_step=3"], "config.num_step does not exist (did you mean 'num_steps'?)"),
        (
            ["--config", __file__, "--config.loss.temporal_clp=3"],
            "config.loss.temporal_clp does not exist (did you mean 'loss.temporal_clip'?)",
        ),
        (["--config", __file__, "--config.xyzzy", "3"], "config.xyzzy does not exist; --explain lists every field"),
    ],
)
def test_wrong_flags_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        flags_parser(lambda path: FIELDS)(["train.py", *arguments])
    assert message in str(error.value)
