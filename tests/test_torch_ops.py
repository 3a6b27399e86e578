"""Tests the operators by `torch.library.opcheck` and under `torch.compile`."""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastbn
from fastbn import FusedBatchNorm2d, FusedBatchNormAct2d
from fastbn.runtime import torch_ops, workspace

from . import gpu_checks

TESTS = (
    "test_schema",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
    "test_autograd_registration",
)
WANTED = [[True] * 4, [False, True, False, True], [True, False, True, False]]


def tensors(device, dtype=torch.float32, channels_last=False, statistics=True):
    format = torch.channels_last if channels_last else torch.contiguous_format
    x, r, dy = (
        torch.randn(3, 9, 4, 5, device=device).to(dtype).contiguous(memory_format=format)
        for _ in range(3)
    )
    w, b, mean = torch.randn(3, 9, device=device).unbind()
    var = torch.rand(9, device=device) + 0.5
    num_batches_tracked = torch.tensor(3, device=device)
    if not statistics:
        return x, r, dy, w, b, None, None, None
    return x, r, dy, w, b, mean.clone(), var, num_batches_tracked


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("channels_last", [False, True])
def test_forward_train_passes_opcheck(channels_last, momentum, statistics, device):
    x, r, _, w, b, mean, var, num_batches_tracked = tensors(
        device, torch.bfloat16, channels_last, statistics
    )
    if momentum is None and num_batches_tracked is None:
        momentum = 0.0
    args = (x, r, w, b, mean, var, num_batches_tracked, momentum, 1.0, 1e-5, "relu", 0.0, True)
    torch.library.opcheck(torch.ops.fastbn.forward_train.default, args, test_utils=TESTS)
    args = (
        x,
        None,
        None,
        None,
        mean,
        var,
        num_batches_tracked,
        momentum,
        1.0,
        1e-5,
        "gelu",
        0.0,
        False,
    )
    torch.library.opcheck(torch.ops.fastbn.forward_train.default, args, test_utils=TESTS)


@pytest.mark.parametrize("save_mask", [True, False])
def test_forward_eval_passes_opcheck(save_mask, device):
    x, r, _, w, b, mean, var, _ = tensors(device)
    args = (x, r, w, b, mean, var, 1e-5, "leaky_relu", 0.1, save_mask)
    torch.library.opcheck(torch.ops.fastbn.forward_eval.default, args, test_utils=TESTS)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("wanted", WANTED)
def test_backward_passes_opcheck(wanted, fixed, device):
    x, r, dy, w, b, mean, var, _ = tensors(device)
    statistics = (b, mean, var) if fixed else (None, torch.stack([mean, var, b]), None)
    args = (dy, x, r, None, w, *statistics, 1e-5, "silu", 0.0, wanted, None)
    torch.library.opcheck(torch.ops.fastbn.backward.default, args, test_utils=TESTS)


def model(norm, act):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.Conv2d(8, 12, 3, bias=False), act(12),
        nn.Flatten(), nn.Linear(12 * 16, 5),
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modules_compile_without_graph_breaks(training, device):
    torch._dynamo.reset()
    eager = model(FusedBatchNorm2d, FusedBatchNormAct2d).to(device).train(training)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 3, 8, 8, device=device)
        with fastbn.use_backend("triton"):
            y1, y2 = eager(x), compiled(x)
            torch.testing.assert_close(y1, y2)
            y1.pow(2).sum().backward()
            y2.pow(2).sum().backward()
    for (name, p1), p2 in zip(eager.named_parameters(), other.parameters()):
        torch.testing.assert_close(p1.grad, p2.grad, msg=name)
    for (name, b1), b2 in zip(eager.named_buffers(), other.buffers()):
        torch.testing.assert_close(b1, b2, msg=name)
    assert other[1].num_batches_tracked == (2 if training else 0)


