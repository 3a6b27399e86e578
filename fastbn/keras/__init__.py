"""Batch norm for Keras 3 on the torch backend, and the conversion of Keras models to it."""

from .conversion import convert
from .layer import BatchNormalization

__all__ = ["BatchNormalization", "convert"]
