"""The text encoder against transformers' (golden file by make_umt5_fixture.py), its invariants and its tables."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from avd_jax.convert import engine, umt5_rules
from avd_jax.convert.state import flat_state, from_flat
from avd_jax.errors import UserError
from avd_jax.models.umt5 import UMT5Config, UMT5Encoder, relative_position_buckets

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "umt5_golden.npz")
WEIGHTS = {name.removeprefix("weights/"): GOLDEN[name] for name in GOLDEN if name.startswith("weights/")}
CONFIG_JSON = json.loads(str(GOLDEN["config_json"]))
CONFIG = umt5_rules.config_from_diffusers(CONFIG_JSON)


def abstract_leaves(config, dtype=jnp.float32):
    model = nnx.eval_shape(lambda: UMT5Encoder(config, nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
    graph, state = nnx.split(model)
    return graph, state, flat_state(state)


def encoder_with(tensors, rules, dtype=jnp.float32):
    graph, state, leaves = abstract_leaves(CONFIG, dtype)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    pieces = engine.resolve(rules, shapes, leaves, name="test")
    arrays = dict(engine.leaves_from_torch(pieces, leaves, lambda key, rows: tensors[key]))
    return nnx.merge(graph, from_flat(state, {path: jnp.asarray(array) for path, array in arrays.items()}))


@pytest.fixture(scope="module")
def encoder():
    return encoder_with(WEIGHTS, umt5_rules.diffusers_rules(CONFIG))


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.abs(ours - theirs).max() / np.sqrt(np.mean(theirs**2))


def native_weights(encoder):
    leaves = flat_state(nnx.split(encoder)[1]).items()
    arrays = ((path, np.asarray(leaf)) for path, leaf in leaves)
    return dict(engine.tensors_to_torch(umt5_rules.native_rules(CONFIG), arrays))


def test_embeddings_of_transformers(encoder):
    mask = GOLDEN["attention_mask"]
    embeds = np.asarray(encoder(jnp.asarray(GOLDEN["input_ids"]), jnp.asarray(mask)))
    assert embeds.dtype == np.float32
    assert relative_error(embeds, GOLDEN["prompt_embeds"]) < 2e-5
    assert not embeds[mask == 0].any()


def test_bfloat16_is_near_float32():
    encoder = encoder_with(WEIGHTS, umt5_rules.diffusers_rules(CONFIG), jnp.bfloat16)
    embeds = encoder(jnp.asarray(GOLDEN["input_ids"]), jnp.asarray(GOLDEN["attention_mask"]))
    assert embeds.dtype == jnp.bfloat16
    error = np.asarray(embeds, np.float32) - GOLDEN["prompt_embeds"]
    assert 1e-5 < np.sqrt(np.mean(error**2) / np.mean(GOLDEN["prompt_embeds"] ** 2)) < 0.03


def test_parameters_in_bfloat16_give_what_they_give_in_float32(encoder):
    """As a CPU runs Wan's file: half the memory, and nothing of float32's accuracy is lost."""
    ids, mask = jnp.asarray(GOLDEN["input_ids"]), jnp.asarray(GOLDEN["attention_mask"])
    graph, state = nnx.split(encoder)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    embeds, expected = (nnx.merge(graph, params)(ids, mask) for params in (narrow, wide))
    assert embeds.dtype == jnp.float32
    assert relative_error(embeds, expected) < 1e-6
    assert relative_error(encoder(ids, mask), expected) > 1e-3, "the weights are not bfloat16's"


def test_padding_changes_nothing(encoder):
    mask = jnp.asarray(GOLDEN["attention_mask"])
    ids = jnp.asarray(GOLDEN["input_ids"])
    embeds = encoder(ids, mask)
    np.testing.assert_array_equal(encoder(jnp.where(mask == 1, ids, 7), mask > 0), embeds)
    length = int(mask[1].sum())
    short = encoder(ids[1:, :length], mask[1:, :length])
    assert relative_error(short, embeds[1:, :length]) < 1e-5


def test_a_fully_masked_text_is_zero(encoder):
    embeds = np.asarray(encoder(jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 8), jnp.int32)))
    np.testing.assert_array_equal(embeds, 0)


def test_order_of_tokens_matters_through_the_bias_alone(encoder):
    ids = jnp.asarray(GOLDEN["input_ids"][:1, :12])
    mask = jnp.ones_like(ids)
    assert relative_error(encoder(ids[:, ::-1], mask)[:, ::-1], encoder(ids, mask)) > 1e-2

    graph, state = nnx.split(encoder)
    leaves = flat_state(state)
    unbiased = {path: leaf * 0 if "pos_embedding" in path else leaf for path, leaf in leaves.items()}
    unbiased = nnx.merge(graph, from_flat(state, unbiased))
    assert relative_error(unbiased(ids[:, ::-1], mask)[:, ::-1], unbiased(ids, mask)) < 1e-5


def test_buckets():
    buckets = relative_position_buckets(300, num_buckets=32, max_distance=128)
    assert buckets.dtype == np.int32
    assert buckets.shape == (300, 300)
    behind, ahead = buckets[299, ::-1], buckets[0]  # by distance
    np.testing.assert_array_equal(behind[:8], np.arange(8))
    # 8 * 16 ** (i / 8), rounded up, is where the i-th logarithmic bucket begins
    edges = [8, 12, 16, 23, 32, 46, 64, 91]
    np.testing.assert_array_equal(np.flatnonzero(np.diff(behind[7:])) + 8, edges)
    np.testing.assert_array_equal(behind[91:], 15)
    np.testing.assert_array_equal(ahead[1:], behind[1:] + 16)
    np.testing.assert_array_equal(buckets[1:, 1:], buckets[:-1, :-1])


def test_full_size():
    _, _, leaves = abstract_leaves(UMT5Config())
    assert sum(leaf.size for leaf in leaves.values()) == 5_680_910_336
    assert leaves["blocks.attn.q.kernel"].shape == (24, 4096, 64, 64)
    assert leaves["blocks.pos_embedding.embedding"].shape == (24, 32, 64)


def test_blocks_are_compiled_once():
    def lines(num_layers):
        config = UMT5Config(vocab_size=8, dim=8, ffn_dim=8, num_heads=2, head_dim=4, num_layers=num_layers)
        model = UMT5Encoder(config, nnx.Rngs(0))
        ids = jnp.ones((1, 4), jnp.int32)
        return len(jax.jit(lambda: model(ids, ids)).lower().as_text().splitlines())

    assert lines(2) == lines(6)


def test_wans_own_keys_give_the_same_encoder(encoder):
    tensors = native_weights(encoder)
    assert sorted(key for key in tensors if key.startswith("blocks.1.")) == [
        "blocks.1.attn.k.weight",
        "blocks.1.attn.o.weight",
        "blocks.1.attn.q.weight",
        "blocks.1.attn.v.weight",
        "blocks.1.ffn.fc1.weight",
        "blocks.1.ffn.fc2.weight",
        "blocks.1.ffn.gate.0.weight",
        "blocks.1.norm1.weight",
        "blocks.1.norm2.weight",
        "blocks.1.pos_embedding.embedding.weight",
    ]
    assert umt5_rules.config_from_native({key: tensor.shape for key, tensor in tensors.items()}) == CONFIG
    ids, mask = jnp.asarray(GOLDEN["input_ids"]), jnp.asarray(GOLDEN["attention_mask"])
    native = encoder_with(tensors, umt5_rules.native_rules(CONFIG))
    np.testing.assert_array_equal(native(ids, mask), encoder(ids, mask))


def test_export_restores_every_tensor(encoder):
    leaves = flat_state(nnx.split(encoder)[1]).items()
    arrays = ((path, np.asarray(leaf)) for path, leaf in leaves)
    tensors = dict(engine.tensors_to_torch(umt5_rules.diffusers_rules(CONFIG), arrays))
    assert tensors.keys() == WEIGHTS.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, WEIGHTS[key])


def test_the_duplicate_of_the_token_embedding_is_not_needed(encoder):
    duplicated = WEIGHTS | {"encoder.embed_tokens.weight": WEIGHTS["shared.weight"]}
    again = encoder_with(duplicated, umt5_rules.diffusers_rules(CONFIG))
    np.testing.assert_array_equal(again.token_embedding.embedding[...], encoder.token_embedding.embedding[...])


def test_config_of_transformers_and_back():
    assert UMT5Config(vocab_size=48, dim=24, ffn_dim=40, num_heads=2, head_dim=8, num_layers=3) == CONFIG
    assert umt5_rules.config_from_diffusers(umt5_rules.config_to_diffusers(CONFIG)) == CONFIG
    assert umt5_rules.config_to_diffusers(UMT5Config()).items() >= {"d_model": 4096, "d_kv": 64, "d_ff": 10240}.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, r"te/config.json: model_type is 't5'; only 'umt5'"),
        ({"feed_forward_proj": "relu"}, r"feed_forward_proj is .relu., only .gated-gelu. is known"),
        ({"num_layers": "24"}, r"the field 'num_layers' is '24'; it must be a positive int"),
        ({"d_kv": 0}, r"the field 'd_kv' is 0; it must be a positive int"),
        ({"layer_norm_epsilon": None}, r"the field 'layer_norm_epsilon' is None; it must be a positive float"),
    ],
)
def test_wrong_config(change, message):
    with pytest.raises(UserError, match=message):
        umt5_rules.config_from_diffusers(CONFIG_JSON | change, name="te/config.json")


def test_missing_field_and_foreign_file():
    entries = {key: value for key, value in CONFIG_JSON.items() if key != "d_ff"}
    with pytest.raises(UserError, match="the field 'd_ff' is missing"):
        umt5_rules.config_from_diffusers(entries)
    with pytest.raises(UserError, match=r"t5.pth: no matrix 'token_embedding.weight' in it"):
        umt5_rules.config_from_native({"patch_embedding.weight": (8, 8)}, name="t5.pth")
