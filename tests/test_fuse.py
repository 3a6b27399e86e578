"""`fuse`, `convert` and `revert` keep what models compute, and `fuse` takes as few calls as it can.

Each module here was computed wrongly by some earlier way of fusing. Results are compared bit for
bit with those of an unfused copy, on PyTorch's path.
"""

import copy
import io
import operator
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.fx.experimental.optimization
import torch.nn as nn
import torch.nn.functional as F
from torch import fx
from torch.utils.checkpoint import checkpoint

import fastbn
from fastbn import FusedBatchNorm2d, FusedBatchNormAct2d, convert, explain, fuse, revert

from .models import NET_CALLS, Block, Net, assert_alike, fused_calls, pair


@pytest.fixture(autouse=True)
def _pytorch_computes():
    with fastbn.use_backend("torch"):
        yield


def x(*shape):
    return torch.randn(shape or (2, 4, 5, 5))


class Own(nn.Module):
    """A module with two norms, two ReLUs, and the members and the forward that a test gives."""

    def __init__(self, forward, **members):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        for name, member in members.items():
            setattr(self, name, member)
        self.__class__ = type("Own", (Own,), {"forward": forward})


def check(forward, expected, inputs=None, kwargs=None, exact=True, **members):
    """Fuses a module with this forward, and checks what it computes and by which calls."""
    model, reference = pair(lambda: Own(forward, **members))
    fuse(model)
    inputs = inputs or [x()]
    assert_alike(model, reference, inputs, kwargs, exact)
    _, calls = fused_calls(model, *inputs, **(kwargs or {}))
    assert calls == expected
    return model


# The following tests fuse norms with what can be computed in the same call.


def test_a_network_fuses_across_modules():
    model, reference = pair(Net)
    assert fuse(model) is model
    images = x(4, 3, 8, 8)
    _, calls = fused_calls(model, images)
    assert calls == NET_CALLS
    assert_alike(model, reference, [images])
    _, calls = fused_calls(model.eval(), images)
    assert calls == NET_CALLS


