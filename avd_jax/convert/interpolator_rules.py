"""Conversion table of the frame interpolator, whose keys are those of the authors' code, and its configs.

In the authors' checkpoints the keys are under `model.interp.interpolation_module.`, inside the generator.
"""

from collections.abc import Mapping
from typing import Any

from avd_jax.convert.engine import Rule
from avd_jax.errors import UserError, closest
from avd_jax.models.interpolator import InterpolatorConfig

PREFIX = "model.interp.interpolation_module."
# The same without what a repackaged file, or one of the module alone, leaves out.
PREFIXES = (PREFIX, PREFIX.removeprefix("model."), PREFIX.removeprefix("model.interp."))
BLOCKS = ("enc1", "enc2", "enc3", "dec2", "dec1")

CLASS_NAME = "AVDInterpolator"
_CONV, _TRANSPOSED, _POINTWISE = "o i h w -> h w i o", "i o p q -> i p q o", "o i 1 1 -> i o"


def rules(_: InterpolatorConfig) -> list[Rule]:
    """Return the table, which is the same for all sizes."""
    table = [
        Rule("out_conv.weight", "out_conv.kernel", _POINTWISE),
        Rule("out_conv.bias", "out_conv.bias"),
    ]
    for name in ("upconv2", "upconv1"):
        table += [Rule(f"{name}.weight", f"{name}.kernel", _TRANSPOSED), Rule(f"{name}.bias", f"{name}.bias")]
    for name in BLOCKS:
        table += [
            Rule(f"{name}.conv.0.weight", f"{name}.conv.kernel", _CONV),
            Rule(f"{name}.conv.1.weight", f"{name}.norm.scale"),
            Rule(f"{name}.conv.1.bias", f"{name}.norm.bias"),
            Rule(f"{name}.conv.1.running_mean", f"{name}.norm.mean"),
            Rule(f"{name}.conv.1.running_var", f"{name}.norm.var"),
            Rule(f"{name}.conv.1.num_batches_tracked", None),  # counts batches in training only
        ]
    return table


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], *, name: str) -> InterpolatorConfig:
    """Read the sizes off the weights.

    Raises:
      UserError: when a key that the sizes are read from is missing or has not four axes.
    """
    sizes = {}
    for block in ("enc1", "enc2", "enc3"):
        key = f"{block}.conv.0.weight"
        if len(shapes.get(key, ())) != 4:
            raise UserError(f"{name}: the kernel {key!r} is missing{closest(key, shapes)}; it holds no interpolator")
        sizes[block] = shapes[key]
    widths = tuple(size[0] for size in sizes.values())
    return InterpolatorConfig(channels=sizes["enc1"][1] // 2, widths=widths)


def config_from_json(entries: Mapping[str, Any], *, name: str) -> InterpolatorConfig:
    """Read what `config_to_json` wrote; raises UserError for another class, or a field that is unknown or missing."""
    if entries.get("_class_name") != CLASS_NAME:
        raise UserError(f"{name}: _class_name is {entries.get('_class_name')!r}, expected {CLASS_NAME!r}")
    values = {key: value for key, value in entries.items() if key != "_class_name"}
    known = InterpolatorConfig.__dataclass_fields__
    for field in known:
        if field not in values:
            raise UserError(f"{name}: the field {field!r} is missing")
    for field in values:
        if field not in known:
            raise UserError(f"{name}: the field {field!r} is not known{closest(field, known)}")
    if not isinstance(values["widths"], list):
        raise UserError(f"{name}: the field 'widths' is {values['widths']!r}, expected three whole numbers")
    return InterpolatorConfig(values["channels"], tuple(values["widths"]))


def config_to_json(config: InterpolatorConfig) -> dict[str, Any]:
    """Return the entries of the config.json beside exported weights."""
    return {"_class_name": CLASS_NAME, "channels": config.channels, "widths": list(config.widths)}
