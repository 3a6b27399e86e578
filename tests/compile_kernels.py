"""Compiles every kernel for real GPU targets and reads what the compiler made of it.

    python -m tests.compile_kernels [--json FILE]

No GPU is needed. The launches are the operators' own: they run on meta tensors
of real sizes with an H100's facts, and what they would launch is recorded.
Prints for each kernel and target its registers, spills, shared memory and the
widest global accesses.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbn import ops
from fastbn.kernels import backward, forward
from fastbn.kernels.device import H100

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    name: getattr(module, name)
    for module, name in (
        (forward, "bn_stats_fwd_kernel"),
        (forward, "bn_apply_fwd_kernel"),
        (backward, "bn_reduce_bwd_kernel"),
        (backward, "bn_apply_bwd_kernel"),
    )
}
_POINTEES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of forward and backward, whose launches are to be compiled."""

    shape: tuple[int, ...]
    channels_last: bool
    dtype: str
    activation: str = "none"
    residual: bool = False
    training: bool = True

    def __str__(self) -> str:
        layout = "NHWC" if self.channels_last else "NCHW"
        epilogue = ("+add" if self.residual else "") + (
            "" if self.activation == "none" else f"+{self.activation}"
        )
        mode = "" if self.training else " eval"
        return f"{'x'.join(map(str, self.shape))} {layout} {self.dtype} BN{epilogue}{mode}"


IMAGE = (256, 64, 56, 56)
CASES = [
    *(Case(IMAGE, last, dtype, "relu") for last in (False, True) for dtype in ("bf16", "fp32")),
    *(Case(IMAGE, last, "bf16", "relu", residual=True) for last in (False, True)),
    *(Case(IMAGE, last, "bf16", "silu", residual=True) for last in (False, True)),
    *(Case(IMAGE, last, "fp16", "gelu") for last in (False, True)),
    *(Case(IMAGE, last, "bf16", "relu", training=False) for last in (False, True)),
    Case((256, 256, 14, 14), False, "bf16", "relu"),
    Case((256, 512, 7, 7), False, "bf16", "relu", residual=True),
    Case((256, 2048, 7, 7), True, "bf16", "relu", residual=True),
    Case((2, 32, 128, 128, 128), False, "bf16", "leaky_relu"),
    Case((1024, 4096), False, "bf16", "relu"),
    Case((1024, 4096), False, "fp64", "none"),
]


@dataclass(frozen=True)
class Launch:
    """A kernel with all that its compilation depends on."""

    case: Case
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, object], ...]
    access_bytes: int


class _Recorder:
    """Stands in for a kernel and records its launches instead of launching."""

    def __init__(self, name: str, case: Case, launches: list[Launch]) -> None:
        self.name, self.case, self.launches = name, case, launches

    def __getitem__(self, grid):
        return self._record

    def _record(self, *args, **kwargs) -> None:
        kernel = KERNELS[self.name]
        options = {k: kwargs.pop(k) for k in ("num_warps", "enable_fp_fusion")}
        arguments = dict(zip(kernel.arg_names, args)) | kwargs
        constexprs = {p.name for p in kernel.params if p.is_constexpr}
        signature, constants, aligned = {}, {}, []
        for index, name in enumerate(kernel.arg_names):
            value = arguments[name]
            if name in constexprs or value is None or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + _POINTEES[value.dtype]
                aligned.append(index)
            elif isinstance(value, float):
                signature[name] = "fp64"
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(index)
        x = arguments["X"]
        inner = arguments["ALIGN"] * x.element_size()
        self.launches.append(
            Launch(
                self.case, self.name, tuple(signature.items()), tuple(constants.items()),
                tuple(aligned), tuple(options.items()), min(16, inner),
            )  # fmt: skip
        )


def record(case: Case) -> list[Launch]:
    """The launches of a case on an H100, without one."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(
        case.dtype, torch.float64
    )
    x = torch.empty(case.shape, dtype=dtype, device="meta")
    if case.channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.contiguous(memory_format=formats[x.dim()])
    c = case.shape[1]
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, var = torch.empty(4, c, dtype=stats, device="meta").unbind()
    counter = torch.empty((), dtype=torch.int64, device="meta")
    residual = torch.empty_like(x) if case.residual else None
    signs = case.residual and case.activation in ("relu", "leaky_relu")
    launches: list[Launch] = []
    recorders = {name: _Recorder(name, case, launches) for name in KERNELS}
    with mock.patch.multiple(ops, device_facts=lambda device: H100, **recorders):
        if case.training:
            _, mean, rstd, mask = ops._forward_train(
                x, residual, weight, bias, mean, var, counter, 0.1, 1e-5, case.activation, 0.01,
                signs,
            )  # fmt: skip
        else:
            rstd = var
            _, mask = ops._forward_eval(
                x, residual, weight, bias, mean, var, 1e-5, case.activation, 0.01, signs
            )
        ops._backward(
            x, x, None if signs else residual, mask, weight, bias, mean, rstd, 1e-5,
            case.activation, 0.01, not case.training, [True, True, True, case.residual],
        )  # fmt: skip
    return launches


def compile_launch(launch: Launch, target_name: str) -> dict:
    """Compiles one launch for one target and reports its resources."""
    kernel, target = KERNELS[launch.kernel], TARGETS[target_name]
    index = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature=dict(launch.signature),
        constexprs={(index(name),): value for name, value in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    resources = (
        _amd_resources(compiled) if target.backend == "hip" else _nvidia_resources(compiled)
    )
    return {
        "case": str(launch.case),
        "kernel": launch.kernel,
        "target": target_name,
        "warps": compiled.metadata.num_warps,
        "threads": compiled.metadata.num_warps * target.warp_size,
        "shared": compiled.metadata.shared,
        "access_bytes": launch.access_bytes,
        **resources,
    }


def _nvidia_resources(compiled) -> dict:
    bin = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [bin / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True
        ).stdout
        sass = subprocess.run(
            [bin / "cuobjdump", "-sass", cubin.name], capture_output=True, text=True
        ).stdout
    widths = {"LDG": 0, "STG": 0}
    for kind, suffixes in re.findall(r"\b(LDG|STG)\.([A-Z0-9.]+)", sass):
        bits = re.search(r"(?:^|\.)(?:U|S)?(8|16|64|128|256)(?:\.|$)", suffixes)
        widths[kind] = max(widths[kind], int(bits[1]) // 8 if bits else 4)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1])
        + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "load_bytes": widths["LDG"],
        "store_bytes": widths["STG"],
    }


def _amd_resources(compiled) -> dict:
    text = compiled.asm["amdgcn"]

    def widest(kind: str) -> int:
        found = re.findall(rf"(?:global|buffer)_{kind}_(\w+)", text)
        bytes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2}
        return max((bytes.get(width, 1) for width in found), default=0)

    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        + int(re.search(r"\.sgpr_spill_count:\s+(\d+)", text)[1]),
        "load_bytes": widest("load"),
        "store_bytes": widest("store"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for real GPU targets.")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    launches = [launch for case in CASES for launch in record(case)]
    jobs = [(launch, target) for launch in launches for target in TARGETS]
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(compile_launch, *zip(*jobs)))
    print(f"{'target':7} {'registers':>9} {'spills':>6} {'shared':>6} {'load':>4} {'store':>5}  what")
    for row in rows:
        print(
            f"{row['target']:7} {row['registers']:9} {row['spills']:6} {row['shared']:6}"
            f" {row['load_bytes']:4} {row['store_bytes']:5}  {row['kernel']} of {row['case']}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
