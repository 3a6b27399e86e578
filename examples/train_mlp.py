"""Trains a 2-3-2-1 network on concentric circles, with batch norm and without.

    python examples/train_mlp.py                               # no norm against fastbn, about 10 s
    python examples/train_mlp.py --norm none torch fused       # and PyTorch's own batch norm
    python examples/train_mlp.py --order act-norm              # batch norm after the ReLU
    python examples/train_mlp.py --csv points.csv              # your data, columns X,Y,class

Batch norm follows each hidden layer. Each network starts from the same weights and sees the same
batches in the same order. The program writes circles.png (data, decision boundaries, validation
curves) and metrics.json to --output-dir.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from command_line import (
    Parser,
    UserError,
    default_device,
    device,
    integer,
    learning_rate,
    make_output_dir,
)
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from fastbn import FusedBatchNorm1d, explain

NORMS = {"none": None, "torch": nn.BatchNorm1d, "fused": FusedBatchNorm1d}
ORDERS = ("norm-act", "act-norm")
LABELS = {
    "none": "no batch norm",
    "torch": "nn.BatchNorm1d",
    "fused": "FusedBatchNorm1d",
    "keras": "keras.layers",
    "fastbn": "fastbn.keras",
}
# The curves of a norm and of fastbn's coincide. A thin line over a broad one shows both.
BROAD = {"color": "tab:green", "linewidth": 5, "alpha": 0.4}
THIN = {"color": "tab:purple", "zorder": 3}
LINES = {
    "none": {"color": "dimgray"},
    "torch": BROAD,
    "fused": THIN,
    "keras": BROAD,
    "fastbn": THIN,
}
NOISE = 0.1  # standard deviation of the radius; the rings lie at 0.5 and 1
LARGEST = 1e15  # float32 holds the squares of such coordinates in variances and gradients


def make_circles(samples, seed):
    """Returns points (samples, 2) on two noisy rings, and labels; class 1 is the inner ring."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 2
    radius = 1 - 0.5 * labels + NOISE * torch.randn(samples, generator=generator)
    angle = 2 * math.pi * torch.rand(samples, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), labels.float()


def parse_number(text, where):
    """Returns a value to train on, or raises a UserError that says where the text is."""
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"{where}: {text!r} is no number") from None
    # This form of the comparison refuses NaN too, since NaN compares false with everything.
    if not abs(number) <= LARGEST:
        raise UserError(f"{where}: {text!r} is not between {-LARGEST:g} and {LARGEST:g}")
    return number


def parse_row(row, where):
    """Returns one line of the file as [x, y, class]."""
    if None in row:  # csv puts values without a column's name there
        raise UserError(f"{where}: more values than columns")
    values = []
    for column in ("X", "Y", "class"):
        if row[column] is None:
            raise UserError(f"{where}: no value in column {column!r}")
        values.append(parse_number(row[column], f"{where}, column {column!r}"))
    if values[2] not in (0, 1):
        raise UserError(f"{where}, column 'class': {row['class']!r} is neither 0 nor 1")
    return values


