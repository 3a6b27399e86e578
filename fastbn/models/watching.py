"""Watches what a `forward` reads and changes while it is recorded, and compares it later."""

from __future__ import annotations

import builtins
import contextlib
import sys
import threading
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
from torch import Tensor
from torch.fx.proxy import TraceError

# For each attribute that was read, the module's path, the name, and the value. The name ""
# stands for the module's type.
Reads = tuple[tuple[str, str, Any], ...]

# One trace at a time: `torch.fx` changes `nn.Module` while it records.
lock = threading.RLock()

CONSTANTS = (bool, int, float, str, type(None))
# Values that can't change without becoming other objects.
_FIXED = (torch.dtype, torch.device, torch.Size, torch.memory_format, type)
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_CONTAINERS = (list, tuple, dict, set)

# Methods of `nn.Module` whose answers depend on more than attributes.
_LISTS = {
    "parameters", "named_parameters", "buffers", "named_buffers", "children", "named_children",
    "modules", "named_modules", "state_dict", "get_submodule", "get_parameter",
}  # fmt: skip


class Missing:
    """Stands for an attribute that was asked for and was not there."""


class Watch:
    """A context manager that notes what code of models reads, and refuses to let it set attributes.

    It has no effect on other threads.

    Args:
        module: the module whose `forward` is recorded.
        stand_in: the type of stand-ins for values.
        answer_isinstance: does what `isinstance` does for a stand-in.
    """

    def __init__(
        self, module: nn.Module, stand_in: type, answer_isinstance: Callable[[Any, Any], bool]
    ) -> None:
        self.module, self.stand_in, self.answer_isinstance = module, stand_in, answer_isinstance
        self.thread = threading.get_ident()
        self.reads: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
        self.codes: list[CodeType] = []
        self.containers: list[tuple[Any, Any]] = []
        self.before = [(m, [dict(place) for place in _places(m)]) for m in module.modules()]
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        read, write = object.__getattribute__, nn.Module.__setattr__
        is_instance, delete = builtins.isinstance, nn.Module.__delattr__

        def getattribute(module: nn.Module, name: str) -> Any:
            internal = name.startswith("__") and name != "__dict__"
            own = threading.get_ident() == self.thread and not internal and _by_model()
            try:
                value = read(module, name)
            except AttributeError:
                if own:
                    self._note(module, name, self._registered(module, name))
                raise
            if own:
                self._note(module, name, value)
            elif name == "_modules" and _reader() == "torch.nn.modules.container":
                self.reads[id(module), name] = (module, name, tuple(value))
            return value

        def setattribute(module: nn.Module, name: str, value: Any) -> None:
            if threading.get_ident() == self.thread:
                raise TraceError(f"it sets {name}")
            write(module, name, value)

        def delattribute(module: nn.Module, name: str) -> None:
            if threading.get_ident() == self.thread:
                raise TraceError(f"it deletes {name}")
            delete(module, name)

        def isinstance_(value: Any, kinds: Any) -> bool:
            if threading.get_ident() == self.thread:
                if type(value) is self.stand_in and _by_model(("torch.", "fastbn.models")):
                    return self.answer_isinstance(value, kinds)
                if is_instance(value, nn.Module) and _by_model(("torch.", "fastbn.")):
                    self.reads[id(value), ""] = (value, "", type(value))
            return is_instance(value, kinds)

        for target, name, function in (
            (nn.Module, "__getattribute__", getattribute),
            (nn.Module, "__setattr__", setattribute),
            (nn.Module, "__delattr__", delattribute),
            (builtins, "isinstance", isinstance_),
        ):
            self.stack.enter_context(mock.patch.object(target, name, function))

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    @staticmethod
    def _registered(module: nn.Module, name: str) -> Any:
        members = object.__getattribute__(module, "__dict__")
        for place in ("_modules", "_parameters", "_buffers"):
            if name in members.get(place, {}):
                return members[place][name]
        return Missing

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        """Notes what code of a model read, or refuses what can't be compared later."""
        if name in ("_modules", "_parameters", "_buffers", "__dict__") or name in _LISTS:
            raise TraceError(f"it reads {name} of a module")
        if type(value) in (nn.ParameterList, nn.ParameterDict):
            raise TraceError(f"it reads {name}, a {type(value).__name__}")
        if isinstance(value, MethodType):
            self.codes.append(value.__code__)
            value = value.__code__
        elif isinstance(value, _CONTAINERS):
            parts = list(value) + (list(value.values()) if isinstance(value, dict) else [])
            if type(value) not in _CONTAINERS or not all(map(_is_comparable, parts)):
                raise TraceError(f"it reads {name}, in which it may find anything")
            self.containers.append((value, _copy(value)))
            value = _copy(value)
        elif not (_is_comparable(value) or isinstance(value, Tensor) or value is Missing):
            raise TraceError(f"it reads {name}, a {type(value).__name__}")
        self.reads[id(module), name] = (module, name, value)

    def refuse_names(self, code: CodeType, names: set[str]) -> None:
        """Refuses code that uses certain names, also in functions within it."""
        for name in names.intersection(code.co_names):
            raise TraceError(f"it uses {name}")
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self.refuse_names(constant, names)

    def changes(self) -> str | None:
        """Undoes changes of modules and containers, and says what changed, or returns None."""
        reason = None
        for container, content in self.containers:
            if not same(container, content):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
                reason = f"it changes a {type(container).__name__}"
        for module, states in self.before:
            for place, state in zip(_places(module), states):
                if list(place) != list(state) or any(place[k] is not state[k] for k in state):
                    place.clear()
                    place.update(state)
                    reason = "it changes a module"
        return reason

    def found(self) -> Reads | None:
        """Returns what was read, or None if that is of a module outside of the watched one."""
        paths = {id(m): path for path, m in self.module.named_modules()}
        if any(id(m) not in paths for m, *_ in self.reads.values()):
            return None
        return tuple(
            (paths[id(m)], name, value)
            for m, name, value in self.reads.values()
            if not (m is self.module and name == "training")
        )


