"""A tiny umT5, trained from scratch on the captions of the built-in world (`data/shapes_world.py`).

Each token of a clause learns to tell all about the object of that clause, and each token of a caption all about the
scene. Linear probes ask for it and are thrown away afterwards. A transformer that reads such embeddings need not find
out by itself which colour belongs to which shape.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from avd_jax import convert
from avd_jax.data import shapes_world
from avd_jax.data.tokenizer import Tokenizer
from avd_jax.data.world_clips import FIRST_TEXT_ENCODER_CAPTION
from avd_jax.models.functional import Functional, Params, unallocated
from avd_jax.models.umt5 import UMT5Config, UMT5Encoder
from avd_jax.parallel.hosts import batch_rows
from avd_jax.parallel.mesh import mesh_that_divides
from avd_jax.training.batches import CountedBatches
from avd_jax.training.method import BatchField, Method, Term, Trained, Update

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
WORDS = {**THING_WORDS, **SCENE_WORDS}
UNASKED = -1
NEW_CAPTIONS = 1024  # that no update sees, on which the accuracy is measured


def build(config, *, devices=None, video=None) -> Method:
    """Put the method together; arguments and errors as in `methods/avd/method.py`."""
    mesh = mesh_that_divides(config.batch_size, devices)
    tokenizer = convert.load_tokenizer(config.tokenizer)
    sizes = UMT5Config(vocab_size=tokenizer.vocab_size, **config.model)
    network = unallocated(lambda: EncoderWithProbes(sizes, config.seed))
    rate = optax.cosine_decay_schedule(config.optimizer.learning_rate, config.num_steps)
    shape = config.batch_size, LENGTH

    def array(*axes: int) -> BatchField:
        return BatchField(jax.ShapeDtypeStruct((*shape, *axes), jnp.int32))

    return Method(
        name="text_encoder",
        main="text_encoder",
        mesh=mesh,
        networks={
            "text_encoder": Trained(
                network.abstract_params(),
                lambda shardings: nnx.to_pure_dict(nnx.state(new_encoder(sizes, config.seed))),
                optax.adam(rate),
            )
        },
        updates=(_update(network),),
        fields={"ids": array(), "mask": array(), "answers": array(len(WORDS))},
        batches=lambda fresh: CountedBatches(
            lambda number: questions(tokenizer, _captions(config.batch_size, number)),
            batch_rows(mesh, config.batch_size).rows,
        ),
        record=lambda: {"architecture": {"name": "umt5", "config": dataclasses.asdict(sizes)}},
        inputs=lambda: {"tokenizer": hashlib.sha256(tokenizer.serialized).hexdigest()[:16]},
    )


class EncoderWithProbes(nnx.Module):
    """An encoder, and the linear probes that read the answers off its embeddings and are thrown away afterwards."""

    def __init__(self, sizes: UMT5Config, seed: int):
        self.encoder = UMT5Encoder(sizes, nnx.Rngs(seed))
        self.probes = nnx.Linear(sizes.dim, sum(map(len, WORDS.values())), rngs=nnx.Rngs(seed + 1))

    def __call__(self, ids, mask) -> list[jax.Array]:
        """Return the logits of each question, [B LENGTH answers]."""
        splits = np.cumsum([len(answers) for answers in WORDS.values()])[:-1].tolist()
        return jnp.split(self.probes(self.encoder(ids, mask)), splits, axis=-1)


def new_encoder(sizes: UMT5Config, seed: int) -> EncoderWithProbes:
    """Return an encoder with random weights, and its probes."""
    network = EncoderWithProbes(sizes, seed)
    query = network.encoder.blocks.attn.q.kernel
    query[...] = query[...] * sizes.head_dim**-0.5  # the scale that T5 starts from: its logits are not divided
    return network


def trained_encoder(method: Method, params: Params) -> UMT5Encoder:
    """Return the encoder of `params`, trained by `method`, as a module."""
    return _network(method).module(params).encoder


def accuracy(method: Method, params: Params, tokenizer: Tokenizer, *, captions: int = NEW_CAPTIONS) -> float:
    """Return the share of questions on captions that are new to it which the encoder's probes answer, 0..1."""
    network = _network(method)
    new = questions(tokenizer, range(FIRST_TEXT_ENCODER_CAPTION, FIRST_TEXT_ENCODER_CAPTION + captions))
    return float(jax.jit(lambda params: answered(network(params, new["ids"], new["mask"]), new["answers"])[1])(params))


def answered(logits: Sequence[jax.Array], answers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean cross-entropy of all answers that are asked for, and the share of right ones, both scalars.

    Args:
      logits: of each question, [B LENGTH answers].
      answers: [B LENGTH questions], UNASKED if there is none.
    """
    total, right = 0.0, 0.0
    asked = answers != UNASKED
    for i, one in enumerate(logits):
        answer = answers[..., i]
        wrong = optax.softmax_cross_entropy_with_integer_labels(one, jnp.maximum(answer, 0))
        total += jnp.sum(jnp.where(asked[..., i], wrong, 0.0))
        right += jnp.sum((jnp.argmax(one, -1) == answer) & asked[..., i])
    return total / asked.sum(), right / asked.sum()


def _network(method: Method) -> Functional:
    sizes = UMT5Config(**method.record()["architecture"]["config"])
    return unallocated(lambda: EncoderWithProbes(sizes, 0))


def _update(network: Functional) -> Update:
    def loss(text_encoder: Params, ids, mask, answers):
        return answered(network(text_encoder, ids, mask), answers)[0]

    return Update("total", "text_encoder", (Term("answers", 1.0, ("text_encoder", "ids", "mask", "answers"), loss),))


def _captions(batch_size: int, number: int) -> range:
    """Return the numbers of a batch's captions, after those that the accuracy is measured on."""
    first = FIRST_TEXT_ENCODER_CAPTION + NEW_CAPTIONS + number * batch_size
    return range(first, first + batch_size)


def questions(tokenizer: Tokenizer, indices: range) -> dict[str, np.ndarray]:
    """Return `ids` and `mask` of captions, [B LENGTH], and the right `answers`, [B LENGTH questions]."""
    scenes = [shapes_world.scene(i) for i in indices]
    ids, mask = (array[:, :LENGTH] for array in tokenizer([scene.caption for scene in scenes]))
    answers = np.full((*ids.shape, len(WORDS)), UNASKED, np.int32)
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
    return {"ids": ids, "mask": mask, "answers": answers}


def _tokens(tokenizer: Tokenizer, text: str) -> int:
    return int(tokenizer([text])[1].sum()) - 1  # without </s>
