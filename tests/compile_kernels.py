"""Compiles every kernel for real GPU targets and reads what the compiler made of it.

    python -m tests.compile_kernels [--targets TARGET ...] [--few] [--json FILE]

No GPU is needed. The launches are the operators' own: they run on tensors
without memory, of the benchmarks' sizes and a few more, planned for an H100, and
each kernel is compiled as Triton would for that launch. Prints for each its registers, bytes
of spills and of shared memory, and the bytes of its widest loads and stores; and of launches
in bfloat16 for NVIDIA's GPUs, for each element, the instructions of the loop over tiles, those
outside of it in a run of the planned length, and the share of all that the device can issue
while its memory moves the same element (`instructions.py` says what is counted).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.plans import problem_of
from benchmarks.shapes import cases as benchmark_cases
from fastbn.kernels.device import H100, Device
from fastbn.kernels.plan import make_schedule
from fastbn.runtime import execution_plan, plan_cache, sync_ops, torch_ops
from fastbn.runtime.launcher import Launcher
from fastbn.runtime.layout import memory_format

from .instructions import Way, ways
from .memory_order import order

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """One call of forward and backward, whose launches are to be compiled."""

    shape: tuple[int, ...]
    channels_last: bool
    dtype: str
    activation: str = "none"
    residual: bool = False
    training: bool = True
    skip: bool = False
    synchronised: bool = False

    def __str__(self) -> str:
        layout = "NHWC" if self.channels_last else "NCHW"
        epilogue = ("+add" if self.residual else "") + (
            "" if self.activation == "none" else f"+{self.activation}"
        )
        kinds = {" skip": self.skip, " sync": self.synchronised, " eval": not self.training}
        mode = "".join(name for name, is_so in kinds.items() if is_so)
        return f"{'x'.join(map(str, self.shape))} {layout} {self.dtype} BN{epilogue}{mode}"


def table() -> list[Case]:
    """A case for each tile, strategy, dtype and epilogue that the benchmarks' shapes lead to."""
    dtypes = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    found = {}
    for case in benchmark_cases(gpu=True, quick=False):
        problem = problem_of(case)
        for direction in ("forward", "backward"):
            schedule = make_schedule(problem, H100, direction == "backward")
            key = (
                direction, schedule.strategy, schedule.reduce.tile, schedule.apply.tile,
                case.dtype, case.epilogue,
            )  # fmt: skip
            found.setdefault(key, case)
    return [
        Case(
            case.size, case.layout == "channels-last", dtypes[case.dtype],
            "relu" if case.epilogue.relu else "none", case.epilogue.residual,
        )
        for case in dict.fromkeys(found.values())
    ]  # fmt: skip


IMAGE = (256, 64, 56, 56)
CASES = [
    *table(),
    *(Case(IMAGE, last, "bf16", "silu", residual=True) for last in (False, True)),
    *(Case(IMAGE, last, "fp16", "gelu") for last in (False, True)),
    *(Case(IMAGE, last, "bf16", "relu", training=False) for last in (False, True)),
    Case((2, 32, 128, 128, 128), False, "bf16", "leaky_relu"),
    Case((8192, 1024), False, "fp64", "none"),
    *(Case(IMAGE, last, "bf16", "relu", True, synchronised=True) for last in (False, True)),
    Case((8192, 1024), False, "fp64", "gelu", synchronised=True),
    *(Case((128, 512, 7, 7), False, dtype, "gelu") for dtype in ("bf16", "fp32")),
    Case((512, 4096), False, "bf16", "gelu", residual=True),
    Case((512, 1000), False, "fp32", "gelu_tanh", residual=True),
    Case((512, 1000), False, "fp64", "gelu_tanh", residual=True),
    # Every strategy and layout that may skip a batch.
    *(Case(IMAGE, last, "fp16", "relu", skip=True) for last in (False, True)),
    Case(IMAGE, False, "bf16", "silu", residual=True, skip=True),
    Case((128, 512, 7, 7), False, "bf16", "gelu", skip=True),
    Case((64, 256, 14, 14), True, "bf16", skip=True),
    Case((8192, 1024), False, "fp64", skip=True),
    Case((512, 1024), False, "fp16", skip=True),
    # Sizes and splits of 1, which Triton compiles in as constants.
    Case((16, 1, 64, 64), False, "bf16", "relu"),
    Case((2, 3, 4, 4), False, "fp32", "gelu_tanh", residual=True),
    Case((1, 16, 1, 1, 5), False, "fp16", "elu", training=False),
    Case((1, 16), False, "fp32", "tanh", training=False),
    Case((32, 16), False, "bf16", "hardswish", residual=True),
]


