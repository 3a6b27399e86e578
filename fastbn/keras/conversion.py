"""`convert` copies a Keras model and makes the copy's batch norms run in fused kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from .activations import fused_activation
from .layer import BatchNormalization
from .requirements import keras


def convert(model: Any) -> Any:
    """Returns a copy of a Keras model with its batch norms replaced by fastbn's.

    The copy has the model's layers, their names and weights and, if the model is compiled, its
    optimizer (without its state), loss and metrics. Weights, and files of weights, fit both.
    The model stays as it is.

    In a Sequential or functional model, an activation layer that the kernels can compute moves
    into the batch norm before it if nothing else reads that batch norm. A linear one of the same
    name takes its place. A subclassed model is copied by its `get_config`, and its
    activations stay where they are.

    Args:
        model: a Sequential, functional or subclassed `keras.Model`, built or not, with other
            models in it or not. Subclasses of Keras's batch norm stay as they are.

    Raises:
        TypeError: the model is no Keras model, or Keras can't make a layer from its config.
        NotImplementedError: a subclassed model needs a `get_config` of its own, as Keras says.
        ValueError: a subclassed model's config makes a model of other weights.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, but got a {type(model).__name__}")
    copy = _copy(model, _fused_layers(model))
    # Layers inside of other layers and of subclassed models were made by the code of these, and
    # are still Keras's.
    for layer in copy._flatten_layers(include_self=False):
        if type(layer) is keras.layers.BatchNormalization:
            layer.__class__ = BatchNormalization
            layer.activation = keras.activations.linear
    if [w.shape for w in copy.weights] != [w.shape for w in model.weights]:
        raise ValueError(
            f"get_config of {type(model).__name__} must describe a model of the same weights, but"
            f" a copy by it has {len(copy.weights)} weights and the model {len(model.weights)}, or"
            " their shapes differ: let get_config hold the arguments of __init__, and build all"
            " layers in build"
        )
    for weight, value in zip(copy.weights, model.weights):
        weight.assign(value)
    return copy


def _copy(layer: Any, copies: dict[int, Any]) -> Any:
    """Returns a layer or model without its weights; `copies` are those made so far, by id."""
    if id(layer) not in copies:
        if type(layer) is keras.Sequential or _is_functional(layer):
            copy = keras.models.clone_model(
                layer, clone_function=lambda inner: _copy(inner, copies)
            )
        else:
            copy = type(layer).from_config(layer.get_config())
        copies[id(layer)] = copy
        if isinstance(layer, keras.Model):
            # A model that is not built may have layers that are built.
            for inner in (layer, *layer.layers):
                made = copies.get(id(inner))
                if inner.built and made is not None and not made.built:
                    made.build_from_config(inner.get_build_config())
                    made.built = True
            if layer.compiled and not copy.compiled:
                copy.compile_from_config(layer.get_compile_config())
    return copies[id(layer)]


def _is_functional(layer: Any) -> bool:
    return isinstance(layer, keras.Model) and "output_layers" in layer.get_config()


def _fused_layers(model: Any) -> dict[int, Any]:
    """Returns what takes the place of batch norms and of activations that move into them."""
    inner = model._flatten_layers()
    models = {id(layer): layer for layer in inner if isinstance(layer, keras.Model)}.values()
    # If several models have a layer, its output may have further readers in another one.
    owners = Counter(id(layer) for one in models for layer in one.layers)
    fused: dict[int, Any] = {}
    for one in models:
        for norm, activation in _only_readers(one):
            if owners[id(norm)] == owners[id(activation)] == 1 and _fuses(norm, activation):
                fused[id(norm)] = _with_activation(norm, activation)
                fused[id(activation)] = keras.layers.Activation(
                    "linear", name=activation.name, dtype=activation.dtype_policy
                )
    return fused


def _only_readers(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yields the layers of a model that one other layer reads, with that layer.

    Both are called once. A subclassed model yields nothing, since its calls are unknown.
    """
    if type(model) is keras.Sequential:
        yield from zip(model.layers, model.layers[1:])
        return
    if not _is_functional(model):
        return
    config = model.get_config()
    calls = {layer["name"]: len(layer["inbound_nodes"]) for layer in config["layers"]}
    readers: dict[str, list[str]] = {name: [] for name in calls}
    for layer in config["layers"]:
        for name in _sources(layer["inbound_nodes"]):
            readers[name].append(layer["name"])
    # The outputs of the model have readers outside of it.
    for name in keras.tree.flatten(config["output_layers"]):
        if isinstance(name, str):
            readers[name] += ["", ""]
    operations = {operation.name: operation for operation in model.operations}
    for name, found in readers.items():
        if len(found) == 1 == calls[name] == calls[found[0]]:
            yield operations[name], operations[found[0]]


def _sources(inbound_nodes: Any) -> Iterator[str]:
    """Yields the name of the layer behind each tensor in a config of calls."""
    if isinstance(inbound_nodes, dict):
        if "keras_history" in inbound_nodes:
            yield inbound_nodes["keras_history"][0]
        inbound_nodes = list(inbound_nodes.values())
    if isinstance(inbound_nodes, (list, tuple)):
        for part in inbound_nodes:
            yield from _sources(part)


def _fuses(norm: Any, activation: Any) -> bool:
    return (
        type(norm) is keras.layers.BatchNormalization
        # The regulariser would see the activation's output.
        and norm.activity_regularizer is None
        and isinstance(activation, keras.layers.Layer)
        and fused_activation(activation) not in (None, ("none", None))
        and activation.compute_dtype == norm.compute_dtype
    )


def _with_activation(norm: Any, activation: Any) -> BatchNormalization:
    kind = type(activation)
    if kind is keras.layers.Activation:
        function = activation.activation
    elif fused_activation(activation) == ("relu", None):
        function = keras.activations.relu
    else:
        function = kind.from_config(activation.get_config())
    return BatchNormalization.from_config({**norm.get_config(), "activation": function})
