"""Memory beyond the input is bounded: neither a float32 copy of the features nor a matrix of similarities is made."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
import torch
from eval.bench_compress import synthetic_features
from llava.token_compression import CompressionConfig, compress

def mebibytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

frames, tokens, dim = map(int, sys.argv[1:4])
config = CompressionConfig(**{sys.argv[4]: float(sys.argv[5])})
features = synthetic_features(frames, tokens, dim, dtype=torch.bfloat16)
compress(features[:2], config)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
before = mebibytes("VmRSS")
compress(features, config)
print(mebibytes("VmHWM") - before)
"""


def extra_mebibytes(frames: int, tokens: int, dim: int, setting: str, value: float) -> float:
    arguments = [str(argument) for argument in (frames, tokens, dim, setting, value)]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(run.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is read from /proc")
@pytest.mark.slow
@pytest.mark.parametrize(("setting", "value"), [("similarity_threshold", 0.8), ("retention_ratio", 0.1)])
def test_extra_memory_on_the_cpu(setting, value):
    """The float32 copy would take 550 MiB; similarities of the tokens after the first step 500."""
    assert extra_mebibytes(200, 196, 3584, setting, value) < 600


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("setting", "value"), [("similarity_threshold", 0.8), ("retention_ratio", 0.1)])
def test_extra_memory_on_a_gpu(setting, value):
    from eval.bench_compress import synthetic_features
    from llava.token_compression import CompressionConfig, compress

    features = synthetic_features(1024, 196, 3584, dtype=torch.bfloat16).cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compress(features, CompressionConfig(**{setting: value}))
    assert torch.cuda.max_memory_allocated() - before <= 2**30
