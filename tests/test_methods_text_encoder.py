"""Training a tiny umT5 on captions: the probes' answers are the scene's, and training finds them."""

from pathlib import Path

import numpy as np
import pytest
from avd_jax.training.text_training import THING_WORDS, UNASKED, train_text_encoder

from avd_jax.data import shapes_world
from avd_jax.data.tokenizer import Tokenizer
from avd_jax.models.umt5 import UMT5Config
from avd_jax.training import text_training

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_path(ROOT / "weights" / "tiny" / "tokenizer")


def test_questions_are_asked_of_the_clause_that_holds_the_answer(tokenizer):
    first = next(i for i in range(500) if len(shapes_world.scene(i).things) == 2)
    scene = shapes_world.scene(first)
    ids, mask, answers = text_training._questions(tokenizer, range(first, first + 1))
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


def test_training_makes_the_words_readable(tokenizer):
    sizes = UMT5Config(vocab_size=tokenizer.vocab_size, dim=32, ffn_dim=64, num_heads=2, head_dim=16, num_layers=1)
    before = train_text_encoder(tokenizer, sizes, seed=0, num_steps=1, batch_size=8)[1]
    after = train_text_encoder(tokenizer, sizes, seed=0, num_steps=120, batch_size=8)[1]
    assert before < 0.5
    assert after > before + 0.2