def load_csv(path):
    """Reads points and labels from a file with the columns X, Y and class, in any order."""
    try:
        # utf-8-sig drops the byte order mark that spreadsheets put before the first column's name.
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = reader.fieldnames
            if header is None:
                raise UserError(f"{path}: the file is empty")
            for column in ("X", "Y", "class"):
                if column not in header:
                    found = ", ".join(header)
                    raise UserError(f"{path}: no column {column!r}; the header has: {found}")
            rows = [parse_row(row, f"{path}, line {reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if len(rows) < 5:
        raise UserError(f"{path}: {len(rows)} rows; a validation split of 0.2 needs at least 5")
    table = torch.tensor(rows)
    return table[:, :2], table[:, 2]


def split(samples, seed):
    """Returns shuffled indices for training (80 %) and for validation (20 %)."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return order[samples // 5 :], order[: samples // 5]


def build_net(norm, order, seed):
    """Returns a 2-3-2-1 network with ReLU, whose linear weights depend on the seed alone."""
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in ((2, 3), (3, 2)):
        linear = nn.Linear(inputs, outputs)
        if NORMS[norm] is None:
            layers += [linear, nn.ReLU()]
        elif order == "norm-act":
            # The norm subtracts the mean, and with it the bias of the linear layer. That bias is
            # removed only now, since Linear(bias=False) would change the weights of later layers.
            linear.bias = None
            layers += [linear, NORMS[norm](outputs), nn.ReLU()]
        else:
            # The bias stays, since it decides where the ReLU bends, which the norm can't change.
            layers += [linear, nn.ReLU(), NORMS[norm](outputs)]
    return nn.Sequential(*layers, nn.Linear(2, 1), nn.Flatten(0))


def train(net, data, args):
    """Trains the network in place and returns its curves, which have a value for each epoch."""
    x_train, y_train, x_val, y_val = data
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    shuffle = torch.Generator().manual_seed(args.seed)
    curves = {"train_loss": [], "val_loss": [], "val_accuracy": []}
    for _ in range(args.epochs):
        net.train()
        total, seen = 0.0, 0
        for batch in torch.randperm(len(x_train), generator=shuffle).split(args.batch_size):
            # One sample has no variance, and batch norm refuses to train on it. It is left out
            # for every network, so that all of them take the same steps.
            if len(batch) == 1:
                continue
            loss = F.binary_cross_entropy_with_logits(net(x_train[batch]), y_train[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, seen = total + loss.detach() * len(batch), seen + len(batch)
        net.eval()
        with torch.no_grad():
            logits = net(x_val)
        curves["train_loss"].append(float(total) / seen)
        curves["val_loss"].append(F.binary_cross_entropy_with_logits(logits, y_val).item())
        curves["val_accuracy"].append(((logits > 0) == (y_val > 0.5)).float().mean().item())
    return curves


def draw_boundary(axes, net, data):
    """Draws the network's probability, the line where it is one half, and the points."""
    x_train, y_train, x_val, y_val = (part.cpu().numpy() for part in data)
    points = np.concatenate([x_train, x_val])
    margin = 0.1 * np.ptp(points, axis=0) + 1e-3
    (left, bottom), (right, top) = points.min(0) - margin, points.max(0) + margin
    x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    grid = torch.from_numpy(np.stack([x.ravel(), y.ravel()], axis=1)).to(data[0])
    with torch.no_grad():
        probability = net(grid).sigmoid().view(x.shape).cpu().numpy()
    # The colour scale reaches beyond 0 and 1, so that the background is paler than the points.
    shades = {"levels": np.linspace(0, 1, 11), "cmap": "RdBu", "vmin": -0.8, "vmax": 1.8}
    axes.contourf(x, y, probability, **shades)
    axes.contour(x, y, probability, levels=[0.5], colors="black", linewidths=1.5)
    for value, color in ((0, "#b2182b"), (1, "#2166ac")):
        dots = {"color": color, "edgecolors": "black"}
        axes.scatter(*x_train[y_train == value].T, s=5, linewidths=0, **dots)
        axes.scatter(*x_val[y_val == value].T, s=15, linewidths=0.6, **dots)
    axes.set(xlabel="X", ylabel="Y", aspect="equal")


def draw(path, nets, curves, data):
    """Draws a panel for each network, and the validation curves of all networks."""
    figure = Figure(figsize=(3.6 * len(nets) + 4, 3.8), layout="constrained")
    panels = figure.subplot_mosaic(
        [[*nets, "val_loss"], [*nets, "val_accuracy"]],
        width_ratios=[3.6] * len(nets) + [4],
    )
    for norm, net in nets.items():
        draw_boundary(panels[norm], net, data)
        panels[norm].set_title(f"{LABELS[norm]}: {curves[norm]['val_accuracy'][-1]:.1%}")
        for key in ("val_loss", "val_accuracy"):
            epochs = range(1, len(curves[norm][key]) + 1)
            panels[key].plot(epochs, curves[norm][key], label=LABELS[norm], **LINES[norm])
    panels["val_loss"].set(ylabel="validation loss", ylim=(0, None))
    panels["val_accuracy"].set(ylabel="validation accuracy", ylim=(None, 1.02), xlabel="epoch")
    for key in ("val_loss", "val_accuracy"):
        panels[key].spines[["top", "right"]].set_visible(False)
    # The legend is above the panel, since the curves may be anywhere in it.
    panels["val_loss"].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(path, dpi=100)


def prepare(args):
    """Loads the data and makes the output folder, so that errors come before the training."""
    points, labels = load_csv(args.csv) if args.csv else make_circles(args.samples, args.seed)
    train_rows, val_rows = split(len(points), args.seed)
    make_output_dir(args.output_dir)
    parts = points[train_rows], labels[train_rows], points[val_rows], labels[val_rows]
    return [part.to(args.device) for part in parts]


def parse_args(argv):
    parser = Parser(
        prog="train_mlp.py",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--norm", nargs="+", choices=NORMS, default=["none", "fused"], help="networks to train")
    add("--order", choices=ORDERS, default="norm-act", help="batch norm before or after ReLU")
    add("--csv", type=Path, metavar="FILE", help="data with columns X,Y,class instead of circles")
    add("--samples", type=integer(5, 10**6), default=1000, help="points on the circles")
    add("--epochs", type=integer(1), default=200, help="passes over the training data")
    add("-b", "--batch-size", type=integer(2), default=32, help="samples per step")
    add("--lr", type=learning_rate, default=0.01, help="Adam's learning rate")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="for all that is drawn at random")
    add("--device", type=device, default=default_device(), help="where to train")
    add("--output-dir", type=Path, default=Path("runs/mlp"), help="for circles.png, metrics.json")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        data = prepare(args)
    except UserError as error:
        print(f"train_mlp.py: error: {error}", file=sys.stderr)
        return 2
    nets, curves = {}, {}
    print(f"{'norm':<8}{'train loss':>12}{'val loss':>12}{'val accuracy':>15}")
    for norm in dict.fromkeys(args.norm):
        nets[norm] = build_net(norm, args.order, args.seed).to(args.device)
        curves[norm] = train(nets[norm], data, args)
        last = {key: values[-1] for key, values in curves[norm].items()}
        print("{:<8}{train_loss:>12.4f}{val_loss:>12.4f}{val_accuracy:>15.1%}".format(norm, **last))
    # JSON has no NaN, which the loss of a diverged network may be, so that null stands for it.
    metrics = {
        norm: {key: [v if math.isfinite(v) else None for v in values] for key, values in c.items()}
        for norm, c in curves.items()
    }
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    draw(args.output_dir / "circles.png", nets, curves, data)
    if "fused" in nets and explain(None, data[0]).backend == "torch":
        print("PyTorch computed the fused norm: its curves say nothing of fastbn's kernels.")
    print(f"wrote circles.png and metrics.json to {args.output_dir}")
    return 0


if __name__ == "__main__":
    # The network is so small that a second thread costs more than it computes.
    torch.set_num_threads(1)
    sys.exit(main())
