"""LoRA files in every key style merged into weights of every layout, and those that do not fit."""

import json
import shutil
from pathlib import Path

import convert_cases as cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avd_jax import convert
from avd_jax.convert.adapted import with_adapters
from avd_jax.convert.adapter_keys import STYLES, targets
from avd_jax.convert.adapters import named_adapters, spelled
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.fingerprint import fingerprint
from avd_jax.convert.weights import open_weights
from avd_jax.errors import UserError

RANK, ALPHA = 3, 1.5
# Wan's module -> diffusers': rotary, plain, wide, outside of the blocks.
MODULES = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.self_attn.o": "blocks.1.attn1.to_out.0",
    "blocks.1.cross_attn.k": "blocks.1.attn2.to_k",
    "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}
SPELLINGS = {  # how a file calls a module, the down and the up matrix
    "comfyui": (lambda wan: f"diffusion_model.{wan}", "lora_down", "lora_up"),
    "comfyui, PEFT's ends": (lambda wan: f"diffusion_model.{wan}", "lora_A", "lora_B"),
    "DiffSynth": (lambda wan: f"pipe.dit.{wan}", "lora_A.default", "lora_B.default"),
    "plain": (lambda wan: wan, "lora_A", "lora_B"),
    "kohya": (lambda wan: "lora_unet_" + wan.replace(".", "_"), "lora_down", "lora_up"),
    "VideoX-Fun": (lambda wan: "lora_unet__" + wan.replace(".", "_"), "lora_down", "lora_up"),
    "diffusers": (lambda wan: f"transformer.{MODULES[wan]}", "lora_A", "lora_B"),
    "diffusers, old": (lambda wan: f"transformer.{MODULES[wan]}", "lora.down", "lora.up"),
    "PEFT": (lambda wan: f"base_model.model.{MODULES[wan]}", "lora_A", "lora_B"),
}


def factors(seed=0):
    """Return Wan's module -> (down, up), as wide as the fixture's."""
    rng = np.random.default_rng(seed)
    native = cases.read_all(cases.NATIVE / cases.WEIGHTS)
    found = {}
    for module in MODULES:
        rows, columns = native[f"{module}.weight"].shape
        sizes = (RANK, columns), (rows, RANK)
        found[module] = tuple(rng.standard_normal(size).astype(np.float32) for size in sizes)
    return found


def write_lora(folder, tensors, name="style.safetensors"):
    cases.write_all(folder, tensors, stem=name.removesuffix(".safetensors"))
    return folder / name


def lora_tensors(spelling, *, alpha=ALPHA, dtype=np.float32, seed=0):
    name, down, up = SPELLINGS[spelling]
    tensors = {}
    for module, pair in factors(seed).items():
        for end, array in zip((down, up), pair, strict=True):
            tensors[f"{name(module)}.{end}.weight"] = array.astype(dtype)
        if alpha is not None:
            tensors[f"{name(module)}.alpha"] = np.asarray(alpha, dtype)
    return tensors


def merged_by_hand(folder, scale, *, seed=0, dtype=np.float32):
    """Write the fixture with the pairs added, computed in float64."""
    native = cases.read_all(cases.NATIVE / cases.WEIGHTS)
    for module, pair in factors(seed).items():
        down, up = (matrix.astype(dtype).astype(np.float64) for matrix in pair)
        native[f"{module}.weight"] = (native[f"{module}.weight"] + scale * (up @ down)).astype(np.float32)
    cases.write_all(folder, native)
    shutil.copy(cases.NATIVE / "config.json", folder)
    return folder


def leaves(path, lora="", dtype=None):
    return dict(with_adapters(open_weights(path, WAN_DIT), str(lora)).arrays(dtype))


