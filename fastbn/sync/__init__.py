"""Batch norm whose statistics several processes share, by `torch.distributed`.

In training, forward and backward of a layer send one message each:

    moments -> all-gather -> merge -> normalise              forward
    sums    -> all-reduce          -> gradients              backward

`runtime/sync_ops.py` takes these steps in the kernels, and `steps.py` by PyTorch's operations.
"""

from .convert import convert_sync_batchnorm
from .modules import FusedSyncBatchNorm, FusedSyncBatchNormAct

__all__ = ["FusedSyncBatchNorm", "FusedSyncBatchNormAct", "convert_sync_batchnorm"]
