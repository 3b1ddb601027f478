"""What the machine can do at best: `python -m benchmarks.ceilings DTYPE` prints TFLOP/s and GB/s as JSON."""

import json
import sys
import time

import torch
import torch.nn.functional as F


def best(call, count: int = 5) -> float:
    """Seconds of the quickest of several calls."""
    call()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@torch.no_grad()
def ceilings(dtype: torch.dtype) -> dict[str, float]:
    a = torch.randn(2048, 2048).to(dtype)
    x = torch.randn(2, 640, 32, 32).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(640, 640, 3, 3).to(dtype, memory_format=torch.channels_last)
    large, target = torch.empty(1 << 26, dtype=torch.float32), torch.empty(1 << 26, dtype=torch.float32)
    return {
        "matmul": 2 * 2048**3 / best(lambda: a @ a) / 1e12,
        "convolution": 2 * 9 * 640**2 * 2 * 32**2 / best(lambda: F.conv2d(x, weight, padding=1)) / 1e12,
        "copy, GB/s": 2 * large.nbytes / best(lambda: target.copy_(large)) / 1e9,
    }


if __name__ == "__main__":
    print(json.dumps(ceilings(getattr(torch, sys.argv[1]))))
