"""Trains on CIFAR-10 in Keras with batch norm and without; only one import is not the tutorial's.

    python examples/keras_cifar.py                               # no norm against fastbn
    python examples/keras_cifar.py --norm none keras fastbn      # and Keras's own batch norm
    python examples/keras_cifar.py --model gap --augment         # global average pooling
    python examples/keras_cifar.py --data-path pictures          # train/<class>/, test/<class>/

Without --data-path it takes CIFAR-10 from keras.datasets. If that can't be downloaded, it trains on
a procedural stand-in and says so. Every network starts from the same weights and sees the same
batches. The program writes a .keras file for each norm, metrics.json and curves.png to
--output-dir.
"""

import argparse
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import cifar_data
import cifar_results
import keras
import torch
from cifar_data import Data, Split, to_channels_first
from command_line import Parser, UserError, integer, learning_rate, make_output_dir
from keras import layers

from fastbn.keras import BatchNormalization

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NORMS = {"none": None, "keras": layers.BatchNormalization, "fastbn": BatchNormalization}


def cnn(norm: Any, classes: int) -> keras.Model:
    """Returns the tutorial's network, with batch norm between each layer and its activation."""
    if norm is None:
        return keras.Sequential(
            [
                layers.Conv2D(32, 3, padding="same", activation="relu"),
                layers.MaxPooling2D(),
                layers.Conv2D(64, 3, padding="same", activation="relu"),
                layers.MaxPooling2D(),
                layers.Flatten(),
                layers.Dense(64, activation="relu"),
                layers.Dense(classes, activation="softmax"),
            ]
        )
    return keras.Sequential(
        [
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            norm(),
            layers.Activation("relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", use_bias=False),
            norm(),
            layers.Activation("relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, use_bias=False),
            norm(),
            layers.Activation("relu"),
            layers.Dense(classes, activation="softmax"),
        ]
    )


@keras.saving.register_keras_serializable("examples")
class GlobalAveragePooling(keras.Model):
    """A network of one convolution block, followed by the average over the whole image."""

    def __init__(self, norm: str, classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm_name, self.classes = norm, classes
        self.conv = layers.Conv2D(64, 3, padding="same", use_bias=norm == "none")
        self.norm = layers.Identity() if norm == "none" else NORMS[norm]()
        self.relu = layers.Activation("relu")
        self.pool = layers.GlobalAveragePooling2D()
        self.dense = layers.Dense(classes, activation="softmax")

    def call(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.pool(self.relu(self.norm(self.conv(x)))))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "norm": self.norm_name, "classes": self.classes}


def build_model(norm: str, classes: int, options: Namespace) -> keras.Model:
    """Returns the compiled network; its weights depend on the seed, not on the norm."""
    keras.utils.set_random_seed(options.seed)
    network = (
        cnn(NORMS[norm], classes) if options.model == "cnn" else GlobalAveragePooling(norm, classes)
    )
    augmentation = [
        layers.RandomFlip("horizontal", seed=options.seed),
        layers.RandomRotation(0.1, seed=options.seed),
        layers.RandomTranslation(0.1, 0.1, seed=options.seed),
    ]
    model = keras.Sequential(
        [keras.Input((32, 32, 3)), *(augmentation if options.augment else []), network]
    )
    model.compile(
        keras.optimizers.Adam(options.lr), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


class Clock(keras.callbacks.Callback):
    """Measures what each epoch's training takes, without the validation after it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.start = time.perf_counter()
        self.seconds.append(0.0)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seconds[-1] = time.perf_counter() - self.start


def train(norm: str, data: Data, options: Namespace) -> cifar_results.History:
    """Trains one network, saves it, and checks that the file holds what was trained."""
    model, clock = build_model(norm, len(data.classes), options), Clock()
    x_val, y_val = arrays(data.val)
    print(f"\n{norm}")
    keras.utils.set_random_seed(options.seed)  # batches come in the same order for each norm
    history = model.fit(
        *arrays(data.train),
        batch_size=options.batch_size,
        epochs=options.epochs,
        validation_data=(x_val, y_val),
        callbacks=[clock],
        verbose=2,
    ).history

    path = options.output_dir / f"{norm}.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    _, accuracy = loaded.evaluate(x_val, y_val, batch_size=options.batch_size, verbose=0)
    # The scores may differ a little, since a GPU may choose other kernels.
    if abs(accuracy - history["val_accuracy"][-1]) > 0.005:
        raise RuntimeError(f"{path} scores {accuracy:.1%}, not {history['val_accuracy'][-1]:.1%}")
    print(f"{path}: loaded again, {accuracy:.1%}")
    return [
        {
            "epoch": epoch,
            "train_loss": history["loss"][epoch - 1],
            "val_loss": history["val_loss"][epoch - 1],
            "val_accuracy": history["val_accuracy"][epoch - 1],
            "seconds": seconds,
            "images_per_second": len(data.train[1]) / seconds,
        }
        for epoch, seconds in enumerate(clock.seconds, 1)
    ]


def arrays(split: Split) -> tuple[Any, Any]:
    """Returns images from 0 to 1 with channels last, as Keras expects them, and their labels."""
    images, labels = split
    return images.permute(0, 2, 3, 1).numpy().astype("float32") / 255, labels.numpy()


def download() -> Data | None:
    """Returns CIFAR-10 from keras.datasets, or else what train_cifar.py finds."""
    try:
        cifar_data.probe(cifar_data.CIFAR10.url)
        train, val = keras.datasets.cifar10.load_data()
    except Exception:  # Keras raises a plain Exception if the download breaks off
        return cifar_data.download_cifar10()
    splits = ((to_channels_first(x), torch.from_numpy(y[:, 0]).long()) for x, y in (train, val))
    return Data("CIFAR-10", CLASSES, *splits)


def parse_options(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(
        prog="keras_cifar.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--norm", nargs="+", choices=NORMS, default=["none", "fastbn"], help="default: none fastbn")
    add("--model", choices=("cnn", "gap"), default="cnn", help="default: cnn")
    add("--data-path", type=Path, help="holds cifar-10-batches-py, or <train|test>/<class>/...")
    add("--max-train-samples", type=integer(2), metavar="N", help="train on only N of the images")
    add("--augment", action="store_true", help="random flips, rotations and shifts")
    add("--epochs", type=integer(1), default=10, metavar="N", help="default: 10")
    add("-b", "--batch-size", type=integer(1), default=128, metavar="N", help="default: 128")
    add("--lr", type=learning_rate, default=1e-3, help="learning rate of Adam, default: 0.001")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="default: 0")
    workers = os.cpu_count() or 1
    add("--workers", type=integer(0), default=workers, help="threads that decode an image folder")
    add("--output-dir", type=Path, default=Path("runs/keras_cifar"), help="default: %(default)s")
    options = parser.parse_args(argv)
    options.norm = list(dict.fromkeys(options.norm))
    # Keras chooses the device, by the environment variable KERAS_TORCH_DEVICE if that is set.
    options.device = keras.ops.zeros(1).device
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    try:
        data = cifar_data.load_data(
            options.data_path, options.workers, options.max_train_samples, download
        )
        make_output_dir(options.output_dir)
    except UserError as error:
        print(f"keras_cifar.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.model} on {data}, {options.device}")
    histories = {norm: train(norm, data, options) for norm in options.norm}
    norms = cifar_results.summarise(histories, dict.fromkeys(histories))
    cifar_results.write_metrics(options.output_dir / "metrics.json", options, data, norms)
    cifar_results.draw_curves(options.output_dir / "curves.png", options.model, data, histories)
    print(f"\nValidation accuracy, {options.model} on {data}")
    print(cifar_results.table(norms))
    print(f"metrics.json, curves.png and the .keras files are in {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
