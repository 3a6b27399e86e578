"""The plan cache finds only plans that would be made again, and none for a refused call."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

import fastbn
from fastbn import FusedBatchNormAct2d, batch_norm
from fastbn.runtime import execution, plan_cache
from fastbn.runtime.layout import dense


@pytest.fixture(autouse=True)
def only_kernels(replan):
    with fastbn.use_backend("triton"):
        yield


@pytest.fixture
def hits(monkeypatch):
    """Lists the names of the planners whose plans are found in the cache."""
    planners, found = {}, []
    lookup, insert = plan_cache.lookup, plan_cache.insert

    def spy_insert(key, tensors, planner, *options):
        planners[key] = planner, options
        return insert(key, tensors, planner, *options)

    def spy_lookup(key, tensors):
        plan = lookup(key, tensors)
        if plan is not None:
            planner, options = planners[key]
            assert plan is planner(tensors, *options)
            assert all(t is None or dense(t, plan.format) is t for t in tensors)
            found.append(planner.__name__)
        return plan

    monkeypatch.setattr(plan_cache, "insert", spy_insert)
    monkeypatch.setattr(plan_cache, "lookup", spy_lookup)
    return found


def step(module, x, residual=None):
    y = module(x, residual)
    return y, *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_second_call_hits_the_cache(training, momentum, residual, hits, device):
    module = FusedBatchNormAct2d(4, momentum=momentum).to(device).train(training)
    x, r = torch.randn(2, 2, 4, 3, 3, device=device).unbind()
    x.requires_grad_()
    r = r if residual else None
    first = step(module, x, r)
    assert hits == []
    module.reset_running_stats()
    second = step(module, x, r)
    assert hits == ["plan_forward", "plan_backward"]
    for a, b in zip(first, second):
        assert a.equal(b)


class Tagged(torch.Tensor):
    pass


def lazily_negated(t):
    return torch._neg_view(-t)


def spread(t):
    """Returns the same values at every second element in memory."""
    return torch.stack([t, t], -1)[..., 0]


def changes():
    """Yields the name of a change, and a function that makes it of one argument."""
    of_tensors = {
        "requires_grad": lambda t: t.clone().requires_grad_(),
        "double": torch.Tensor.double,
        "half": torch.Tensor.half,
        "subclass": lambda t: t.as_subclass(Tagged),
        "negated": lazily_negated,
        "spread": spread,
        "longer": lambda t: torch.cat([t, t], min(1, t.dim() - 1)),
        "one axis more": lambda t: t.unsqueeze(-1),
        "elsewhere": lambda t: t.to("meta"),
        "sparse": torch.Tensor.to_sparse,
        "inference": lambda t: _in_inference_mode(t.clone),
    }
    for name, change in of_tensors.items():
        for argument in ("input", "weight", "bias", "running_mean", "running_var"):
            yield f"{argument} {name}", {argument: change}
    for argument in ("weight", "bias"):
        yield f"no {argument}", {argument: lambda t: None}
    yield "no running_mean", {"running_mean": lambda t: None}
    yield "no statistics", {"running_mean": lambda t: None, "running_var": lambda t: None}
    yield "channels last", {"input": lambda t: t.contiguous(memory_format=torch.channels_last)}
    for eps in (0, 0.0, -1.0, 2.0, 1, torch.tensor(0.5), "small", None):
        yield f"eps {eps!r}", {"eps": lambda _, eps=eps: eps}
    for momentum in (0, 0.0, 1.0, 0.7, None, torch.tensor(0.5), "high"):
        yield f"momentum {momentum!r}", {"momentum": lambda _, value=momentum: value}
    yield "fixed statistics", {"training": lambda _: False}
    yield "another activation", {"activation": lambda _: "silu"}


def _in_inference_mode(make):
    with torch.inference_mode():
        return make()


def outcome(device, change):
    """Returns the output and the input's gradient, or the error; and the running statistics."""
    torch.manual_seed(0)
    arguments = {
        "input": torch.randn(2, 4, 3, 5, device=device), "running_mean": torch.zeros(4),
        "running_var": torch.ones(4), "weight": torch.rand(4), "bias": torch.rand(4),
        "training": True, "momentum": 0.1, "eps": 1e-5, "activation": "relu",
    }  # fmt: skip
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = value.to(device)
    for name, make in change.items():
        arguments[name] = make(arguments[name])
    x, mean, var = (arguments[name] for name in ("input", "running_mean", "running_var"))
    results = []
    try:
        y = batch_norm(**arguments)
        results.append(y)
        if x.requires_grad:
            results += torch.autograd.grad(y.square().sum(), x)
    except (RuntimeError, TypeError, ValueError) as error:
        results.append(f"{type(error).__name__}: {error}")
    return [*results, mean, var]


