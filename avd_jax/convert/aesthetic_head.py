"""Aesthetic heads on CLIP's image embeddings: both that are in use are linear, so both become one vector.

Sources: LAION-AI/aesthetic-predictor (`sa_0_4_vit_l_14_linear.pth`, VBench's) and
christophschuhmann/improved-aesthetic-predictor (`sac+logos+ava1-l14-linearMSE.pth`: five layers and no activation).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avd_jax.convert.files import NotHereError, open_files, tensors_of
from avd_jax.convert.folders import snapshot_of, weight_files
from avd_jax.errors import UserError
from avd_jax.paths import any_path

LINEAR, MLP = "LAION's linear aesthetic head", "LAION's aesthetic MLP without activations"
# The numbers of its layers, between which there is dropout. With activations they would be 0, 3, 6, 9 and 11.
_MLP_LAYERS = (0, 2, 4, 6, 7)
_KEY = re.compile(r"(layers\.(\d+)\.)?(?:weight|bias)")


@dataclass(frozen=True)
class AestheticHead:
    """A linear map from a unit-norm embedding to a score.

    Attributes:
      weight: float32 [D].
      bias: added to the product.
      name: LINEAR or MLP; their scores are not comparable, though both were trained on ratings of 1 to 10.
      file: its name; several training sets have an MLP each.
    """

    weight: np.ndarray
    bias: float
    name: str
    file: str


def load_aesthetic_head(path: str | Path) -> AestheticHead:
    """Load an aesthetic head from its file, or from the folder of its model.safetensors.

    Raises:
      NotHereError: the file holds something else.
      UserError: it is damaged, has activations, or its layers do not fit together.
    """
    path = snapshot_of(any_path(path))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = (path,) if path.is_file() else weight_files(path)
    if not files:
        raise NotHereError(f"{path}: no model.safetensors or pytorch_model.bin here; name the file itself")
    tensors = tensors_of(open_files(files))
    layers = _layers({key: tensor.shape for key, tensor in tensors.items()})
    if not layers:
        raise NotHereError(f"{path}: holds no aesthetic head ('weight' and 'bias', or 'layers.0.weight' and so on)")
    if list(layers.values()) not in ([0], list(_MLP_LAYERS)):
        raise UserError(
            f"{path}: an aesthetic head whose layers are not {', '.join(map(str, _MLP_LAYERS))}, so that there are "
            "activations between them; take sac+logos+ava1-l14-linearMSE.pth or sa_0_4_vit_l_14_linear.pth"
        )

    def read(key: str) -> np.ndarray:
        return tensors[key].read().astype(np.float64)

    weight, bias = np.ones((1, 1)), np.zeros(1)  # of the layers behind
    for layer in reversed(list(layers)):
        matrix, vector = read(f"{layer}weight"), read(f"{layer}bias")
        if len(matrix) != weight.shape[1]:
            raise UserError(f"{path}: the layers of the aesthetic head do not fit together at {layer}weight")
        bias = bias + weight @ vector
        weight = weight @ matrix
    return AestheticHead(weight[0].astype(np.float32), float(bias[0]), LINEAR if "" in layers else MLP, files[0].name)


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the prefixes of the layers with their numbers, in order; none if these are not the tensors of a head."""
    names = {match[1] or "": int(match[2] or 0) for key in shapes if (match := _KEY.fullmatch(key))}
    expected = {f"{name}{end}" for name in names for end in ("weight", "bias")}
    matrices = all(len(shapes[f"{name}weight"]) == 2 for name in names if f"{name}weight" in shapes)
    return dict(sorted(names.items(), key=lambda item: item[1])) if expected == set(shapes) and matrices else {}
