"""Rotary embedding against complex numbers on interleaved pairs, as Wan writes it, and what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.models import rope


def wan_rotation(x, grid):
    """Rotate interleaved pairs (2i, 2i + 1) of [B H N K] by complex multiplication, in float64."""
    head_dim = x.shape[-1]
    rows = head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6)  # channels an axis
    turns = [np.outer(np.arange(n), 10_000.0 ** -(np.arange(0, d, 2) / d)) for n, d in zip(grid, rows, strict=True)]
    angles = [
        np.concatenate([turns[0][f], turns[1][h], turns[2][w]])
        for f in range(grid[0])
        for h in range(grid[1])
        for w in range(grid[2])
    ]
    pairs = x.astype(np.float64).reshape(*x.shape[:-1], head_dim // 2, 2)
    rotated = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.asarray(angles))
    return np.stack([rotated.real, rotated.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("head_dim", [4, 12, 64, 128])
def test_wan_rotation_up_to_the_order_of_channels(head_dim):
    grid = 3, 2, 5
    x = np.random.default_rng(0).standard_normal((2, 3, 30, head_dim)).astype(np.float32)
    half_split = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    rotated = np.asarray(rope.rotate(half_split, *rope.rotation(*grid, head_dim)))
    expected = wan_rotation(x, grid)
    np.testing.assert_allclose(rotated[..., : head_dim // 2], expected[..., 0::2], atol=1e-6)
    np.testing.assert_allclose(rotated[..., head_dim // 2 :], expected[..., 1::2], atol=1e-6)


def test_pairs_of_wan():
    assert rope.axis_pairs(128) == (22, 21, 21)
    assert all(sum(rope.axis_pairs(k)) == k // 2 for k in range(2, 130, 2))


def test_scores_depend_on_the_distance_only():
    grid, head_dim = (6, 5, 4), 24
    rng = np.random.default_rng(1)
    query, key = (np.broadcast_to(rng.standard_normal(head_dim, np.float32), (1, 1, 120, head_dim)) for _ in range(2))
    table = rope.rotation(*grid, head_dim)
    rotated = [np.asarray(rope.rotate(jnp.asarray(x), *table), np.float64)[0, 0] for x in (query, key)]
    scores = (rotated[0] @ rotated[1].T).reshape(*grid, *grid)
    assert abs(scores[3, 2, 1, 1, 1, 0] - scores[5, 4, 3, 3, 3, 2]) < 1e-5
    assert abs(scores[0, 0, 0, 2, 0, 0] - scores[3, 4, 3, 5, 4, 3]) < 1e-5
    assert abs(scores[0, 0, 0, 2, 0, 0] - scores[0, 0, 0, 0, 2, 0]) > 1e-3, "each axis has channels of its own"


def test_far_positions_keep_their_digits():
    cos, sin = rope.rotation(20_000, 1, 1, 8)
    exact = np.outer(np.arange(20_000), 10_000.0 ** (-np.arange(2) / 2))
    np.testing.assert_allclose(cos[:, :2], np.cos(exact), atol=1e-7)
    np.testing.assert_allclose(sin[:, :2], np.sin(exact), atol=1e-7)


def test_half_precision_is_rotated_in_float32():
    x = np.random.default_rng(2).standard_normal((1, 2, 60, 16)).astype(jnp.bfloat16)
    table = rope.rotation(60, 1, 1, 16)
    rotated = rope.rotate(x, *table)
    assert rotated.dtype == jnp.bfloat16
    exact = np.asarray(rope.rotate(x.astype(np.float32), *table))
    np.testing.assert_allclose(np.asarray(rotated, np.float32), exact, rtol=2**-8, atol=1e-6)


def test_strided_frames_have_the_positions_of_every_second_one():
    strided, all_frames = (rope.rotation(frames, 2, 3, 16, frame_stride=stride) for frames, stride in ((3, 2), (5, 1)))
    for half, full in zip(strided, all_frames, strict=True):
        np.testing.assert_array_equal(half.reshape(3, 2, 3, -1), full.reshape(5, 2, 3, -1)[::2])


def test_the_gradient_turns_back():
    """Against the transpose of the formula, which is linear in x."""
    rng = np.random.default_rng(0)
    x, weights = (rng.standard_normal((2, 3, 30, 12)).astype(np.float32) for _ in range(2))
    cos, sin = rope.rotation(3, 2, 5, 12)

    def formula(x):
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    np.testing.assert_allclose(rope.rotate(x, cos, sin), formula(x), atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(rope.rotate(x, cos, sin) * weights))(x)
    np.testing.assert_allclose(gradient, jax.linear_transpose(formula, x)(weights)[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_form_for_matrix_units_is_the_same_and_so_is_its_gradient(dtype):
    x, slope = np.random.default_rng(0).standard_normal((2, 2, 3, 30, 12)).astype(dtype)
    table = rope.rotation(3, 2, 5, 12)
    found, expected = (jax.vjp(lambda x, t=t: rope.rotate(x, *t), x) for t in (rope.for_matrix_units(table), table))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1](slope)[0], expected[1](slope)[0])
