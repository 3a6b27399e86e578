"""Breaks a copy of the project on purpose, in many ways: the tests must fail each time."""

import multiprocessing
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Seconds until a broken kernel counts as hanging.
LIMIT = 300

# Each entry is named after what it breaks, and has a file, the text to replace, its replacement,
# and the tests that must fail.
BREAKAGES = {
    "mask dropped from the moments": (
        "kernels/access.py",
        "tl.where(inside(run, i, TILE), x.to(about.dtype) - about, 0.0)",
        "x.to(about.dtype) - about",
        "tests/test_kernels.py::test_shapes_and_dtypes",
    ),
    "mask dropped from the output": (
        "kernels/access.py",
        "tl.store(at, x, inside(run, i, TILE), ",
        "tl.store(at, x, ",
        "tests/test_kernels.py::test_shapes_and_dtypes",
    ),
    "running mean kept for the batch's": (
        "kernels/forward.py",
        "tl.store(Statistics + c, mean, exists)",
        "tl.store(Statistics + c, tl.load(RunningMean + c, exists).to(mean.dtype), exists)",
        "tests/test_kernels.py::test_momentum",
    ),
    "no Bessel's correction": (
        "kernels/forward.py",
        "m2 / (count - tl.full((), correction, mean.dtype))",
        "m2 / count",
        "tests/test_kernels.py::test_momentum",
    ),
    "bad batches counted": (
        "kernels/running.py",
        "tl.min(finite, axis=0) == 1",
        "tl.min(finite, axis=0) >= 0",
        "tests/test_skip_nonfinite.py::test_the_function_skips_bad_batches_without_a_count[ticketed]",
    ),
    "only the last block of channels looked at": (
        "kernels/running.py",
        "finite &= is_finite(load_statistics(Variances, c, exists), RunningVar)",
        "finite = is_finite(load_statistics(Variances, c, exists), RunningVar)",
        "tests/test_skip_nonfinite.py::test_one_bad_channel_of_very_many_decides[resident]",
    ),
    "each group decides for itself": (
        "kernels/running.py",
        "    if Variances is not None:\n        if last_to_arrive(Arrivals, programs):",
        "    if Variances is not None:\n        if first:",
        "tests/test_skip_nonfinite.py::test_the_last_of_many_groups_decides[two-pass-torch.float32]",
    ),
    "a norm computed after its input has changed": (
        "models/chains.py",
        "if not may_wait(node, chain.steps[-1], module, chain.steps):",
        "if False:",
        "tests/test_fuse.py::test_an_input_changed_after_the_norm_prevents_fusing",
    ),
    "a graph taken for good": (
        "models/variants.py",
        "            return guard(module)",
        "            return True",
        "tests/test_fuse.py::test_a_flag_that_changes_later_is_obeyed",
    ),
    "a module with random numbers called later": (
        "models/steps.py",
        "return all(is_call(step, module, _is_identity) for step in between)",
        "return True",
        "tests/test_fuse.py::test_random_numbers_are_drawn_in_the_same_order",
    ),
    "hooks passed over": (
        "models/fused.py",
        "        and not has_hooks(module)",
        "        and True",
        "tests/test_fuse.py::test_hooks_run_while_they_are_registered",
    ),
    "a residual broadcast in the kernels": (
        "models/fused.py",
        "return residual.dtype == input.dtype and",
        "return",
        "tests/test_fuse.py::test_a_residual_of_another_dtype_is_added_as_in_pytorch",
    ),
    "models unfused in silence": (
        "models/fused.py",
        "    if activation is not None and passes",
        "    if False and passes",
        "tests/test_fuse.py::test_a_network_fuses_across_modules",
    ),
    "Bessel's correction of a biased variance": (
        "kernels/forward.py",
        "m2 / (count - tl.full((), correction, mean.dtype))",
        "m2 / (count - 1.0)",
        "tests/test_kernels.py::test_biased_running_var",
    ),
    "offsets of 32 bits": (
        "kernels/addressing.py",
        "start, step = row * sizes.Q + first,",
        "start, step = row.to(tl.int32) * sizes.Q + first,",
        "tests/test_addressing.py::test_runs_have_the_offsets_of_plain_python",
    ),
    "splits merged without the distance of their means": (
        "kernels/moments.py",
        "tl.sum(m2, axis=0, keep_dims=True) + between",
        "tl.sum(m2, axis=0, keep_dims=True)",
        "tests/test_kernels.py::test_many_tiles_and_splits",
    ),
    "the first to arrive taken for the last": (
        "kernels/tickets.py",
        'sem="acq_rel") == programs - 1',
        'sem="acq_rel") == 0',
        "tests/test_kernels.py::test_many_tiles_and_splits",
    ),
    "mean's gradient forgotten": (
        "kernels/backward.py",
        "constant = -affine.scale * (sum_g / count)",
        "constant = 0.0 * sum_g",
        "tests/test_kernels.py::test_optional_parameters",
    ),
    "sign bits in the wrong order": (
        "kernels/epilogue.py",
        "bits << tl.arange(0, _BITS)[None, :]",
        "bits << (7 - tl.arange(0, _BITS)[None, :])",
        "tests/test_kernels.py::test_mask_of_few_bits",
    ),
    "splits merged about zero": (
        "kernels/moments.py",
        "about = tl.sum(shares * means, axis=0, keep_dims=True)",
        "about = tl.zeros((1, WIDTH), acc)",
        "tests/test_kernels.py::test_tiles_unlike_one_another[ticketed-first-sample_apart]",
    ),
    "means about an outlier": (
        "kernels/moments.py",
        "return tl.maximum(lower, tl.minimum(upper, middle))",
        "return first",
        "tests/test_kernels.py::test_outliers_among_very_many_values[ticketed-last-one]",
    ),
    "the square of a rounding error overflows": (
        "kernels/forward.py",
        "tl.fma(x, part, -part * near)",
        "tl.fma(x, part, 0.0 * near)",
        "tests/test_kernels.py::test_huge_constant_channels",
    ),
    "any cached plan taken for any call": (
        "runtime/plan_cache.py",
        "if guards.check(*given):\n                return plan",
        "return plan",
        "tests/test_plan_cache.py::test_an_earlier_call_changes_nothing",
    ),
    "resident mean left uncorrected": (
        "kernels/resident.py",
        "mean = about + rest",
        "mean = about",
        "tests/test_kernels.py::test_hostile_scales",
    ),
    "moments about zero": (
        "kernels/forward.py",
        "    squares = sums * sums\n",
        "    sums, shift = sums + shift, 0.0 * shift\n    squares = sums * sums\n",
        "tests/test_kernels.py::test_hostile_scales",
    ),
    "columns given to the wrong channels": (
        "kernels/addressing.py",
        "(columns.to(tl.float32) + 0.5)",
        "columns.to(tl.float32)",
        "tests/test_addressing.py::test_columns_are_divided_exactly",
    ),
    "pieces of planes counted wrongly": (
        "kernels/moments.py",
        "count = count * columns_of_piece(row % pieces, c - first, sizes, TILE).to(acc)",
        "count = count * tl.minimum(sizes.S, TILE.q)",
        "tests/test_kernels.py::test_tiles_that_begin_within_planes",
    ),
    "columns of the channel before taken for the plane's": (
        "kernels/addressing.py",
        "own = own & (q >= tl.where(i == 0, run.lead, 0))",
        "own = own & (q >= 0)",
        "tests/test_kernels.py::test_tiles_that_begin_within_planes",
    ),
    "values of a plane's runs counted as if it began aligned": (
        "kernels/moments.py",
        "lead = lead_of(channel, sizes, TILE).to(tl.int64)",
        "lead = 0",
        "tests/test_kernels.py::test_tiles_that_begin_within_planes",
    ),
    "no sums stored by runs that have no columns": (
        "kernels/moments.py",
        "< tl.maximum(run.columns, 1)",
        "< run.columns",
        "tests/test_kernels.py::test_tiles_that_begin_within_planes",
    ),
    "accesses stored whole where channels meet": (
        "kernels/access.py",
        "beyond = (run.lead | run.columns) % TILE.align",
        "beyond = run.lead * 0",
        "tests/test_kernels.py::test_tiles_that_begin_within_planes",
    ),
    "the last ticket drawn in vain not noticed": (
        "kernels/tickets.py",
        "if ticket == total + tl.num_programs(0) - 1:",
        "if ticket == total + tl.num_programs(0):",
        "tests/test_protocol.py::test_launch_after_launch",
    ),
    "slices in the wrong order": (
        "kernels/tickets.py",
        "(step > 0) & ((step % 2 == 0) | (step == 2 * slices - 1))",
        "(step > 0) & ((step % 2 == 1) | (step == 2 * slices - 1))",
        "tests/test_protocol.py::test_order",
    ),
    "ranks merged without the distance of their means": (
        "kernels/synchronised.py",
        "keep_dims=True) + between",
        "keep_dims=True)",
        "tests/test_sync_ops.py::test_moments_of_many_processes",
    ),
    "moments finished before they are sent": (
        "kernels/synchronised.py",
        "tl.store(Moments + 2 * sizes.C + c, m2, c < end)",
        "tl.store(Moments + 2 * sizes.C + c, m2 / sizes.N, c < end)",
        "tests/test_sync_ops.py::test_moments_of_many_processes",
    ),
    "what rounding took from a mean not sent": (
        "kernels/synchronised.py",
        "(near - rounded) + mean, c < end)",
        "mean * 0.0, c < end)",
        "tests/test_sync_ops.py::test_means_far_from_zero_leave_variances_their_digits",
    ),
    "the count of one process in all gradients": (
        "kernels/backward.py",
        "        count = tl.load(Count).to(sum_g.dtype)",
        "        count = (tl.cast(sizes.N, tl.int64) * sizes.S).to(sum_g.dtype)",
        "tests/test_sync_ops.py::test_gradients_of_a_part",
    ),
    "sums of one process taken for the total": (
        "sync/autograd.py",
        "            dist.all_reduce(sums, group=group)",
        "            pass",
        "tests/test_sync_training.py::test_training_of_two_processes",
    ),
    "counter of tickets not set back": (
        "kernels/tickets.py",
        "        tl.store(Tickets, generation << 32)",
        "        pass",
        "tests/test_kernels.py::test_launch_after_launch",
    ),
    "arrivals not set back": (
        "kernels/tickets.py",
        "        tl.store(Arrivals, 0)",
        "        pass",
        "tests/test_kernels.py::test_launch_after_launch",
    ),
}