def test_compiled_backward_runs_the_kernels(device):
    """The graph has no operation of the reference, which only second derivatives need."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(FusedBatchNorm2d(4).to(device), fullgraph=True, backend=backend)
    x = torch.randn(2, 4, 5, 5, device=device, requires_grad=True)
    with fastbn.use_backend("triton"):
        compiled(x).sum().backward()
    forward, backward = ({str(node.target) for node in graph.graph.nodes} for graph in graphs)
    assert "fastbn.backward.default" in backward
    assert not any("var" in name or "rsqrt" in name for name in forward | backward)


def test_compiled_modules_keep_tangents(device):
    """The tangent is kept although nothing requires a gradient."""
    torch._dynamo.reset()
    bn = FusedBatchNormAct2d(4).to(device).requires_grad_(False)
    compiled = torch.compile(bn, backend="aot_eager")
    x, tangent = torch.randn(2, 2, 4, 5, 5, device=device).unbind()
    tangents = []
    with fastbn.use_backend("triton"), torch.autograd.forward_ad.dual_level():
        for module in (bn, compiled):
            y = module(torch.autograd.forward_ad.make_dual(x, tangent))
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_exported_programs_hold_pytorchs_operators(training, strict, device):
    """Every runtime has PyTorch's operators, and exported programs may be differentiated."""
    torch._dynamo.reset()
    bn = FusedBatchNormAct2d(4).to(device).train(training)
    x = torch.randn(2, 4, 5, 5, device=device)
    with fastbn.use_backend("triton"):
        program = torch.export.export(copy.deepcopy(bn), (x,), strict=strict)
        assert not any("fastbn" in str(node.target) for node in program.graph.nodes)
        results = []
        for module in (bn, program.module()):
            y = module(x)
            grads = torch.autograd.grad(y.square().sum(), list(module.parameters()))
            buffers = dict(module.named_buffers())
            results.append((y, *grads, buffers["running_mean"], buffers["running_var"]))
    torch.testing.assert_close(*results)


def test_autograd_sees_what_kernels_write(device):
    bn = FusedBatchNorm2d(4).to(device)
    before = bn.running_mean.clone()
    version = bn.running_mean._version
    bn(torch.randn(2, 4, 5, 5, device=device) + 3)
    assert not bn.running_mean.equal(before)
    assert bn.running_mean._version > version
    assert bn.num_batches_tracked._version > 0


@pytest.mark.parametrize("same", ["residual", "bias"])
def test_one_tensor_in_two_places_compiles(same, device):
    torch._dynamo.reset()
    bn = FusedBatchNormAct2d(4, act_layer="silu").to(device)
    if same == "bias":
        bn.bias = bn.weight
    compiled = torch.compile(copy.deepcopy(bn), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5, device=device)
    with fastbn.use_backend("triton"):
        results = []
        for module in (bn, compiled):
            leaf = x.clone().requires_grad_()
            module(leaf, leaf if same == "residual" else None).pow(2).sum().backward()
            results.append(leaf.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dynamic_shapes_compile(training, device):
    torch._dynamo.reset()
    bn = FusedBatchNormAct2d(6, momentum=None).to(device).train(training)
    compiled = torch.compile(bn, fullgraph=True, backend="aot_eager", dynamic=True)
    with fastbn.use_backend("triton"):
        for size in (4, 5, 7):
            x, r = torch.randn(2, size, 6, size, size, device=device).unbind()
            x.requires_grad_()
            other = copy.deepcopy(bn)
            y1, y2 = compiled(x, r), other(x, r)
            torch.testing.assert_close(y1, y2)
            torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (y1, y2)))
            torch.testing.assert_close(bn.running_var, other.running_var)


