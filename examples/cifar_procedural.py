"""Ten classes of shapes and textures, drawn by formula: a stand-in for CIFAR-10 with no download.

Every image shows one pattern of random size, angle, place, colour and contrast on a clouded, noisy
background. The class can't be read off colour or brightness: a network has to learn shapes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32
LABEL = "procedural stand-in, not CIFAR-10"


def disc(u: Tensor, v: Tensor) -> Tensor:
    return u.hypot(v) < 1


def square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) < 0.89  # 0.89 gives it the disc's area


def triangle(u: Tensor, v: Tensor) -> Tensor:
    return (v > -0.7) & (u.abs() * math.sqrt(3) + v < 1.4)


def ring(u: Tensor, v: Tensor) -> Tensor:
    return (u.hypot(v) - 0.8).abs() < 0.25


def cross(u: Tensor, v: Tensor) -> Tensor:
    return (torch.minimum(u.abs(), v.abs()) < 0.3) & (torch.maximum(u.abs(), v.abs()) < 1.1)


def star(u: Tensor, v: Tensor) -> Tensor:
    return u.hypot(v) < 0.8 + 0.4 * (5 * torch.atan2(v, u)).cos()


def stripes(u: Tensor, v: Tensor) -> Tensor:
    return disc(u, v) & ((6 * u).sin() > 0)


def checks(u: Tensor, v: Tensor) -> Tensor:
    return disc(u, v) & ((5 * u).sin() * (5 * v).sin() > 0)


def dots(u: Tensor, v: Tensor) -> Tensor:
    return disc(u, v) & ((7 * u).cos() + (7 * v).cos() > 0.6)


def spiral(u: Tensor, v: Tensor) -> Tensor:
    radius = u.hypot(v)
    return (radius < 1.1) & ((7 * radius + torch.atan2(v, u)).sin() > 0)


PATTERNS = (disc, square, triangle, ring, cross, star, stripes, checks, dots, spiral)
CLASSES = tuple(pattern.__name__ for pattern in PATTERNS)


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` images, uint8 ``(count, 3, 32, 32)``, with their labels, the same on every run."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    axis = torch.linspace(-1, 1, SIZE)
    y, x = axis.view(-1, 1), axis.view(1, -1)

    labels = torch.arange(count) % len(PATTERNS)
    # Each pattern is defined around (0, 0) with radius 1; (u, v) are the pixels seen from there.
    x, y = x - uniform(-0.3, 0.3, 1, 1), y - uniform(-0.3, 0.3, 1, 1)
    angle, scale = uniform(-1.0, 1.0, 1, 1), uniform(0.45, 0.85, 1, 1)
    u = (angle.cos() * x + angle.sin() * y) / scale
    v = (angle.cos() * y - angle.sin() * x) / scale
    pattern = torch.empty(count, SIZE, SIZE, dtype=torch.bool)
    for label, shape in enumerate(PATTERNS):
        chosen = labels == label
        pattern[chosen] = shape(u[chosen], v[chosen])

    clouds = F.interpolate(uniform(-1, 1, 3, 4, 4), size=SIZE, mode="bicubic")
    image = uniform(0.2, 0.8, 3, 1, 1) + 0.2 * clouds
    # The sign is drawn per channel, so that a pattern may be lighter, darker or of another hue.
    sign = uniform(-1, 1, 3, 1, 1).sign()
    image += sign * uniform(0.12, 0.45, 3, 1, 1) * pattern.unsqueeze(1)
    image += uniform(0.01, 0.05, 1, 1, 1) * torch.randn(image.shape, generator=generator)
    image = 0.5 + uniform(0.2, 0.6, 1, 1, 1) * (image - 0.5)  # pale, each to another degree
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), labels
