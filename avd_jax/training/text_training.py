"""Training a tiny umT5 from scratch on the captions of the built-in world (`data/shapes_world.py`).

Each token of a clause learns to tell all about the object of that clause, and each token of a caption all about the
scene, through linear probes that are thrown away afterwards. A transformer that reads such embeddings need not find out
by itself which colour belongs to which shape.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from avd_jax.data import shapes_world
from avd_jax.data.tokenizer import Tokenizer
from avd_jax.models.umt5 import UMT5Config, UMT5Encoder

FIRST_CAPTION = 2_000_000  # number of the first scene of the built-in world; clips for other work are below
LENGTH = 64  # tokens; captions of three objects have about 50
THING_WORDS = {  # what a token of a clause is asked, and the answers
    "shape": shapes_world.SHAPES,
    "colour": tuple(shapes_world.COLOURS),
    "tone": tuple(shapes_world.TONES),
    "texture": tuple(dict.fromkeys(shapes_world.TEXTURES)),
    "size": tuple(shapes_world.SIZES),
    "action": tuple(dict.fromkeys(shapes_world.ACTIONS)),
    "direction": tuple(shapes_world.DIRECTIONS),
    "speed": tuple(shapes_world.SPEEDS),
}
SCENE_WORDS = {"background": tuple(shapes_world.BACKGROUNDS), "pan": tuple(dict.fromkeys(shapes_world.PANS))}
UNASKED = -1


def train_text_encoder(
    tokenizer: Tokenizer, config: UMT5Config, *, seed: int, num_steps: int, batch_size: int = 64
) -> tuple[UMT5Encoder, float]:
    """Train an encoder; returns it and its probes' accuracy on new captions, 0..1."""
    words = {**THING_WORDS, **SCENE_WORDS}
    encoder = UMT5Encoder(config, nnx.Rngs(seed))
    query = encoder.blocks.attn.q.kernel
    query[...] = query[...] * config.head_dim**-0.5  # the scale that T5 starts from: its logits are not divided
    probes = nnx.Linear(config.dim, sum(map(len, words.values())), rngs=nnx.Rngs(seed + 1))
    splits = np.cumsum([len(answers) for answers in words.values()])[:-1].tolist()
    graphdef, params = nnx.split((encoder, probes))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))

    def loss(params, ids, mask, answers):
        encoder, probes = nnx.merge(graphdef, params)
        embeds = encoder(ids, mask)
        logits = jnp.split(probes(embeds), splits, axis=-1)
        total, right = 0.0, 0.0
        asked = answers != UNASKED
        for i, one in enumerate(logits):
            answer = answers[..., i]
            wrong = optax.softmax_cross_entropy_with_integer_labels(one, jnp.maximum(answer, 0))
            total += jnp.sum(jnp.where(asked[..., i], wrong, 0.0))
            right += jnp.sum((jnp.argmax(one, -1) == answer) & asked[..., i])
        return total / asked.sum(), right / asked.sum()

    @jax.jit
    def step(params, moments, *batch):
        gradient = jax.grad(loss, has_aux=True)(params, *batch)[0]
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments

    moments = optimizer.init(params)
    for number in range(num_steps):
        first = FIRST_CAPTION + (number + 16) * batch_size
        params, moments = step(params, moments, *_questions(tokenizer, range(first, first + batch_size)))
    new = _questions(tokenizer, range(FIRST_CAPTION, FIRST_CAPTION + 16 * batch_size))
    accuracy = float(jax.jit(loss)(params, *new)[1])
    return nnx.merge(graphdef, params)[0], accuracy


def _questions(tokenizer: Tokenizer, indices: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens and mask, [B LENGTH], and the right answers, [B LENGTH questions]."""
    scenes = [shapes_world.scene(i) for i in indices]
    ids, mask = (array[:, :LENGTH] for array in tokenizer([scene.caption for scene in scenes]))
    answers = np.full((*ids.shape, len(THING_WORDS) + len(SCENE_WORDS)), UNASKED, np.int32)
    for row, scene in enumerate(scenes):
        for i, (name, words) in enumerate(SCENE_WORDS.items()):
            answers[row, mask[row] > 0, len(THING_WORDS) + i] = words.index(getattr(scene, name))
        for thing in scene.things:
            # Clauses are found by their first word's place: each is the text up to it, in tokens.
            before = scene.caption.lower().index(thing.description)
            start, end = (
                _tokens(tokenizer, scene.caption[:stop]) for stop in (before, before + len(thing.description))
            )
            for i, (name, words) in enumerate(THING_WORDS.items()):
                if thing.action == "move" or name not in ("direction", "speed"):
                    answers[row, start:end, i] = words.index(getattr(thing, name))
    return ids, mask, answers


def _tokens(tokenizer: Tokenizer, text: str) -> int:
    return int(tokenizer([text])[1].sum()) - 1  # without </s>