def test_a_changing_activation_parameter_compiles(device):
    """`torch.compile` makes a symbol of the parameter, whose value it doesn't know."""
    torch._dynamo.reset()

    def function(x, alpha):
        return fastbn.batch_norm(
            x, None, None, training=True, activation="elu", activation_param=alpha
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(3, 4, 5, device=device)
    with fastbn.use_backend("triton"):
        for alpha in (0.3, 0.4):
            torch.testing.assert_close(compiled(x, alpha), function(x, alpha))


@pytest.mark.parametrize("transform", ["grad", "vjp"])
def test_transforms_inside_compiled_code_agree(transform, device):
    torch._dynamo.reset()
    x = torch.randn(3, 4, 5, device=device)
    grad = torch.randn_like(x)

    def norm(x):
        return fastbn.batch_norm(x, None, None, training=True, activation="silu")

    def function(x):
        if transform == "grad":
            return torch.func.grad(lambda x: (norm(x) * grad).sum())(x)
        return torch.func.vjp(norm, x)[1](grad)[0]

    with fastbn.use_backend("triton"):
        compiled = torch.compile(function, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, function(x))


def test_profilers_and_tracers_see_the_operators(device):
    """Ordinary calls bypass the dispatcher, by which these tools see operators."""
    bn = FusedBatchNormAct2d(4).to(device).eval()
    x = torch.randn(2, 4, 5, 5, device=device)
    expected = bn(x)
    with fastbn.use_backend("triton"):
        with torch.profiler.profile(acc_events=True) as profile:
            bn(x)
        assert "fastbn::forward_eval" in {event.key for event in profile.key_averages()}
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            y = bn(leaf)
            torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)
        with torch.profiler.profile(acc_events=True) as profile:
            torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert "fastbn::backward" in {event.key for event in profile.key_averages()}
        for pre_dispatch in (False, True):
            graph = make_fx(bn, pre_dispatch=pre_dispatch)(x)
            assert any("fastbn.forward_eval" in str(node.target) for node in graph.graph.nodes)
            torch.testing.assert_close(graph(x), expected)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, but still works
            traced = torch.jit.trace(bn, x)
        assert "fastbn::forward_eval" in str(traced.inlined_graph)


def test_operators_do_not_write_between_elements(device):
    x = torch.randn(2, 4, 5, 5, device=device)
    memory = torch.zeros(8, device=device)
    with pytest.raises(RuntimeError, match="running statistics that are contiguous"):
        torch_ops._forward_train(
            x, None, None, None, memory[::2], memory[::2], None, 0.5, 1.0, 1e-5, "none", 0.0, False
        )
    assert memory.eq(0).all()


def test_backward_with_a_mask_of_another_format_passes_opcheck(device):
    """The results have the mask's memory format, for fake tensors too."""
    x, r, dy, w, b, mean, var, _ = tensors(device, channels_last=True)
    numbers = (0.1, 1.0, 1e-5, "relu", 0.0)
    *_, mask = torch_ops._forward_train(x, r, w, b, None, None, None, *numbers, True)
    args = (
        dy,
        x.contiguous(),
        None,
        mask,
        w,
        None,
        torch.stack([mean, var, b]),
        None,
        1e-5,
        "relu",
        0.0,
    )
    args = (*args, [True] * 4, torch.channels_last)
    torch.library.opcheck(torch.ops.fastbn.backward.default, args, test_utils=TESTS)


