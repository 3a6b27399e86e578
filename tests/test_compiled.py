"""What compilers for real GPUs make of the kernels; see `compile_kernels.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from filelock import FileLock

from fastbn.kernels.instructions import INSTRUCTIONS
from fastbn.kernels.tiling import PROGRAMS_PER_SM

from .compile_kernels import lone_releases
from .memory_order import order

# Of a multiprocessor: registers, and bytes of shared memory.
REGISTERS = 65536
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


# Versions of Triton whose own choices, as of registers, CI sees. Another one's can't be known
# here: they are reported, and only what is wrong with any compiler fails.
KNOWN_TRITONS = ("3.6", "3.7", "3.8", "3.9")

# Cases and targets to compile, by the option --compile.
COMPILED = {
    "few": ["--targets", "sm_90", "--few"],
    "all": ["--targets", "sm_90"],
    "others": ["--targets", "sm_80", "sm_100", "gfx942", "--few"],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory, worker_id, pytestconfig):
    """All launches, compiled once: of several workers the first does it for the others."""
    folder = tmp_path_factory.getbasetemp()
    path = (folder if worker_id == "master" else folder.parent) / "compiled.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            compile_all(path, COMPILED[pytestconfig.getoption("--compile")])
    return json.loads(path.read_text())


def compile_all(path, options):
    # In a process of its own: here the kernels may be the interpreter's.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", *options, "--json", path],
        cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def compilers_choice(rows, version=triton.__version__):
    """Takes launches in which a compiler chose badly: a failure, if CI knows the compiler."""
    if not rows:
        return
    text = "; ".join(f"{row['kernel']} of {row['case']} on {row['target']}: {row}" for row in rows)
    if version.startswith(tuple(f"{known}." for known in KNOWN_TRITONS)):
        pytest.fail(text)
    pytest.skip(f"Triton {version} is newer than these checks, and chose otherwise: {text}")


def test_every_kernel_on_every_target(rows):
    kernels = {"bn_stats_fwd_kernel", "bn_apply_fwd_kernel", "bn_reduce_bwd_kernel"}
    kernels |= {"bn_resident_fwd_kernel", "bn_resident_bwd_kernel"}
    kernels |= {"bn_ticketed_fwd_kernel", "bn_ticketed_bwd_kernel"}
    kernels |= {"bn_moments_fwd_kernel", "bn_merge_fwd_kernel"}
    for target in {row["target"] for row in rows}:
        compiled = {row["kernel"] for row in rows if row["target"] == target}
        assert compiled == kernels | {"bn_apply_bwd_kernel"}


def test_nothing_spills(rows):
    compilers_choice([row for row in rows if row["spills"]])


def test_an_unknown_compilers_choices_are_reported_and_a_known_ones_fail():
    row = {"kernel": "k", "case": "c", "target": "sm_90", "spills": 8}
    compilers_choice([], "99.1.0")
    with pytest.raises(pytest.fail.Exception, match="'spills': 8"):
        compilers_choice([row], "3.8.0")
    with pytest.raises(pytest.skip.Exception, match=r"Triton 3\.80\.1 .* k of c on sm_90"):
        compilers_choice([row], "3.80.1")


def test_accesses_are_as_wide_as_the_layout_allows(rows):
    """The tile of the input, at least, is loaded in accesses of the planned width."""
    for row in rows:
        wide = sum(
            int(bytes) * count
            for bytes, count in row["loads"].items()
            if int(bytes) >= row["access_bytes"]
        )
        tensors = 2 if "bwd" in row["kernel"] else 1
        assert wide >= tensors * row["thread_bytes"], row


def test_outputs_are_stored_wide(rows):
    for row in rows:
        kernel = row["kernel"]
        takes_moments = "stats" in kernel or "moments" in kernel
        if not takes_moments and ("reduce" not in kernel or row["case"].endswith(" eval")):
            wide = sum(
                int(bytes) * count
                for bytes, count in row["stores"].items()
                if int(bytes) >= row["access_bytes"]
            )
            tensors = 1 + ("bwd" in kernel and "+add" in row["case"])
            assert wide >= tensors * row["thread_bytes"], row


def test_nothing_is_contracted(rows):
    """The backward finds an argument on the side of a kink where the forward left it."""
    assert not any(row["contracted"] for row in rows)


def test_a_release_covers_the_stores_of_all_waves(rows):
    """AMD's covers those of its own wave: all wait for theirs, and for each other, before it."""
    rows = [row for row in rows if row["target"] == "gfx942"]
    if not rows:
        pytest.skip("CI compiles for gfx942, by --compile others")
    for row in rows:
        assert row["lone_releases"] == 0, row
    shared = {row["kernel"] for row in rows if row["releases"]}
    assert {"bn_stats_fwd_kernel", "bn_moments_fwd_kernel", "bn_reduce_bwd_kernel"} <= shared
    assert {"bn_ticketed_fwd_kernel", "bn_ticketed_bwd_kernel"} <= shared