# Each copy is tested in a process of its own, forked from one that has imported torch and Triton
# already, so that it starts fast.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "triton"])
TEST = """
import os, sys
os.chdir({folder!r})
sys.path.insert(0, {folder!r})
output = os.open("output", os.O_CREAT | os.O_WRONLY)
os.dup2(output, 1)
os.dup2(output, 2)
os.environ.pop("PYTEST_XDIST_WORKER", None)
import pytest
code = pytest.main(["-x", "-n", "0", "--tb", "native", "-p", "no:cacheprovider", {tests!r}])
sys.stdout.flush()
os._exit(code)
"""


def run(tmp_path, file, there, put, tests):
    """Tests a copy of the project in which a piece of text is replaced.

    Returns the exit status, which is negative after a crash and None if the tests hang, and
    what the tests printed.
    """
    for name in ("kernels", "fastbn", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # The copy is imported from its folder, where `fastbn.kernels` is a plain subfolder.
    shutil.move(tmp_path / "kernels", tmp_path / "fastbn" / "kernels")
    path = tmp_path / "fastbn" / file
    source = path.read_text()
    assert source.count(there) == 1, "the line to break is gone: adapt this test"
    path.write_text(source.replace(there, put))
    process = FORKS.Process(target=exec, args=(TEST.format(folder=str(tmp_path), tests=tests),))
    process.start()
    process.join(LIMIT)
    status = process.exitcode
    process.kill()
    return status, (tmp_path / "output").read_text()


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_copy_fails(breakage, tmp_path):
    status, output = run(tmp_path, *BREAKAGES[breakage])
    if status is None:
        # Programs wait for each other by tickets alone, so nothing else may hang.
        assert BREAKAGES[breakage][0] == "kernels/tickets.py"
    # A write out of bounds may end the whole process, or any error may follow from it.
    elif status >= 0:
        assert status == 1, output
        assert "AssertionError" in output or breakage == "mask dropped from the output"


def test_unmodified_copy_passes(tmp_path):
    line = "    offsets, pieces = n * sizes.Q + q, 0"
    status, output = run(tmp_path, "kernels/addressing.py", line, line, "tests/test_addressing.py")
    assert status == 0, output