ACTIVATIONS = {
    "relu": lambda z: F.relu(z, inplace=True),
    "leaky_relu": lambda z: F.leaky_relu(z, 0.3, inplace=True),
    "elu": lambda z: F.elu(z, alpha=0.5),
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": lambda z: F.gelu(z),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": lambda z: z.tanh(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_that_are_functions_fuse(name):
    function = ACTIVATIONS[name]
    check(lambda self, x: function(self.bn(x)), {name: 1})
    check(lambda self, x: function(self.bn(x) + x), {f"add+{name}": 1})


@pytest.mark.parametrize(
    ("add", "kind"),
    [
        (lambda y, r: y + r, "add"),
        (lambda y, r: r + y, "add"),
        (torch.add, "add"),
        (lambda y, r: y.add(r), "add"),
        (lambda y, r: y.add_(r), "add"),
        (lambda y, r: operator.iadd(y, r), "add"),
        # The kernels don't compute the following ones in one call.
        (lambda y, r: torch.add(y, r, alpha=2), None),
        (lambda y, r: y.add(r, alpha=2), None),
        (lambda y, r: y + 1, None),
        (lambda y, r: y + y, None),
        (lambda y, r: y - r, None),
    ],
)
def test_only_plain_additions_fuse(add, kind):
    check(lambda self, x: add(self.bn(x), x), {kind or "none": 1})


def test_one_of_two_norms_takes_their_addition():
    model = check(lambda self, x: self.relu(self.bn(x) + self.bn2(x)), {"none": 1, "add+relu": 1})
    found = explain(model)
    assert found.kinds == {"bn": "plain", "bn2": "add+act"}
    assert found.reasons == {"bn": "two norms feed one addition, and the other one takes it"}


def test_one_inplace_relu_fuses_at_several_places():
    def forward(self, x):
        y = self.inplace(self.bn(x))
        return self.inplace(self.bn2(self.inplace(y * 1)) + y)

    check(forward, {"relu": 1, "add+relu": 1})


def test_a_forward_may_branch_on_training():
    def forward(self, x):
        if self.training:
            return self.relu(self.bn(x))
        return torch.sigmoid(self.bn(x) + x)

    model = check(forward, {"relu": 1})
    assert fused_calls(model.eval(), x())[1] == {"add+sigmoid": 1}


def test_a_flag_that_changes_later_is_obeyed():
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if self.active else y

    model, reference = pair(lambda: Own(forward, active=True))
    fuse(model)
    for active, calls in ((True, {"relu": 1}), (False, {"none": 1}), (True, {"relu": 1})):
        model.active = reference.active = active
        assert_alike(model, reference, [x()])
        assert fused_calls(model, x())[1] == calls


def test_changes_of_a_list_and_of_a_childs_attribute_are_seen():
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if 2 in self.indices and self.conv.stride == (1, 1) else y

    model, reference = pair(lambda: Own(forward, indices=[1, 2], conv=nn.Conv2d(4, 4, 1)))
    fuse(model)
    assert fused_calls(model, x())[1] == {"relu": 1}
    for change in (
        lambda m: m.indices.remove(2),
        lambda m: m.indices.append(2),
        lambda m: setattr(m.conv, "stride", (2, 2)),
    ):
        change(model)
        change(reference)
        assert model(inputs := x()).equal(reference(inputs))


def test_layers_in_a_list_fuse():
    def forward(self, x):
        for norm in self.norms:
            x = F.relu(norm(x))
        return x

    norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
    model = check(forward, {"relu": 2}, norms=norms)
    model.norms.append(nn.BatchNorm2d(4))
    convert(model)
    assert fused_calls(model, x())[1] == {"relu": 3}


def test_optional_arguments_may_be_left_out():
    def forward(self, x, shortcut=None, scale=1.0):
        if shortcut is None:
            shortcut = x * scale
        return self.relu(self.bn(x) + shortcut)

    check(forward, {"add+relu": 1})
    check(forward, {"add+relu": 1}, [x(), x()])
    # A number may differ from call to call, so that the module's own forward runs.
    model = check(forward, {"none": 1}, kwargs={"scale": 2.0})
    inputs = x(), x()
    for kwargs, calls in (({"scale": 1}, {"none": 1}), ({"shortcut": inputs[1]}, {"add+relu": 1})):
        assert fused_calls(model, inputs[0], **kwargs)[1] == calls
    for args, kwargs in (
        ((), {}),
        ((1, 2, 3, 4), {}),
        ((inputs[0],), {"other": 1}),
        ((inputs[0],), {"x": 1}),
    ):
        with pytest.raises(TypeError, match=r"forward\(\)"):
            model(*args, **kwargs)


def test_an_argument_may_be_a_list():
    def forward(self, features):
        features = [features] if isinstance(features, torch.Tensor) else features
        return self.relu(self.bn(torch.cat(features, 0)))

    model, reference = pair(lambda: Own(forward))
    fuse(model)
    for inputs in (x(), [x(), x()]):
        assert model(inputs).equal(reference(inputs))
        assert fused_calls(model, inputs)[1] == {"relu": 1}
    assert model((x(), x(), x())).shape[0] == 6


def test_a_forward_may_ask_for_the_type_of_a_layers_result():
    """The result is known to be a tensor if the layer is PyTorch's own and has no hooks."""

    def forward(self, x):
        x = self.layers(self.relu(self.bn(x)))
        return x if isinstance(x, list) else self.relu(self.bn2(x))

    layers = nn.Sequential(nn.Identity(), nn.Conv2d(4, 4, 1))
    model = check(forward, {"relu": 2}, layers=layers)
    for hooked in (model.layers, model.layers[-1]):
        hook = hooked.register_forward_hook(lambda module, args, output: [output])
        assert type(model(x())) is list
        hook.remove()
        assert fused_calls(model, x())[1] == {"relu": 2}
    # A user's module may return anything, and a pooling layer may return a pair.
    for layer in (Own(lambda self, x: [x]), nn.MaxPool2d(2, return_indices=True)):
        model.layers[-1] = layer
        kind = type(layer(x()))
        if kind is list:
            assert type(model(x())) is kind
        else:
            with pytest.raises(AttributeError, match="'tuple' object has no attribute 'dim'"):
                model(x())


def test_a_sum_in_place_fuses_if_nobody_else_has_the_memory():
    """A module returns what it has just computed, so the sum may be written to other memory."""

    def forward(self, x):
        y = self.ghost(x)
        y += self.bn(x)
        return y

    def ghost(self, x):
        return torch.cat([self.bn(x)[:, :2], self.bn2(x)[:, 2:]], 1)[:, :4]

    def keeps(self, x):
        self.kept[0] = self.bn2(x)
        return self.kept[0]

    def forward_of_two(self, x):
        z = self.bn2(x)
        y = self.ghost(z)
        y += self.bn(x)
        return y * z

    def passes(self, x):
        return x if x.shape[0] else self.bn(x)

    def keeps_input(self, x):
        self.kept.append(x)
        return x

    def in_training(self, x):
        return self.bn2(x) if self.training else x if x.sum() < 1e9 else self.bn2(x)

    def and_kept(self, x):
        return self.tap(self.bn2(x))

    def in_layers(self, x):
        return self.layers(x)

    model = check(forward, {"add": 1, "none": 2}, ghost=Own(ghost))
    assert explain(model).reasons["ghost.bn"].startswith("next is ")
    hook = model.ghost.register_forward_hook(lambda module, args, output: seen.append(output))
    seen: list = []
    y = model(x())
    assert seen[0] is y
    hook.remove()
    check(forward, {"none": 2}, ghost=Own(keeps, kept=[None]))
    check(forward_of_two, {"none": 2}, ghost=Own(passes))
    check(forward_of_two, {"add": 1, "none": 3}, ghost=Own(ghost))
    model = check(forward_of_two, {"add": 1, "none": 2}, ghost=Own(in_training))
    assert fused_calls(model.eval(), x())[1] == {"none": 2}
    for kept in (
        Own(and_kept, tap=Own(keeps_input, kept=[])),
        Own(in_layers, layers=nn.Sequential(nn.BatchNorm2d(4), Own(keeps_input, kept=[]))),
    ):
        model = check(forward, {"none": 2}, ghost=kept)
        tap = model.ghost.tap if "tap" in model.ghost._modules else model.ghost.layers[1]
        assert model(x()) is tap.kept[-1]


@pytest.mark.parametrize(
    "name", ["original", "owner", "ends_in_norm", "is_fresh", "forward_then", "current_variant"]
)
def test_modules_may_have_any_names(name):
    def forward(self, x):
        return self.relu(self.bn(getattr(self, name)(x)))

    def passes_on(self, x):
        return getattr(self, name)(self.bn(x))

    check(forward, {"relu": 1}, **{name: nn.Conv2d(4, 4, 1)})
    model = check(passes_on, {"none": 1}, **{name: nn.Conv2d(4, 4, 1)})
    assert explain(model).reasons["bn"] == "next is Conv2d"
    assert type(revert(model).bn) is nn.BatchNorm2d
    check(lambda self, x: self.relu(self.bn(x)), {"relu": 1}, **{name: "a string"})


class Batch(torch.Tensor):
    """A tensor of another type."""


@pytest.mark.parametrize("kind", [Batch, (list, Batch), torch.FloatTensor, nn.Parameter])
def test_a_forward_that_asks_for_other_tensor_types_stays(kind):
    """A value that is a tensor may also be of a subclass, so that the module's own forward runs."""

    def of_an_argument(self, x):
        return self.relu(self.bn(x)) * (3 if isinstance(x, kind) else 1)

    def of_a_result(self, x):
        return self.relu(self.bn(x)) * (3 if isinstance(self.conv(x), kind) else 1)

    for forward in (of_an_argument, of_a_result):
        model, reference = pair(lambda f=forward: Own(f, conv=nn.Conv2d(4, 4, 1)))
        fuse(model)
        for batch in (x(), x().as_subclass(Batch)):
            assert torch.equal(model(batch), reference(batch))


def test_a_sequential_may_iterate_in_its_own_order():
    class Backwards(nn.Sequential):
        def __iter__(self):
            return reversed(self._modules.values())

    def forward(self, x):
        y = self.layers(x)
        return self.relu(self.bn(y[0] if isinstance(y, tuple) else y))

    layers = Backwards(nn.MaxPool2d(1, return_indices=True), nn.Conv2d(4, 4, 1))
    check(forward, {"none": 1}, layers=layers)


def test_a_refusal_for_a_hook_ends_with_the_hook():
    def forward(self, x):
        y = self.conv(x)
        return self.relu(self.bn(y[0] if isinstance(y, list) else y))

    model = Own(forward, conv=nn.Conv2d(4, 4, 1))
    hook = model.conv.register_forward_hook(lambda module, args, output: [output])
    fuse(model)
    assert fused_calls(model, x())[1] == {"none": 1}
    hook.remove()
    fuse(model)
    assert fused_calls(model, x())[1] == {"relu": 1}


def test_drop_layers_fuse_in_eval_mode_alone():
    def forward(self, x):
        return self.relu(self.nothing(self.drop(self.bn(x)) + x))

    model = check(forward, {"none": 1}, drop=nn.Dropout(0.5), nothing=nn.Identity())
    assert fused_calls(model.eval(), x())[1] == {"add+relu": 1}
    model.drop.train()
    assert fused_calls(model, x())[1] == {"none": 1}
    assert explain(model).reasons["bn"] == "next is Dropout"
    model.drop.p = 0.0
    assert fused_calls(model.train(), x())[1] == {"add+relu": 1}


# The following tests have norms that must not be fused.


def test_a_residual_that_is_added_to_in_place_does_not_fuse():
    def forward(self, x):
        y = x * 2
        z = y
        y += self.bn(x)
        return self.relu(z)

    check(forward, {"none": 1})

    def forward(self, x):
        x += self.bn(x)
        return self.relu(x)

    model, reference = pair(lambda: Own(forward))
    fuse(model)
    inputs = [x()] * 2
    inputs = [t.clone() for t in inputs]
    assert model(inputs[0]).equal(reference(inputs[1]))
    assert inputs[0].equal(inputs[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda self, x: x.mul_(2),
        lambda self, x: self.inplace(x),
        lambda self, x: F.relu(x, inplace=True),
        lambda self, x: self.inplace(x.view(x.shape)),
        lambda self, x: self.branch(x),
        lambda self, x: operator.imul(x, 2),
    ],
)
def test_an_input_changed_after_the_norm_prevents_fusing(change):
    def forward(self, x):
        y = self.bn(x[:])
        return self.relu(y + change(self, x))

    branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    model, reference = pair(lambda: Own(forward, branch=branch))
    fuse(model)
    with torch.no_grad():
        output, calls = fused_calls(model, (inputs := x()).clone())
        assert output.equal(reference(inputs))
    assert calls == {"none": 1}


def test_a_residual_computed_after_the_norm_may_be_added():
    def forward(self, x):
        h = self.conv(x)
        y = self.bn(h)
        r = self.inplace(x * 3)
        return self.relu(y + r)

    check(forward, {"add+relu": 1}, conv=nn.Conv2d(4, 4, 1))


def test_a_norm_may_be_called_twice():
    def forward(self, x):
        y = self.bn(x)
        r = self.bn(x * 2)
        return self.relu(y + r)

    check(forward, {"none": 1, "add+relu": 1})

    def forward(self, x):
        y = self.bn(x)
        r = torch.tanh(self.bn(x * 2))
        return self.relu(y + r)

    check(forward, {"none": 1, "tanh": 1})


def test_an_output_with_two_users_is_not_fused():
    check(lambda self, x: self.relu(y := self.bn(x)) + y, {"none": 1})
    check(lambda self, x: (y := self.bn(x)) + torch.sigmoid(y), {"none": 1})


def test_a_broadcast_addition_is_not_fused():
    check(lambda self, x: self.relu(self.bn(x) + x[:, :, :1, :1]), {"none": 1})
    check(lambda self, x: self.relu(self.bn(x) + self.scale), {"none": 1},
          scale=nn.Parameter(torch.randn(4, 1, 1)))  # fmt: skip


def test_a_residual_of_another_dtype_is_added_as_in_pytorch():
    def in_place(self, x, r):
        y = self.bn(x)
        y += r
        return self.relu(y)

    for forward, dtype in (
        (lambda self, x, r: self.relu(self.bn(x) + r), torch.float64),
        (in_place, torch.float32),
    ):
        model, reference = pair(lambda: Own(forward))  # noqa: B023
        fuse(model)
        inputs = x(), x().double()
        assert model(*inputs).dtype == dtype
        assert model(*inputs).equal(reference(*inputs))


def test_random_numbers_are_drawn_in_the_same_order():
    def forward(self, x):
        y = self.branch(x)
        r = F.dropout(x, 0.5, self.training)
        return self.relu(y + r)

    branch = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(4))
    check(forward, {"none": 1}, branch=branch)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_inside_a_forward_stay(reentrant):
    def forward(self, x):
        if self.checkpointing:
            return self.relu(checkpoint(self.bn, x, use_reentrant=reentrant))
        return self.relu(self.bn(x))

    model, reference = pair(lambda: Own(forward, checkpointing=False))
    fuse(model)
    assert fused_calls(model, x())[1] == {"relu": 1}
    for checkpointing, calls in ((True, {"none": 1}), (False, {"relu": 1})):
        model.checkpointing = reference.checkpointing = checkpointing
        assert_alike(model, reference, [x()])
        assert fused_calls(model, x())[1] == calls


def effects():
    def sets(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.relu(self.bn(x))

    def counts(self, x):
        self.count += 1
        return self.relu(self.bn(x))

    def appends(self, x):
        self.seen.append(1)
        return self.relu(self.bn(x))

    def draws(self, x):
        import random

        return self.relu(self.bn(x)) if random.random() < 2 else x

    def changes_grad_mode(self, x):
        with torch.no_grad():
            y = self.bn(x)
        return self.relu(y) + x

    def casts(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.relu(self.bn(x))

    def asks_torch(self, x):
        return self.relu(self.bn(x)) * (1 if torch.rand(()) < 2 else 0)

    def decides(self, x):
        return self.relu(self.bn(x)) if x.sum() < 1e9 else x

    def any_number(self, *xs):
        return self.relu(self.bn(xs[0]))

    def in_a_circle(self, x):
        return self.relu(self.bn(x)) if self.count == 0 else super(type(self), self).forward(x)

    return {
        "it sets calls": sets,
        "it sets count": counts,
        "it changes a list": appends,
        "it draws random numbers": draws,
        "it uses no_grad": changes_grad_mode,
        "it uses autocast": casts,
        "it calls rand without its input": asks_torch,
        "symbolically traced variables cannot be used as inputs to control flow": decides,
        "its forward takes any number of arguments": any_number,
        r"it calls super\(type\(self\), self\)": in_a_circle,
    }


@pytest.mark.parametrize("reason", effects())
def test_a_forward_that_no_graph_shows_stays(reason):
    model, reference = pair(lambda: Own(effects()[reason], seen=[], count=0))
    own = type(model)
    fuse(model)
    assert type(model) is own
    assert model.seen == []
    assert model.count == 0
    torch.manual_seed(3)
    found = model(inputs := x())
    torch.manual_seed(3)
    assert found.equal(reference(inputs))
    assert (model.seen, model.count) == (reference.seen, reference.count)
    (found,) = {r for path, r in explain(model).reasons.items() if path == "bn"}
    assert found.startswith("Own can't be traced: ")
    assert re.search(reason, found)


def test_a_forward_may_change_buffers():
    def forward(self, x):
        self.steps.add_(1)
        return self.relu(self.bn(x)) * self.steps

    model, reference = pair(lambda: Own(forward))
    for m in (model, reference):
        m.register_buffer("steps", torch.zeros(()))
    fuse(model)
    assert model.steps == 0
    assert_alike(model, reference, [x()])
    assert fused_calls(model, x())[1] == {"relu": 1}


# The following tests use models after they were fused.


def test_hooks_run_while_they_are_registered():
    model, reference = pair(Net)
    fuse(model)
    images = x(4, 3, 8, 8)
    for path, fewer in (
        ("blocks.0.bn2", {"relu": 3, "add+relu": 1, "none": 2}),
        ("blocks.0.relu", {"relu": 2, "add+relu": 1, "none": 3}),
        ("blocks.1.downsample", {"relu": 3, "add+relu": 1, "none": 2}),
        ("stem.2", {"relu": 2, "add+relu": 2, "none": 2}),
    ):
        seen = [[], []]
        handles = [
            m.get_submodule(path).register_forward_hook(
                lambda _, args, output, seen=seen[i]: seen.append(output.detach().clone())
            )
            for i, m in enumerate((model, reference))
        ]
        output, calls = fused_calls(model, images)
        assert calls == fewer
        assert output.equal(reference(images))
        assert len(seen[0]) == len(seen[1])
        assert all(a.equal(b) for a, b in zip(*seen))
        for handle in handles:
            handle.remove()
        output, calls = fused_calls(model, images)
        assert calls == NET_CALLS
        assert output.equal(reference(images))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert fused_calls(model, images)[1] == {"none": 6}
    handle.remove()


@pytest.mark.parametrize("name", ["bn1", "bn2", "relu", "conv2"])
@pytest.mark.parametrize("new", [nn.Identity, nn.GELU, lambda: nn.InstanceNorm2d(4, affine=True)])
def test_a_replaced_module_runs(name, new):
    model, reference = pair(Block)
    fuse(model)
    setattr(model, name, new())
    setattr(reference, name, copy.deepcopy(getattr(model, name)))
    assert_alike(model, reference, [x()])


def test_a_patched_forward_runs():
    model, reference = pair(Block)
    fuse(model)
    for m in (model, reference):
        m.bn2.forward = lambda z: z * 3
        m.relu.forward = lambda z: z.abs()
    assert_alike(model, reference, [x()])


def test_a_sequential_may_be_sliced_and_extended():
    model, reference = pair(
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
    )
    fuse(model)
    assert_alike(model, reference, [x()])
    assert fused_calls(model, x())[1] == {"relu": 1}
    assert_alike(model[:2], reference[:2], [x()])
    assert fused_calls(model[1:], x())[1] == {"relu": 1}
    conv = nn.Conv2d(4, 4, 1)
    for m in (model, reference):
        m.append(copy.deepcopy(conv))
        del m[3]
        m.insert(2, nn.Identity())
    assert_alike(model, reference, [x()])
    assert fused_calls(model, x())[1] == {"none": 1}
    assert fuse(nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)), nn.ReLU()))(x()).min() == 0


