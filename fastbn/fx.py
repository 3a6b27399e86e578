"""`torch.fx` records a call of one of fastbn's modules and doesn't trace what happens inside."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch.fx.proxy import Proxy, TraceError

from .activations import has_global_hooks, has_hooks


def record_call(module: nn.Module, *args: Any) -> Proxy:
    """Records a call of a module as one node, which is what a leaf is to a tracer.

    A tracer treats modules of `torch.nn` as leaves, and calls the `forward` of others. That of
    fastbn's modules calls this function, so that they are leaves to any tracer too.

    Raises:
        TraceError: the module is the root of the trace, or has hooks, which the trace has run
            and the recorded call would run once more.
    """
    tracer: Any = next(arg.tracer for arg in args if isinstance(arg, Proxy))
    path = tracer.path_of_module(module)
    name = type(module).__name__
    if not path:
        raise TraceError(f"{name} can't be traced alone; trace a module that holds it")
    if has_hooks(module) or has_global_hooks():
        raise TraceError(
            f"{name} has hooks, which would run both in the trace and in the traced module;"
            " let the tracer's is_leaf_module return True for it, or remove the hooks"
        )
    return tracer.create_proxy("call_module", path, args, {})
