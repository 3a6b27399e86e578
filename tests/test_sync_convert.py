"""`convert_sync_batchnorm` changes the class of norms and nothing else, and `revert` undoes it."""

import copy
import inspect

import pytest
import torch
import torch.nn as nn

import fastbn
from fastbn import FusedSyncBatchNorm, FusedSyncBatchNormAct, convert_sync_batchnorm

X = {nn.BatchNorm1d: (4, 3, 5), nn.BatchNorm2d: (4, 3, 5, 5), nn.BatchNorm3d: (4, 3, 2, 3, 4)}
NORMS = {
    **{kind: FusedSyncBatchNorm for kind in (*X, nn.SyncBatchNorm)},
    fastbn.FusedBatchNorm1d: FusedSyncBatchNorm,
    fastbn.FusedBatchNorm2d: FusedSyncBatchNorm,
    fastbn.FusedBatchNorm3d: FusedSyncBatchNorm,
    fastbn.FusedBatchNormAct1d: FusedSyncBatchNormAct,
    fastbn.FusedBatchNormAct2d: FusedSyncBatchNormAct,
    fastbn.FusedBatchNormAct3d: FusedSyncBatchNormAct,
}


def timm_norm():
    timm = pytest.importorskip("timm", reason="it tests what becomes of timm's norms")
    return timm.layers.BatchNormAct2d


@pytest.mark.parametrize("kind", [*NORMS, "timm"])
def test_a_norm_is_another_class_and_the_same_object(kind, device):
    kind, new = (timm_norm(), FusedSyncBatchNormAct) if kind == "timm" else (kind, NORMS[kind])
    shape = next((X[native] for native in X if issubclass(kind, native)), (4, 3, 5))
    norm = kind(3, eps=0.1, momentum=0.3).to(device)
    # PyTorch's own can't run on a CPU.
    expected = copy.deepcopy(norm).eval() if kind is nn.SyncBatchNorm else copy.deepcopy(norm)
    seen = []
    norm.register_forward_hook(lambda *a: seen.append(a))
    tensors, attributes = norm.state_dict(keep_vars=True), dict(norm.__dict__)
    assert convert_sync_batchnorm(norm, "a group") is norm
    assert type(norm) is new
    assert norm.process_group == "a group"
    assert list(norm.state_dict()) == list(nn.SyncBatchNorm(3).state_dict())
    assert all(t is tensors[name] for name, t in norm.state_dict(keep_vars=True).items())
    norm.train(expected.training)
    x = torch.randn(shape, device=device)
    torch.testing.assert_close(norm(x), expected(x))
    assert len(seen) == 1
    copied = copy.deepcopy(norm)
    for module in (norm, copied):
        # What was fused before stays so under `revert_sync_norm` alone.
        fastbn.sync.convert.revert_sync_norm(module)
        assert type(module) is kind
        assert module.__dict__.keys() == attributes.keys()
        torch.testing.assert_close(module.train(expected.training)(x), expected(x))


def test_models_fused_and_plain_come_back_as_they_were(device):
    def make():
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 3, 1)
        return nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), timm_norm()(3)).to(device)

    x = torch.randn(4, 3, 5, 5, device=device)
    for prepare in (fastbn.fuse, fastbn.convert, lambda model: model):
        model, plain = prepare(make()), make()
        classes = [type(module) for module in plain.modules()]
        convert_sync_batchnorm(model)
        assert type(model[1]) is FusedSyncBatchNorm
        assert type(model[3]) is FusedSyncBatchNormAct
        assert list(model.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(model(x), plain(x))
        fastbn.revert(model)
        assert [type(module) for module in model.modules()] == classes
        torch.testing.assert_close(model(x), plain(x))
        plain.load_state_dict(model.state_dict())


def test_a_group_stays_unless_another_one_is_given():
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group="theirs"), nn.BatchNorm2d(3))
    convert_sync_batchnorm(model)
    assert [norm.process_group for norm in model] == ["theirs", None]
    convert_sync_batchnorm(model, "ours")
    assert [norm.process_group for norm in model] == ["ours", "ours"]
    fastbn.revert(model)
    assert type(model[0]) is nn.SyncBatchNorm
    assert type(model[1]) is nn.BatchNorm2d
    assert not hasattr(model[1], "process_group")


def test_norms_made_as_such_become_what_pytorch_has():
    model = nn.Sequential(
        FusedSyncBatchNorm(3, process_group="ours"),
        FusedSyncBatchNormAct(3),
        FusedSyncBatchNorm(3, biased_running_var=True),
    )
    fastbn.revert(model)
    kinds = [nn.SyncBatchNorm, FusedSyncBatchNormAct, FusedSyncBatchNorm]
    assert [type(module) for module in model] == kinds
    assert model[0].process_group == "ours"


def test_a_norm_of_an_unknown_class_is_named():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Own(3), nn.LazyBatchNorm2d()))
    with pytest.warns(RuntimeWarning, match=r"1\.0 \(Own\), 1\.1 \(LazyBatchNorm2d\); replace"):
        convert_sync_batchnorm(model)
    assert [type(m) for m in (model[0], model[1][0])] == [FusedSyncBatchNorm, Own]
    frozen = fastbn.freeze(nn.BatchNorm2d(3))
    convert_sync_batchnorm(frozen)  # has nothing to share, so there is nothing to warn of
    assert type(frozen) is not FusedSyncBatchNorm
    with pytest.raises(TypeError, match="module must be a module, but got a list"):
        convert_sync_batchnorm([])


def test_constructors():
    """Arguments in PyTorch's and timm's order, and the norm alone for tools that fold norms."""
    theirs, ours = nn.SyncBatchNorm, FusedSyncBatchNorm
    names = [name for name in inspect.signature(theirs).parameters if name != "bias"]
    assert list(inspect.signature(ours).parameters)[: len(names)] == names
    if "bias" in inspect.signature(theirs).parameters:
        assert ours(3, bias=False).bias is None
    form = inspect.signature(fastbn.FusedBatchNormAct2d).parameters
    assert [*inspect.signature(FusedSyncBatchNormAct).parameters.keys() - form.keys()] == [
        "process_group"
    ]
    norm = FusedSyncBatchNormAct(3, process_group="ours", act_layer="silu")
    alone = norm.without_activation()
    assert type(alone) is nn.SyncBatchNorm
    assert alone.process_group == "ours"
    assert alone.weight is norm.weight
    with pytest.raises(RuntimeError, match="they would drop its SiLU"):
        nn.SyncBatchNorm.convert_sync_batchnorm(norm)
