"""Mends of Triton's interpreter: it shall round as a GPU does, and take a third of the time."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch_lang, _convert_float = interpreter._patch_lang, interpreter._convert_float
_get_np_dtype = interpreter._get_np_dtype


def mend() -> None:
    _remember_types()
    interpreter._patch_lang = _patch_lang_once
    interpreter._convert_float = _convert_rounding
    interpreter._get_np_dtype = _get_known_np_dtype
    # Only the interpreter runs kernels in this process.
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _patch_lang_once(function):
    """Triton does it anew for each function that a kernel calls: a third of the time."""
    language = function.__globals__.get("tl", tl.core)
    if tl.core.is_builtin(language.load):
        return _patch_lang(function)
    return interpreter._LangPatchScope()


def _convert_rounding(input, input_dtype, output_dtype, rounding_mode):
    """Rounds float32 to the nearest bfloat16, of two equally near ones to the even one.

    Triton's interpreter drops the lower bits instead. The way back is exact, which for
    denormal numbers Triton's isn't.
    """
    if (input_dtype, output_dtype) == (tl.bfloat16, tl.float32):
        return np.asarray(input, np.uint16).astype(np.uint32) << 16
    if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
        return _convert_float(input, input_dtype, output_dtype, rounding_mode)
    bits = np.asarray(input, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    quiet = bits >> 16 | 0x40  # of a NaN the upper bits alone might say infinity
    return np.where(np.isnan(input), quiet, rounded).astype(np.uint16)


def _check_overflow(semantic, lhs, rhs, operation):
    """Checks by NumPy that whole numbers do not overflow; Triton interprets that check, too."""
    bits = lhs.type.scalar.int_bitwidth
    if bits >= 64:
        return
    exact = _EXACT[operation.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data)
    smallest = 0 if lhs.type.scalar.is_int_unsigned() else -(2 ** (bits - 1))
    inside = smallest <= exact.min() and exact.max() < smallest + 2**bits
    assert inside, f"an integer of {bits} bits overflows in {operation.__name__}"


_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _get_known_np_dtype(dtype):
    """Triton makes a dictionary of all dtypes for each question."""
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _get_np_dtype(dtype)
    return _np_dtypes[name]


_np_dtypes: dict[str, np.dtype] = {}


def _remember_types():
    """Lets a type be made once, and what a tensor knows of it: half of the time went into that."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types = {}

    def find(cls, element_type, shape):
        key = (cls, element_type.name, *[getattr(size, "value", size) for size in shape])
        return types.setdefault(key, object.__new__(cls))

    def remembered_type(block, element_type, shape):
        # The name comes last, so a type that has one is complete.
        if "name" not in block.__dict__:
            make_type(block, element_type, shape)

    def remembered_tensor(tensor, handle, type):
        if "of_tensors" not in type.__dict__:
            make_tensor(tensor, handle, type)
            type.of_tensors = dict(tensor.__dict__)
        tensor.__dict__.update(type.of_tensors, handle=handle)

    tl.block_type.__new__, tl.block_type.__init__ = find, remembered_type
    tl.tensor.__init__ = remembered_tensor
