"""Updates running statistics and num_batches_tracked, or skips a batch that is not finite."""

import triton
import triton.language as tl

from .tickets import last_to_arrive

# The last program to finish handles so many channels at a time.
_CHANNELS = tl.constexpr(512)


@triton.jit
def averaging_factor(momentum, NumBatchesTracked, CUMULATIVE: tl.constexpr, acc: tl.constexpr):
    """Returns the batch's share of the running statistics; if CUMULATIVE, all shares are equal."""
    if CUMULATIVE:
        return 1.0 / (tl.load(NumBatchesTracked) + 1).to(acc)
    else:
        return tl.full((), momentum, acc)


@triton.jit
def update_running(Running, batch, factor, c, mask):
    """Sets running to (1 - factor) * running + factor * batch, if there are running statistics."""
    if Running is not None:
        running = tl.load(Running + c, mask, other=0.0).to(batch.dtype)
        running = (1.0 - factor) * running + factor * batch
        tl.store(Running + c, running.to(Running.dtype.element_ty), mask)


@triton.jit
def finish_batch(
    Statistics, RunningMean, RunningVar, NumBatchesTracked, Variances, momentum, C, first,
    Arrivals, programs, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """Increments num_batches_tracked; with Variances, updates or skips all channels first.

    All programs that finish channels call this. Where a batch may be skipped, or all programs
    read num_batches_tracked, the last program to call acts; otherwise the one with `first` does.
    """
    if Variances is not None:
        if last_to_arrive(Arrivals, programs):
            update_unless_nonfinite(
                Statistics, RunningMean, RunningVar, NumBatchesTracked, Variances, momentum, C,
                CUMULATIVE,
            )  # fmt: skip
    elif CUMULATIVE and NumBatchesTracked is not None:
        if last_to_arrive(Arrivals, programs):
            count_batch(NumBatchesTracked)
    elif first:
        count_batch(NumBatchesTracked)


@triton.jit
def update_unless_nonfinite(
    Means, RunningMean, RunningVar, NumBatchesTracked, Variances, momentum, C,
    CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """Updates the running statistics of all channels and counts the batch, or does neither."""
    if are_finite(Means, Variances, RunningMean, RunningVar, C):
        factor = averaging_factor(momentum, NumBatchesTracked, CUMULATIVE, Means.dtype.element_ty)
        for some in range(0, C, _CHANNELS):
            c, exists = channels_from(some, C)
            update_running(RunningMean, load_statistics(Means, c, exists), factor, c, exists)
            update_running(RunningVar, load_statistics(Variances, c, exists), factor, c, exists)
        count_batch(NumBatchesTracked)


@triton.jit
def count_batch(NumBatchesTracked):
    """Increments num_batches_tracked, if there is one."""
    if NumBatchesTracked is not None:
        tl.store(NumBatchesTracked, tl.load(NumBatchesTracked) + 1)


@triton.jit
def are_finite(Means, Variances, RunningMean, RunningVar, C):
    """Says whether the means and variances of all channels are finite."""
    finite = tl.full((_CHANNELS,), 1, tl.int32)
    for some in range(0, C, _CHANNELS):
        c, exists = channels_from(some, C)
        finite &= is_finite(load_statistics(Means, c, exists), RunningMean)
        finite &= is_finite(load_statistics(Variances, c, exists), RunningVar)
    return tl.min(finite, axis=0) == 1


@triton.jit
def is_finite(batch, Running):
    """Returns 1 where a statistic is finite, in the running one's dtype too, and 0 elsewhere."""
    if Running is not None:
        batch = batch.to(Running.dtype.element_ty).to(batch.dtype)
    return (tl.abs(batch) < float("inf")).to(tl.int32)


@triton.jit
def channels_from(first, C):
    """Returns _CHANNELS channels from `first` on, and which of them exist."""
    c = first + tl.arange(0, _CHANNELS)
    return c, c < C


@triton.jit
def load_statistics(P, c, exists):
    """Loads other programs' statistics, bypassing the first-level cache; zero where none exist."""
    return tl.load(P + c, exists, other=0.0, cache_modifier=".cg")
