"""Drop-in modules for `nn.BatchNorm1d/2d/3d`, and their forms with an activation."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.fx.proxy import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from .act_layers import make_activation, make_layer
from .activations import activation_of, has_global_hooks
from .functional import check_residual, tracked_batch_norm
from .fx import record_call
from .recomputation import is_recomputing

_NATIVE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# The name and parameter of no activation, and the types of layers that do nothing.
_NONE = ("none", None)
_NO_LAYERS = (nn.Identity, type(None))

_TAKEN_FOR_A_NORM = (
    "eps of a {0} was read, as tools do that fold or replace batch norms: they would drop its {1}."
    " Give them what without_activation() returns, and let {1} follow."
)


class _Fused(_BatchNorm):
    """The `forward` of the drop-in modules; the other base class is one of `nn.BatchNorm*d`."""

    # The class has defaults, since a converted PyTorch module has no such attributes.
    biased_running_var = False
    skip_nonfinite = False
    # Whether the running statistics normalise in training too.
    has_fixed_statistics = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        biased_running_var: bool = False,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        # Newer versions of PyTorch have more keywords, such as `bias`.
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats,
            device=device, dtype=dtype, **kwargs,
        )  # fmt: skip
        if biased_running_var:
            self.biased_running_var = True
        if skip_nonfinite:
            self.skip_nonfinite = True

    def extra_repr(self) -> str:
        return super().extra_repr() + self._options()

    def _options(self) -> str:
        names = ("biased_running_var", "skip_nonfinite")
        return "".join(f", {name}=True" for name in names if getattr(self, name))

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return record_call(self, input)
        return self.normalise(input)

    def normalise(
        self,
        input: Tensor,
        activation: str = "none",
        activation_param: float | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Computes the norm, with activation and residual as `batch_norm` takes them."""
        self._check_input_dim(input)
        return tracked_batch_norm(
            input, *arguments_of(self), activation, activation_param, residual,
            self.biased_running_var, self.skip_nonfinite,
        )  # fmt: skip


def arguments_of(
    module: _BatchNorm,
) -> tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float | None,
    float,
]:  # fmt: skip
    """Returns what a batch norm module passes to `tracked_batch_norm` after the input.

    These are running mean and variance, num_batches_tracked, weight, bias, whether the
    batch's own statistics count, momentum, and eps.
    """
    # `nn.Module` looks attributes up in these dictionaries too, but takes five times as long. Its
    # way is needed where a plain attribute stands in the place of a parameter or buffer.
    parameters, buffers = module._parameters, module._buffers
    if "weight" in parameters and "bias" in parameters:
        weight, bias = parameters["weight"], parameters["bias"]
    else:
        weight, bias = module.weight, module.bias
    if "running_mean" in buffers and "running_var" in buffers:
        mean, var = buffers["running_mean"], buffers["running_var"]
    else:
        mean, var = module.running_mean, module.running_var
    num_batches_tracked, training, momentum = None, True, module.momentum
    if not module.training or module.has_fixed_statistics:
        training = mean is None and var is None
    elif not module.track_running_stats:
        # In training, statistics that are not tracked must not be updated.
        mean = var = None
    elif "num_batches_tracked" in buffers:
        num_batches_tracked = buffers["num_batches_tracked"]
    else:
        num_batches_tracked = module.num_batches_tracked
    if training and is_recomputing():
        # Copies are updated instead, since autograd must save as many tensors as in the forward.
        mean, var, num_batches_tracked = (
            None if t is None else t.clone() for t in (mean, var, num_batches_tracked)
        )
    if momentum is None and num_batches_tracked is None:
        momentum = 0.0
    eps = module._eps if isinstance(module, _FusedAct) else module.eps
    return mean, var, num_batches_tracked, weight, bias, training, momentum, eps


class FusedBatchNorm1d(_Fused, nn.BatchNorm1d):
    """`nn.BatchNorm1d` in fused kernels, for input of shape (N, C) or (N, C, L).

    Constructor, parameters, buffers, `state_dict` and results are the same as in
    `nn.BatchNorm1d`. The keywords `biased_running_var` and `skip_nonfinite` are those of
    `batch_norm`.
    """


class FusedBatchNorm2d(_Fused, nn.BatchNorm2d):
    """`nn.BatchNorm2d` in fused kernels, for contiguous or channels-last (N, C, H, W).

    Constructor, parameters, buffers, `state_dict` and results are the same as in
    `nn.BatchNorm2d`. The keywords `biased_running_var` and `skip_nonfinite` are those of
    `batch_norm`.
    """


class FusedBatchNorm3d(_Fused, nn.BatchNorm3d):
    """`nn.BatchNorm3d` in fused kernels, for contiguous or channels-last (N, C, D, H, W).

    Constructor, parameters, buffers, `state_dict` and results are the same as in
    `nn.BatchNorm3d`. The keywords `biased_running_var` and `skip_nonfinite` are those of
    `batch_norm`.
    """