def _places(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Returns the dictionaries that hold a module's attributes."""
    return module.__dict__, module._parameters, module._buffers, module._modules


def _is_comparable(value: Any) -> bool:
    """Says whether a value can be compared with another one later, by `same`."""
    return type(value) in CONSTANTS or isinstance(value, (nn.Module, *_FIXED, *_FUNCTIONS))


def _copy(value: Any) -> Any:
    return value if isinstance(value, tuple) else value.copy()


_MACHINERY = (
    "torch.fx", "torch.nn.modules.module", "torch.nn.modules.container", "torch._", "torch.utils",
    "torch.overrides", "fastbn.",
)  # fmt: skip


def _by_model(machinery: tuple[str, ...] = _MACHINERY) -> bool:
    """Says whether the caller of the calling function is code of a model, not of a library."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return not name.startswith(machinery) and name.partition(".")[0] not in sys.stdlib_module_names


def _reader() -> str:
    return sys._getframe(2).f_globals.get("__name__", "")


def same(value: Any, kept: Any) -> bool:
    """Says whether an attribute is what it was: of the same type, and equal or the same object."""
    if isinstance(kept, CodeType):
        return getattr(value, "__code__", None) is kept
    if type(value) is not type(kept):
        return False
    if isinstance(kept, (list, tuple)):
        return len(value) == len(kept) and all(same(a, b) for a, b in zip(value, kept))
    if isinstance(kept, dict):
        return list(value) == list(kept) and all(same(value[k], kept[k]) for k in kept)
    if isinstance(kept, float):
        return repr(value) == repr(kept) if kept == 0 or kept != kept else value == kept
    if isinstance(kept, (str, int, set)):
        return value == kept
    return value is kept
