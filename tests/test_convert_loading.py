"""Every layout gives the same module: golden velocity and gradients from diffusers, exact weights elsewhere."""

import json
import os
import shutil

import convert_cases as cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import processes
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from avd_jax import convert
from avd_jax.convert import umt5_rules, vae_rules
from avd_jax.convert.architectures import UMT5, WAN_DIT, WAN_VAE
from avd_jax.convert.engine import tensors_to_torch
from avd_jax.convert.weights import open_weights
from avd_jax.data.tokenizer import Tokenizer
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.wan_vae import WanVAEConfig

TINY_VAE = WanVAEConfig(base_dim=4)
TINY_T5 = UMT5Config(vocab_size=32, dim=8, ffn_dim=12, num_heads=2, head_dim=4, num_layers=2)


@pytest.fixture(scope="module")
def golden():
    with np.load(cases.FIXTURES / "dit_golden.npz") as file:
        return dict(file)


@nnx.jit  # compiled once for all layouts
def apply(dit, latents, timesteps, prompt_embeds):
    return dit(latents, timesteps, prompt_embeds)


def relative_error(actual, expected) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(actual) - expected)) / np.mean(np.square(expected))))


def lay_out(name, tmp_path):
    """Return a path to the fixture's transformer in the layout `name`."""
    native = cases.read_all(cases.NATIVE / cases.WEIGHTS)
    if name == "native":
        return cases.NATIVE
    if name == "diffusers":
        return cases.DIFFUSERS
    if name == "diffusers subfolder":
        return cases.DIFFUSERS / "transformer"
    if name == "native file":
        return cases.NATIVE / cases.WEIGHTS
    if name == "diffusers file":
        return cases.DIFFUSERS / "transformer" / cases.WEIGHTS
    if name == "sharded":
        return cases.sharded_copy(tmp_path)
    if name == "shards without index":
        (cases.sharded_copy(tmp_path) / f"{cases.WEIGHTS}.index.json").unlink()
        return tmp_path
    if name == "prefixed":
        cases.write_all(tmp_path, {f"model.{key}": value for key, value in native.items()})
    if name == "repackaged":
        cases.write_all(tmp_path, {f"model.diffusion_model.{key}": value for key, value in native.items()})
    if name == "with interpolator":
        interpolator = {"model.interp.interpolation_module.out_conv.bias": np.zeros(4, np.float32)}
        cases.write_all(tmp_path, {f"model.{key}": value for key, value in native.items()} | interpolator)
    if name == "orbax":
        convert.save_orbax(open_weights(cases.NATIVE, WAN_DIT), tmp_path / "transformer")
        return tmp_path
    shutil.copy(cases.NATIVE / "config.json", tmp_path)
    return tmp_path / cases.WEIGHTS


@pytest.mark.parametrize(
    "layout",
    [
        "native",
        "diffusers",
        "diffusers subfolder",
        "native file",
        "diffusers file",
        "sharded",
        "shards without index",
        "prefixed",
        "repackaged",
        "with interpolator",
        "orbax",
    ],
)
def test_every_layout_gives_the_golden_velocity(layout, tmp_path, golden):
    path = lay_out(layout, tmp_path)
    dit = convert.load_dit(path)
    velocity = apply(dit, golden["latents"], golden["timesteps"], golden["prompt_embeds"])
    assert relative_error(velocity, golden["velocity"]) < 1e-5
    assert convert.dit_config(path) == dit.config


def test_gradients_are_the_golden_ones(golden):
    graphdef, state = nnx.split(convert.load_dit(cases.NATIVE))

    def loss(state):
        dit = nnx.merge(graphdef, state)
        return jnp.mean(jnp.square(dit(golden["latents"], golden["timesteps"], golden["prompt_embeds"])))

    gradients = convert.flat_state(jax.jit(jax.grad(loss))(state))
    rules = WAN_DIT.native_rules(convert.dit_config(cases.NATIVE))
    relaid = dict(tensors_to_torch(rules, ((path, np.asarray(leaf)) for path, leaf in gradients.items())))
    expected = {key.removeprefix("gradient:"): value for key, value in golden.items() if key.startswith("gradient:")}
    assert relaid.keys() == expected.keys()
    for key, value in expected.items():
        # A key's bias shifts all logits of a query alike, so that its true gradient is zero.
        if key.endswith(".k.bias") and np.abs(value).max() < 1e-6:
            assert np.abs(relaid[key]).max() < 1e-6
        else:
            assert relative_error(relaid[key], value) < 1e-3, key