def fused_activation(module: nn.Module) -> tuple[str, float | None] | None:
    """Returns name and parameter of the activation that the kernels compute for a module.

    Returns None if the module has something that the kernels can't compute: another
    activation, a drop layer, or hooks that see the calls of either. PyTorch then computes
    drop layer, residual and activation after the kernels.
    """
    layers = module._modules
    act, drop = layers.get("act"), layers.get("drop")
    if has_global_hooks() or (drop is not None and activation_of(drop) != _NONE):
        return None
    return _NONE if act is None else activation_of(act)


class _FusedAct(_Fused):
    """Batch norm, residual and activation in one module."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: str | Callable[..., nn.Module] | None = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[..., nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        biased_running_var: bool = False,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            biased_running_var=biased_running_var, skip_nonfinite=skip_nonfinite, **kwargs,
        )  # fmt: skip
        self.drop = (
            nn.Identity() if drop_layer is None else make_layer("drop_layer", drop_layer, {})
        )
        self.act = make_activation(act_layer if apply_act else None, act_kwargs or {})

    @property
    def eps(self) -> float:
        """The number that is added to the variance.

        A tool that folds or replaces a batch norm has to read `eps`, and hardly any other code
        does. A tool that does not know this class would lose the activation, so reading `eps`
        of a norm with an activation is an error or gives a warning.
        """
        layers = [layer for layer in (self.drop, self.act) if type(layer) not in _NO_LAYERS]
        reader = sys._getframe(1).f_globals.get("__name__", "")
        # TorchScript reads every attribute.
        if layers and not reader.startswith(("torch.jit.", "torch._jit_internal")):
            lost = " and ".join(type(layer).__name__ for layer in layers)
            message = _TAKEN_FOR_A_NORM.format(type(self).__name__, lost)
            if reader.startswith(("torch.", "timm.")):
                raise RuntimeError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = value

    def extra_repr(self) -> str:
        return self.without_activation().extra_repr() + self._options()

    # TorchScript would compile the property.
    __jit_unused_properties__ = ("eps",)

    def without_activation(self) -> _BatchNorm:
        """Returns the norm alone, an `nn.BatchNorm*d` that shares parameters and buffers.

        Tools that fold or replace batch norms can take it. `drop`, the residual and `act` have
        to follow it.
        """
        native = next((native for native in _NATIVE if isinstance(self, native)), nn.SyncBatchNorm)
        norm = native(
            self.num_features, self._eps, self.momentum, self.affine,
            self.track_running_stats, device="meta",
        )  # fmt: skip
        norm._parameters.update(self._parameters)
        norm._buffers.update(self._buffers)
        return norm.train(self.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) or isinstance(residual, Proxy):
            return record_call(self, input, *(() if residual is None else (residual,)))
        fused = fused_activation(self)
        if fused is not None:
            return self.normalise(input, *fused, residual)
        self._check_input_dim(input)
        if residual is not None:
            check_residual(input, residual)
        output = self.normalise(input)
        if self.drop is not None:
            output = self.drop(output)
        if residual is not None:
            output = output + residual
        return output if self.act is None else self.act(output)


_ACT_DOC = """`{base}`, an optional residual and an activation in one.

    `forward(x, residual=None)` returns `act(drop(bn(x)) + residual)`; the residual
    has the shape of `x`. The constructor takes the arguments of timm's
    `BatchNormAct2d`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype:
            as for `nn.{base}`.
        apply_act: False leaves the activation out.
        act_layer: a module class; a name that `fastbn.functional.batch_norm`
            knows, "swish" or "hard_swish"; or None for no activation. Activations
            that this function knows run inside the kernels, all others after them.
        act_kwargs: arguments of `act_layer`.
        inplace: accepted for compatibility with timm, without effect: the fused
            output is always new memory.
        drop_layer: a module class applied between normalisation and residual;
            with one, only the normalisation is fused.
        biased_running_var, skip_nonfinite: as for `batch_norm`.

    Raises:
        TypeError: `act_layer` or `drop_layer` is a module and not a class, or
            the residual is no tensor.
        ValueError: `act_layer` is an unknown name, or the residual has another
            shape or device than the input.
    """


class FusedBatchNormAct1d(_FusedAct, nn.BatchNorm1d):
    __doc__ = _ACT_DOC.format(base="BatchNorm1d")


class FusedBatchNormAct2d(_FusedAct, nn.BatchNorm2d):
    __doc__ = _ACT_DOC.format(base="BatchNorm2d")


class FusedBatchNormAct3d(_FusedAct, nn.BatchNorm3d):
    __doc__ = _ACT_DOC.format(base="BatchNorm3d")
