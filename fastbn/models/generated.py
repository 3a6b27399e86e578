"""Classes that take the place of a module's own, and are like it but for their `forward`."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable
from typing import Any

import torch.nn as nn


class Generated(nn.Module):
    """The first base of all generated classes; the second one is the module's own class.

    Its members have names that no module has, since a member would hide a module's own.

    Copies have the generated class too. A pickle holds the module's own class, so that whoever
    loads it does not need the code that was generated here.
    """

    _fastbn_original: type[nn.Module]

    # Returns what `fused` returns for this module and further arguments, if it ends in a norm.
    _fastbn_forward_then: Callable[..., Any]

    @property
    def _fastbn_ends_in_norm(self) -> bool:
        """Says whether something that follows the module may become part of its last norm."""
        return False

    @property
    def _fastbn_makes_fresh(self) -> bool:
        """Says whether a call leaves its arguments alone and returns other memory."""
        return False

    @property
    def _fastbn_lets_go(self) -> bool:
        """Says whether a call returns new memory that nobody else keeps."""
        return False

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if reduced[0] is not vars(copyreg)["__newobj__"]:
            function = self._fastbn_original if reduced[0] is type(self) else reduced[0]
            return function, *reduced[1:]
        # Pickles of protocols 0 and 1 make objects by this function. With `__newobj__`, later ones
        # would insist on the object's own class.
        reconstruct: Any = vars(copyreg)["_reconstructor"]
        return reconstruct, (self._fastbn_original, object, None), *reduced[2:]

    def __deepcopy__(self, memo: dict) -> Any:
        if hasattr(self._fastbn_original, "__deepcopy__"):
            made = self._fastbn_original.__deepcopy__(self, memo)
            made.__class__ = type(self)
            return made
        return self._fastbn_rebuilt(lambda state: copy.deepcopy(state, memo), memo)

    def __copy__(self) -> Any:
        return self._fastbn_rebuilt(lambda state: state, {})

    def _fastbn_rebuilt(self, copied: Callable[[Any], Any], memo: dict) -> Any:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        # Before Python 3.11 objects have no `__getstate__` of their own.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        made.__setstate__(copied(state))
        return made


def subclass(
    original: type[nn.Module], base: type[Generated], members: dict[str, Any]
) -> type[nn.Module]:
    """Returns a class of the same name as a module's own."""
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_fastbn_original": original,
    }
    return type(original.__name__, (base, original), names | members)


def set_class(module: nn.Module, new: type[nn.Module]) -> None:
    # A module's class may have a `__setattr__` of its own, which must not see this.
    object.__setattr__(module, "__class__", new)


def is_wrapped(module: nn.Module) -> bool:
    """Says whether a module's class was derived from a generated one, as `fully_shard` does."""
    return isinstance(module, Generated) and "_fastbn_original" not in vars(type(module))


def revert_class(module: nn.Module) -> None:
    """Gives a module its own class back."""
    if isinstance(module, Generated) and not is_wrapped(module):
        set_class(module, module._fastbn_original)