def test_modules_of_the_same_sizes_have_nothing_in_common():
    config = convert.dit_config(cases.NATIVE)
    changed, other = WAN_DIT.abstract(config), WAN_DIT.abstract(config)
    changed.remat = "block"
    changed.head.head.bias = None
    assert other.remat == WAN_DIT.abstract(config).remat == "none"
    assert other.head.head.bias is not None


def test_bfloat16_loads_exactly_and_sets_the_compute_dtype(tmp_path):
    native = cases.read_all(cases.NATIVE / cases.WEIGHTS)
    cases.write_all(tmp_path, {key: value.astype(ml_dtypes.bfloat16) for key, value in native.items()})
    shutil.copy(cases.NATIVE / "config.json", tmp_path)
    exact, dit = cases.leaves_of(convert.load_dit(tmp_path)), convert.load_dit(tmp_path, dtype=jnp.bfloat16)
    assert dit.dtype == jnp.bfloat16
    for path, leaf in cases.leaves_of(dit).items():
        # Wan keeps these in float32, and so does every network of ours, whatever the dtype.
        stays = "time_" in path or "norm" in path or "modulation" in path or path.startswith("head.")
        assert leaf.dtype == (np.float32 if stays else jnp.bfloat16), path
        assert exact[path].dtype == np.float32
        np.testing.assert_array_equal(leaf.astype(np.float32), exact[path])
    plain = cases.leaves_of(convert.load_dit(cases.NATIVE))
    np.testing.assert_array_equal(
        exact["head.head.kernel"], plain["head.head.kernel"].astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    half = cases.leaves_of(convert.load_dit(cases.NATIVE, dtype=jnp.bfloat16))
    np.testing.assert_array_equal(half["head.head.kernel"], plain["head.head.kernel"])


def test_sizes_come_from_the_shapes_if_no_config_fits(tmp_path):
    """A single file whose neighbour is another model's config; heads of 64 are told from the width."""
    config = WAN_DIT.config_class(
        dim=128, ffn_dim=16, num_heads=1, num_layers=2, in_dim=4, out_dim=4, freq_dim=8, text_dim=6
    )
    cases.write_all(tmp_path, cases.random_tensors(WAN_DIT.diffusers_rules(config), WAN_DIT, config))
    assert convert.dit_config(tmp_path / cases.WEIGHTS) == config
    shutil.copy(cases.NATIVE / "config.json", tmp_path)
    assert convert.dit_config(tmp_path / cases.WEIGHTS) == config


@pytest.mark.parametrize("old", [False, True])
def test_training_checkpoint_gives_the_asked_network_of_the_latest_complete_step(tmp_path, old):
    run = cases.training_run(tmp_path, ema=True, old=old)
    fixture = cases.leaves_of(convert.load_dit(cases.NATIVE))["head.head.kernel"]
    checkpoints = run / "checkpoints"
    incomplete = checkpoints / "30.orbax-checkpoint-tmp"
    incomplete.mkdir()
    for path, key, expected in (
        (run, "generator", fixture),
        (checkpoints, "generator", fixture),
        (checkpoints / "10", "generator", fixture / 2),
        (run, "critic", fixture + 1),
        (run, "fake_score", fixture + 1),
        (run, "ema", fixture + 2),
    ):
        np.testing.assert_array_equal(cases.leaves_of(convert.load_dit(path, key=key))["head.head.kernel"], expected)
        assert convert.student_settings(path) == cases.STUDENT
    recorded = {} if old else {"main": "generator"}
    assert convert.training_settings(run) == recorded | {"step": 20, "config": {"optimizer": {"learning_rate": 2e-6}}}
    assert convert.student_settings(cases.NATIVE) is None


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import convert_cases as cases
from avd_jax import convert
from flax import nnx

mesh = jax.make_mesh((4,), ("fsdp",))
def sharding(path, shape):
    axis = next((i for i in range(len(shape) - 1, -1, -1) if shape[i] % 4 == 0), None)
    return NamedSharding(mesh, PartitionSpec(*(("fsdp" if i == axis else None) for i in range(len(shape)))))
for path in sys.argv[1:]:
    whole, split = convert.load_dit(path), convert.load_dit(path, sharding=sharding)
    for name, leaf in convert.flat_state(nnx.state(split)).items():
        assert leaf.sharding == sharding(name, leaf.shape), name
        np.testing.assert_array_equal(leaf, cases.leaves_of(whole)[name])
    kernel = split.blocks.ffn_0.kernel[...]
    assert kernel.addressable_shards[0].data.shape == (2, 24, 10), kernel.addressable_shards[0].data.shape
print("same")
"""


def test_sharded_loading_gives_each_device_its_part(tmp_path):
    orbax = lay_out("orbax", tmp_path)
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(cases.FIXTURES.parent), str(cases.FIXTURES.parents[1])]),
    }
    command = ["-c", SHARDED, str(cases.NATIVE), str(orbax)]
    done = processes.run(command, env=environment)
    assert done.stdout == "same\n", done.stderr


def test_layers_can_be_sharded(tmp_path):
    """The stacked axis is cut too when the sharding says so; one device, so the part is the whole."""
    mesh = jax.make_mesh((1,), ("layers",))
    sharding = NamedSharding(mesh, PartitionSpec("layers"))
    split = convert.load_dit(cases.NATIVE, sharding=lambda path, shape: sharding)
    for path, leaf in cases.leaves_of(convert.load_dit(cases.NATIVE)).items():
        np.testing.assert_array_equal(cases.leaves_of(split)[path], leaf)


def native_parts(folder):
    """Write VAE and text encoder as in Wan's folder, but .safetensors."""
    for architecture, config in ((WAN_VAE, TINY_VAE), (UMT5, TINY_T5)):
        stem = {"vae": "Wan2.1_VAE", "text_encoder": "models_t5_umt5-xxl-enc-bf16"}[architecture.component]
        tensors = cases.random_tensors(architecture.native_rules(config), architecture, config)
        cases.write_all(folder, tensors, stem=stem)


def diffusers_parts(folder):
    """Write VAE and text encoder as in diffusers' folder."""
    for architecture, config, rules, stem in (
        (WAN_VAE, TINY_VAE, vae_rules, "diffusion_pytorch_model"),
        (UMT5, TINY_T5, umt5_rules, "model"),
    ):
        part = folder / architecture.component
        cases.write_all(part, cases.random_tensors(rules.diffusers_rules(config), architecture, config), stem=stem)
        (part / "config.json").write_text(json.dumps(rules.config_to_diffusers(config)))


@pytest.mark.parametrize("write", [native_parts, diffusers_parts])
def test_vae_and_text_encoder_load_from_both_layouts_and_from_orbax(write, tmp_path):
    write(tmp_path / "source")
    found, missing = convert.find_components(tmp_path / "source")
    assert (sorted(found), missing) == (["text_encoder", "vae"], ["transformer", "tokenizer"])
    for architecture, load, config in (
        (WAN_VAE, convert.load_vae, TINY_VAE),
        (UMT5, convert.load_umt5, TINY_T5),
    ):
        weights = found[architecture.component]
        convert.save_orbax(weights, tmp_path / "ours" / architecture.component)
        expected = dict(weights.arrays())
        assert expected.keys() == architecture.leaves(config).keys()
        for path in (tmp_path / "source", tmp_path / "ours", tmp_path / "ours" / architecture.component):
            loaded = load(path)
            assert loaded.config == config
            for name, leaf in cases.leaves_of(loaded).items():
                np.testing.assert_array_equal(leaf, expected[name])


def test_tokenizer_is_found_in_every_layout(tmp_path):
    expected = Tokenizer.from_path(cases.FIXTURES / "tokenizer.json")(["a cat"])
    for layout in ("tokenizer", "google/umt5-xxl", "."):
        folder = tmp_path / layout
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(cases.FIXTURES / "tokenizer.json", folder)
        np.testing.assert_array_equal(convert.load_tokenizer(tmp_path)(["a cat"])[0], expected[0])
        (folder / "tokenizer.json").unlink()


def test_the_text_encoder_stays_as_it_is_stored_if_that_is_exact(tmp_path):
    tensors = cases.random_tensors(umt5_rules.native_rules(TINY_T5), UMT5, TINY_T5)
    for stored, dtype, expected in (
        (ml_dtypes.bfloat16, jnp.float32, jnp.bfloat16),
        (np.float16, jnp.float32, np.float16),
        (np.float16, jnp.bfloat16, jnp.bfloat16),  # which does not hold float16's values
        (np.float32, jnp.bfloat16, jnp.bfloat16),
    ):
        cases.write_all(tmp_path, {key: array.astype(stored) for key, array in tensors.items()}, stem="umt5")
        loaded = convert.load_umt5(tmp_path / "umt5.safetensors", dtype)
        assert loaded.dtype == dtype
        assert {leaf.dtype for leaf in cases.leaves_of(loaded).values()} == {np.dtype(expected)}
    loaded = convert.load_umt5(tmp_path / "umt5.safetensors", param_dtype=jnp.float32)
    assert {leaf.dtype for leaf in cases.leaves_of(loaded).values()} == {np.dtype(np.float32)}
