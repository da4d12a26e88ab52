"""Training a tiny umT5 on captions: the probes' answers are the scene's, and training finds them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import run_method

from avd_jax.data import shapes_world
from avd_jax.data.tokenizer import Tokenizer
from avd_jax.data.world_clips import FIRST_TEXT_ENCODER_CAPTION
from avd_jax.errors import UserError
from avd_jax.fields import config_from
from avd_jax.methods.text_encoder import FIELDS, RECIPE, method
from avd_jax.methods.text_encoder.method import (
    NEW_CAPTIONS,
    THING_WORDS,
    UNASKED,
    accuracy,
    answered,
    questions,
    trained_encoder,
)
from avd_jax.models.umt5 import UMT5Config
from avd_jax.parallel.mesh import mesh_that_divides

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_path(ROOT / "weights" / "tiny" / "tokenizer")


def config_for(num_steps, **changes):
    config = config_from(FIELDS)
    config.tokenizer = str(ROOT / "weights" / "tiny")
    sizes = config.model
    sizes.dim, sizes.ffn_dim, sizes.num_heads, sizes.head_dim, sizes.num_layers = 32, 64, 2, 16, 1
    config.num_steps, config.batch_size, config.log_every, config.checkpoint_every = num_steps, 8, 50, 0
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    monkeypatch.setattr(method, "mesh_that_divides", lambda size, devices: mesh_that_divides(size, jax.devices()[:2]))


def test_questions_are_asked_of_the_clause_that_holds_the_answer(tokenizer):
    first = next(i for i in range(500) if len(shapes_world.scene(i).things) == 2)
    scene = shapes_world.scene(first)
    asked = questions(tokenizer, range(first, first + 1))
    ids, mask, answers = asked["ids"], asked["mask"], asked["answers"]
    colour = list(THING_WORDS).index("colour")
    colours = [THING_WORDS["colour"][i] for i in answers[0, :, colour] if i != UNASKED]
    assert set(colours) == {thing.colour for thing in scene.things}
    # Each clause's answers stand at its own tokens, in the caption's order.
    assert colours == sorted(colours, key=[thing.colour for thing in scene.things].index)
    for thing in scene.things:
        (word,) = tokenizer([thing.colour])[0][0, :1]
        place = int(np.flatnonzero(ids[0] == word)[0])
        assert THING_WORDS["colour"][answers[0, place, colour]] == thing.colour
    assert (answers[0, mask[0] > 0, len(THING_WORDS)] != UNASKED).all()
    assert (answers[0, mask[0] == 0] == UNASKED).all()


def test_loss_and_share_of_right_answers_by_hand():
    logits = [jnp.array([[[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]]]), jnp.zeros((1, 3, 4))]  # of two questions
    answers = jnp.array([[[UNASKED, UNASKED], [0, UNASKED], [1, 2]]])
    loss, right = answered(logits, answers)
    assert float(loss) == pytest.approx(np.log(4) / 3, rel=1e-6)  # two are certain and right, one guesses among four
    assert float(right) == pytest.approx(2 / 3)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_no_batch_has_a_caption_that_the_accuracy_is_measured_on(tokenizer, batch_size):
    method = RECIPE.build(config_for(1, batch_size=batch_size))
    batches, first = method.batches({}), FIRST_TEXT_ENCODER_CAPTION + NEW_CAPTIONS
    for number in range(3):
        if number == 2:  # from another's position
            state, batches = batches.get_state(), method.batches({})
            batches.set_state(state)
        start = first + number * batch_size
        expected = questions(tokenizer, range(start, start + batch_size))
        jax.tree.map(np.testing.assert_array_equal, next(batches), expected)


def test_training_makes_the_words_readable(tokenizer, tmp_path):
    shares = {}
    for num_steps in (1, 120):
        run = run_method(RECIPE, config_for(num_steps), tmp_path / str(num_steps))
        shares[num_steps] = accuracy(run.method, run.state.networks["text_encoder"].latest, tokenizer, captions=16 * 8)
    assert shares[1] < 0.5
    assert shares[120] > shares[1] + 0.2

    encoder = trained_encoder(run.method, run.state.networks["text_encoder"].latest)
    expected = UMT5Config(vocab_size=tokenizer.vocab_size, dim=32, ffn_dim=64, num_heads=2, head_dim=16, num_layers=1)
    assert encoder.config == expected
    ids, mask = tokenizer([shapes_world.caption(0)])
    assert np.isfinite(encoder(ids[:, :64], mask[:, :64])).all()


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    config = config_for(4, checkpoint_every=2)
    whole = run_method(RECIPE, config, tmp_path)
    assert whole.status == 0
    assert whole.state.networks["text_encoder"].ema is None
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "gone")  # as if it had been killed after step 2
    resumed = run_method(RECIPE, config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)


def test_a_run_resumes_with_a_copy_of_its_tokenizer_but_with_no_other(tokenizer, tmp_path):
    run_method(RECIPE, config_for(1), tmp_path / "run")
    tokenizer.save(tmp_path / "copy")
    assert run_method(RECIPE, config_for(1, tokenizer=str(tmp_path / "copy")), tmp_path / "run").status == 0
    file = tmp_path / "copy" / "tokenizer.json"
    file.write_text(file.read_text().replace('"unk_token": "<unk>"', '"unk_token": "</s>"'))  # as many tokens
    assert file.read_bytes() != tokenizer.serialized
    with pytest.raises(UserError, match=r"/1: the run began with other contents of config\.tokenizer; name a copy of"):
        run_method(RECIPE, config_for(1, tokenizer=str(tmp_path / "copy")), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": ""}, "config.tokenizer is empty: give the folder"),
        ({"model.num_layers": 0}, "config.model.num_layers=0 must be at least 1"),
        ({"optimizer.learning_rate": -1.0}, "config.optimizer.learning_rate=-1.0 must be 0 or a positive number"),
        ({"batch_size": 0}, "config.batch_size=0 must be at least 1"),
    ],
)
def test_wrong_values_are_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run_method(RECIPE, config_for(1, **change), tmp_path / "run")
