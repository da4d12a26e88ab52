"""How programs name what an adapter changes: one parameter of the transformer under every spelling there is.

Three key styles are in use for Wan. ComfyUI's are Wan's own names behind `diffusion_model.`; kohya's are those with
underscores behind `lora_unet_`; diffusers' are its own names behind `transformer.`. PEFT, DiffSynth and others write
either's names behind a prefix of their own, so a prefix is what stands before the names that are known.
"""

import dataclasses
import functools
import re

from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.engine import Rule, source_shapes
from avd_jax.errors import UserError, closest
from avd_jax.models.wan_dit import WanDiTConfig

STYLES = ("comfyui", "kohya", "diffusers")
_PREFIXES = {"comfyui": "diffusion_model.", "kohya": "lora_unet_", "diffusers": "transformer."}

# What an adapter is for, if its keys are no text-to-video transformer's.
_OTHERS = (
    (r"vace", "a VACE model"),
    (r"k_img|v_img|img_emb|add_[kv]_proj|image_embedder|norm_added", "an image-to-video model"),
    (r"(^|[._])(motion_encoder|face_adapter|face_encoder|pose_patch)", "Wan Animate"),
    (r"control_adapter|ref_conv", "a Fun-Control model"),
    (r"lora_te|text_encoder\.|text_model", "a text encoder"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """One parameter that an adapter may change.

    Attributes:
      key: Wan's own key.
      diffusers: diffusers' key.
      shape: in PyTorch's layout.
      path: of our leaf.
      layer: its layer in the leaf; None if it is all of it.
      rule: re-lays the tensor as the leaf, or as its layer.
      of_linear: whether its module is a linear layer.
    """

    key: str
    diffusers: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    rule: Rule
    of_linear: bool

    @property
    def is_linear(self) -> bool:
        """Whether it is the matrix of a linear layer."""
        return self.of_linear and self.key.endswith(".weight")

    def module(self, style: str) -> str:
        """Return the name of its module as a program writes it, of the parameter itself if it has none."""
        name = module_of(self.diffusers if style == "diffusers" else self.key)
        return _PREFIXES[style] + (name.replace(".", "_") if style == "kohya" else name)


@functools.lru_cache(maxsize=8)
def targets(config: WanDiTConfig) -> dict[str, Target]:
    """Return Wan's own key -> parameter, of all parameters of a transformer."""
    native, diffusers = WAN_DIT.native_rules(config), WAN_DIT.diffusers_rules(config)  # in the same order
    shapes = dict(source_shapes(native, WAN_DIT.leaves(config)))
    found = {}
    for key, shape in shapes.items():
        rule, named = next(pair for pair in zip(native, diffusers, strict=True) if pair[0].match(key) is not None)
        layer = rule.match(key)
        found[key] = Target(
            key=key,
            diffusers=named.source.replace("{}", layer),
            shape=shape,
            path=rule.target,
            layer=int(layer) if rule.stacked else None,
            rule=rule,
            of_linear=len(shapes.get(f"{module_of(key)}.weight", ())) == 2,
        )
    return found


def module_of(key: str) -> str:
    """Return the module that a key's parameter belongs to; the parameter's own name if it is no weight or bias."""
    for end in (".weight", ".bias"):
        if key.endswith(end):
            return key.removesuffix(end)
    return key


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How a file names modules: `names` is whose names they are, `prefix` what stands before them."""

    names: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.names} behind {self.prefix!r}"


@functools.lru_cache(maxsize=8)
def _known(config: WanDiTConfig) -> dict[str, tuple[str, str, str]]:
    """Return name -> (whose it is, Wan's module, Wan's key or "" for a module); of names that two have: "" as owner."""
    names: dict[str, tuple[str, str, str]] = {}
    for target in targets(config).values():
        module = module_of(target.key)
        for owner, key in (("comfyui", target.key), ("diffusers", target.diffusers)):
            for name, whole in ((module_of(key), ""), (key, target.key)):
                # A parameter without a module is both.
                whole = target.key if module == target.key else whole
                same = name in names and names[name][0] != owner
                names[name] = ("" if same else owner, module, whole)
                names.setdefault(f"_{name.replace('.', '_')}", ("kohya", module, whole))
    return names


def recognise(base: str, config: WanDiTConfig) -> tuple[Spelling | None, str, str] | None:
    """Return how a key names its module, Wan's name of the module, and Wan's key if it names one parameter of it.

    Args:
      base: a key of an adapter without the end that says what of the adapter it is.
      config: sizes of the transformer.

    Returns:
      None for a module that the transformer does not have; as spelling None for a name that says no style.
    """
    known = _known(config)
    if "." not in base:
        flat = re.match(r"(lora_\w+?_)_?(?=blocks_|head_|patch_|text_|time_|condition_|proj_out|scale_)", base)
        if flat and (found := known.get(f"_{base[flat.end() :]}")):
            return Spelling("kohya", flat[1]), found[1], found[2]
    parts = base.split(".")
    for i in range(len(parts)):
        if found := known.get(".".join(parts[i:])):
            prefix = "".join(f"{part}." for part in parts[:i])
            return (Spelling(found[0], prefix) if found[0] else None), found[1], found[2]
    return None


def unknown(name: str, key: str, base: str, config: WanDiTConfig) -> UserError:
    """Return the error for a key whose module the transformer does not have, which says what the adapter is for."""
    for pattern, what in _OTHERS:
        if re.search(pattern, key):
            return UserError(f"{name}: is for {what} ({key}), not for a text-to-video transformer; leave it out")
    layer = re.search(r"blocks[._](\d+)[._]", base)
    if layer and int(layer[1]) >= config.num_layers:
        first = base[: layer.start(1)] + "0" + base[layer.end(1) :]
        if recognise(first, config):
            return UserError(
                f"{name}: is a LoRA of another model: {key} is of block {layer[1]}, and this model has "
                f"{config.num_layers} blocks, from 0 on"
            )
    tail = base.removeprefix("lora_unet_") if "." not in base else base
    for prefix in _PREFIXES.values():
        tail = tail.removeprefix(prefix)
    names = [n.removeprefix("_") if "." not in base else n for n in _known(config)]
    return UserError(f"{name}: {key} changes nothing that this model has{closest(tail, names)}; is it another model's?")
