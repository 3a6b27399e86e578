"""Trains the tutorial's network on concentric circles in Keras, with and without batch norm.

    python examples/keras_mlp.py                               # no norm against fastbn
    python examples/keras_mlp.py --norm none keras fastbn      # and Keras's own batch norm
    python examples/keras_mlp.py --csv points.csv              # your data, columns X,Y,class

Each network starts from the same weights and sees the same batches in the same order. The program
writes circles.png (data, decision boundaries, validation curves) and metrics.json to --output-dir.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from command_line import Parser, UserError, integer, learning_rate, make_output_dir
from keras import layers
from train_mlp import draw, load_csv, make_circles, split

from fastbn.keras import BatchNormalization

NORMS = {"none": None, "keras": layers.BatchNormalization, "fastbn": BatchNormalization}


def build_net(norm):
    if norm is None:
        return keras.Sequential(
            [
                keras.Input((2,)),
                layers.Dense(3, activation="relu"),
                layers.Dense(2, activation="relu"),
                layers.Dense(1, activation="sigmoid"),
            ]
        )
    return keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(3, use_bias=False),
            norm(),
            layers.Activation("relu"),
            layers.Dense(2, use_bias=False),
            norm(),
            layers.Activation("relu"),
            layers.Dense(1, activation="sigmoid"),
        ]
    )


def train(norm, data, args):
    """Returns the trained network and its curves, which have a value for each epoch."""
    x_train, y_train, x_val, y_val = data
    keras.utils.set_random_seed(args.seed)
    net = build_net(NORMS[norm])
    net.compile(keras.optimizers.Adam(args.lr), "binary_crossentropy", metrics=["accuracy"])
    keras.utils.set_random_seed(args.seed)  # batches come in the same order for each norm
    history = net.fit(
        x_train,
        y_train,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=(x_val, y_val),
        verbose=0,
    ).history
    history["train_loss"] = history.pop("loss")
    return net, {key: history[key] for key in ("train_loss", "val_loss", "val_accuracy")}


def logits_of(net):
    """Returns the network without its sigmoid, which train_mlp.py's `draw` expects."""
    return lambda points: torch.logit(net(points)[:, 0])


def parse_args(argv):
    parser = Parser(
        prog="keras_mlp.py",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--norm", nargs="+", choices=NORMS, default=["none", "fastbn"], help="networks to train")
    add("--csv", type=Path, metavar="FILE", help="data with columns X,Y,class instead of circles")
    add("--samples", type=integer(5, 10**6), default=1000, help="points on the circles")
    add("--epochs", type=integer(1), default=200, help="passes over the training data")
    add("-b", "--batch-size", type=integer(1), default=32, help="samples per step")
    add("--lr", type=learning_rate, default=0.01, help="Adam's learning rate")
    add("--seed", type=integer(0, 2**32 - 1), default=1, help="for all that is drawn at random")
    add("--output-dir", type=Path, default=Path("runs/keras_mlp"), help="where the files go")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        points, labels = load_csv(args.csv) if args.csv else make_circles(args.samples, args.seed)
        make_output_dir(args.output_dir)
    except UserError as error:
        print(f"keras_mlp.py: error: {error}", file=sys.stderr)
        return 2
    train_rows, val_rows = split(len(points), args.seed)
    data = points[train_rows], labels[train_rows], points[val_rows], labels[val_rows]
    nets, curves = {}, {}
    print(f"{'norm':<8}{'train loss':>12}{'val loss':>12}{'val accuracy':>15}")
    for norm in dict.fromkeys(args.norm):
        net, curves[norm] = train(norm, data, args)
        nets[norm] = logits_of(net)
        last = {key: values[-1] for key, values in curves[norm].items()}
        print("{:<8}{train_loss:>12.4f}{val_loss:>12.4f}{val_accuracy:>15.1%}".format(norm, **last))
    # JSON has no NaN, which the loss of a diverged network may be, so that null stands for it.
    metrics = {
        norm: {key: [v if math.isfinite(v) else None for v in values] for key, values in c.items()}
        for norm, c in curves.items()
    }
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    draw(args.output_dir / "circles.png", nets, curves, data)
    print(f"wrote circles.png and metrics.json to {args.output_dir}")
    return 0


if __name__ == "__main__":
    # The network is so small that a second thread costs more than it computes.
    torch.set_num_threads(1)
    sys.exit(main())