class _Driver:
    """A driver with no device behind it: Triton compiles for its target, as for a real one."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        # A number of its own: Triton keeps what it compiled by device.
        self.device = hash(target) % 2**31

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def launches(case: Case, device: Device, nvidia: bool) -> list[tuple[Launcher, tuple]]:
    """Returns what a case launches, planned for a device: launchers and their arguments."""
    found = []

    def note(self: Launcher, tensors, *floats) -> None:
        found.append((self, (*tensors, *self.integers, *floats)))

    plan_cache.clear()
    with (
        mock.patch.object(execution_plan, "device_facts", return_value=device),
        mock.patch.object(execution_plan, "limits_registers", return_value=nvidia),
        mock.patch.object(Launcher, "__call__", note),
        mock.patch.object(Launcher, "check"),
    ):
        _call(case)
    plan_cache.clear()
    return found


def compile_launches(case: Case, target: GPUTarget, device: Device) -> list[tuple[Any, dict]]:
    """Compiles all launches of a case, planned for a device, and leaves them in Triton's cache.

    Returns:
        For each launch the compiled kernel, and its arguments by name.
    """
    driver.set_active(_Driver(target))
    compiled = []
    for launcher, arguments in launches(case, device, target.backend == "cuda"):
        kernel = launcher.kernel
        code = kernel.warmup(*arguments, grid=launcher.grid, **launcher.constants)
        compiled.append((code, dict(zip(kernel.arg_names, arguments)) | launcher.constants))
    return compiled


def few() -> list[Case]:
    """Returns one case for each kernel and kind of tile, and those that may skip a batch."""
    found, seen = [], set()
    for case in CASES:
        kinds = {
            (
                launcher.kernel.fn.__name__,
                getattr(launcher.constants.get("TILE"), "layout", None),
                case.skip and case.residual,
            )
            for launcher, _ in launches(case, H100, nvidia=True)
        }
        if not kinds <= seen:
            found.append(case)
            seen |= kinds
    return found


def compile_case(case: Case, target_name: str) -> list[dict]:
    """Compiles all launches of a case for one target and reports their resources."""
    target = TARGETS[target_name]
    rows = []
    for kernel, arguments in compile_launches(case, target, H100):
        # The kernel that merges moments has no tile.
        tile, itemsize = arguments.get("TILE"), case_itemsize(case)
        threads = kernel.metadata.num_warps * target.warp_size
        rows.append(
            {
                "case": str(case),
                "kernel": kernel.metadata.name,
                "target": target_name,
                "threads": threads,
                "shared": kernel.metadata.shared,
                # What a thread moves of one tensor's tile, and how wide it can be moved.
                "thread_bytes": tile.elements * itemsize // threads if tile else 0,
                "access_bytes": min(
                    tile.access_bytes(itemsize), tile.elements * itemsize // threads
                )
                if tile
                else 0,
                "layout": tile.layout if tile else None,
                "contracted": kernel.metadata.enable_fp_fusion,
                "elements": math.prod(case.shape),
                "phases": _phases(kernel, arguments, case),
                **_resources(kernel),
            }
        )
    return rows


def _call(case: Case) -> None:
    """Forward and backward on tensors without memory."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes.get(case.dtype, torch.float64)
    x = torch.empty(case.shape, dtype=dtype, device="meta")
    if case.channels_last:
        format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        x = x.contiguous(memory_format=format)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, var = torch.empty(4, x.shape[1], dtype=stats, device="meta").unbind()
    num_batches_tracked = torch.empty((), dtype=torch.int64, device="meta")
    residual = torch.empty_like(x) if case.residual else None
    signs = case.residual and case.activation in ("relu", "leaky_relu")
    epilogue = (1e-5, case.activation, 0.01)
    if case.synchronised:
        written = (mean, var, num_batches_tracked)
        _call_synchronised(case, x, residual, weight, bias, written, signs)
        return
    if case.training:
        _, statistics, mask = torch_ops._forward_train(
            x, residual, weight, bias, mean, var, num_batches_tracked, 0.1, 1.0, *epilogue, signs,
            case.skip,
        )  # fmt: skip
        var = None
    else:
        statistics = mean
        _, mask = torch_ops._forward_eval(x, residual, weight, bias, mean, var, *epilogue, signs)
    saved = (None, mask) if signs else (residual, None)
    format = memory_format(x) if signs else None
    options = (*epilogue, (True, case.residual, True, True), format)
    if case.training or signs or case.activation == "none":
        bias = None  # not read, or beside the batch's statistics
    torch_ops._backward(x, x, *saved, weight, bias, statistics, var, *options)


def _call_synchronised(case: Case, x, residual, weight, bias, written, signs: bool) -> None:
    """The same with the moments of four processes."""
    gathered = sync_ops._moments(x).expand(4, -1).contiguous()
    momentum = None if case.channels_last else 0.1
    numbers = (momentum, 1.0, 1e-5, momentum is None)
    statistics, count = sync_ops._merge(gathered, bias, *written, *numbers)
    epilogue = (case.activation, 0.01)
    _, mask = sync_ops._normalise(x, residual, weight, statistics, *epilogue, signs)
    saved = (None, mask, weight) if signs else (residual, None, weight)
    options = (*epilogue, (True, case.residual, True, True), memory_format(x) if signs else None)
    sums, _, _ = sync_ops._sums(x, x, *saved, statistics, *options)
    sync_ops._gradients(x, x, *saved, statistics, sums, count, *options)


