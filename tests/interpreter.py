"""Changes to Triton's interpreter: it rounds as a GPU does, and takes a fifth of the time."""

from __future__ import annotations

import operator

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch_lang, _convert_float = interpreter._patch_lang, interpreter._convert_float
_get_np_dtype = interpreter._get_np_dtype
_unwrap = tl.core._unwrap_if_constexpr
_convert_operands = TritonSemantic.binary_op_type_checking_impl
_SEMANTIC = TritonSemantic(interpreter.interpreter_builder)


def mend() -> None:
    _remember_types()
    _compare_types_by_identity_first()
    tl.core._unwrap_if_constexpr = _unwrap_if_constexpr
    interpreter._patch_lang = _patch_lang_once
    interpreter._patch_attr = _patch_builtin
    interpreter.TensorHandle.__init__ = _init_handle
    interpreter._convert_float = _convert_rounding
    interpreter._get_np_dtype = _get_known_np_dtype
    # Only the interpreter runs kernels in this process.
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    TritonSemantic.binary_op_type_checking_impl = _convert_operands_once


def _patch_lang_once(function):
    """Triton does it anew for each function that a kernel calls: a third of the time."""
    language = function.__globals__.get("tl", tl.core)
    if tl.core.is_builtin(language.load):
        return _patch_lang(function)
    return interpreter._LangPatchScope()


def _patch_builtin(obj, name, member, builder, scope):
    """Passes the interpreter's semantic on, for which Triton copies all keywords."""
    builtin = getattr(member, "__wrapped__", member)

    def interpreted(*arguments, _semantic=None, **keywords):
        return builtin(*arguments, **keywords, _semantic=_SEMANTIC)

    scope.set_attr(obj, name, interpreted)


def _init_handle(handle, data, dtype, attr=None):
    """Leaves out the comparison of the sizes of NumPy's type and Triton's."""
    handle.data, handle.dtype, handle.attr = data, dtype, {} if attr is None else attr


def _convert_operands_once(semantic, left, right, *options, **named):
    """Remembers by their types how operands are broadcast, and what numbers become.

    An operation converts its operands to a common type and shape, and to what depends on nothing
    else.
    """
    if named or not isinstance(left, tl.tensor):
        return _convert_operands(semantic, left, right, *options, **named)
    if isinstance(right, tl.tensor):
        key = (left.type.name, right.type.name, *options)
        if key in _tensors:
            return tuple(map(_convert, (left, right), _tensors[key]))
        converted = _convert_operands(semantic, left, right, *options)
        if all(_is_plain(old.dtype, new.dtype) for old, new in zip((left, right), converted)):
            _tensors[key] = [new.type for new in converted]
        return converted
    # Equal numbers may be of different types: 1, 1.0 and True.
    key = (left.type.name, repr(right), *options)
    if key in _numbers:
        return left, _numbers[key]
    converted = _convert_operands(semantic, left, right, *options)
    if converted[0] is left:
        # A view of one number takes no memory, and nobody can write to it.
        handle = converted[1].handle
        handle.data = np.broadcast_to(handle.data.flat[:1], handle.data.shape)
        _numbers[key] = converted[1]
    return converted


def _is_plain(old, new):
    """Says whether NumPy converts between two dtypes as Triton does."""
    integers = old.is_int() and new.is_int() and not (old.is_bool() or new.is_bool())
    return old is new or integers


def _convert(tensor, type):
    pointers = type.scalar.is_ptr()
    if tensor.type is type or (pointers and not type.is_block()):
        return tensor
    data = tensor.handle.data
    if tensor.dtype is not type.scalar and not pointers:
        data = data.astype(_get_known_np_dtype(type))
    if type.is_block():
        data = np.broadcast_to(data, type.get_block_shapes())
    return tl.tensor(interpreter.TensorHandle(data, type.scalar), type)


_tensors: dict[tuple, list] = {}
_numbers: dict[tuple, tl.tensor] = {}


def _unwrap_if_constexpr(value):
    """Looks for the commonest kind of value first."""
    return value if type(value) is tl.tensor else _unwrap(value)


def _compare_types_by_identity_first():
    for kind in (tl.dtype, tl.block_type):

        def compare(one, other, compare_names=kind.__eq__):
            return one is other or compare_names(one, other)

        kind.__eq__ = compare


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
    exact = _EXACT[operation.__name__]
    left, right = lhs.handle.data, rhs.handle.data
    if left.size == right.size == 1:
        least = most = exact(left.item(), right.item())
    else:
        results = exact(left.astype(np.int64), right)
        least, most = results.min(), results.max()
    smallest = 0 if lhs.type.scalar.is_int_unsigned() else -(2 ** (bits - 1))
    inside = smallest <= least and most < smallest + 2**bits
    assert inside, f"an integer of {bits} bits overflows in {operation.__name__}"


_EXACT = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


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
