"""Says which of Keras's activations the kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .requirements import keras

# The name and the parameter by which `fastbn.batch_norm` knows each of Keras's functions, with
# Keras's defaults.
_FUNCTIONS = {
    keras.activations.linear: ("none", None),
    keras.activations.relu: ("relu", None),
    keras.activations.leaky_relu: ("leaky_relu", 0.2),
    keras.activations.silu: ("silu", None),
    keras.activations.gelu: ("gelu", None),
    keras.activations.hard_silu: ("hardswish", None),
    keras.activations.relu6: ("relu6", None),
    keras.activations.elu: ("elu", 1.0),
    keras.activations.sigmoid: ("sigmoid", None),
    keras.activations.tanh: ("tanh", None),
}


def fused_activation(activation: Callable[..., Any]) -> tuple[str, float | None] | None:
    """Returns name and parameter of what the kernels compute for a Keras function or layer.

    Returns None if they can't compute it. A layer of a subclass may do anything, and one with
    an activity regulariser adds a loss.
    """
    if not isinstance(activation, keras.layers.Layer):
        return _FUNCTIONS.get(activation)
    kind = type(activation)
    if activation.activity_regularizer is not None:
        return None
    if kind is keras.layers.Activation:
        return fused_activation(activation.activation)
    if kind is keras.layers.LeakyReLU:
        return "leaky_relu", float(activation.negative_slope)
    if kind is keras.layers.ELU:
        return "elu", float(activation.alpha)
    if kind is keras.layers.ReLU and not activation.threshold:
        limit, slope = activation.max_value, float(activation.negative_slope)
        if limit is None:
            return ("leaky_relu", slope) if slope else ("relu", None)
        if limit == 6 and not slope:
            return "relu6", None
    return None