def close(ours, theirs, tolerance=2e-6):
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        np.testing.assert_allclose(ours[path], array, rtol=tolerance, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_weights(spelling, tmp_path):
    lora = write_lora(tmp_path, lora_tensors(spelling))
    expected = merged_by_hand(tmp_path / "by_hand", 0.5 * ALPHA / RANK)
    close(leaves(cases.NATIVE, f"{lora}:0.5"), leaves(expected))


@pytest.mark.parametrize("layout", ["diffusers", "orbax"])
def test_every_layout_takes_them(layout, tmp_path):
    base = cases.DIFFUSERS
    if layout == "orbax":
        base = tmp_path / "ours"
        convert.save_orbax(open_weights(cases.NATIVE, WAN_DIT), base / "transformer")
    lora = write_lora(tmp_path, lora_tensors("kohya", alpha=None))
    expected = leaves(merged_by_hand(tmp_path / "by_hand", -1.0))
    close(leaves(base, f"{lora}:-1"), expected)
    mesh = Mesh(np.array(jax.devices()), ("all",))

    def sharding(path, shape):
        return NamedSharding(mesh, PartitionSpec("all") if shape[0] % len(jax.devices()) == 0 else PartitionSpec())

    sharded = convert.load_dit(base, lora=f"{lora}:-1", sharding=sharding)
    close(cases.leaves_of(sharded), expected)
    assert not sharded.text_embedding_2.kernel[...].sharding.is_fully_replicated


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_summed_in_float32_and_cast_once(dtype, tmp_path):
    lora = write_lora(tmp_path, lora_tensors("comfyui", dtype=dtype))
    expected = merged_by_hand(tmp_path / "by_hand", ALPHA / RANK, dtype=dtype)
    exact = leaves(cases.NATIVE, lora)
    close(exact, leaves(expected))
    for path, array in leaves(cases.NATIVE, lora, jnp.bfloat16).items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, exact[path].astype(array.dtype), err_msg=path)


