"""Lets `torch.utils.checkpoint` recompute a norm without a second update of its statistics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

_thread = threading.local()


def update_once() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Makes fastbn's modules update running statistics once for each checkpointed call.

    A checkpoint runs its function again in the backward, and batch norms in it then update their
    running statistics and count the batch once more, PyTorch's and fastbn's alike. With

        checkpoint(function, x, use_reentrant=False, context_fn=fastbn.update_once)

    they do so in the forward alone. Results and gradients are the same.

    Returns:
        The contexts of the forward and of the recomputation, as `context_fn` must.
    """
    return nullcontext(), _recomputing()


def is_recomputing() -> bool:
    """Says whether the statistics of this call were updated by an earlier one."""
    return getattr(_thread, "recomputing", False)


@contextmanager
def _recomputing() -> Iterator[None]:
    before = is_recomputing()
    _thread.recomputing = True
    try:
        yield
    finally:
        _thread.recomputing = before
