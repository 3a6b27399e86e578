"""Converts Keras models to fastbn's batch norm, and trains, saves and loads them."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastbn

keras = pytest.importorskip("keras")

from keras import layers  # noqa: E402

from fastbn.keras import BatchNormalization, convert  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with fastbn.use_backend(request.param):
        yield request.param


def sequential():
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(4, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.Conv2D(4, 3, use_bias=False),
            layers.BatchNormalization(momentum=0.8),
            layers.ReLU(negative_slope=0.1),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, activation="softmax"),
        ]
    )


def deferred():
    """Returns a model that is built by its first call, and not by an `Input`."""
    model = keras.Sequential(sequential().layers)
    model(images())
    return model


def functional():
    """Returns a model whose first activation is read by two branches; one has an activation too."""
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, padding="same")(inputs)
    x = layers.BatchNormalization(name="first")(x)
    x = layers.ReLU(name="first_relu")(x)
    y = layers.Conv2D(4, 3, padding="same")(x)
    y = layers.BatchNormalization(name="second")(y)
    x = layers.Conv2D(4, 3, padding="same")(x)
    x = layers.BatchNormalization(name="third")(x)
    x = layers.Activation("silu", name="third_silu")(x)
    x = layers.Add()([x, y])
    x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(layers.Flatten()(x)))


def nested():
    inputs = keras.Input((6, 6, 3))
    x = layers.TimeDistributed(layers.BatchNormalization())(inputs)
    block = keras.Sequential([layers.BatchNormalization(), layers.Activation("tanh")])
    x = functional()(block(x))
    return keras.Model(inputs, x)


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A custom model like the tutorial's, with a block and the average over the image."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.conv = layers.Conv2D(filters, 3, use_bias=False)
        self.norms = [layers.BatchNormalization()]
        self.pool, self.dense = (
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, activation="softmax"),
        )

    def call(self, x, training=None):
        x = keras.activations.relu(self.norms[0](self.conv(x), training=training))
        return self.dense(self.pool(x))

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


def subclassed():
    model = Subclassed(4)
    model(images())
    return model


# Functions that make models, each with the activations of the converted model's batch norms.
MODELS = {
    sequential: ["relu", "ReLU"],
    deferred: ["relu", "ReLU"],
    functional: ["relu", "linear", "silu"],
    nested: ["linear", "tanh", "relu", "linear", "silu"],
    subclassed: ["linear"],
}


def images(count=16):
    return np.random.default_rng(0).normal(1.0, 2.0, (count, 6, 6, 3)).astype("float32")


def labels(count=16):
    return np.arange(count) % 2


def compiled(model, **options):
    optimizer = keras.optimizers.SGD(0.05)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], **options)
    return model


def norms(model):
    kind = keras.layers.BatchNormalization
    return [layer for layer in model._flatten_layers() if isinstance(layer, kind)]


def names(model):
    """Returns the names of all layers except inputs, to which Keras gives new names."""
    return [layer.name for layer in model.layers if not isinstance(layer, layers.InputLayer)]


def name_of(activation):
    return getattr(activation, "__name__", type(activation).__name__)


def assert_same_weights(a, b, **tolerance):
    assert [w.path.split("/")[-1] for w in a.weights] == [w.path.split("/")[-1] for w in b.weights]
    for x, y in zip(a.weights, b.weights):
        torch.testing.assert_close(x.value, y.value, msg=x.path, **tolerance)


def perturbed(model):
    """Changes all weights from their initial values and returns the model."""
    torch.manual_seed(5)
    for weight in model.weights:
        weight.assign(weight.value + torch.rand_like(weight.value) / 4)
    return model


@pytest.mark.parametrize("make", MODELS)
def test_converted_model_computes_and_trains_alike(make, backend):
    keras.utils.set_random_seed(0)
    theirs = compiled(perturbed(make()))
    before = [w.value.detach().clone() for w in theirs.weights]
    ours = convert(theirs)
    assert [type(norm) for norm in norms(ours)] == [BatchNormalization] * len(MODELS[make])
    assert sorted(name_of(n.activation) for n in norms(ours)) == sorted(MODELS[make])
    if make is not subclassed:  # Keras gives new names to the layers of a subclassed model
        assert names(ours) == names(theirs)
    assert_same_weights(ours, theirs, rtol=0, atol=0)
    x, y = images(), labels()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    options = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0}
    found = ours.fit(x, y, **options).history
    assert all(map(torch.equal, before, [w.value for w in theirs.weights]))
    expected = theirs.fit(x, y, **options).history
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["accuracy"] == expected["accuracy"]
    assert_same_weights(ours, theirs, rtol=1e-3, atol=1e-4)


def test_activation_that_something_else_reads_stays_where_it_is(backend):
    # Two layers read the first norm. The second norm is read by the activation, and it is an output
    # of the model. One activation, which is called twice, follows the last two norms.
    inputs = keras.Input((5,))
    norm = [layers.BatchNormalization() for _ in range(4)]
    added = keras.ops.add(layers.ReLU()(norm[0](inputs)), norm[0].output)
    shown = norm[1](added)
    twice, relu = norm[2](layers.ReLU()(shown)), layers.ReLU()
    relus = relu(norm[3](relu(twice)))
    theirs = perturbed(keras.Model(inputs, [relus, shown]))
    ours = convert(theirs)
    assert [name_of(n.activation) for n in norms(ours)] == ["linear"] * 4
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_layer_of_two_models_keeps_its_own_meaning():
    """The inner model's batch norm is read by a ReLU there, and by a dense layer outside."""
    norm = layers.BatchNormalization()
    inner = keras.Sequential([keras.Input((5,)), norm, layers.ReLU()])
    inputs = keras.Input((5,))
    theirs = perturbed(keras.Model(inputs, [inner(inputs), layers.Dense(2)(norm(inputs))]))
    ours = convert(theirs)
    assert len(norms(ours)) == 1
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


