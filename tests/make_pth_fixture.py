"""Write tests/fixtures/state_dict.pth, group_dicts.pt and old_format.pth (needs PyTorch; run from the repository root).

They hold what state dicts hold: parameters, views that share a storage, a scalar, an empty tensor, several dtypes.
"""

from pathlib import Path

import torch

FIXTURES = Path(__file__).parent / "fixtures"


def main():
    base = torch.arange(48, dtype=torch.float32).reshape(6, 8) / 7
    tensors = {
        "parameter": torch.nn.Parameter(base.clone()),
        "transposed": base.t(),
        "window": base[1:3, 2:5],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "flags": torch.arange(4) > 1,
    }
    torch.save(tensors, FIXTURES / "state_dict.pth")
    torch.save({"generator": {"w": base}, "critic": {"w": base + 1}, "step": 5}, FIXTURES / "group_dicts.pt")
    torch.save({"w": base}, FIXTURES / "old_format.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
