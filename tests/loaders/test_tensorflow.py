"""`loaders.tensorflow` and `loaders.keras`: run by hand where the packages are installed
(`pip install 'densemesh[tensorflow,keras]'`); one environment has Keras on one backend."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import recognised
from loaders.base import Artifact, InferError, LoaderError, Tensor, TensorSpec

os.environ.setdefault("KERAS_BACKEND", "torch")


@pytest.fixture(scope="module")
def tensorflow_loader() -> Any:
    pytest.importorskip("tensorflow")
    from loaders.tensorflow import TensorflowLoader

    return TensorflowLoader()


@pytest.fixture(scope="module")
def tensorflow_model(
    tensorflow_loader: Any, tmp_path_factory: pytest.TempPathFactory, digits: tuple[Tensor, Tensor]
) -> Any:
    """A linear model of digits trained by TensorFlow, its directory and its own scores."""
    import tensorflow as tf

    images, labels = (digits[0] / 16).astype(np.float32), digits[1]
    module = tf.Module()
    module.weights = tf.Variable(tf.zeros((64, 10)))
    for _ in range(30):
        with tf.GradientTape() as tape:
            scores = images @ module.weights
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, scores))
        module.weights.assign_sub(tape.gradient(loss, module.weights) * 2)

    @tf.function(input_signature=[tf.TensorSpec([None, 64], tf.float32, name="images")])  # type: ignore[untyped-decorator]
    def serve(images: Any) -> Any:
        scores = images @ module.weights
        return {"scores": scores, "name": tf.strings.as_string(tf.argmax(scores, 1))}

    path = tmp_path_factory.mktemp("tf") / "model.savedmodel"
    tf.saved_model.save(module, str(path), signatures={"serving_default": serve})
    return path, images, (images @ module.weights).numpy()


def test_answers_are_tensorflows_own(tensorflow_loader: Any, tensorflow_model: Any) -> None:
    path, images, expected = tensorflow_model
    assert recognised(path) == "tensorflow"
    model = tensorflow_loader.load(Artifact(path))
    assert model.signature.inputs == (TensorSpec("images", "FP32", (-1, 64)),)
    assert model.signature.outputs == (TensorSpec("name", "BYTES", (-1,)), TensorSpec("scores", "FP32", (-1, 10)))
    answer = model.infer({"images": images}, ["scores", "name"])
    np.testing.assert_allclose(answer["scores"], expected, rtol=1e-5, atol=1e-5)
    assert answer["name"].tolist() == [str(label).encode() for label in answer["scores"].argmax(1)]
    with pytest.raises(InferError, match="size-incompatible") as refusal:
        model.infer({"images": images[:, 1:]}, ["scores"])
    assert refusal.value.bad_input
    model.unload()


def test_damaged_models_and_absent_signatures(tensorflow_loader: Any, tensorflow_model: Any, tmp_path: Path) -> None:
    path, _, _ = tensorflow_model
    with pytest.raises(LoaderError, match="no signature 'classify': it has serving_default"):
        tensorflow_loader.load(Artifact(path, {"signature": "classify"}))
    (tmp_path / "saved_model.pb").write_bytes((path / "saved_model.pb").read_bytes()[:99])
    with pytest.raises(LoaderError, match="does not load with TensorFlow") as refusal:
        tensorflow_loader.load(Artifact(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def keras_loader() -> Any:
    pytest.importorskip("keras")
    from loaders.keras import KerasLoader

    return KerasLoader()


@pytest.fixture(scope="module")
def keras_model(keras_loader: Any, tmp_path_factory: pytest.TempPathFactory, digits: tuple[Tensor, Tensor]) -> Any:
    import keras

    images, labels = (digits[0] / 16).astype(np.float32), digits[1]
    given = keras.Input((64,), name="images")
    hidden = keras.layers.Dropout(0.5)(keras.layers.Dense(32, "relu")(given))
    model = keras.Model(given, keras.layers.Dense(10, "softmax", name="classes")(hidden))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(images, labels, verbose=0)
    path = tmp_path_factory.mktemp("keras") / "model.keras"
    model.save(path)
    return path, images, model.predict(images, verbose=0)


def test_answers_are_keras_own(keras_loader: Any, keras_model: Any) -> None:
    path, images, expected = keras_model
    assert recognised(path) == "keras"
    model = keras_loader.load(Artifact(path))
    assert model.signature.inputs == (TensorSpec("images", "FP32", (-1, 64)),)
    assert model.signature.outputs == (TensorSpec("classes", "FP32", (-1, 10)),)
    answer = model.infer({"images": images}, ["classes"])["classes"]
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InferError, match="shape") as refusal:
        model.infer({"images": images[:, 1:]}, ["classes"])
    assert refusal.value.bad_input
    model.unload()


def test_lambdas_and_damaged_files_are_refused(keras_loader: Any, keras_model: Any, tmp_path: Path) -> None:
    import keras

    given = keras.Input((2,))
    keras.Model(given, keras.layers.Lambda(lambda x: x + 1)(given)).save(tmp_path / "lambda.keras")
    with pytest.raises(LoaderError, match=r"lambda.keras does not load with Keras .*[Ll]ambda"):
        keras_loader.load(Artifact(tmp_path / "lambda.keras"))
    whole = keras_model[0].read_bytes()
    (tmp_path / "cut.keras").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoaderError, match=r"cut.keras is not a Keras archive"):
        keras_loader.load(Artifact(tmp_path / "cut.keras"))
    with zipfile.ZipFile(tmp_path / "empty.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(LoaderError, match=r"empty.keras does not load with Keras"):
        keras_loader.load(Artifact(tmp_path / "empty.keras"))