def test_results_are_handed_over_in_order(rows):
    """NVIDIA's machine code, for every target: `memory_order.py` says what the order is."""
    seen = set()
    for row in rows:
        if row.get("hand_over"):
            assert not row["misordered"], row
            ticketed = "ticketed" in row["kernel"]
            arrivals = "resident" not in row["kernel"]
            # The last program to finish its channels decides whether a batch is skipped.
            arrivals += row["case"].endswith(" skip") and "fwd" in row["kernel"]
            expected = {"arrive": arrivals, "raise": ticketed, "poll": ticketed}
            if not row["case"].endswith(" eval"):
                assert row["hand_over"] == expected, row
            seen.add(row["kernel"])
    shares = {"bn_stats_fwd_kernel", "bn_moments_fwd_kernel", "bn_reduce_bwd_kernel"}
    shares |= {"bn_resident_fwd_kernel", "bn_merge_fwd_kernel"}
    assert seen == shares | {"bn_ticketed_fwd_kernel", "bn_ticketed_bwd_kernel"}


ARRIVAL = ["STG.E.128 [R2], R4", "BAR.SYNC 0x0", "MEMBAR.ALL.GPU", "@P0 ATOMG.E.ADD.STRONG.GPU"]
ARRIVAL += ["CCTL.IVALL", "BAR.SYNC 0x0", "LDG.E.STRONG.GPU R4"]
FLAG = ["STG.E [R2], R4", "BAR.SYNC 0x0", "MEMBAR.SC.GPU", "ATOMG.E.EXCH.64.STRONG.GPU"]
POLL = ["LDG.E.64.STRONG.GPU R2", "CCTL.IVALL", "BAR.SYNC 0x0", "LDG.E.STRONG.GPU R4"]
TICKET = ["ATOMG.E.ADD.64.STRONG.GPU", "BAR.SYNC 0x0"]
IN_ORDER = TICKET + POLL + ARRIVAL + FLAG


def sass(instructions):
    return "".join(f"/*{16 * i:04x}*/ {text} ;\n" for i, text in enumerate(instructions))


def test_what_is_in_order_passes():
    assert order(sass(IN_ORDER)) == ({"arrive": 1, "raise": 1, "poll": 1}, [])
    # Partial results in float64 have 64 bits, as flags have.
    wide = ["LDG.E.64.STRONG.GPU R4" if text == POLL[-1] else text for text in IN_ORDER]
    assert order(sass(wide)) == ({"arrive": 1, "raise": 1, "poll": 1}, [])


@pytest.mark.parametrize("part", [ARRIVAL, FLAG, POLL], ids=["arrival", "flag", "poll"])
def test_what_is_out_of_order_is_noticed(part):
    """Each two neighbours exchanged, and each instruction left out but for stores and loads."""
    rest = [text for other in (ARRIVAL, FLAG, POLL) if other is not part for text in other]
    broken = []
    for i in range(len(part)):
        exchanged = part.copy()
        exchanged[i : i + 2] = reversed(exchanged[i : i + 2])
        broken.append(exchanged)
        if not part[i].startswith(("STG", "LDG.E.STRONG")):
            broken.append(part[:i] + part[i + 1 :])
    for code in broken:
        if code != part:
            assert order(sass(TICKET + rest + code)) != order(sass(IN_ORDER)), code


