"""Lets `torch.utils.checkpoint` recompute a norm without a second update of its statistics."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class _Thread(threading.local):
    # Reading an attribute takes a tenth of the time of `getattr` with a default. `torch.compile`
    # guards attributes of the object, but not defaults of its class.
    def __init__(self) -> None:
        self.recomputing = False


_thread = _Thread()


def update_once() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Makes fastbn's modules update running statistics once for each checkpointed call.

    A checkpoint runs its function again in the backward, and batch norms in it then update their
    running statistics and count the batch once more. The argument `context_fn` in

        checkpoint(function, x, use_reentrant=False, context_fn=fastbn.update_once)

    makes fastbn's modules do so only in the forward. Results and gradients are the same.

    Returns:
        The contexts of the forward and of the recomputation, as `context_fn` must.
    """
    return nullcontext(), _Recomputing()


def is_recomputing() -> bool:
    """Says whether this thread recomputes a call whose forward has updated the statistics."""
    return _thread.recomputing


class _Recomputing:
    """The context of a recomputation, which can be entered again by a second backward."""

    def __enter__(self) -> None:
        self.before = is_recomputing()
        _thread.recomputing = True

    def __exit__(self, *error: Any) -> None:
        _thread.recomputing = self.before
