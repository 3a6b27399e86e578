"""Compares `fastbn.keras.BatchNormalization` with Keras's own layer, option by option."""

import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fastbn

keras = pytest.importorskip("keras")

from fastbn.keras import BatchNormalization  # noqa: E402
from fastbn.keras import layer as layer_module  # noqa: E402

ROOT = Path(__file__).parent.parent
STEPS = 10


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with fastbn.use_backend(request.param):
        yield request.param


@pytest.fixture
def calls(monkeypatch):
    """Lists the inputs that the layer passes to `fastbn.batch_norm`."""
    seen = []

    def spy(input, *args, **kwargs):
        seen.append(input)
        return fastbn.batch_norm(input, *args, **kwargs)

    monkeypatch.setattr(layer_module, "batch_norm", spy)
    return seen


@pytest.fixture(autouse=True)
def _float32():
    yield
    keras.config.set_dtype_policy("float32")


def on_device(shape, dtype=torch.float32):
    where = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(shape, device=where, dtype=dtype)


def both(*args, **kwargs):
    """Returns Keras's layer and fastbn's, with the same initial weights."""
    made = []
    for kind in (keras.layers.BatchNormalization, BatchNormalization):
        keras.utils.set_random_seed(1)
        made.append(kind(*args, **kwargs))
    return made


def trained(layer, shape, steps=STEPS, dtype=torch.float32, **call):
    """Returns all results of some training steps, and the output of an inference after them."""
    torch.manual_seed(2)
    optimizer = keras.optimizers.SGD(0.1)
    results = {}
    for step in range(steps):
        x = (1.5 * on_device(shape) + 1).to(dtype).requires_grad_()
        y = layer(x, training=True, **call)
        variables = layer.trainable_variables
        loss = (y.float() * on_device(shape)).sum() + sum(layer.losses)
        wanted = [x, *(variable.value for variable in variables)]
        grads = torch.autograd.grad(loss, wanted)
        if variables:
            optimizer.apply(grads[1:], variables)
        results |= {f"output {step}": y.detach(), f"loss {step}": loss.detach()}
        results |= {f"gradient {step}.{i}": grad for i, grad in enumerate(grads)}
        weights = {f"{w.name} {step}": w.value.detach().clone() for w in layer.weights}
        results |= weights
    results["inference"] = layer(x.detach(), training=False, **call).detach()
    return results


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


CLOSE = {"rtol": 2e-4, "atol": 1e-4}

SHAPES = {
    "dense": ((8, 5), -1),
    "dense, first axis": ((8, 5), 0),
    "sequence": ((4, 6, 5), -1),
    "sequence, axis 1": ((4, 6, 5), 1),
    "images": ((4, 3, 6, 5), -1),
    "images, channels first": ((4, 3, 6, 5), 1),
    "images, axis between": ((4, 3, 6, 5), 2),
    "volumes": ((2, 3, 4, 3, 5), -1),
    "six axes": ((2, 3, 2, 2, 3, 5), -1),
    "six axes, axis between": ((2, 3, 2, 2, 3, 5), -3),
}

