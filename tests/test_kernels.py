"""Kernels of training against float64, by the rule of `oracle.py`."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fastbn
from fastbn.activations import ACTIVATIONS
from fastbn.kernels.device import H100
from fastbn.kernels.plan import make_schedule
from fastbn.kernels.tiling import choose_tile, resident_tile
from fastbn.runtime import execution_plan, workspace
from fastbn.runtime.layout import problem_of
from fastbn.strategy import STRATEGIES

from .oracle import CHANNELS_LAST, Case, check, clone, compare, make_arguments, run_fastbn


@pytest.fixture(params=STRATEGIES, autouse=True)
def strategy(request, force_strategy):
    """Each test for each way to do it."""
    force_strategy(request.param)
    return request.param


def skip_what_never_stays(strategy, shape, dtype, channels_last=False):
    """What does not fit registers takes two passes, which are a case of their own."""
    x = torch.empty(shape, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    if strategy == "resident" and resident_tile(problem_of(x)) is None:
        pytest.skip("it does not fit registers")


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

# Every kind of extent: one channel, one row, odd planes, more than a tile.
SHAPES = [
    (70, 130),
    (3, 20, 7, 7),
    (2, 3, 48, 48),
    (2, 16, 4, 4),
    (2, 1, 7, 5),
    (6, 3),
    (4, 5, 9),
    (1, 6, 5, 5),
    (5, 7, 1, 1),
    (2, 3, 3, 4, 5),
]


def sized(shapes):
    """Pairs each shape with float32 and bfloat16, and the first ones with the other dtypes.

    float16 has bfloat16's width, and float64 its own.
    """
    return [
        pytest.param(shape, dtype, id=f"{'x'.join(map(str, shape))}-{dtype}")
        for i, shape in enumerate(shapes)
        for dtype in DTYPES
        if dtype in (torch.float32, torch.bfloat16) or i < 4
    ]


@pytest.mark.parametrize(("shape", "dtype"), sized(SHAPES))
def test_shapes_and_dtypes(shape, dtype, device, strategy):
    skip_what_never_stays(strategy, shape, dtype)
    check(Case(shape, dtype, activation="relu"), device)


@pytest.mark.parametrize(("shape", "dtype"), sized(s for s in SHAPES if len(s) >= 4))
def test_channels_last(shape, dtype, device, strategy):
    skip_what_never_stays(strategy, shape, dtype, channels_last=True)
    check(Case(shape, dtype, channels_last=True, activation="relu"), device)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shape", [(3, 20, 7, 7), (5, 3, 12, 9), (4, 40, 4, 4), (2, 1, 19, 19)])
def test_many_tiles_and_splits(shape, channels_last, device, strategy):
    if strategy == "resident":
        pytest.skip("it has one tile and no splits")
    case = Case(shape, channels_last=channels_last, activation="relu", residual=True)
    check(case, device)


# Odd planes of channels that lie side by side in tiles, and of channels that have tiles of their
# own, of which the first begins before the plane: of one tile or many, with a part of an access
# or not.
IN_COLUMNS = [(12, 8, 13), (13, 16, 3, 3), (14, 24, 5, 5), (40, 8, 2, 2), (20, 8, 31)]
IN_PLANES = [(5, 8, 7, 7), (9, 8, 65), (3, 8, 5, 41), (2, 24, 11, 3), (4, 8, 63), (13, 12, 43)]


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize(
    ("layout", "shape", "dtype"),
    [
        (layout, shape, dtype)
        for layout, shapes in (("columns", IN_COLUMNS), ("planes", IN_PLANES))
        for i, shape in enumerate(shapes)
        for dtype in DTYPES
        if dtype == torch.float32 or (i == 0 and dtype != torch.float16)
    ],
    ids=str,
)
def test_tiles_that_begin_within_planes(layout, shape, dtype, device, strategy):
    problem = problem_of(torch.empty(shape, dtype=dtype, device="meta"))
    tile = choose_tile(problem, execution_plan.device_facts(device))
    assert tile.layout == layout
    assert layout == "columns" or problem.s % tile.align
    if strategy == "resident" and resident_tile(problem) is None:
        pytest.skip("it does not fit registers")
    check(Case(shape, dtype, activation="relu", residual=True), device)
    if shape in (IN_COLUMNS[0], IN_PLANES[0]):
        check(Case(shape, dtype, activation="silu"), device)


def test_a_mask_whose_rows_have_many_planes(device):
    """It has so many values that no resident kernel may have stored it, plane by plane."""
    shape = (300, 8, 5, 7)
    problem = problem_of(torch.empty(shape, device="meta"), residual=True, saves="mask")
    assert make_schedule(problem, H100, True).reduce.tile.layout == "columns"
    check(Case(shape, activation="leaky_relu", residual=True), device)


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(activation, residual, device, strategy):
    """Each activation has both dtypes in each strategy, and all four pairs with layouts."""
    turn = list(ACTIVATIONS).index(activation) + STRATEGIES.index(strategy) + residual
    dtype, channels_last = (torch.float32, torch.bfloat16)[turn % 2], turn % 4 >= 2
    case = Case((3, 10, 5, 3), dtype, None, channels_last, True, activation, residual)
    check(case, device)


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (2, 3, 1, 3), (3, 13, 3, 3), (5, 9, 1, 1)])
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_mask_of_few_bits(shape, channels_last, device):
    check(Case(shape, channels_last=channels_last, activation="relu", residual=True), device)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("weight", [True, False], ids=["weight", ""])
def test_optional_parameters(weight, bias, device):
    check(Case((4, 6, 5), weight=weight, bias=bias, activation="silu"), device)


def test_without_statistics(device):
    check(Case((4, 6, 5), statistics=False), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_in_half_precision(dtype, device):
    check(Case((4, 6, 5, 5), dtype, param_dtype=dtype), device)


@pytest.mark.parametrize("num_batches_tracked", [0, 1, 999])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.01, 1.0])
def test_momentum(momentum, num_batches_tracked, device):
    compare(make_arguments(Case((8, 3, 4), momentum=momentum), device, num_batches_tracked))


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_biased_running_var(momentum, device):
    check(Case((3, 5, 2), momentum=momentum, biased_running_var=True), device)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0])
def test_eps(eps, device):
    check(Case((8, 3, 4), eps=eps), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 8, 3, 3), (70, 24, 1, 5), (65, 16, 7, 7)])
def test_planes_side_by_side(shape, dtype, device):
    """Odd planes of neighbouring channels, of which tiles begin and end in the middle."""
    problem = problem_of(torch.empty(shape, dtype=dtype))
    assert choose_tile(problem, H100).layout == "columns"
    check(Case(shape, dtype, activation="relu", residual=True), device)


def test_launch_after_launch(device):
    """Nothing of one launch is left for the next, of the same or of another size."""
    for shape in ((6, 12, 9), (3, 5, 7, 7), (64, 3, 5)):
        for momentum in (0.1, None):
            check(Case(shape, activation="relu", momentum=momentum), device)
    check(Case((3, 5, 7, 7), activation="relu"), device)
    assert not any(found.arrivals.any() for found in workspace._workspaces.values())
    for _, tickets, *_ in workspace._workspaces.values():
        # No ticket drawn of the next generation, and no flag of it raised.
        assert tickets[0] % 2**32 == 0
        assert (tickets[1:] <= tickets[0] >> 32).all()


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [
        (torch.float32, 1e6, 1.0),
        (torch.float32, -1e6, 1.0),
        (torch.float32, 1.0, 1e-4),
        (torch.float32, 0.0, 1e-8),
        (torch.float32, 0.0, 1e17),
        (torch.float32, 1e18, 1e14),
        (torch.float64, 1e6, 1.0),
        (torch.bfloat16, 0.0, 1e17),
        (torch.bfloat16, 300.0, 1.0),
        (torch.float16, 60000.0, 500.0),
        (torch.float16, 0.0, 1e-6),
    ],
)
def test_hostile_scales(dtype, mean, std, channels_last, device):
    check(Case((4, 5, 8, 8), dtype, channels_last=channels_last, mean=mean, std=std), device)


@pytest.mark.usefixtures("tiny_tiles")
def test_first_value_far_from_the_others(device):
    """Moments are taken about the first tile's mean: an outlier there must not matter."""
    arguments = make_arguments(Case((4, 5, 8, 8), mean=100.0), device)
    arguments.input[0, :, 0, 0] = torch.tensor([0.0, -1e4, 1e5, 1e-30, 3e4])
    compare(arguments)