@pytest.mark.parametrize("change", [pytest.param(c, id=name) for name, c in changes()])
def test_an_earlier_call_changes_nothing(change, device):
    """Errors and results are the same whatever was called before."""
    plan_cache.clear()
    cold = outcome(device, change)
    for earlier in ({}, {"input": lambda t: t.requires_grad_()}):
        plan_cache.clear()
        outcome(device, earlier)
        warm = outcome(device, change)
        assert len(warm) == len(cold)
        for a, b in zip(warm, cold):
            assert type(a) is type(b)
            if not isinstance(a, torch.Tensor):
                assert a == b
            elif a.layout is torch.strided and a.device.type != "meta":
                assert a.dtype == b.dtype
                assert a.stride() == b.stride()
                assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["vmap", "dual level", "dispatch mode", "no_grad", "inference"])
def test_an_earlier_call_under_a_mode_changes_nothing(where, device):
    """An ordinary call is not taken for one under a transform or mode, nor the reverse."""
    x = torch.randn(3, 2, 4, 5, device=device)
    dispatched = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            dispatched.append(str(function))
            return function(*args, **(kwargs or {}))

    def norm(x):
        return batch_norm(x, None, None, training=True)

    def there():
        if where == "vmap":
            return torch.func.vmap(norm)(x)
        with contextlib.ExitStack() as stack:
            if where == "dual level":
                stack.enter_context(torch.autograd.forward_ad.dual_level())
                dual = torch.autograd.forward_ad.make_dual(x[0], x[1])
                return torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent
            modes = {"dispatch mode": Mode, "no_grad": torch.no_grad}
            stack.enter_context(modes.get(where, torch.inference_mode)())
            return norm(x[0])

    cold = there()
    seen, here = dispatched.copy(), norm(x[0])
    dispatched.clear()
    for _ in range(2):
        assert there().equal(cold)
        assert norm(x[0]).equal(here)
    assert dispatched == 2 * seen
    assert ("fastbn.forward_train.default" in seen) == (where == "dispatch mode")


@pytest.mark.parametrize(
    "what", ["gradient", "dtype", "format", "training", "activation", "residual"]
)
def test_two_keys_in_turn_hit_the_cache(what, hits, device):
    """Calls in turn as two networks do that differ in one thing, such as the precision."""
    x = torch.randn(2, 4, 3, 3, device=device)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    one = {"input": x, "training": True}
    other = (
        one
        | {
            "gradient": {"input": x.clone().requires_grad_()},
            "dtype": {"input": x.half()},
            "format": {"input": x.contiguous(memory_format=torch.channels_last)},
            "training": {"training": False},
            "activation": {"activation": "silu"},
            "residual": {"residual": x.clone()},
        }[what]
    )
    for _ in range(3):
        batch_norm(running_mean=mean, running_var=var, **one)
        batch_norm(running_mean=mean, running_var=var, **other)
    assert hits == ["plan_forward"] * 4


def test_each_set_of_wanted_gradients_has_its_own_plan(monkeypatch, hits, device):
    """Kernels are compiled without the gradients that are not wanted, so plans differ too."""
    plans, backward = {}, execution.run_backward

    def spy(plan, *arguments):
        plans.setdefault(arguments[-1], []).append(plan)
        return backward(plan, *arguments)

    monkeypatch.setattr(execution, "run_backward", spy)
    inputs = [torch.randn(size, device=device) for size in ((2, 4, 3, 3), (4,), (4,))]
    for _ in range(2):
        for wanted in ((True, True, False), (True, True, True), (False, True, True)):
            x, w, b = (t.requires_grad_(want) for t, want in zip(inputs, wanted))
            y = batch_norm(x, None, None, w, b, training=True)
            y.backward(torch.ones_like(y))
    assert all(first is second for first, second in plans.values())
    assert len({plan for _, plan in plans.values()}) == 3
    assert hits.count("plan_backward") == 3