def test_copies_are_fused():
    model, reference = pair(Net)
    fuse(model)
    copies = copy.deepcopy(model), copy.copy(model)
    for made in copies:
        assert fused_calls(made, x(4, 3, 8, 8))[1] == NET_CALLS
    reference.load_state_dict(copies[0].state_dict())
    assert_alike(copies[0], reference, [x(4, 3, 8, 8)])
    assert not any(a is b for a, b in zip(copies[0].parameters(), model.parameters()))


def test_pickles_hold_the_modules_own_classes(tmp_path):
    model, reference = pair(Net)
    fuse(model)
    images = x(4, 3, 8, 8)
    loaded = pickle.loads(pickle.dumps(model))
    torch.save(model, tmp_path / "model.pt")
    for made in (loaded, torch.load(tmp_path / "model.pt", weights_only=False)):
        assert [type(m) for m in made.modules() if not isinstance(m, nn.BatchNorm2d)] == [
            type(m) for m in reference.modules() if not isinstance(m, nn.BatchNorm2d)
        ]
        assert_alike(made, copy.deepcopy(reference), [images])
        assert fused_calls(fuse(made), images)[1] == NET_CALLS


def test_fusing_again_follows_changes():
    model, reference = pair(Net)
    classes = [type(m) for m in fuse(model).modules()]
    assert [type(m) for m in fuse(model).modules()] == classes
    model.blocks[0].relu = reference.blocks[0].relu = nn.SELU()
    assert fused_calls(fuse(model), x(4, 3, 8, 8))[1] == {
        "relu": 2, "add+relu": 1, "add": 1, "none": 2
    }  # fmt: skip
    model.blocks[0].relu = reference.blocks[0].relu = nn.SiLU()
    found = fused_calls(fuse(model), x(4, 3, 8, 8))[1]
    assert found == {"relu": 2, "silu": 1, "add+silu": 1, "add+relu": 1, "none": 1}


