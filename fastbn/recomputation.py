"""Lets `torch.utils.checkpoint` recompute a norm without a second update of its statistics."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class _Thread(threading.local):
    # A default of the class is found five times as fast as that of `getattr`.
    recomputing = False


_thread = _Thread()


def update_once() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Makes fastbn's modules update running statistics once for each checkpointed call.

    A checkpoint runs its function again in the backward, and batch norms in it then update their
    running statistics and count the batch once more, PyTorch's and fastbn's alike. With

        checkpoint(function, x, use_reentrant=False, context_fn=fastbn.update_once)

    they do so in the forward alone. Results and gradients are the same.

    Returns:
        The contexts of the forward and of the recomputation, as `context_fn` must.
    """
    return nullcontext(), _Recomputing()


def is_recomputing() -> bool:
    """Says whether the statistics of this call were updated by an earlier one."""
    return _thread.recomputing


class _Recomputing:
    """The context of a recomputation, which a second backward enters again."""

    def __enter__(self) -> None:
        self.before = is_recomputing()
        _thread.recomputing = True

    def __exit__(self, *error: Any) -> None:
        _thread.recomputing = self.before