@pytest.mark.parametrize(("activation", "clones"), [("none", 0), ("relu", 1)])
def test_a_bias_is_copied_only_if_the_backward_keeps_it(activation, clones, device):
    x, parameter = torch.randn(4, 3, 5, device=device), torch.randn(3, device=device)
    parameter.requires_grad_()
    bias = parameter * 2
    with fastbn.use_backend("triton"):
        y = fastbn.batch_norm(x, None, None, None, bias, True, activation=activation)
    kept = [node.name() for node, _ in y.grad_fn.next_functions if node is not None]
    assert kept == (["CloneBackward0"] if clones else ["MulBackward0"])
    (found,) = torch.autograd.grad(y.square().sum(), parameter)
    z = F.batch_norm(x, None, None, None, parameter * 2, True)
    z = torch.relu(z) if activation == "relu" else z
    (expected,) = torch.autograd.grad(z.square().sum(), parameter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_backward_refuses_statistics_without_the_bias(device):
    """The kernels would read the bias from past their end."""
    x, _, dy, w, b, mean, var, _ = tensors(device)
    options = (1e-5, "silu", 0.0, [True] * 4, None)
    with pytest.raises(RuntimeError, match=r"statistics of shape \(3, C\), but got \(2, 9\)"):
        torch.ops.fastbn.backward(dy, x, None, None, w, b, torch.stack([mean, var]), None, *options)


def test_operators_refuse_tensors_on_two_devices(device):
    x = torch.randn(2, 4, 5, 5, device=device)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device="meta")
    numbers = (1e-5, "none", 0.0)
    for call in (
        lambda: torch_ops._forward_eval(x, None, None, None, mean, var, *numbers, False),
        lambda: torch_ops._forward_train(
            x, None, None, None, mean, var, None, 0.1, 1.0, *numbers, False
        ),
        lambda: torch_ops._backward(
            x, x, None, None, None, None, mean, var, *numbers, (True, False, False, False), None
        ),
    ):
        with pytest.raises(RuntimeError, match=r"on one device, but got .*meta"):
            call()


@pytest.mark.parametrize("negative", ["input", "weight", "residual", "grad_output"])
def test_lazily_negated_tensors_have_the_right_sign(negative, device):
    """The memory of such a tensor holds the values with the opposite sign."""
    x, r, dy, w, b, *_ = tensors(device)
    tensors_of = {"input": x, "weight": w, "residual": r, "grad_output": dy}
    results = []
    for view in (torch._neg_view, torch.neg):
        given = {k: view(t) if k == negative else t for k, t in tensors_of.items()}
        leaf = given["input"].detach().requires_grad_()
        y = fastbn.batch_norm(
            leaf, None, None, given["weight"], b, True, activation="silu",
            residual=given["residual"],
        )  # fmt: skip
        results.append((y, *torch.autograd.grad(y, leaf, given["grad_output"])))
    for lazy, eager in zip(*results):
        torch.testing.assert_close(lazy, eager)


def test_saved_tensors_on_another_device_are_refused(device):
    """A launch would read their addresses as addresses on the device."""
    x = torch.randn(4, 6, 5, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.to("meta")):
        y = fastbn.batch_norm(x, None, None, training=True)
    with pytest.raises(RuntimeError, match="meta"):
        y.sum().backward()


@pytest.mark.parametrize("strategy", ["two-pass", "ticketed"])
def test_nothing_is_written_if_memory_runs_out(strategy, device, monkeypatch, force_strategy):
    force_strategy(strategy)
    bn = FusedBatchNormAct2d(4).to(device)
    x = torch.randn(2, 4, 5, 5, device=device)
    before = copy.deepcopy(bn.state_dict())

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    for name in ("empty", "empty_like", "zeros"):
        workspace.discard()
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, full)
            with fastbn.use_backend("triton"), pytest.raises(torch.OutOfMemoryError):
                bn(x, x)
        for key, value in bn.state_dict().items():
            assert value.equal(before[key])


@pytest.mark.parametrize("freed", ["input", "residual", "weight", "bias", "running_mean"])
@pytest.mark.parametrize("strategy", ["two-pass", "ticketed", "resident"])
def test_nothing_is_written_if_an_argument_was_freed(freed, strategy, device, force_strategy):
    force_strategy(strategy)
    bn = FusedBatchNormAct2d(4).to(device)
    tensors = {"input": torch.randn(2, 4, 5, 5, device=device), **bn.state_dict()}
    tensors["residual"] = tensors["input"].clone()
    whole = {name: t for name, t in tensors.items() if name != freed}
    before = copy.deepcopy(whole)
    tensors[freed].untyped_storage().resize_(0)
    for _ in range(2):
        with fastbn.use_backend("triton"), pytest.raises(RuntimeError, match="was freed"):
            bn(tensors["input"], tensors["residual"])
        assert all(value.equal(before[name]) for name, value in whole.items())