UNFUSED = {
    "another dtype": (layers.BatchNormalization, lambda: layers.ReLU(dtype="float64")),
    "regularised norm": (
        lambda: layers.BatchNormalization(activity_regularizer="l2"), layers.ReLU,
    ),
    "unknown": (layers.BatchNormalization, layers.Softmax),
    "known to nobody else": (
        layers.BatchNormalization, lambda: layers.Activation(keras.activations.selu),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFUSED)
def test_activation_that_the_kernels_cannot_take_stays(case):
    norm, activation = UNFUSED[case]
    theirs = keras.Sequential([keras.Input((5,)), norm(), activation()])
    ours = convert(theirs)
    assert [name_of(n.activation) for n in norms(ours)] == ["linear"]
    assert type(ours.layers[1]) is type(theirs.layers[1])
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(sum(ours.losses), sum(theirs.losses))


def test_features_are_found_by_an_activations_name():
    theirs = perturbed(functional())
    expected, found = (
        keras.Model(model.input, model.get_layer("first_relu").output)(images())
        for model in (theirs, convert(theirs))
    )
    assert (expected == 0).any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_unbuilt_model_of_built_layers_keeps_its_weights():
    theirs = keras.Sequential(perturbed(sequential()).layers)
    ours = convert(theirs)
    assert len(ours.weights) == len(theirs.weights) > 0
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-5)


def test_unbuilt_models_are_converted():
    for make in (lambda: keras.Sequential([layers.BatchNormalization()]), lambda: Subclassed(4)):
        model = convert(make())
        assert model.weights == []
        assert [type(norm) for norm in norms(model)] == [BatchNormalization]
    assert convert(make())(images()).shape == (16, 2)


def test_frozen_layers_stay_frozen():
    theirs = functional()
    theirs.get_layer("first").trainable = False
    ours = convert(theirs)
    assert [v.path for v in ours.trainable_variables] == [
        v.path for v in theirs.trainable_variables
    ]


def test_bad_models_say_what_is_expected():
    with pytest.raises(TypeError, match=r"model must be a keras.Model, but got a BatchNormaliz"):
        convert(layers.BatchNormalization())

    class Forgetful(keras.Model):
        def __init__(self, filters=2):
            super().__init__()
            self.dense = layers.Dense(filters)

        def call(self, x):
            return self.dense(x)

        def get_config(self):
            return {}

    model = Forgetful(3)
    model(np.ones((2, 5), "float32"))
    with pytest.raises(ValueError, match="get_config of Forgetful must describe a model"):
        convert(model)


def test_what_keras_cannot_copy_is_keras_error_and_stays_as_it_was():
    class Configless(keras.Model):
        def __init__(self, filters):
            super().__init__()
            self.dense, self.norm = layers.Dense(filters), layers.BatchNormalization()

        def call(self, x):
            return self.norm(self.dense(x))

    class Keywordless(layers.Layer):
        def __init__(self, filters):
            super().__init__()
            self.dense = layers.Dense(filters)

        def call(self, x):
            return self.dense(x)

    x = np.ones((2, 5), "float32")
    inner = keras.Sequential([keras.Input((5,)), Keywordless(3), layers.BatchNormalization()])
    for model, error, message in (
        (Configless(3), NotImplementedError, r"implement `get_config\(\)`"),
        (inner, TypeError, "deserializing class 'Keywordless'"),
    ):
        before = model(x)
        with pytest.raises(error, match=message):
            convert(model)
        assert not any(isinstance(part, BatchNormalization) for part in model._flatten_layers())
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
@pytest.mark.parametrize("make", [sequential, functional])
def test_weights_go_both_ways_through_files(make, suffix, tmp_path):
    theirs = perturbed(make())
    ours = convert(theirs)
    perturbed(ours)
    for source, target in ((theirs, ours), (ours, theirs)):
        path = str(tmp_path / f"model{suffix}")
        source.save_weights(path) if suffix == ".weights.h5" else source.save(path)
        for weight in target.weights:
            weight.assign(weight * 0)
        target.load_weights(path)
        torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-5)
        assert_same_weights(ours, theirs, rtol=0, atol=0)
        perturbed(target)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("make", MODELS)