def sorted_images(x):
    x += 50.0 * torch.arange(len(x), device=x.device)[:, None, None, None]


def one_image_apart(x):
    x[0] += 3000.0


def sample_apart(x):
    """The values by which partial means are stored stand for the others badly."""
    x += 3000.0
    x[0, :, 0, 0] = x[12, :, 0, 0] = x[12, :, 4, 0] = x[-1, :, -1, -1] = 0.0


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("change", [sorted_images, one_image_apart, sample_apart])
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_tiles_unlike_one_another(channels_last, change, device):
    """Moments are taken about one tile's mean, and merged about that of a few programs."""
    arguments = make_arguments(Case((24, 3, 8, 8), channels_last=channels_last), device)
    change(arguments.input)
    compare(arguments)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("outliers", "limit"), [(1, 2e-6), (16, 2.4e-5)], ids=["one", "many"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_outliers_among_very_many_values(outliers, limit, channels_last, device, strategy):
    """Errors of the ordinary values, which the outliers' size would hide in other tests.

    The outliers come first, where the value about which partial means are stored is
    found: of three values one may be an outlier, and many mislead the first tile's mean.
    """
    if strategy == "resident":
        pytest.skip("so many values never stay in registers")
    x = make_arguments(Case((2, 2, 256, 128), channels_last=channels_last), device).input
    x[0, :, 0, :outliers] = 500.0
    with fastbn.use_backend("triton"):
        actual = fastbn.batch_norm(x, None, None, training=True)
    difference = (actual - F.batch_norm(x.double(), None, None, training=True)).abs()
    difference[0, :, 0, :outliers] = 0
    assert difference.max() < limit


@pytest.mark.parametrize("value", [0.0, 5.0, -3e4, 1e37, 3e37])
def test_constant_channels(value, device):
    arguments = make_arguments(Case((4, 3, 8, 8)), device)
    arguments.input[:, 1] = value
    compare(arguments)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_huge_constant_channels(channels_last, device):
    """Where the square of a rounding error overflows; values for which a mean is rounded, too."""
    constants = 1e30 * (1 + torch.rand(64, device=device))
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = constants[:, None, None].expand(4, 64, 8, 8).contiguous(memory_format=format)
    mean, var = torch.zeros(64, device=device), torch.ones(64, device=device)
    with fastbn.use_backend("triton"):
        y = fastbn.batch_norm(x, mean, var, training=True)
    assert (y.abs() < 10).all()
    # An infinite variance would make any output 0.
    assert var.isfinite().all()
    torch.testing.assert_close(mean, 0.1 * constants)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("images", [slice(None), slice(12, None), slice(0, 1)], ids=str)
def test_a_variance_that_overflows_is_infinite_as_in_pytorch(images, channels_last, device):
    """Where all values, half of the images or one are so large that their squares overflow."""
    x = make_arguments(Case((24, 3, 8, 8), channels_last=channels_last), device).input
    x[images] *= 1e20
    found, expected = (torch.zeros(3, device=device) for _ in range(2))
    var = torch.ones(3, device=device)
    with fastbn.use_backend("triton"):
        y = fastbn.batch_norm(x, found, var, training=True)
    assert y.equal(F.batch_norm(x, expected, torch.ones_like(var), training=True))
    assert y.eq(0).all()
    assert var.isinf().all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e14)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("input", float("nan")),
        ("input", -float("inf")),
        ("grad_output", float("inf")),
        ("residual", float("nan")),
        ("residual", float("inf")),
        ("residual", -float("inf")),
    ],
)
@pytest.mark.parametrize(("channels", "channels_last"), [(8, False), (9, False), (8, True)])
def test_nan_and_inf_stay_in_their_channel(channels, channels_last, where, value, device):
    """Of 8 channels, accesses of 16 bytes also load what belongs to a neighbour."""
    residual = where == "residual"
    case = Case((3, channels, 5, 5), torch.float32, None, channels_last, True, "relu", residual)
    arguments = make_arguments(case, device)
    clean = run_fastbn(clone(arguments))
    getattr(arguments, where)[1, 4, 2, 2] = value
    dirty = run_fastbn(arguments)
    others = [c for c in range(channels) if c != 4]
    for name, result in dirty.items():
        if name == "num_batches_tracked":
            continue
        axis = 0 if result.dim() == 1 else 1
        index = torch.tensor(others, device=device)
        assert result.index_select(axis, index).equal(clean[name].index_select(axis, index)), name
    if where == "input":
        assert dirty["output"][:, 4].isnan().all()
        assert dirty["running_var"][4].isnan()
    elif where == "residual" and value != -float("inf"):
        assert not dirty["output"][1, 4, 2, 2].isfinite()


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_bitwise_reproducible(channels_last, device):
    case = Case((3, 12, 7, 7), channels_last=channels_last, activation="gelu", residual=True)
    arguments = make_arguments(case, device)
    first, second = run_fastbn(clone(arguments)), run_fastbn(clone(arguments))
    for name in first:
        assert first[name].equal(second[name]), name


