"""The backend in force, which says what implementation serves calls."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

BACKENDS = ("auto", "triton", "torch")


def one_of(choices: tuple[str, ...], name: str, source: str) -> str:
    """Returns a name if it is one of the choices, or raises an error that says its source."""
    if name not in choices:
        raise ValueError(f"{source} must be one of {', '.join(choices)}, but got {name!r}")
    return name


_backend = one_of(BACKENDS, os.environ.get("FASTBN_BACKEND", "auto"), "FASTBN_BACKEND")


def get_backend() -> str:
    """Returns the backend in force: "auto", "triton" or "torch"."""
    return _backend


def set_backend(name: str) -> None:
    """Chooses the backend of all calls from here on.

    Args:
        name: "auto" sends GPU tensors to the Triton kernels and CPU tensors to
            PyTorch. "triton" raises an error for a call that the kernels can't
            serve. "torch" uses PyTorch's own batch norm throughout. Whatever the
            backend, `torch.func`, `torch.export`, forward-mode AD and second
            derivatives use PyTorch's operations.

    Raises:
        ValueError: the name is none of these; the backend stays as it was.
    """
    global _backend
    _backend = one_of(BACKENDS, name, "backend")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Sets the backend as `set_backend` does, in all threads, for the length of a `with` block."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)
