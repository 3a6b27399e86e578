"""Mends of Triton's interpreter: one for speed, and one so that it rounds as a GPU does."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_lang, _convert_float = interpreter._patch_lang, interpreter._convert_float


def mend() -> None:
    interpreter._patch_lang = _patch_lang_once
    interpreter._convert_float = _convert_rounding


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
