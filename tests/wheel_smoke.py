"""Trains a few steps with an installed slicefine, on the backend that a wheel is for; run by tests
and by cibuildwheel.

python wheel_smoke.py [backend]
"""

import sys

import torch

import slicefine
from slicefine import ops
from slicefine.backends import cpu

backend = sys.argv[1] if len(sys.argv) > 1 else "cpu"
assert backend != "cpu" or cpu.unavailable is None, cpu.unavailable
device = "cuda" if backend in ("triton", "cuda") else "cpu"
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for slice_type in ("column", "row", "block"):
        net = torch.nn.Sequential(
            torch.nn.Linear(40, 50), torch.nn.Tanh(), torch.nn.Linear(50, 30)
        ).to(device, dtype)
        config = slicefine.SliceConfig(
            r=8, slice_type=slice_type, switch_interval=4, target_modules=["0", "2"]
        )
        model = slicefine.get_slice_model(net, config)
        optimizer = slicefine.SliceAdamW(model.parameters(), lr=1e-2)
        x, y = (
            torch.randn(64, 40, device=device, dtype=dtype),
            torch.randn(64, 30, device=device, dtype=dtype),
        )
        losses = []
        with ops.use_backend(backend):
            for _ in range(12):
                loss = (model(x) - y).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        assert losses[-1] < losses[0], (dtype, slice_type, losses)
print(
    f"trained: slicefine {slicefine.__version__} on {backend}, torch {torch.__version__},"
    f" {slicefine.__file__}"
)
