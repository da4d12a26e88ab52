"""Conversion table of RAFT's large models, whose keys are those of princeton-vl/RAFT (`raft-things.pth`).

In the published files each key begins with `module.`.
"""

import math
from collections.abc import Mapping

from avd_jax.convert.engine import Rule
from avd_jax.errors import UserError
from avd_jax.models.raft import RAFTConfig

_CONV = "o i h w -> h w i o"
_LEVELS = 4  # of all published models; it leaves no trace in the shapes


def rules(_: RAFTConfig) -> list[Rule]:
    """Return the table, which is the same for all sizes."""
    table = []
    for net in ("fnet", "cnet"):
        table += [*_conv(f"{net}.conv1"), *_conv(f"{net}.conv2")]
        blocks = [f"{net}.layer{layer}.{block}" for layer in (1, 2, 3) for block in (0, 1)]
        with_stride = (f"{net}.layer2.0", f"{net}.layer3.0")
        for block in blocks:
            table += [*_conv(f"{block}.conv1"), *_conv(f"{block}.conv2")]
        for block in with_stride:
            table += _conv(f"{block}.downsample.0", f"{block}.downsample")
        if net == "cnet":  # the other one's norms have no parameters
            table += _norm("cnet.norm1")
            for block in blocks:
                table += [*_norm(f"{block}.norm1"), *_norm(f"{block}.norm2")]
            for block in with_stride:
                table += _norm(f"{block}.norm3")
                # The same norm again.
                table += [Rule(rule.source.replace("norm3", "downsample.1"), None) for rule in _norm(f"{block}.norm3")]
    update = "update_block"
    table += [
        rule for name in ("convc1", "convc2", "convf1", "convf2", "conv") for rule in _conv(f"{update}.encoder.{name}")
    ]
    table += [rule for name in "zrq" for axis in "12" for rule in _conv(f"{update}.gru.conv{name}{axis}")]
    table += [*_conv(f"{update}.flow_head.conv1"), *_conv(f"{update}.flow_head.conv2")]
    table += [*_conv(f"{update}.mask.0", f"{update}.mask.conv1"), *_conv(f"{update}.mask.2", f"{update}.mask.conv2")]
    return table


def _conv(theirs: str, ours: str | None = None) -> list[Rule]:
    ours = ours or theirs
    return [Rule(f"{theirs}.weight", f"{ours}.kernel", _CONV), Rule(f"{theirs}.bias", f"{ours}.bias")]


def _norm(name: str) -> list[Rule]:
    ends = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    counter = Rule(f"{name}.num_batches_tracked", None)  # counts batches in training only
    return [*(Rule(f"{name}.{theirs}", f"{name}.{ours}") for theirs, ours in ends.items()), counter]


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], *, name: str) -> RAFTConfig:
    """Read the sizes off the weights.

    Raises:
      UserError: it is a small model, or a key that the sizes are read from is missing or has not four axes.
    """
    if "fnet.layer1.0.conv3.weight" in shapes:
        raise UserError(f"{name}: is RAFT's small model; VBench has the large one, raft-things.pth")

    def widths(key: str) -> tuple[int, int]:
        found = tuple(shapes.get(f"{key}.weight", ()))
        if len(found) != 4:
            raise UserError(f"{name}: no '{key}.weight' in it, or not as RAFT has it; it is incomplete")
        return found[:2]

    motion = [widths(f"update_block.encoder.{conv}") for conv in ("convc1", "convc2", "convf1", "convf2")]
    hidden_dim = widths("update_block.gru.convz1")[0]
    return RAFTConfig(
        widths=tuple(widths(f"fnet.layer{layer}.1.conv2")[0] for layer in (1, 2, 3)),
        feature_dim=widths("fnet.conv2")[0],
        hidden_dim=hidden_dim,
        context_dim=widths("cnet.conv2")[0] - hidden_dim,
        levels=_LEVELS,
        radius=(math.isqrt(motion[0][1] // _LEVELS) - 1) // 2,
        motion_widths=tuple(outputs for outputs, _ in motion),
        motion_dim=widths("update_block.encoder.conv")[0] + 2,
        head_dim=widths("update_block.flow_head.conv1")[0],
    )
