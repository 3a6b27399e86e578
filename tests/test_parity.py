"""Whatever the installed torch's `nn.BatchNorm*d` do, the fused modules do too."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn

import fastbn
from fastbn import FusedBatchNorm1d, FusedBatchNorm2d, FusedBatchNorm3d

PAIRS = {
    "1d": (FusedBatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    "1d matrix": (FusedBatchNorm1d, nn.BatchNorm1d, (8, 3)),
    "2d": (FusedBatchNorm2d, nn.BatchNorm2d, (4, 3, 5, 5)),
    "3d": (FusedBatchNorm3d, nn.BatchNorm3d, (4, 3, 2, 5, 3)),
}


@pytest.fixture(params=["auto", "torch"], autouse=True)
def backend(request):
    """Runs each test by the kernels, where these can serve it, and by PyTorch."""
    with fastbn.use_backend(request.param):
        yield request.param


@pytest.fixture(params=PAIRS)
def pair(request, device):
    fused, native, shape = PAIRS[request.param]

    def make(**kwargs):
        ours, theirs = fused(3, **kwargs).to(device), native(3, **kwargs).to(device)
        if ours.weight is not None:
            nn.init.normal_(theirs.weight)
            ours.load_state_dict(theirs.state_dict())
        return ours, theirs, torch.randn(shape, device=device)

    return make


def assert_same(ours, theirs, x):
    """Asserts that two modules have the same output, gradients and buffers."""
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = ours(x1), theirs(x2)
    torch.testing.assert_close(y1, y2)
    assert y1.is_contiguous() == y2.is_contiguous()
    grad = torch.randn_like(y2)
    y1.backward(grad)
    y2.backward(grad)
    torch.testing.assert_close(x1.grad, x2.grad)
    assert_same_state(ours, theirs)
    for p1, p2 in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p1.grad, p2.grad)


def assert_same_state(ours, theirs):
    s1, s2 = ours.state_dict(), theirs.state_dict()
    assert list(s1) == list(s2)
    assert s1._metadata == s2._metadata
    for name in s1:
        assert s1[name].dtype == s2[name].dtype
        torch.testing.assert_close(s1[name], s2[name])


def outcome(function, *args):
    """Returns what a call returns, or the type and text of the exception that it raises."""
    try:
        return function(*args)
    except Exception as error:
        return type(error), str(error)


def assert_same_outcome(ours, theirs, *args):
    a, b = outcome(ours, *args), outcome(theirs, *args)
    if isinstance(b, torch.Tensor):
        torch.testing.assert_close(a, b)
    else:
        assert a == b


def positional(kind):
    """Returns the arguments of a constructor that need no keyword, with their defaults."""
    parameters = inspect.signature(kind).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("fused", [p[:2] for p in PAIRS.values()])
def test_constructors_have_the_same_arguments(fused):
    ours, theirs = fused
    assert positional(ours) == positional(theirs)
    assert isinstance(ours(3), theirs)
    assert issubclass(ours, nn.modules.batchnorm._BatchNorm)
    assert ours(3).extra_repr() == theirs(3).extra_repr()
    for refused in ({"no_such": 1}, {"num_features": 3}):
        with pytest.raises(TypeError, match=next(iter(refused))):
            ours(3, **refused)


@pytest.mark.skipif(
    "bias" not in inspect.signature(nn.BatchNorm2d.__init__).parameters,
    reason="this torch's BatchNorm has no bias argument",
)
def test_modules_without_bias_agree(pair):
    ours, theirs, x = pair(bias=False)
    assert ours.bias is None
    assert_same(ours, theirs, x)
    act = getattr(fastbn, type(ours).__name__.replace("Norm", "NormAct"))(3, bias=False)
    torch.testing.assert_close(act.to(x.device)(x), type(theirs)(3).to(x.device)(x).relu())


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.3, "eps": 1e-3},
        {"momentum": None, "track_running_stats": False},
        {"momentum": None, "affine": False},
    ],
    ids=str,
)
def test_training_and_eval_agree(pair, kwargs):
    ours, theirs, x = pair(**kwargs)
    for _ in range(3):
        assert_same(ours, theirs, x * 2 + 1)
    ours.eval(), theirs.eval()
    assert_same(ours, theirs, x)
    ours.train(), theirs.train()
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("flag", [True, False])
def test_track_running_stats_may_be_flipped(pair, flag, training):
    ours, theirs, x = pair(track_running_stats=not flag)
    for module in (ours, theirs):
        module.track_running_stats = flag
        module.train(training)
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_missing_statistic_has_the_same_outcome(pair, missing, training):
    ours, theirs, x = pair()
    for module in (ours, theirs):
        setattr(module, missing, None)
        module.train(training)
    assert_same_outcome(ours, theirs, x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_value_per_channel_has_the_same_outcome(pair, training, device):
    ours, theirs, x = pair()
    x = x[:1][(..., *[slice(0, 1)] * (x.dim() - 2))]
    ours.train(training), theirs.train(training)
    before = copy.deepcopy(ours.state_dict())
    assert_same_outcome(ours, theirs, x)
    if training:
        assert outcome(ours, x)[0] is ValueError
    # Neither a refused call nor one in eval mode has written anything, not even the counter.
    for name, value in ours.state_dict().items():
        assert value.equal(before[name]), name


def test_empty_batches_agree(pair):
    ours, theirs, x = pair()
    assert_same(ours, theirs, x[:0])
    assert ours.num_batches_tracked == 1
    assert ours.running_mean.equal(torch.zeros_like(ours.running_mean))
    assert ours.weight.grad.equal(torch.zeros_like(ours.weight))
    ours.eval(), theirs.eval()
    assert_same(ours, theirs, x[:0])


@pytest.mark.parametrize("shape", [(3,), (2, 4, 5, 5), (2, 3, 5), (2, 4), (2, 3, 2, 2, 2, 2), (0,)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wrong_shapes_have_the_same_outcome(pair, shape, training, device):
    ours, theirs, _ = pair()
    ours.train(training), theirs.train(training)
    assert_same_outcome(ours, theirs, torch.randn(shape, device=device))


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.complex64]


@pytest.mark.parametrize("statistics", [None, *DTYPES[:4]], ids=str)
@pytest.mark.parametrize("parameters", [None, *DTYPES[:4]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes_have_the_same_outcome(dtype, parameters, statistics, device):
    """Mixtures that torch accepts give the same results; others are refused by the same error."""
    one_is_double = (dtype == torch.float64) != (statistics == torch.float64)
    if device.type == "cuda" and statistics and dtype.is_floating_point and one_is_double:
        pytest.skip("torch reads the memory of one as if it had the other's dtype")
    x = torch.randn(4, 3, 5, device=device).to(dtype)
    w = None if parameters is None else torch.rand(3, device=device).to(parameters)

    def arguments():
        if statistics is None:
            return x, None, None, w, w, True
        mean = torch.zeros(3, dtype=statistics, device=device)
        return x, mean, torch.ones_like(mean), w, w, True

    ours, theirs = arguments(), arguments()
    a = outcome(fastbn.batch_norm, *ours)
    b = outcome(nn.functional.batch_norm, *theirs)
    if isinstance(b, torch.Tensor):
        tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(a, b, **tolerances)
        assert a.dtype == b.dtype
    else:
        assert a == b
    if statistics is not None:
        torch.testing.assert_close(ours[1], theirs[1])
        torch.testing.assert_close(ours[2], theirs[2])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"weight": torch.ones(2)},
        {"bias": torch.ones(4)},
        {"weight": torch.ones(3, 1)},
        {"running_mean": torch.zeros(2)},
        {"running_mean": None},
        {"running_mean": None, "running_var": None, "training": False},
        {"running_var": torch.ones(3)[::1].expand(2, 3)},
        {"eps": 0.0, "training": True},
        {"eps": -1.0},
        {"momentum": None, "training": True},
        {"momentum": 7.0, "training": True},
        {"weight": torch.ones(3, device="meta")},
        {"running_mean": torch.zeros(3, requires_grad=True), "training": True},
        {"input": torch.eye(3).to_sparse()},
        {"weight": [1.0, 1.0, 1.0]},
        {"running_var": 1.0},
    ],
    ids=lambda kwargs: " ".join(kwargs),
)
def test_functional_refuses_alike(kwargs):
    arguments = {
        "input": torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
    } | kwargs
    copies = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        for _ in range(2)
    ]
    assert_same_outcome(
        lambda: fastbn.batch_norm(**copies[0]),
        lambda: nn.functional.batch_norm(**copies[1]),
    )


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
STRIDES = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=FORMATS[x.dim()]),
    "sliced": lambda x: x[..., ::2],
    "sliced channels-last": lambda x: x.contiguous(memory_format=FORMATS[x.dim()])[..., ::2],
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "one position": lambda x: x.flatten(2)[..., :1].reshape(*x.shape[:2], *[1] * (x.dim() - 2)),
    "one row": lambda x: x[:1].contiguous(memory_format=FORMATS[x.dim()]),
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dim", ["2d", "3d"])
def test_strides_of_outputs_and_gradients_agree(dim, strides, device):
    fused, native, shape = PAIRS[dim]
    x = STRIDES[strides](torch.randn(shape, device=device))
    x1, x2 = x.detach().requires_grad_(), x.detach().requires_grad_()
    y1, y2 = fused(3).to(device)(x1), native(3).to(device)(x2)
    assert y1.stride() == y2.stride()
    torch.testing.assert_close(y1, y2)
    grad = torch.randn(shape, device=device)[: len(y1), ..., : y1.shape[-1]]
    grad = grad.expand_as(y1) if strides != "one position" else torch.randn_like(y1)
    (g1,), (g2,) = torch.autograd.grad(y1, x1, grad), torch.autograd.grad(y2, x2, grad)
    assert g1.stride() == g2.stride()
    torch.testing.assert_close(g1, g2)


def test_state_dicts_load_both_ways(pair):
    ours, theirs, x = pair()
    theirs(x), theirs(x + 1)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, x)
    theirs.load_state_dict(ours.state_dict())
    assert ours.state_dict()._metadata[""]["version"] == 2
    assert ours.num_batches_tracked.dtype == torch.int64


def test_state_dicts_of_version_1_load(pair):
    ours, theirs, _ = pair()
    state = theirs.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    ours.num_batches_tracked += 5
    ours.load_state_dict(copy.deepcopy(state))
    theirs.num_batches_tracked += 5
    theirs.load_state_dict(copy.deepcopy(state))
    assert_same_state(ours, theirs)


def test_pickled_copied_and_saved_modules_agree(pair):
    ours, theirs, x = pair()
    ours(x), theirs(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for clone in (
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
        torch.load(file, weights_only=False),
    ):
        assert type(clone) is type(ours)
        assert_same(clone, copy.deepcopy(theirs), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_modules_agree_after_a_change_of_dtype(pair, dtype):
    ours, theirs, x = pair()
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
    assert ours.num_batches_tracked.dtype == torch.int64
    for _ in range(2):
        ours(x), theirs(x)
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(ours(x), theirs(x), **tolerances)
    torch.testing.assert_close(ours.running_var, theirs.running_var, **tolerances)
    assert ours.num_batches_tracked == 3


def test_hooks_see_the_output_and_reset_clears_the_counter(pair):
    ours, _, x = pair()
    seen = []
    ours.register_forward_hook(lambda module, args, output: seen.append(output))
    y = ours(x)
    assert seen[0] is y
    ours.reset_running_stats()
    assert ours.num_batches_tracked == 0


@pytest.mark.parametrize("convert", [torch.Tensor.float, lambda t: t.repeat(2)])
def test_counter_that_is_no_single_int64_still_counts(pair, convert):
    ours, theirs, x = pair()
    for module in (ours, theirs):
        module.num_batches_tracked = convert(module.num_batches_tracked)
    assert_same(ours, theirs, x)
    assert (ours.num_batches_tracked == 1).all()


def _in_inference_mode(make, *args):
    with torch.inference_mode():
        return make(*args)


LATE = {
    "captured by torch.func": lambda module, x: torch.func.grad(lambda t: module(t).sum())(x),
    "input of inference mode": lambda module, x: module(_in_inference_mode(x.clone)),
    "module of inference mode": lambda module, x: _in_inference_mode(copy.deepcopy, module)(x),
}


@pytest.mark.parametrize("call", LATE)
def test_what_autograd_refuses_leaves_no_trace(pair, call):
    """Autograd refuses these calls only after the sizes and dtypes have been accepted."""
    ours, theirs, x = pair()
    _in_inference_mode(copy.deepcopy(ours), x)  # a similar call, whose cached plan must not serve
    before = copy.deepcopy(ours.state_dict())
    found = outcome(LATE[call], ours, x)
    assert found == outcome(LATE[call], theirs, x)
    assert found[0] is RuntimeError
    for name, value in ours.state_dict().items():
        assert value.equal(before[name]), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("inner", ["input", "module", "both"])
def test_tensors_of_inference_mode_have_the_same_outcome(pair, inner, training):
    """Outside of inference mode these tensors may be read, but not written."""
    modules = *_, x = pair()
    for module in modules[:2]:
        module.train(training)
        _in_inference_mode(copy.deepcopy(module), x)  # a similar call
    if inner != "input":
        modules = [_in_inference_mode(copy.deepcopy, module) for module in modules[:2]]
    if inner != "module":
        x = _in_inference_mode(x.clone)
    ours, theirs = modules[:2]
    with torch.no_grad():
        assert_same_outcome(ours, theirs, x)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_kernels_read_tensors_of_inference_mode(training, device):
    """The kernels too read such tensors, which may be features kept from another network."""
    bn = FusedBatchNorm2d(3).to(device).train(training)
    x = _in_inference_mode(torch.randn(4, 3, 5, 5, device=device).clone)
    assert x.is_inference()
    with fastbn.use_backend("triton"), torch.no_grad():
        y = bn(x)
    twin = nn.BatchNorm2d(3).to(device).train(training)
    torch.testing.assert_close(y, twin(x.clone()))
    torch.testing.assert_close(bn.running_var, twin.running_var)


NUMBERS = {
    "np.float32": np.float32(0.25),
    "np.float64": np.float64(0.25),
    "np.int64": np.int64(1),
    "int": 1,
    "0-d tensor": torch.tensor(0.25),
    "0-d integer tensor": torch.tensor(1),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("name", ["momentum", "eps"])
def test_momentum_and_eps_may_be_numbers_of_other_types(name, number, pair, backend):
    """The kernels serve these numbers too."""
    ours, theirs, x = pair(**{name: number})
    with fastbn.use_backend("triton" if backend == "auto" else backend):
        for _ in range(2):
            assert_same(ours, theirs, x)
        assert fastbn.explain(ours, x).backend == fastbn.get_backend()