def test_a_call_without_gradients_is_not_taken_for_one_with(device):
    """The call without gradients saves no mask, which a backward would need."""
    x, r = torch.randn(2, 2, 4, 3, 3, device=device).unbind()
    x.requires_grad_()

    def gradient(first_without):
        plan_cache.clear()
        if first_without:
            with torch.no_grad():
                batch_norm(x, None, None, training=True, activation="relu", residual=r)
        y = batch_norm(x, None, None, training=True, activation="relu", residual=r)
        return torch.autograd.grad(y.square().sum(), x)[0]

    assert gradient(True).equal(gradient(False))


def test_a_flag_that_is_a_tensor_is_read_each_time(device):
    x = torch.randn(2, 4, 3, 3, device=device)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    training = torch.tensor(True)
    batch_norm(x, mean, var, training=training)
    before = mean.clone()
    training.fill_(False)
    leaf = x.clone().requires_grad_()
    y = batch_norm(leaf, mean, var, training=training)
    assert mean.equal(before)
    (first,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
    training.fill_(True)
    (second,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    torch.testing.assert_close(first, second)


def test_symbolic_sizes_outside_their_mode_go_to_pytorch():
    """Symbolic sizes can't be hashed, and therefore can't be a key."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3)
    x = mode.from_tensor(torch.randn(5, 4, 6), symbolic_context=context)
    with fastbn.use_backend("auto"):
        assert isinstance(batch_norm(x, None, None, training=True), FakeTensor)


def test_functional_wrappers_go_to_pytorch(device):
    x = torch.randn(2, 4, 3, device=device)
    with fastbn.use_backend("auto"):
        y = batch_norm(torch._to_functional_tensor(x), None, None, training=True)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(torch._from_functional_tensor(y), expected)


def test_freed_memory_is_not_read(device):
    """Checks the first call, and one whose plan is cached."""
    plan_cache.clear()
    for keep in (True, False, False):
        x = torch.randn(2, 4, 3, 3, device=device)
        if keep:
            batch_norm(x, None, None, training=True)
        else:
            x.untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match="its storage was freed"):
                batch_norm(x, None, None, training=True)
            plan_cache.clear()


def test_cached_plans_hold_no_tensor(device):
    module = FusedBatchNormAct2d(4).to(device)
    x = torch.randn(2, 4, 3, 3, device=device, requires_grad=True)
    step(module, x)
    step(module, x)
    gone = [weakref.ref(t) for t in (x, *module.parameters(), *module.buffers())]
    del x, module
    gc.collect()
    assert plan_cache._entries
    assert [t() for t in gone] == [None] * len(gone)


def test_number_of_keys_is_limited(monkeypatch, device):
    monkeypatch.setattr(plan_cache, "_MAX_KEYS", 3)
    for rows in (2, 3, 4, 5, 6, 2, 3):
        x = torch.randn(rows, 4, device=device)
        y = batch_norm(x, None, None, training=True)
        torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))
        assert len(plan_cache._entries) <= 3


def test_latest_entries_of_a_key_stay(monkeypatch, hits, device):
    """The calls differ in their dtypes, which are not in the key but in the guards."""
    monkeypatch.setattr(plan_cache, "_MAX_ENTRIES_OF_A_KEY", 2)
    x = torch.randn(2, 4, 3, device=device)
    for dtype in (torch.half, torch.float, torch.double, torch.float, torch.half):
        batch_norm(x.to(dtype), None, None, training=True)
    assert hits == ["plan_forward"]
    assert [len(entries) for entries in plan_cache._entries.values()] == [2]


def test_guards_that_never_match_are_not_stored(device):
    """Guards match no call with one tensor in two places, as here the input and its gradient."""
    x = torch.randn(2, 4, 3, device=device, requires_grad=True)
    for _ in range(3):
        y = batch_norm(x, None, None, training=True)
        torch.autograd.grad(y, x, x)
    assert len(plan_cache._entries) == 1


def test_threads_may_share_one_key(device):
    """The calls differ in their strides, which are not in the key but in the guards."""
    x = torch.randn(2, 4, 3, 3, device=device)
    inputs = [x, x.contiguous(memory_format=torch.channels_last), spread(x), x.mT.contiguous().mT]
    expected = [batch_norm(x, None, None, training=True) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(10):
            y = batch_norm(inputs[i], None, None, training=True)
            if not (y.equal(expected[i]) and y.stride() == expected[i].stride()):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
