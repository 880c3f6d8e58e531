"""The Triton kernels: under the interpreter on the CPU, on a GPU where there is one, and compiled for GPUs anywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.token_compression.paths import has_kernels

CASES = Path(__file__).with_name("kernel_cases.py")
ROOT = Path(__file__).parents[3]

if not has_kernels():
    pytest.skip("Triton 3.4 or newer is not installed, which PyTorch before 2.8 excludes", allow_module_level=True)

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llava.token_compression.gpu import kernels

TYPES = {
    "labels": "*i32", "degrees": "*i32", "found": "*i32", "valid_count": "*i32", "pairs": "*i64", "order": "*i64",
    "starts": "*i64", "sizes": "*i64", "segments": "*i64", "rows": "*i64", "rows_count": "*i64", "kept_count": "*i64",
    "best": "*i64", "keys": "*i64", "sampled": "*i8", "inverse": "*fp32", "kept_inverse": "*fp32", "weights": "*fp32",
    "sums": "*fp32", "kept": "*fp32", "low": "fp32", "high": "fp32", "near": "fp32", "limit": "i32", "size": "i32",
    "count": "i32", "first_block": "i32", "threshold": "i64", "x": "*" + sys.argv[2],
}
VALUES = {
    "dim": 896, "SAMPLED": True, "MEANS": True, "PROGRAMS": 1024, "B": 64, "M": 64, "N": 64, "K": 32,
}
for name in ("join", "settle", "flatten", "edges", "sums", "nearest", "rivals"):
    kernel = getattr(kernels, name + "_kernel")
    signature = {argument: TYPES.get(argument, "constexpr") for argument in kernel.arg_names}
    values = {argument: VALUES[argument] for argument in kernel.arg_names if argument not in TYPES}
    source = ASTSource(kernel, signature=signature, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
    assert len(compiled.asm["cubin"]) > 0
"""


def run(arguments: list[str], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_under_the_interpreter():
    run(["-m", "pytest", "-q", "-x", str(CASES)], TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    run(["-m", "pytest", "-q", "-x", str(CASES)])


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), [("80", "bf16"), ("90", "fp32"), ("90", "bf16")])
def test_kernels_compile_for_gpus_that_are_not_here(capability, dtype, tmp_path):
    run(["-c", COMPILE, capability, dtype], TRITON_CACHE_DIR=str(tmp_path))
