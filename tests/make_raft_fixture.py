"""Make the golden file of RAFT; run in an environment with the `parity` extra.

    python tests/make_raft_fixture.py

`raft_golden.npz` holds a tiny random RAFT under the keys of its authors' files, in half precision, two pictures, and
some of the flow that PyTorch makes of them in 20 steps.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from raft_torch import Raft, randomise
from test_raft import pictures


@torch.no_grad()
def main():
    sizes = {"widths": (8, 10, 12), "features": 10, "hidden": 8, "context": 6, "motion_widths": (8, 7, 6, 5)}
    model = randomise(Raft(**sizes, motion=10, head=9, radius=2), seed=1)
    first, second = (x[:1].round() for x in pictures(128, 136))
    flow = model(first, second)
    np.savez_compressed(
        Path(__file__).parent / "fixtures" / "raft_golden.npz",
        first=first[0].permute(1, 2, 0).numpy().astype(np.uint8),
        second=second[0].permute(1, 2, 0).numpy().astype(np.uint8),
        flow=flow[0].permute(1, 2, 0).numpy()[::5, ::3],
        **{f"module.{key}": value.half().numpy() for key, value in model.state_dict().items()},
    )
    print(flow.abs().mean(), flow.abs().max())


if __name__ == "__main__":
    main()
