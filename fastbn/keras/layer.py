"""`BatchNormalization`, which is Keras's layer in fused kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import batch_norm
from .activations import fused_activation
from .requirements import keras


@keras.saving.register_keras_serializable(package="fastbn")
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` in fused kernels, with an optional activation.

    Arguments, weights, their names, and results are those of Keras's layer (Ioffe and Szegedy,
    2015): `moving_mean` and `moving_variance` keep `momentum` of their old value, the variance
    is the biased one, and a layer with `trainable=False` runs in inference mode. The variance
    is the mean of `(x - mean)**2`, where Keras takes `mean(x**2) - mean**2`, which is wrong for
    a mean that is large beside the standard deviation.

    Keras computes what the kernels can't: calls with a mask, `renorm=True`, and batches with
    one value per channel.

    Args:
        activation: what follows the normalisation: None, a name or function of
            `keras.activations`, or a Keras layer. The kernels compute "relu", "leaky_relu",
            "silu", "gelu", "hard_silu", "relu6", "elu", "sigmoid" and "tanh" (functions with
            their default arguments) and the layers `ReLU`, `LeakyReLU`, `ELU` and `Activation`
            that compute one of these. Any other activation runs after them.
        *args, **kwargs: the arguments of `keras.layers.BatchNormalization`.

    Call arguments:
        inputs: tensor of two or more axes. `axis` may be any of them.
        training: True normalises by the batch's own mean and variance and updates the moving
            ones, False and None normalise by these.
        mask: as for Keras's layer.

    Raises:
        ValueError: the activation is unknown, or Keras's layer refuses an argument.
    """

    def __init__(
        self,
        *args: Any,
        activation: str | dict[str, Any] | Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.activation = keras.activations.get(activation)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        # Without an activation, Keras's own class can take the config too.
        if self.activation is not keras.activations.linear:
            config["activation"] = keras.activations.serialize(self.activation)
        return config

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if mask is not None or not self._kernels_compute(inputs):
            return self.activation(super().call(inputs, training=training, mask=mask))
        fused = fused_activation(self.activation)
        outputs = self._normalise(
            inputs, bool(training and self.trainable), *(fused or ("none", None))
        )
        return outputs if fused else self.activation(outputs)

    def _kernels_compute(self, inputs: Tensor) -> bool:
        """Says whether `fastbn.batch_norm` takes an input, if there is no mask."""
        return (
            # Keras has batch renormalisation since version 3.13.
            not getattr(self, "renorm", False)
            and keras.backend.standardize_dtype(inputs.dtype) == self.compute_dtype
            and inputs.numel() > inputs.shape[self.axis]
        )

    def _normalise(
        self, inputs: Tensor, training: bool, activation: str, activation_param: float | None
    ) -> Tensor:
        variables = self.moving_mean, self.moving_variance
        mean, variance = (variable.value for variable in variables)
        # In a stateless call the values are the caller's, and updates go to its scope.
        stateless = mean is not self.moving_mean._value
        # Keras lets statistics change between a forward in inference mode and its backward.
        if stateless or (torch.is_grad_enabled() and not training):
            mean, variance = mean.clone(), variance.clone()

        # `movedim` returns a view, so channels that are last in memory stay last.
        shape, axis = inputs.shape, self.axis % inputs.dim()
        moves = inputs.dim() in (4, 5) and axis in (1, inputs.dim() - 1)
        if moves:
            inputs = inputs.movedim(axis, 1)
        else:
            inputs = inputs.reshape(math.prod(shape[:axis]), shape[axis], -1)
        outputs = batch_norm(
            inputs, mean, variance,
            self.gamma.value if self.scale else None,
            self.beta.value if self.center else None,
            training, 1 - self.momentum, self.epsilon,
            activation=activation, activation_param=activation_param, biased_running_var=True,
        )  # fmt: skip
        if stateless and training:
            for variable, value in zip(variables, (mean, variance)):
                variable.assign(value)
        return outputs.movedim(1, axis) if moves else outputs.reshape(shape)