def test_models_go_both_ways_through_files(make, suffix, tmp_path):
    if make is subclassed and suffix == ".h5":
        pytest.skip("Keras saves no subclassed model in HDF5")
    theirs = compiled(perturbed(make()))
    ours = convert(theirs)
    ours.save(tmp_path / f"ours{suffix}")
    theirs.save(tmp_path / f"theirs{suffix}")
    loaded = keras.saving.load_model(tmp_path / f"ours{suffix}")
    if make is subclassed:  # loading runs the class's own code, which makes Keras's layers
        loaded = convert(loaded)
    assert [type(norm) for norm in norms(loaded)] == [BatchNormalization] * len(MODELS[make])
    again = convert(keras.saving.load_model(tmp_path / f"theirs{suffix}"))
    for model in (loaded, again):
        torch.testing.assert_close(model(images()), theirs(images()), rtol=1e-5, atol=1e-5)
        # From HDF5, Keras loads optimizers that do not know their variables.
        compiled(model).fit(images(), labels(), verbose=0)


def test_another_process_loads_saved_models(tmp_path):
    """The file needs `import fastbn.keras`, or without an activation just Keras's own layer."""
    theirs = perturbed(keras.Sequential([keras.Input((5,)), layers.BatchNormalization()]))
    plain = convert(theirs)
    fused = convert(keras.Sequential([keras.Input((5,)), *theirs.layers, layers.ReLU()]))
    plain.save(tmp_path / "plain.keras")
    fused.save(tmp_path / "fused.keras")
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    code = """
import numpy, sys, warnings
import keras
try:
    keras.saving.load_model("fused.keras")
except (TypeError, ValueError) as error:
    assert "fastbn>BatchNormalization" in str(error) and "imported" in str(error), error
else:
    raise AssertionError
names = {"fastbn>BatchNormalization": keras.layers.BatchNormalization}
model = keras.saving.load_model("plain.keras", custom_objects=names)
assert not any(name.startswith("fastbn") for name in sys.modules)
numpy.save("plain.npy", model.predict(numpy.load("x.npy"), verbose=0))

import fastbn.keras
model = keras.saving.load_model("fused.keras")
assert type(model.layers[0]) is fastbn.keras.BatchNormalization
numpy.save("fused.npy", model.predict(numpy.load("x.npy"), verbose=0))
"""
    code = f"import sys; sys.path.append({str(ROOT)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, model in (("plain", plain), ("fused", fused)):
        found = np.load(tmp_path / f"{name}.npy")
        np.testing.assert_allclose(found, model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    assert (np.load(tmp_path / "fused.npy") == 0).any()


def test_fit_with_weights_and_callbacks_is_keras_fit(backend, tmp_path):
    """Trains with sample weights, checkpoints, an early stop, and a last batch of one sample."""
    results = []
    for name in ("theirs", "ours"):
        keras.utils.set_random_seed(0)
        model = sequential()
        model = compiled(model if name == "theirs" else convert(model))
        checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / f"{name}.keras")
        history = model.fit(
            images(17), labels(17), batch_size=8, epochs=6, shuffle=False, verbose=0,
            sample_weight=np.linspace(0.1, 2, 17), validation_data=(images(), labels()),
            callbacks=[checkpoint, keras.callbacks.EarlyStopping("accuracy", patience=2)],
        ).history  # fmt: skip
        evaluated = model.evaluate(images(), labels(), verbose=0, return_dict=True)
        saved = keras.saving.load_model(tmp_path / f"{name}.keras")
        torch.testing.assert_close(saved(images()), model(images()))
        results.append({**history, "evaluated": [evaluated["loss"]]})
    theirs, ours = results
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), key


def test_the_layer_trains_in_a_custom_loop(backend):
    """Only the class of the layer differs between the two models, as a changed import would do."""
    losses = []
    for norm in (layers.BatchNormalization, BatchNormalization):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((2,)), layers.Dense(3), norm(), layers.ReLU(), layers.Dense(1)]
        )
        optimizer = keras.optimizers.Adam(0.01)
        loss_of = keras.losses.BinaryCrossentropy(from_logits=True)
        points, targets = on_rings()
        found = []
        for _ in range(10):
            loss = loss_of(targets, model(points, training=True))
            model.zero_grad()
            loss.backward()
            variables = model.trainable_variables
            with torch.no_grad():
                optimizer.apply([v.value.grad for v in variables], variables)
            found.append(loss.item())
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def on_rings():
    angle, inner = np.linspace(0, 50, 64), np.arange(64) % 2
    points = (1 - inner / 2)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return points.astype("float32"), inner[:, None].astype("float32")


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="PyTorch 2.11 can't compile Keras's own code"
)
def test_fit_with_jit_compile_has_the_same_losses(monkeypatch):
    """`jit_compile` calls `torch.compile`, which generates no code here."""
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)
    losses = []
    for jit in (False, True):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((2,)), BatchNormalization(activation="relu"), layers.Dense(1)]
        )
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
        points, targets = on_rings()
        history = model.fit(points, targets, batch_size=32, epochs=2, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_summary_shows_the_layers(capsys):
    ours = convert(sequential())
    ours.summary()
    shown = capsys.readouterr().out
    assert shown.count("BatchNormalization") == 2
    assert ours.count_params() == sequential().count_params()
