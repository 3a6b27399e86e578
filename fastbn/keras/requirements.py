"""Keras 3 on the torch backend, or an error that says how to get it."""

from __future__ import annotations

_SET_BACKEND = "set the environment variable KERAS_BACKEND=torch before Python imports keras"

try:
    import keras
except ImportError as error:
    if error.name == "keras":
        raise ImportError(
            "fastbn.keras needs Keras 3, which is not installed: pip install keras", name="keras"
        ) from error
    raise ImportError(
        f"fastbn.keras needs Keras on the torch backend, but importing keras failed ({error}):"
        f" {_SET_BACKEND}",
        name=error.name,
    ) from error

if keras.__version__.partition(".")[0] in ("0", "1", "2"):
    raise ImportError(
        f"fastbn.keras needs Keras 3, but found Keras {keras.__version__}:"
        " pip install --upgrade keras",
        name="keras",
    )
if keras.config.backend() != "torch":
    raise ImportError(
        f"fastbn.keras needs Keras on the torch backend, but Keras runs on"
        f" {keras.config.backend()!r}: {_SET_BACKEND}",
        name="keras",
    )