@settings(
    # On a GPU each smaller example would be compiled.
    phases=[Phase.generate] if torch.cuda.is_available() else Phase,
    max_examples=12,
    deadline=None,
    derandomize=True,
    # The strategy is the same for all examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape(data):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rank = data.draw(st.integers(0, 3))
    shape = (
        data.draw(st.integers(2, 9)),
        data.draw(st.integers(1, 20)),
        *data.draw(st.lists(st.integers(1, 7 if rank < 3 else 3), min_size=rank, max_size=rank)),
    )
    check(
        Case(
            shape,
            dtype=data.draw(st.sampled_from(DTYPES)),
            channels_last=rank >= 2 and data.draw(st.booleans()),
            activation=data.draw(st.sampled_from(["none", "relu", "silu"])),
            residual=data.draw(st.booleans()),
        ),
        device,
    )


LAYOUTS = {
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "sliced channels-last": lambda x: x.repeat_interleave(2, -1)
    .contiguous(memory_format=torch.channels_last)[..., ::2],
    "sliced channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "permuted": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "flipped rows": lambda x: x.flip(2).contiguous(memory_format=torch.channels_last).flip(2),
}  # fmt: skip


@pytest.mark.parametrize("distance", [0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, distance, device):
    """Input, residual and the output's gradient, each of its own strides."""
    names = list(LAYOUTS)
    residual = names[(names.index(layout) + distance) % len(names)]
    case = Case((3, 6, 4, 5), activation="relu", residual=True)
    arguments = make_arguments(case, device)
    arguments.input = LAYOUTS[layout](arguments.input)
    arguments.residual = LAYOUTS[residual](arguments.residual)
    arguments.grad_output = LAYOUTS["permuted"](arguments.grad_output)
    compare(arguments)


def test_expanded(device):
    arguments = make_arguments(Case((4, 6, 3, 5)), device)
    arguments.input = arguments.input[:, :, :1].expand(4, 6, 3, 5)
    arguments.grad_output = torch.randn(4, 6, 1, 1, device=device).expand(4, 6, 3, 5)
    compare(arguments)
