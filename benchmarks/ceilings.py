"""What the machine can do at best: `python -m benchmarks.ceilings DTYPE` prints TFLOP/s and GB/s as JSON."""

import json
import sys
import time

import torch
import torch.nn.functional as F


def best(call, device: torch.device, count: int = 5) -> float:
    """Seconds of the quickest of several calls."""
    seconds = []
    for _ in range(count + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@torch.no_grad()
def ceilings(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    side = 2048 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device).to(dtype)
    b, size = (2, 32) if device.type == "cpu" else (32, 64)
    x = torch.randn(b, 640, size, size, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(640, 640, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    large, target = (torch.empty(1 << 26, dtype=torch.float32, device=device) for _ in range(2))
    return {
        "matmul": 2 * side**3 / best(lambda: a @ a, device) / 1e12,
        "convolution": 2 * 9 * 640**2 * b * size**2 / best(lambda: F.conv2d(x, weight, padding=1), device) / 1e12,
        "copy, GB/s": 2 * large.nbytes / best(lambda: target.copy_(large), device) / 1e9,
    }


if __name__ == "__main__":
    print(json.dumps(ceilings(getattr(torch, sys.argv[1]), torch.device("cpu"))))
