"""The engine by itself: a small table read in both directions, its parts, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.convert.engine import (
    Piece,
    Rule,
    leaf_from_torch,
    leaves_from_torch,
    read_shards,
    resolve,
    source_shapes,
    tensors_to_torch,
)
from avd_jax.errors import UserError

RULES = [
    Rule("proj.weight", "proj.kernel", "(h k) i -> i h k", {"h": 2}),
    Rule("layers.{}.w", "layers.kernel", "o i -> i o"),
    Rule("list.{}.b", "list.{}.bias"),
    Rule("rotary", "rotary", "(h p two) -> h (two p)", {"h": 2, "two": 2}),
    *(Rule(f"joined.{{}}.{name}", "joined", "o i -> i o", part=i) for i, name in enumerate("qkv")),
    *(Rule(f"bias_{name}", "bias", part=i) for i, name in enumerate("qk")),
    Rule("counter", None),
]
SHAPES = {
    "proj.kernel": (3, 2, 4),
    "layers.kernel": (3, 5, 6),
    "list.0.bias": (7,),
    "list.1.bias": (8,),
    "rotary": (2, 6),
    "joined": (2, 3, 4, 5),
    "bias": (2, 4),
}
TARGETS = {path: jax.ShapeDtypeStruct(shape, np.dtype(np.float32)) for path, shape in SHAPES.items()}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape, dtype=np.float32) for key, shape in source_shapes(RULES, TARGETS)}


def shapes_of(tensors):
    return {key: array.shape for key, array in tensors.items()}


def to_flax(tensors):
    pieces = resolve(RULES, shapes_of(tensors), TARGETS, name="file")
    return dict(leaves_from_torch(pieces, TARGETS, lambda key, _: tensors[key]))


def test_source_shapes_are_those_of_the_file(tensors):
    assert shapes_of(tensors) == {
        "proj.weight": (8, 3),
        **{f"layers.{i}.w": (6, 5) for i in range(3)},
        "list.0.b": (7,),
        "list.1.b": (8,),
        "rotary": (12,),
        **{f"joined.{i}.{name}": (5, 4) for i in range(2) for name in "qkv"},
        "bias_q": (4,),
        "bias_k": (4,),
    }


def test_a_shape_is_told_without_an_array_of_it():
    rule = Rule("x", "y", "(a b) c -> c b a", {"a": 2})
    assert rule.source_shape((10**6, 10**6, 2)) == (2 * 10**6, 10**6)


def test_layouts_are_the_stated_ones(tensors):
    leaves = to_flax(tensors)
    np.testing.assert_array_equal(leaves["layers.kernel"][2], tensors["layers.2.w"].T)
    np.testing.assert_array_equal(leaves["proj.kernel"][:, 1, 3], tensors["proj.weight"][7])
    np.testing.assert_array_equal(leaves["rotary"][1], tensors["rotary"][6:][[0, 2, 4, 1, 3, 5]])


def test_parts_of_a_leaf_come_from_several_tensors(tensors):
    leaves = to_flax(tensors)
    np.testing.assert_array_equal(leaves["joined"][1, 2], tensors["joined.1.v"].T)
    np.testing.assert_array_equal(leaves["bias"], [tensors["bias_q"], tensors["bias_k"]])


def test_a_part_without_a_rule_is_a_mistake_in_the_table():
    with pytest.raises(AssertionError, match="leaf bias is filled by 1 rules"):
        dict(source_shapes([rule for rule in RULES if rule.source != "bias_q"], TARGETS))


def test_back_is_exact(tensors):
    back = dict(tensors_to_torch(RULES, to_flax(tensors).items()))
    assert back.keys() == tensors.keys()
    for key, array in tensors.items():
        assert back[key].flags.c_contiguous
        np.testing.assert_array_equal(back[key], array)


def read_parts(tensors, path, indices):
    """Return the parts, and the keys that were read for them."""
    read = []

    def count(key, rows):
        read.append(key)
        known = np.full_like(tensors[key], 77)  # what was not asked for
        known[slice(*rows or (None,))] = tensors[key][slice(*rows or (None,))]
        return known

    pieces = resolve(RULES, shapes_of(tensors), TARGETS, name="file")
    return read_shards(pieces[path], TARGETS[path], count, indices), read


def test_parts_are_those_of_the_whole_and_each_tensor_is_read_once(tensors):
    for path, leaf in to_flax(tensors).items():
        middle = tuple(slice(size // 3, size - size // 4) for size in leaf.shape)
        first = (slice(0, 1), *(slice(None) for _ in leaf.shape[1:]))
        parts, read = read_parts(tensors, path, [middle, first])
        np.testing.assert_array_equal(parts[0], leaf[middle])
        np.testing.assert_array_equal(parts[1], leaf[first])
        assert len(read) == len(set(read))


def test_layers_outside_the_part_are_not_read(tensors):
    _, read = read_parts(tensors, "layers.kernel", [(slice(1, 2), slice(None), slice(None))])
    assert read == ["layers.1.w"]


@pytest.mark.parametrize(
    ("path", "cut", "rows"),
    [
        ("proj.kernel", np.s_[:, 1:, :], (4, 8)),
        ("proj.kernel", np.s_[:, :, 1:3], (1, 7)),
        ("proj.kernel", np.s_[1:, :, :], None),
        ("layers.kernel", np.s_[:, :, 2:4], (2, 4)),
        ("rotary", np.s_[1:, :], (6, 12)),
        ("rotary", np.s_[:, :3], (0, 11)),  # the even ones of both heads
    ],
)
def test_of_a_tensor_only_the_rows_that_are_wanted_are_read(path, cut, rows, tensors):
    asked = set()
    pieces = resolve(RULES, shapes_of(tensors), TARGETS, name="file")
    read_shards(pieces[path], TARGETS[path], lambda key, rows: asked.add(rows) or tensors[key], [cut])
    assert asked == {rows}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shapes: shapes.pop("layers.1.w"), "missing: layers.1.w"),
        (lambda shapes: shapes.update({"layers.3.w": (6, 5)}), "not known: layers.3.w"),
        (lambda shapes: shapes.update({"other": (1,)}), "not known: other"),
        (lambda shapes: shapes.update({"rotary": (11,)}), r"rotary has shape \(11,\), expected \(12,\)"),
        (lambda shapes: shapes.update({"proj.weight": (3, 8)}), r"proj.weight has shape \(3, 8\), expected \(8, 3\)"),
    ],
)
def test_strictness(change, message, tensors):
    shapes = shapes_of(tensors)
    change(shapes)
    with pytest.raises(UserError, match=message):
        resolve(RULES, shapes, TARGETS, name="file")


def test_known_and_unneeded_keys_may_be_there_or_not(tensors):
    resolve(RULES, shapes_of(tensors) | {"counter": ()}, TARGETS, name="file")


def test_jax_takes_over_what_was_read_without_a_copy():
    """Else a large leaf, of which there are some of gigabytes, would need its memory twice while it is loaded."""
    leaf = jax.ShapeDtypeStruct((3, 1000, 7), jnp.bfloat16)
    rule = Rule("{}.weight", "weight", "o i -> i o")
    pieces = [Piece(f"{i}.weight", rule, (i,)) for i in range(3)]
    array = leaf_from_torch(pieces, leaf, lambda key, _: np.full((7, 1000), int(key[0])))
    np.testing.assert_array_equal(array[:, 0, 0].astype(int), range(3))
    assert jax.device_put(array, jax.devices("cpu")[0]).unsafe_buffer_pointer() == array.ctypes.data