def test_several_add_up(tmp_path):
    one = write_lora(tmp_path, lora_tensors("comfyui", alpha=None), "one.safetensors")
    two = write_lora(tmp_path, lora_tensors("PEFT", alpha=None, seed=1), "two.safetensors")
    both = leaves(cases.NATIVE, f"{one}:0.5, {two}:2")
    base, first, second = (leaves(cases.NATIVE, lora) for lora in ("", f"{one}:0.5", f"{two}:2"))
    for path, array in both.items():
        np.testing.assert_allclose(array, first[path] + second[path] - base[path], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_whole_differences(style, tmp_path):
    """Of norms, biases and what has no module, and of the patch's convolution."""
    config = convert.dit_config(cases.NATIVE)
    rng = np.random.default_rng(0)
    native, tensors = cases.read_all(cases.NATIVE / cases.WEIGHTS), {}
    for key in (
        *("blocks.0.norm3.weight", "blocks.0.norm3.bias", "blocks.1.self_attn.norm_k.weight", "head.modulation"),
        *("blocks.1.modulation", "patch_embedding.weight", "blocks.0.self_attn.q.bias"),
    ):
        change = rng.standard_normal(native[key].shape).astype(np.float32)
        native[key] = native[key] + change
        tensors[f"{targets(config)[key].module(style)}.{'diff_b' if key.endswith('.bias') else 'diff'}"] = change
    cases.write_all(tmp_path / "by_hand", native)
    shutil.copy(cases.NATIVE / "config.json", tmp_path / "by_hand")
    if style == "comfyui":  # as lightx2v writes it
        for module in ("blocks.1", "head"):
            tensors[f"diffusion_model.{module}.diff_m"] = tensors.pop(f"diffusion_model.{module}.modulation.diff")
    lora = write_lora(tmp_path, tensors)
    close(leaves(cases.NATIVE, lora), leaves(tmp_path / "by_hand"))


def test_peft_says_alpha_beside_the_file_and_diffusers_inside(tmp_path):
    tensors = lora_tensors("PEFT", alpha=None)
    write_lora(tmp_path, tensors, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": RANK, "use_rslora": True}))
    expected = leaves(merged_by_hand(tmp_path / "by_hand", 6 / np.sqrt(RANK)))
    close(leaves(cases.NATIVE, tmp_path / "adapter_model.safetensors"), expected, 1e-5)

    plain = write_lora(tmp_path, lora_tensors("diffusers", alpha=None), "plain.safetensors").read_bytes()
    size = int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8 : 8 + size])
    header["__metadata__"]["lora_adapter_metadata"] = json.dumps({"transformer.lora_alpha": 6, "transformer.r": RANK})
    text = json.dumps(header).encode()
    (tmp_path / "said.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + plain[8 + size :])
    expected = leaves(merged_by_hand(tmp_path / "by_hand_2", 6 / RANK))
    close(leaves(cases.NATIVE, tmp_path / "said.safetensors"), expected, 1e-5)


def test_the_fingerprint_follows_contents_and_strength_not_the_name(tmp_path):
    lora = write_lora(tmp_path, lora_tensors("comfyui"))
    copy = shutil.copy(lora, tmp_path / "copy.safetensors")
    other = write_lora(tmp_path, lora_tensors("comfyui", seed=1), "other.safetensors")
    weights = open_weights(cases.NATIVE, WAN_DIT)
    found = [fingerprint(with_adapters(weights, str(n))) for n in ("", lora, copy, f"{lora}:0.5", other)]
    assert found[0] == fingerprint(weights)
    assert found[1] == found[2]
    assert len(set(found)) == 4


def test_names_and_strengths():
    text = " a.safetensors , b/c.safetensors:0.8,d:-1,gs:x/e.safetensors, 1:2"
    read = named_adapters(text.replace("gs:x", "x:y"))
    assert [(str(path), strength) for path, strength in read] == [
        *(("a.safetensors", 1.0), ("b/c.safetensors", 0.8), ("d", -1.0), ("x:y/e.safetensors", 1.0), ("1", 2.0)),
    ]
    assert named_adapters(",".join(spelled(read))) == read
    assert named_adapters("") == []
    exact = [(Path("a"), 0.1 + 0.2), (Path("b"), 1e-7), (Path("c"), 123456.7)]
    assert named_adapters(",".join(spelled(exact))) == exact
    for wrong in ("a.safetensors:much", "a.safetensors:nan", "a:inf", "a:1_0", "a:", "a:1e39"):
        with pytest.raises(UserError, match=r"is no number; write FILE:0\.8"):
            named_adapters(wrong)


def change(**changes):
    """Return a change of a good file's tensors: key -> array, or None to remove it."""

    def apply(tensors):
        tensors |= {key: array for key, array in changes.items() if array is not None}
        return {key: array for key, array in tensors.items() if changes.get(key, 0) is not None}

    return apply


Q = "diffusion_model.blocks.0.self_attn.q"
WRONG = {
    "another width": (
        change(**{f"{Q}.lora_down.weight": np.ones((RANK, 5120))}),
        f"is a LoRA of another model: {Q}.lora_down.weight has shape (3, 5120), this model's "
        "blocks.0.self_attn.q.weight wants (3, 24)",
    ),
    "another height": (
        change(**{f"{Q}.lora_up.weight": np.ones((5120, RANK))}),
        f"is a LoRA of another model: {Q}.lora_up.weight has shape (5120, 3), this model's",
    ),
    "another rank": (change(**{f"{Q}.lora_up.weight": np.ones((24, 4))}), "which is not of the rank 3 of"),
    "more blocks": (
        change(**{"diffusion_model.blocks.39.ffn.0.lora_up.weight": np.ones((2, 2))}),
        "is a LoRA of another model: diffusion_model.blocks.39.ffn.0.lora_up.weight is of block 39, and this model "
        "has 2 blocks",
    ),
    "mixed": (
        change(**{"lora_unet_blocks_0_ffn_2.lora_up.weight": np.ones((24, 1))}),
        "mixes key styles, comfyui behind 'diffusion_model.': diffusion_model.blocks.0.self_attn.q.lora_down.weight, "
        "and kohya behind 'lora_unet_': lora_unet_blocks_0_ffn_2.lora_up.weight; give a file with keys of one style",
    ),
    "half a pair": (change(**{f"{Q}.lora_up.weight": None}), f"{Q}.lora_down.weight has no up matrix beside it"),
    "alpha alone": (
        change(**{f"{Q}.lora_up.weight": None, f"{Q}.lora_down.weight": None}),
        f"{Q}.alpha has no matrices beside it",
    ),
    "a rank of 0": (
        change(**{f"{Q}.lora_down.weight": np.ones((0, 24)), f"{Q}.lora_up.weight": np.ones((24, 0))}),
        f"{Q}.lora_down.weight has shape (0, 24), a rank of 0",
    ),
    "alpha of a pair": (change(**{f"{Q}.alpha": np.ones(2)}), f"{Q}.alpha has shape (2,); it must be one number"),
    "no alpha in alpha": (change(**{f"{Q}.alpha": np.ones(0)}), f"{Q}.alpha has shape (0,)"),
    "nothing like it": (
        change(**{"diffusion_model.blocks.0.self_atn.q.diff_b": np.ones(24)}),
        "diffusion_model.blocks.0.self_atn.q.diff_b changes nothing that this model has (did you mean "
        "'blocks.0.self_attn.q'?)",
    ),
    "image to video": (
        change(**{"diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": np.ones((1, 24))}),
        "is for an image-to-video model (diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight)",
    ),
    "VACE": (
        change(**{"diffusion_model.vace_blocks.0.self_attn.q.lora_down.weight": np.ones((1, 24))}),
        "is for a VACE model (diffusion_model.vace_blocks",
    ),
    "text encoder": (change(**{"lora_te_x.lora_up.weight": np.ones((1, 2))}), "is for a text encoder"),
    "LyCORIS": (change(**{f"{Q}.hada_w1_a": np.ones((1, 2))}), f"{Q}.hada_w1_a is of another kind of adapter"),
    "no LoRA": (change(**{f"{Q}.weight": np.ones((24, 24))}), f"{Q}.weight is no part of a LoRA"),
    "twice": (change(**{f"{Q}.diff": np.ones((24, 24))}), f"{Q}.diff is a second change of"),
    "twice, otherwise spelled": (change(**{f"{Q}.lora_B.weight": np.ones((24, RANK))}), "say the same; keep one"),
    "a bias it has not": (
        change(**{"diffusion_model.blocks.0.self_attn.norm_q.diff_b": np.ones(24)}),
        "changes blocks.0.self_attn.norm_q.bias, which this model does not have",
    ),
    "another bias": (change(**{f"{Q}.diff_b": np.ones(5120)}), f"another model: {Q}.diff_b has shape (5120,)"),
    "a low-rank norm": (
        change(
            **{
                "diffusion_model.blocks.0.norm3.lora_down.weight": np.ones((1, 24)),
                "diffusion_model.blocks.0.norm3.lora_up.weight": np.ones((24, 1)),
            }
        ),
        "which is no matrix",
    ),
    "integers": (change(**{f"{Q}.lora_up.weight": np.ones((24, RANK), np.int8)}), "is int8; get the LoRA as bf16"),
    "empty": (lambda tensors: {}, "holds no tensor; give a LoRA"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_line_that_names_the_key(case, tmp_path):
    damage, message = WRONG[case]
    tensors = damage(lora_tensors("comfyui"))
    lora = write_lora(tmp_path, {k: a.astype(np.float32) if a.dtype == np.float64 else a for k, a in tensors.items()})
    with pytest.raises(UserError) as caught:
        with_adapters(open_weights(cases.NATIVE, WAN_DIT), str(lora))
    assert str(caught.value).startswith(f"{lora}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    write_lora(tmp_path, lora_tensors("comfyui"))
    (tmp_path / "a.ckpt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    weights = open_weights(cases.NATIVE, WAN_DIT)
    for name, message in (
        ("stile.safetensors", "no such LoRA (did you mean 'style.safetensors'?)"),
        ("a.ckpt", "is no .safetensors file"),
        ("empty", "holds no .safetensors file"),
    ):
        with pytest.raises(UserError) as caught:
            with_adapters(weights, str(tmp_path / name))
        assert message in str(caught.value)
    write_lora(tmp_path, lora_tensors("PEFT", alpha=None), "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"adapter_config\.json: no settings of a LoRA; restore the file"):
        with_adapters(weights, str(tmp_path / "adapter_model.safetensors"))


def test_values_that_are_not_finite(tmp_path):
    tensors = lora_tensors("comfyui")
    tensors[f"{Q}.lora_up.weight"][3, 1] = np.nan
    with pytest.raises(UserError, match=r"self_attn\.q\.lora_up\.weight is not finite"):
        leaves(cases.NATIVE, write_lora(tmp_path, tensors))


def test_the_full_size_has_every_key_in_every_style():
    config = WAN_DIT.config_class()
    known = targets(config)
    assert len(known) == 825  # of the 1.3B's own file
    assert sum(target.is_linear for target in known.values()) == 30 * 10 + 6
    for style in STYLES:
        assert len({target.module(style) for target in known.values()}) == 30 * 16 + 8