OPTIONS = {
    "momentum and epsilon": {"momentum": 0.7, "epsilon": 0.1},
    "no center": {"center": False},
    "no scale": {"scale": False},
    "neither": {"center": False, "scale": False},
    "initializers": {
        "beta_initializer": "random_normal",
        "gamma_initializer": keras.initializers.RandomUniform(0.5, 1.5),
        "moving_mean_initializer": "ones",
        "moving_variance_initializer": keras.initializers.Constant(3.0),
    },
    "regularizers": {
        "beta_regularizer": "l1",
        "gamma_regularizer": keras.regularizers.L2(0.3),
        "activity_regularizer": keras.regularizers.L2(0.01),
    },
    "constraints": {"beta_constraint": "non_neg", "gamma_constraint": "unit_norm"},
    "float64": {"dtype": "float64"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_training_agrees_for_every_rank_and_axis(shape, backend, calls):
    shape, axis = SHAPES[shape]
    theirs, ours = both(axis=axis)
    assert_same(trained(ours, shape), trained(theirs, shape), **CLOSE)
    assert len(calls) == STEPS + 1


@pytest.mark.parametrize("options", OPTIONS)
def test_training_agrees_with_every_option(options, backend, calls):
    theirs, ours = both(**OPTIONS[options])
    shape, dtype = (4, 3, 6, 5), getattr(torch, ours.compute_dtype)
    found = trained(ours, shape, dtype=dtype)
    assert_same(found, trained(theirs, shape, dtype=dtype), **CLOSE)
    assert len(calls) == STEPS + 1
    assert [w.name for w in ours.weights] == [w.name for w in theirs.weights]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_training_agrees_in_half_precision(policy, backend, calls):
    """Allows for Keras's additional rounding and for PyTorch's sums in half precision on a CPU."""
    theirs, ours = both(dtype=policy)
    found, expected = trained(ours, (8, 4, 4, 5)), trained(theirs, (8, 4, 4, 5))
    assert {name: t.dtype for name, t in found.items()} == {
        name: t.dtype for name, t in expected.items()
    }
    digits = torch.finfo(getattr(torch, ours.compute_dtype)).eps
    assert_same(found, expected, rtol=8 * digits, atol=16 * digits)
    assert len(calls) == STEPS + 1


@pytest.mark.parametrize(
    ("training", "trainable"), [(None, True), (False, True), (True, False), (None, False)]
)
def test_inference_agrees_and_moves_no_statistics(training, trainable, backend, calls):
    results = []
    for layer in both(beta_initializer="random_normal"):
        trained(layer, (8, 5), steps=1)
        layer.trainable = trainable
        before = [w.value.detach().clone() for w in layer.weights]
        torch.manual_seed(3)
        x = on_device((8, 5)).requires_grad_()
        y = layer(x, training=training)
        (grad,) = torch.autograd.grad(y, x, on_device((8, 5)))
        assert all(map(torch.equal, before, [w.value for w in layer.weights]))
        results.append({"output": y.detach(), "gradient": grad})
    assert_same(results[1], results[0], **CLOSE)
    assert len(calls) == 3


def test_statistics_may_change_between_forward_and_backward(backend):
    grads = []
    for layer in both():
        trained(layer, (8, 5), steps=2)
        torch.manual_seed(3)
        x = on_device((8, 5)).requires_grad_()
        y = layer(x, training=False)
        layer(10 * x.detach(), training=True)
        grads += torch.autograd.grad(y, [x, layer.gamma.value], on_device((8, 5)))
    torch.testing.assert_close(grads[2:], grads[:2])


UNSERVED = {
    "mask": ({}, {"mask": torch.arange(24).reshape(4, 6) % 3 > 0}),
    "one value per channel": ({}, {}),
}
if hasattr(both()[0], "renorm"):
    UNSERVED["renorm"] = ({"renorm": True, "renorm_clipping": {"rmax": 2.0, "dmax": 1.0}}, {})


@pytest.mark.parametrize("case", UNSERVED)
def test_what_the_kernels_cannot_compute_has_keras_numbers(case, calls):
    options, call = UNSERVED[case]
    shape = (1, 1, 5) if case == "one value per channel" else (4, 6, 5)
    theirs, ours = both(**options)
    found = trained(ours, shape, dtype=torch.float32, **call)
    assert_same(found, trained(theirs, shape, **call), rtol=0, atol=0)
    # Keras's own code computes the inference too, even with one value per channel.
    assert calls == []


def test_a_mask_of_another_layer_is_used_and_passed_on(backend):
    """The mask is attached to the tensor, and the LSTM behind the norm gets it too."""
    results = []
    for norm in both():
        x = keras.Input((6, 5))
        model = keras.Model(x, keras.layers.LSTM(3)(norm(keras.layers.Masking()(x))))
        values = on_device((4, 6, 5))
        values[:, 4:] = 0
        for weight in model.weights:
            weight.assign(weight * 0 + 0.3)
        results.append((values, model, norm))
    (x, theirs, a), (_, ours, b) = results
    torch.testing.assert_close(ours(x, training=True), theirs(x, training=True))
    torch.testing.assert_close(b.moving_mean.value, a.moving_mean.value)


def test_a_large_mean_leaves_the_variance_its_digits(backend):
    """Compares with float64, since Keras's own formula for the variance loses its digits here."""
    layer = BatchNormalization(momentum=0.0)
    x = 3000 + on_device((64, 5))
    y = layer(x, training=True)
    exact = x.double()
    variance = exact.var(0, correction=0)
    torch.testing.assert_close(layer.moving_variance.value.double(), variance, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        y.double(), (exact - exact.mean(0)) * torch.rsqrt(variance + 1e-3), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize(("axis", "other"), [(-1, 1), (1, -1)])
def test_inputs_are_not_copied(axis, other, calls):
    """Checks contiguous images, and the views that a convolution returns, in both layouts."""
    x = on_device((4, 3, 6, 5))
    for inputs in (x, x.movedim(other, axis)):
        y = BatchNormalization(axis=axis)(inputs, training=True)
        seen = calls.pop()
        assert seen.data_ptr() == inputs.data_ptr()
        assert seen.is_contiguous() or seen.is_contiguous(memory_format=torch.channels_last)
        assert y.stride() == inputs.stride()


ACTIVATIONS = {
    "linear": None,
    "relu": "relu",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu",
    "silu": "swish",
    "gelu": "gelu",
    "hard_silu": "hard_swish",
    "elu": keras.activations.elu,
    "sigmoid": "sigmoid",
    "tanh": keras.activations.tanh,
    "ReLU": keras.layers.ReLU(),
    "ReLU with a slope": keras.layers.ReLU(negative_slope=0.3),
    "ReLU with a limit": keras.layers.ReLU(max_value=6),
    "LeakyReLU": keras.layers.LeakyReLU(0.1),
    "ELU": keras.layers.ELU(0.5),
    "Activation": keras.layers.Activation("silu"),
}
FOLLOWING = {
    "softmax": "softmax",
    "selu": keras.activations.selu,
    "ReLU with another limit": keras.layers.ReLU(max_value=1.0),
    "ReLU with a threshold": keras.layers.ReLU(threshold=0.5),
    "regularised": keras.layers.Activation("relu", activity_regularizer="l2"),
    "a function": lambda x: 2 * x,
}


@pytest.mark.parametrize("name", [*ACTIVATIONS, *FOLLOWING])
def test_every_activation_agrees_with_keras(name, backend, monkeypatch):
    activation = (ACTIVATIONS | FOLLOWING)[name]
    fused = []

    def spy(*args, activation, **kwargs):
        fused.append(activation)
        return fastbn.batch_norm(*args, activation=activation, **kwargs)

    monkeypatch.setattr(layer_module, "batch_norm", spy)
    ours, norm = BatchNormalization(activation=activation), keras.layers.BatchNormalization()
    theirs = keras.Sequential([norm, keras.layers.Lambda(keras.activations.get(activation))])
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        x = (2 * on_device((8, 5))).requires_grad_()
        y = layer(x, training=True)
        (grad,) = torch.autograd.grad(y.sum() + (y * on_device((8, 5))).sum(), x)
        results.append({"output": y.detach(), "gradient": grad, "inference": layer(x).detach()})
    assert_same(results[0], results[1], **CLOSE)
    assert ("none" not in fused) == (name in ACTIVATIONS and name != "linear")
    assert len(fused) == 2


# A function of a user's own is left out, since Keras saves a lambda only in files of models.
@pytest.mark.parametrize(
    "name", [*ACTIVATIONS, *[name for name in FOLLOWING if name != "a function"]]
)
def test_activation_survives_the_config(name):
    activation = (ACTIVATIONS | FOLLOWING)[name]
    layer = BatchNormalization(activation=activation)
    config = keras.saving.serialize_keras_object(layer)
    assert config["registered_name"] == "fastbn>BatchNormalization"
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is BatchNormalization
    x = on_device((8, 5))
    torch.testing.assert_close(again(x, training=True), layer(x, training=True))


def test_an_unknown_activation_is_keras_error():
    with pytest.raises(ValueError, match=r"Could not interpret activation.*rellu"):
        BatchNormalization(activation="rellu")


def test_config_without_an_activation_is_keras_own():
    options = {"axis": 1, "momentum": 0.7, "name": "norm", "gamma_regularizer": "l2"}
    theirs, ours = both(**options)
    assert ours.get_config() == theirs.get_config()
    assert BatchNormalization(2, 0.9, 0.1).get_config()["epsilon"] == 0.1


def test_weights_train_on_in_pytorch(backend):
    """Follows what examples/README.md says about weights from Keras."""
    theirs = keras.layers.BatchNormalization()
    trained(theirs, (8, 5), steps=2)
    norm = fastbn.FusedBatchNorm1d(5, eps=1e-3, momentum=0.01, biased_running_var=True)
    names = ("weight", "bias", "running_mean", "running_var")
    weights = (weight.value.detach().clone() for weight in theirs.weights)
    norm.load_state_dict(dict(zip(names, weights)), strict=False)
    norm.to(theirs.gamma.value.device)
    for _ in range(STEPS):
        x = 3 * on_device((8, 5))
        torch.testing.assert_close(norm(x), theirs(x, training=True), **CLOSE)
    torch.testing.assert_close(norm.running_var, theirs.moving_variance.value.detach())
    torch.testing.assert_close(norm.eval()(x), theirs(x), **CLOSE)


def test_synchronized_is_keras_error():
    with pytest.raises(ValueError, match="only supported with the TensorFlow backend"):
        BatchNormalization(synchronized=True)


def test_axis_out_of_range_is_keras_error():
    for layer in both(axis=4):
        with pytest.raises((ValueError, IndexError)):
            layer(on_device((2, 3)))


def test_stateless_call_changes_nothing(backend):
    outcomes = []
    for layer in both():
        layer.build((8, 5))
        torch.manual_seed(3)
        x = on_device((8, 5))
        given = [v.value.detach().clone() for v in layer.non_trainable_variables]
        kept = [value.clone() for value in given]
        weights = [v.value.detach() for v in layer.trainable_variables]
        y, updated = layer.stateless_call(weights, given, x, training=True)
        assert all(map(torch.equal, given, kept))
        assert all(torch.equal(v.value, k) for v, k in zip(layer.non_trainable_variables, kept))
        outcomes.append([y.detach(), *(value.detach() for value in updated)])
    torch.testing.assert_close(outcomes[1], outcomes[0], **CLOSE)
    assert not torch.equal(outcomes[1][1], kept[0])


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="PyTorch 2.11 can't compile Keras's own code"
)
def test_compiled_layer_has_one_graph(backend):
    theirs, ours = both()
    for layer in (theirs, ours):
        layer.build((8, 5))
    call = torch.compile(lambda x: ours(x, training=True), backend="aot_eager", fullgraph=True)
    x = on_device((8, 5))
    torch.testing.assert_close(call(x), theirs(x, training=True), **CLOSE)
    torch.testing.assert_close(ours.moving_variance.value, theirs.moving_variance.value)


def fake_keras(version, backend):
    module = types.ModuleType("keras")
    module.__version__ = version
    module.config = types.SimpleNamespace(backend=lambda: backend)
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "needs Keras 3, which is not installed: pip install keras"),
        (fake_keras("2.15.0", "tensorflow"), "needs Keras 3, but found Keras 2.15.0: pip install"),
        (fake_keras("3.0.0", "jax"), "runs on 'jax': set the environment variable KERAS_BACKEND"),
    ],
    ids=["no Keras", "Keras 2", "another backend"],
)
def test_import_without_the_right_keras_says_what_to_do(module, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", module)
    with pytest.raises(ImportError, match=message):
        runpy.run_path(str(ROOT / "fastbn" / "keras" / "requirements.py"))


def test_import_under_another_keras_backend_is_an_error():
    """The message is the same whether that backend is installed or not."""
    done = subprocess.run(
        [sys.executable, "-c", "import fastbn.keras"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"KERAS_BACKEND": "tensorflow"},
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: fastbn.keras needs Keras on the torch backend, but ")
    assert last.endswith("KERAS_BACKEND=torch before Python imports keras")


def test_fastbn_never_imports_keras():
    code = "import sys, fastbn; sys.exit(any(m.partition('.')[0] == 'keras' for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