@pytest.mark.parametrize("residual", [False, True])
def test_saved_tensor_hooks_of_compiled_code_may_change_strides(residual, device):
    """The packed mask's bits stay in the order of the original input, and are read in it."""
    torch._dynamo.reset()
    eager = FusedBatchNormAct2d(3).to(device)
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    x, r = torch.randn(2, 2, 3, 4, 5, device=device).unbind()
    x, r = (t.contiguous(memory_format=torch.channels_last) for t in (x, r))
    results = []
    for module in (eager, compiled):
        leaf = x.clone().requires_grad_()
        with (
            fastbn.use_backend("triton"),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
            ),
        ):
            y = module(leaf, r if residual else None)
        results.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_cuda_graphs_of_compiled_modules_agree():
    torch._dynamo.reset()
    bn = FusedBatchNorm2d(8).cuda()
    compiled = torch.compile(copy.deepcopy(bn), mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        x = torch.randn(4, 8, 16, 16, device="cuda", requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler warns of its own code
            y1, y2 = bn(x), compiled(x)
            gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (y1, y2)]
        torch.testing.assert_close(y1, y2)
        torch.testing.assert_close(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["two-pass", "ticketed"])
@pytest.mark.parametrize("check", [gpu_checks.graph_replays, gpu_checks.streams_agree])
def test_graphs_and_streams_give_the_same_bits(check, strategy, force_strategy):
    force_strategy(strategy)
    check()


def test_new_sizes_of_images_compile_nothing_anew(device):
    """The size of a packed mask is a function of the input's symbolic sizes."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, dynamic=True)
    def call(x, weight, bias):
        count = torch.zeros((), dtype=torch.int64, device=device)
        mean, var = torch.zeros_like(weight), torch.ones_like(weight)
        return torch.ops.fastbn.forward_train(
            x, x, weight, bias, mean, var, count, 0.1, 1.0, 1e-5, "relu", 0.0, True
        )

    weight, bias = torch.ones(16, device=device), torch.zeros(16, device=device)
    for size in (7, 9, 11, 13):
        y, _, mask = call(torch.randn(4, 16, size, size, device=device), weight, bias)
        assert y.shape[-1] == size
        assert mask.numel() >= 2 * 4 * size * size
    assert counter.frame_count == 1


def test_a_training_step_has_two_operators(device):
    """The forward writes the bias beside the statistics, and nothing copies it for the backward."""
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    norm = fastbn.FusedBatchNormAct2d(3).to(device)
    x, grad = torch.randn(2, 4, 3, 5, 5, device=device).unbind()
    with fastbn.use_backend("triton"), Seen():
        y = norm(x)
        grads = torch.autograd.grad(y, (norm.weight, norm.bias), grad)
    assert [name for name in seen if "aten.detach" not in name] == [
        "fastbn.forward_train.default",
        "fastbn.backward.default",
    ]
    z = F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, True))
    for found, expected in zip(grads, torch.autograd.grad(z, (norm.weight, norm.bias), grad)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_aot_autograd_traces_the_operators(device):
    """Calls AOTAutograd directly, which traces with functional tensors, as `torch.compile` does."""
    from torch._functorch.aot_autograd import aot_module

    seen = []

    def compiler(graph, _):
        seen.append([node for node in graph.graph.nodes if "fastbn" in f"{node.target}{node.args}"])
        return make_boxed_func(graph.forward)

    norm = fastbn.FusedBatchNormAct2d(3).to(device)
    expected = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU()).to(device)
    inputs = [torch.randn(4, 3, 5, 5, device=device).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    with fastbn.use_backend("triton"):
        output = aot_module(norm, fw_compiler=compiler, bw_compiler=compiler)(inputs[0])
        output.square().sum().backward()
    right = expected(inputs[1])
    right.square().sum().backward()
    torch.testing.assert_close(output, right)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, expected[0].running_var)
    assert norm.num_batches_tracked == 1
    assert [len(nodes) for nodes in seen] == [1, 1]