@pytest.mark.parametrize("text", ["LDG.E.CONSTANT R2", "LDG.E.128.CONSTANT R4", "ACQBULK"])
def test_what_must_not_be_there_is_noticed(text):
    assert order(sass([*IN_ORDER, text]))[1]


def test_a_lone_release_is_noticed():
    store, wait = "buffer_store_dword v1\n", ";;#ASMSTART\n s_waitcnt vmcnt(0)\n ;;#ASMEND\n"
    barrier, release = "s_barrier\n", "buffer_wbl2 sc1\ns_waitcnt vmcnt(0)\nglobal_atomic_add v1\n"
    whole = store + wait + barrier + release
    assert lone_releases(2 * whole) == 0
    for broken in (
        store + barrier + release,
        store + wait + release,
        wait + store + barrier + release,
        wait + barrier + store + release,
    ):
        assert lone_releases(whole + broken) == 1, broken


def test_registers_stay_where_they_are(rows):
    """Shared memory serves sums and transposed masks, not every value that a program has."""
    compilers_choice([row for row in rows if row.get("shared_stores", 0) > 128])


# Whether this is the version of Triton whose instructions were counted.
COUNTED_WITH_THIS = triton.__version__.startswith("3.8.")

# Instructions of a thread for each element on an H100, at most: in the loop over tiles, and with
# what a run of the planned length does once. With columns, a fifth more.
BUDGET = {"moments": (6, 10), "output": (7, 9), "sums": (11, 15), "gradient": (13, 16)}
WITH_RESIDUAL = BUDGET | {"output": (13, 16)}


def test_instructions_leave_time_for_memory(rows):
    """Other targets and versions of Triton may take a fifth more."""
    over, seen = [], set()
    for row in rows:
        budget = WITH_RESIDUAL if "+add" in row["case"] else BUDGET
        if not row["case"].endswith("+relu") or row["elements"] < 2**24:
            continue
        for phase in row["phases"]:
            loop, whole = budget[phase["phase"]]
            more = 1.0 if row["target"] == "sm_90" and COUNTED_WITH_THIS else 1.2
            more *= 1.2 if phase["layout"] == "columns" else 1.0
            # Ticketed kernels load with policies for the cache, which the compiler makes in
            # each turn anew: 11 instructions for 32 elements.
            loop += 0.3 if phase["phase"] == "moments" and "ticketed" in row["kernel"] else 0
            seen.add((phase["phase"], "ticketed" in row["kernel"]))
            assert phase["barriers"] == 0
            turn, all_of_it = phase["loop"], phase["loop"] + phase["fixed"]
            if round(turn, 1) > more * loop or round(all_of_it) > more * whole:
                over.append(row)
    assert {phase for phase, _ in seen} == set(BUDGET)
    compilers_choice(over)


def test_the_planner_knows_how_many_instructions_there_are(rows):
    """Ticketed kernels of batch norm with ReLU: loops within a fifth, what else within a third."""
    if not COUNTED_WITH_THIS:
        pytest.skip("instructions were counted with another version of Triton")
    wrong, seen = [], set()
    for row in rows:
        if row["target"] != "sm_90" or not row["case"].endswith("BN+relu"):
            continue
        for phase in row["phases"] if "ticketed" in row["kernel"] else ():
            key = (phase["phase"], phase["layout"])
            seen.add(key)
            loop, fixed = INSTRUCTIONS[key]
            once = _ratio(phase["fixed_instructions"], fixed)
            if _ratio(phase["loop"], loop) > 1.2 or once > 4 / 3:
                wrong.append(row)
    assert seen <= set(INSTRUCTIONS)
    compilers_choice(wrong)


def _ratio(a, b):
    return max(a / b, b / a)


def test_as_many_programs_fit_as_planned(rows):
    """Registers and shared memory leave room for the programs that the splits count on."""

    def fits(row):
        shared = row["shared"] + 1024  # which the system takes of each program
        return (
            row["registers"] * row["threads"] * PROGRAMS_PER_SM <= REGISTERS
            and shared * PROGRAMS_PER_SM <= SHARED[row["target"]]
        )

    # Nothing counts on more than one resident program: there spills are the limit.
    rows = [row for row in rows if row["target"] in SHARED and "resident" not in row["kernel"]]
    compilers_choice([row for row in rows if not fits(row)])