def test_revert_gives_the_classes_back():
    model, reference = pair(Net)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    handle = model.blocks[0].bn1.register_forward_hook(lambda *_: None)
    fuse(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert type(model.blocks[0]).__name__ == "Block"
    assert isinstance(model.blocks[0], Block)
    assert revert(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert model.blocks[0].bn1._forward_hooks
    handle.remove()
    assert [sorted(vars(m)) for m in model.modules()] == [
        sorted(vars(m)) for m in reference.modules()
    ]
    assert_alike(model, reference, [x(4, 3, 8, 8)])


def test_revert_keeps_what_pytorch_has_no_type_for():
    model = nn.Sequential(
        FusedBatchNormAct2d(4),
        FusedBatchNorm2d(4, biased_running_var=True),
        FusedBatchNorm2d(4, skip_nonfinite=True),
        FusedBatchNorm2d(4),
    )
    kinds = [type(m) for m in revert(model)]
    assert kinds == [FusedBatchNormAct2d, FusedBatchNorm2d, FusedBatchNorm2d, nn.BatchNorm2d]


class MyNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_norms_of_other_types_stay_and_are_named():
    lazy, sync = nn.LazyBatchNorm2d(), nn.SyncBatchNorm(4)
    model, reference = pair(lambda: nn.Sequential(MyNorm(4), nn.ReLU(), nn.BatchNorm2d(4)))
    model.add_module("lazy", lazy)
    model.add_module("sync", sync)
    fuse(model)
    assert explain(model).unknown == {
        "0": "MyNorm", "lazy": "LazyBatchNorm2d", "sync": "SyncBatchNorm"
    }  # fmt: skip
    assert "0 stays a MyNorm." in str(explain(model))
    assert type(lazy) is nn.LazyBatchNorm2d
    del model[3:]
    assert_alike(model, reference, [x()])
    lazy(x())
    assert type(convert(lazy)) is FusedBatchNorm2d


def test_shared_modules_and_meta_models_fuse():
    block = Block()
    model, reference = pair(lambda: nn.Sequential(block, nn.ReLU(), block))
    fuse(model)
    assert_alike(model, reference, [x()])
    assert fused_calls(model, x())[1] == {"relu": 2, "add+relu": 2}
    model = fuse(Net().to("meta"))
    assert fused_calls(model, x(4, 3, 8, 8).to("meta"))[1] == NET_CALLS


def test_what_is_no_model_is_refused():
    for function in (convert, fuse, revert):
        with pytest.raises(TypeError, match="model must be a module, but got a Tensor"):
            function(x())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused_and_a_scripted_part_stays():
    scripted = torch.jit.script(Block())
    with pytest.raises(TypeError, match="fuse it before scripting"):
        fuse(scripted)
    model, reference = pair(lambda: nn.Sequential(Block(), nn.BatchNorm2d(4), nn.ReLU()))
    model.append(scripted)
    reference.append(copy.deepcopy(scripted))
    fuse(model)
    assert model(inputs := x()).equal(reference(inputs))


def test_a_fused_model_converts_to_sync_batch_norm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(Net()))
    reference = revert(copy.deepcopy(model))
    model.eval()
    with torch.no_grad():
        assert model(images := x(4, 3, 8, 8)).equal(reference.eval()(images))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 6


def test_norms_of_a_fused_model_fold_into_convolutions():
    model, reference = pair(Net)
    fuse(model).eval()
    reference.eval()
    images = x(4, 3, 8, 8)
    block = model.blocks[0]
    block.conv1 = torch.nn.utils.fusion.fuse_conv_bn_eval(block.conv1, block.bn1)
    block.bn1 = nn.Identity()
    torch.testing.assert_close(model(images), reference(images))
    whole = torch.fx.experimental.optimization.fuse(fuse(copy.deepcopy(reference)))
    torch.testing.assert_close(whole(images), reference(images))


def test_a_fused_model_is_traced_symbolically():
    model, reference = pair(Net)
    traced = fx.symbolic_trace(fuse(model))
    norms = [n for n in traced.graph.nodes if n.op == "call_module" and ("bn" in n.target)]
    assert len(norms) == 4
    assert_alike(traced, reference, [x(4, 3, 8, 8)])


def test_a_graph_is_edited(tmp_path):
    """The graph is one that `torch.fx` traced before the network was fused."""
    model, reference = (fx.symbolic_trace(net) for net in pair(Net))
    steps = [(node.op, node.target) for node in model.graph.nodes]
    assert fuse(model) is model
    model.recompile()
    images = x(4, 3, 8, 8)
    _, calls = fused_calls(model, images)
    assert calls == NET_CALLS
    assert_alike(model, reference, [images])
    found = explain(fuse(model))
    assert sorted(found.kinds.values()) == sorted(["act"] * 3 + ["add+act"] * 2 + ["plain"])
    assert set(found.reasons.values()) == {
        "two norms feed one addition, and the other one takes it"
    }
    model.graph.lint()
    torch.save(model, tmp_path / "graph.pt")
    loaded = torch.load(tmp_path / "graph.pt", weights_only=False)
    # Loading traces the code again, and so finds the modules' calls instead of the fused ones.
    assert loaded(images).equal(model(images))
    assert fused_calls(fuse(loaded), images)[1] == NET_CALLS
    assert fused_calls(copy.deepcopy(model), images)[1] == NET_CALLS
    assert [(node.op, node.target) for node in revert(model).graph.nodes] == steps
    reference(images)
    assert_alike(model, reference, [images])


def test_a_graph_with_functions_is_edited():
    def forward(self, x):
        y = F.leaky_relu(self.bn(x), 0.3, inplace=True)
        return torch.sigmoid(self.nothing(y + self.drop(self.bn2(x))))

    parts = {"nothing": nn.Identity(), "drop": nn.Dropout(0.0)}
    model, reference = (fx.symbolic_trace(m) for m in pair(lambda: Own(forward, **parts)))
    fuse(model)
    assert_alike(model, reference, [x()])
    assert fused_calls(model, x())[1] == {"leaky_relu": 1, "add+sigmoid": 1}
    assert_alike(revert(model), reference, [x()])
    assert fused_calls(model, x())[1] == {}


def test_replicas_of_data_parallel_are_fused():
    model, reference = pair(Net)
    replica = fuse(model)._replicate_for_data_parallel()
    images = x(4, 3, 8, 8)

    def replicate(module, parent):
        for name, child in parent._modules.items():
            if child is not None:
                module._modules[name] = child._replicate_for_data_parallel()
                replicate(module._modules[name], child)
        for name, parameter in parent._parameters.items():
            # `torch.nn.parallel.replicate` does the same.
            if parameter is None:
                module._parameters[name] = None
            else:
                setattr(module, name, parameter * 1)
        module._former_parameters = {}

    replicate(replica, model)
    output, calls = fused_calls(replica, images)
    assert calls == NET_CALLS
    assert output.equal(reference(images))


def test_nothing_but_class_and_call_differ():
    code = """
import torch, fastbn, inspect
from tests.models import Net, Block
model = fastbn.fuse(Net())
assert inspect.signature(model.forward) == inspect.signature(Net().forward)
assert repr(model).replace('FusedBatchNorm2d', 'BatchNorm2d') == repr(Net())
assert 'torch._dynamo' not in __import__('sys').modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_explain_says_what_became_of_norms():
    model = Net()
    images = x(4, 3, 8, 8)
    assert set(explain(convert(model)).kinds.values()) == {"plain"}
    assert "plain because the model is not fused" in str(explain(model))
    found = explain(fuse(model), images)
    kinds = {"stem.1": "act", "blocks.0.bn1": "act", "blocks.0.bn2": "add+act",
             "blocks.1.bn1": "act", "blocks.1.bn2": "plain",
             "blocks.1.downsample.1": "add+act"}  # fmt: skip
    assert found.kinds == kinds
    # These were counted by hand, in elements: BN+ReLU saves 5 tensors, BN+add+ReLU saves 5 and
    # 29/32 in float32.
    big, small = 4 * 4 * 8 * 8, 4 * 6 * 4 * 4
    assert found.saved_bytes == round(4 * ((2 * 5 + 5.90625) * big + (5 + 5.90625) * small))
    words = str(found).splitlines()
    assert words[0] == "6 batch norms are fastbn's."
    assert "    3 norm and activation" in words
    buffer = io.StringIO()
    print(found, file=buffer)
    assert "A training step reads and writes" in buffer.getvalue()


# The following forwards ask for or change what a graph can't show. An earlier way of tracing used
# the answers that it got in the trace for all later calls.


def answered_for_good():
    def asks_for_a_computed_type(self, x):
        y = self.bn(x)
        return self.relu(y) if isinstance(y, torch.Tensor) else y

    def compares_a_type(self, x):
        return self.relu(self.bn(x)) if type(x) is torch.Tensor else self.bn(x)

    def asks_for_an_attribute(self, x):
        y = self.conv(x)
        return self.relu(self.bn(y * 2 if hasattr(y, "logits") else y))

    def unpacks_none(self, x):
        x, skip = x if isinstance(x, tuple) else (x, None)
        y = self.bn(x)
        return y if skip is None else self.relu(y + skip)

    def asks_for_the_grad_mode(self, x):
        y = self.bn(x)
        return self.relu(y) if torch.is_grad_enabled() else y

    def switches_autocast_off(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.relu(self.bn(x.float()))

    def draws_from_numpy(self, x):
        import numpy

        return self.relu(self.bn(x)) * (1 if numpy.random.rand() < 0.5 else 2)

    def reads_an_object(self, x):
        y = self.bn(x)
        return self.relu(y) if self.config.active else y

    def asks_for_a_childs_type(self, x):
        y = self.bn(x)
        return self.relu(y) if isinstance(self.child, nn.Identity) else y

    def calls_a_method(self, x):
        return self.relu(self.bn(x)) * self.factor()

    def reads_the_statistics(self, x):
        return self.relu(self.bn(x) + x * self.bn.running_mean.view(1, -1, 1, 1))

    def changes_the_weight(self, x):
        y = self.bn(x)
        self.bn.bias.data.add_(1)
        return self.relu(y + x)

    def uses_a_child_that_may_change_its_input(self, x):
        h = self.conv(x)
        return self.relu(self.bn(h) + self.short(h))

    def writes_out(self, x):
        h = self.conv(x)
        y = self.bn(h)
        torch.add(h.detach(), 1, out=h.detach())
        return self.relu(y + x)

    def changes_data(self, x):
        z = x.view(x.shape)
        x.data += 1
        return self.relu(self.bn(z))

    def changes_a_view(self, x):
        z = x.mT
        z += 1
        return self.relu(self.bn(x))

    def saves_a_feature(self, x):
        y = self.bn(x)
        self.features["y"] = y.detach()
        return self.relu(y)

    def deletes(self, x):
        if hasattr(self, "temporary"):
            del self.temporary
        return self.relu(self.bn(x))

    def adds_a_list(self, x):
        h = [x]
        h = h + [1]  # noqa: RUF005
        y = self.bn(h[0])
        r = self.inplace(x)
        return self.relu(y + r)

    def has_an_infinite_limit(self, x):
        return self.relu(self.bn(x)).clamp(max=self.limit)

    def asks_for_what_is_missing(self, x):
        y = self.bn(x)
        return self.relu(y) if getattr(self, "missing", None) is None else y

    return {name: f for name, f in locals().items() if callable(f)}


class Config:
    active = True


class Doubling(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x) * 2


@pytest.mark.parametrize("name", answered_for_good())
def test_whatever_changes_later_is_seen(name):
    """Compares with an unfused copy before and after changes of all that these forwards look at."""
    forward = answered_for_good()[name]
    model, reference = pair(
        lambda: Own(
            forward, conv=nn.Conv2d(4, 4, 1), config=Config(), child=nn.Identity(),
            short=nn.Identity(), factor=lambda: 1, features={}, limit=float("inf"), temporary=1,
        )
    )  # fmt: skip
    fuse(model)
    changes = (
        lambda m: None,
        lambda m: setattr(m.config, "active", not m.config.active),
        lambda m: setattr(m, "child", nn.Tanh()),
        lambda m: setattr(m, "factor", lambda: 3),
        lambda m: setattr(m, "short", nn.ReLU(inplace=True)),
        lambda m: setattr(m, "missing", 1),
        lambda m: setattr(m, "limit", 0.5),
    )
    batch = x()
    for change in changes:
        for net in (model, reference):
            change(net)
        for grad in (True, False):
            results = []
            for net in (model, reference):
                torch.manual_seed(3)
                np.random.seed(3)
                with torch.set_grad_enabled(grad):
                    results.append(net(batch.clone()).detach())
            assert results[0].equal(results[1])
    assert model.features.keys() == reference.features.keys()
    assert all(type(value) is torch.Tensor for value in model.features.values())
    assert hasattr(model, "temporary") == hasattr(reference, "temporary")
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=0, atol=0)


def test_modules_of_one_class_may_differ_in_a_childs_type():
    def forward(self, x):
        y = self.bn(x)
        y = y * 2 if isinstance(self.relu, nn.Sigmoid) else y
        return self.relu(y)

    class Asking(Own):
        pass

    Asking.forward = forward
    for act in (nn.ReLU(), nn.Sigmoid(), nn.ReLU()):
        torch.manual_seed(0)
        model = Own(forward)
        model.__class__ = Asking
        model.relu = act
        reference = copy.deepcopy(model)
        fuse(model)
        assert model(batch := x()).equal(reference(batch))


def test_a_class_may_define_its_own_call():
    model, reference = pair(
        lambda: nn.Sequential(Doubling(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.ReLU())
    )
    fuse(model)
    assert_alike(model, reference, [x()])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.zeros(x.shape) if isinstance(x, torch.Tensor) else x,
        lambda x: torch.tensor(x.shape[0]) * x,
        lambda x: torch.where(x > 0, x, 0),
    ],
)
def test_functions_in_c_see_no_tensor_in_a_stand_in(make):
    """They once took the tracer's stand-in for a tensor, and the process crashed."""
    model, reference = pair(lambda: Own(lambda self, x: self.relu(self.bn(x) + make(x))))
    fuse(model)
    assert model(batch := x()).equal(reference(batch))


def test_outputs_keep_their_types_and_layouts():
    from collections import OrderedDict

    model, reference = pair(
        lambda: Own(lambda self, x: OrderedDict(out=self.relu(self.bn(x)), again=x))
    )
    output = fuse(model)(batch := x())
    assert type(output) is OrderedDict
    assert list(output) == ["out", "again"]
    assert output["out"].equal(reference(batch)["out"])
    model, reference = pair(lambda: Own(lambda self, x, r: self.relu(r + self.bn(x))))
    fuse(model)
    inputs = x(), x().contiguous(memory_format=torch.channels_last)
    assert model(*inputs).stride() == reference(*inputs).stride()


def test_a_residual_of_none_is_an_error():
    model = fuse(Own(lambda self, x, r: self.relu(self.bn(x) + r)))
    with pytest.raises(TypeError):
        model(x(), None)


def test_modules_of_one_class_fuse_with_numbers_of_their_own():
    def forward(self, x):
        return self.relu(self.bn(x)) * self.alpha

    class Scaled(Own):
        pass

    Scaled.forward = forward
    for i in range(24):
        model = Own(forward, alpha=i / 7)
        model.__class__ = Scaled
        fuse(model)
        assert fused_calls(model, x())[1] == {"relu": 1}


def test_other_threads_are_not_disturbed_by_a_trace():
    import threading

    stop, errors = threading.Event(), []
    bystander = Block()

    def work():
        while not stop.is_set():
            try:
                bystander.last = 1
                bystander.bn1.running_mean.sum()
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        fuse(Net())
    stop.set()
    thread.join()
    assert not errors