def _phases(kernel, arguments: dict, case: Case) -> list[dict]:
    """The instructions of the phases that a launch has, for each element of a tensor."""
    name = kernel.metadata.name
    hip = kernel.metadata.target.backend == "hip"
    if hip or case.dtype != "bf16" or not case.training or case.synchronised or "resident" in name:
        return []
    tile, length = arguments["TILE"], arguments["length"]
    each = tile.elements / (kernel.metadata.num_warps * kernel.metadata.target.warp_size)
    first, second = ("sums", "gradient") if "bwd" in name else ("moments", "output")
    found = []
    for way in _ways(kernel):
        phase = second if way.stores else first
        # The first tile's moments are taken before the loop, which so has a turn less.
        outside = way.fixed - (way.loop if phase == "moments" else 0)
        loop, fixed = way.loop / each, outside / each / length
        units = (2 if "bwd" in name else 1) * (1 + way.stores)
        seconds = units * case_itemsize(case) / H100.bandwidth
        issued = (loop + fixed) / (H100.sm_count * H100.issues)
        found.append(
            {
                "phase": phase,
                "layout": tile.layout,
                "length": length,
                "loop": loop,
                "fixed": fixed,
                "fixed_instructions": outside,
                "barriers": way.barriers,
                "issue_share": issued / seconds,
            }
        )
    return found


def case_itemsize(case: Case) -> int:
    return {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[case.dtype]


@cache
def _ways(kernel) -> list[Way]:
    return ways(_sass(kernel))


@cache
def _sass(kernel) -> str:
    return _dump(kernel, "-sass")


@cache
def _resources(kernel) -> dict:
    """Of a kernel, once: many launches of different cases share one."""
    hip = kernel.metadata.target.backend == "hip"
    return (_amd_resources if hip else _nvidia_resources)(kernel)


def _dump(compiled, what: str) -> str:
    """What cuobjdump says of a kernel."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return subprocess.run([cuobjdump, what, cubin.name], capture_output=True, text=True).stdout


def _nvidia_resources(compiled) -> dict:
    usage = _dump(compiled, "-res-usage")
    # The machine's own instructions are as wide, and take twenty times as long to print.
    text = compiled.asm["ptx"]
    access = r"\.global\b\S*?(?:\.v(\d))?\.[a-z](\d+)\s"
    loads, stores = (
        Counter(int(n or 1) * int(bits) // 8 for n, bits in re.findall(rf"\b{kind}{access}", text))
        for kind in ("ld", "st")
    )
    # Kernels in which programs hand results to each other.
    shares = re.search(r"\batom\.", text)
    hand_over, misordered = order(_sass(compiled)) if shares else ({}, [])
    return {
        "hand_over": hand_over,
        "misordered": misordered,
        "shared_stores": len(re.findall(r"\bst\.shared\b", text)),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1])
        + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "loads": loads,
        "stores": stores,
    }


def _amd_resources(compiled) -> dict:
    text = compiled.asm["amdgcn"]
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b32": 4, "b64": 8}
    loads, stores = (
        Counter(
            widths.get(width, 2 if "short" in width else 1)
            for width in re.findall(rf"(?:global|buffer)_{kind}_(\w+)", text)
        )
        for kind in ("load", "store")
    )
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        # Scalar registers spill to vector ones; what goes to memory is in this segment.
        "spills": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1]),
        "releases": text.count("buffer_wbl2"),
        "lone_releases": lone_releases(text),
        "loads": loads,
        "stores": stores,
    }


def lone_releases(amdgcn: str) -> int:
    """Releases that cover the stores of their own wave alone: see `wait_for_own_stores`."""
    before = (text.rpartition("ASMSTART")[2] for text in amdgcn.split("buffer_wbl2")[:-1])
    joined = r"\A\s+s_waitcnt vmcnt\(0\)(?!.*_store_).*\bs_barrier\b"
    return sum(re.search(joined, text, re.DOTALL) is None for text in before)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for real GPU targets.")
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="by default all"
    )
    parser.add_argument(
        "--few", action="store_true", help="one case for each kernel and kind of tile"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    cases = few() if arguments.few else CASES
    jobs = [(case, target) for target in arguments.targets for case in cases]
    with ProcessPoolExecutor() as pool:
        rows = [row for rows in pool.map(compile_case, *zip(*jobs)) for row in rows]
    print("target  registers spills shared load store  kernel")
    for row in rows:
        print(
            f"{row['target']:7} {row['registers']:9} {row['spills']:6} {row['shared']:6}"
            f" {max(row['loads']):4} {max(row['stores']):5}  {row['kernel']} of {row['case']}"
        )
        for phase in row["phases"]:
            print(
                f"    {phase['phase']:8} in runs of {phase['length']:3} tiles:"
                f" {phase['loop']:4.1f} + {phase['fixed']:4.1f} instructions an element,"
                f" {phase['barriers']} barriers, issue {phase['issue_share']:4.0%}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
