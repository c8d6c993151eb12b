"""`loaders.huggingface`: transformers' own answers, from directories as transformers saves them."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.artifacts import resolve
from loaders.base import Artifact, InferError, LoadedModel, LoaderError, Tensor, TensorSpec

pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")

import torch
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece

from loaders.huggingface import HuggingfaceLoader
from mesh.local_cluster import LocalPod, ready

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LOADER = HuggingfaceLoader()
GOOD, BAD = ["good", "great", "fine", "lovely", "excellent"], ["bad", "awful", "poor", "sad", "terrible"]
TEXTS = ["The film was great , and lovely !", "a poor story", "its story was sad and it seemed awful to me", "", "ä"]


def sentences(words: list[str], seed: int) -> list[str]:
    """Fifty, each with two of the words."""
    rng = np.random.default_rng(seed)
    rest = ["the", "film", "was", "and", "its", "story", "seemed", "to", "me", "a", ",", "!"]
    made = (rng.permutation([*rng.choice(rest, rng.integers(3, 12)), *rng.choice(words, 2)]) for _ in range(50))
    return [" ".join(map(str, words)) for words in made]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    texts = [*sentences(GOOD, 0), *sentences(BAD, 1)]
    own = Tokenizer(WordPiece(unk_token="[UNK]"))
    own.normalizer, own.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    own.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=16, **names)


def config(**more: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertConfig(vocab_size=200, max_position_embeddings=16, **sizes, **more)


@pytest.fixture(scope="session")
def classifier(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that has learnt which words are good."""
    torch.manual_seed(0)
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    model = transformers.BertForSequenceClassification(config(**labels))
    feeds = tokenizer([*sentences(GOOD, 0), *sentences(BAD, 1)], padding=True, truncation=True, return_tensors="pt")
    wanted, optimizer = torch.tensor([1] * 50 + [0] * 50), torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(15):
        model(**feeds, labels=wanted).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return saved(model, tokenizer, tmp_path_factory.mktemp("models") / "classifier")


@pytest.fixture(scope="session")
def encoder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return saved(transformers.BertModel(config()), tokenizer, tmp_path_factory.mktemp("encoder"))


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(path: Path, **parameters: Any) -> LoadedModel:
    return LOADER.load(Artifact(path, parameters))


def texts(*values: str) -> dict[str, Tensor]:
    return {"args": np.array([value.encode() for value in values], object)}


def run(model: LoadedModel, *values: str) -> dict[str, Tensor]:
    return model.infer(texts(*values), [spec.name for spec in model.signature.outputs])


def test_a_classifier_answers_as_the_pipeline_does(classifier: Path) -> None:
    model = load(classifier)
    assert model.signature.inputs == (TensorSpec("text", "BYTES", (-1,)),)
    assert model.signature.outputs[2] == TensorSpec("scores", "FP32", (-1, 2))
    pipeline = transformers.pipeline("text-classification", str(classifier), device="cpu")
    answer = run(model, *TEXTS)
    for n, told in enumerate(pipeline(TEXTS, truncation=True)):
        assert answer["label"][n].decode() == told["label"]
        assert answer["score"][n] == pytest.approx(told["score"], abs=1e-5)
    assert [label.decode() for label in answer["label"][:3]] == ["good", "bad", "bad"]  # it has learnt something
    np.testing.assert_allclose(answer["scores"].max(axis=1), answer["score"])
    assert [answer[name].dtype.name for name in ("score", "scores")] == ["float32", "float32"]


def test_texts_come_in_a_row_or_a_column_and_in_any_number(classifier: Path) -> None:
    model = load(classifier)
    many = (TEXTS * 9)[:40]
    rows = run(model, *many)
    column = model.infer({"x": np.array([[text.encode()] for text in many], object)}, ["scores"])
    np.testing.assert_array_equal(column["scores"], rows["scores"])
    for n in (0, 17, 39):
        np.testing.assert_allclose(run(model, many[n])["scores"], rows["scores"][n : n + 1], atol=1e-5)
    none = run(model)
    assert [none[name].shape for name in ("label", "score", "scores")] == [(0,), (0,), (0, 2)]


@pytest.mark.parametrize(("problem", "sums_to_one"), [("multi_label_classification", False), ("regression", False)])
def test_scores_are_what_the_configuration_says(
    classifier: Path, tmp_path: Path, problem: str, sums_to_one: bool
) -> None:
    shutil.copytree(classifier, tmp_path, dirs_exist_ok=True)
    configured(tmp_path, problem_type=problem)
    pipeline = transformers.pipeline("text-classification", str(tmp_path), device="cpu", top_k=None)
    found = run(load(tmp_path), TEXTS[0])["scores"][0]
    wanted = {each["label"]: each["score"] for each in pipeline([TEXTS[0]])[0]}
    assert found.tolist() == pytest.approx([wanted["bad"], wanted["good"]], abs=1e-5)
    assert (abs(found.sum() - 1) < 1e-3) == sums_to_one


def configured(folder: Path, **settings: Any) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **settings}))


def test_embeddings_are_means_or_the_first_token(encoder: Path, tokenizer: Any) -> None:
    with torch.inference_mode():
        feeds = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
        states = transformers.AutoModel.from_pretrained(encoder).eval()(**feeds).last_hidden_state.numpy()
    mask = feeds["attention_mask"].numpy()[..., None]
    mean = (states * mask).sum(axis=1) / mask.sum(axis=1)
    model = load(encoder)
    assert model.signature.outputs == (TensorSpec("embedding", "FP32", (-1, 32)),)
    np.testing.assert_allclose(run(model, *TEXTS)["embedding"], mean, atol=1e-5)
    np.testing.assert_allclose(run(load(encoder, pooling="cls"), *TEXTS)["embedding"], states[:, 0], atol=1e-5)
    unit = run(load(encoder, normalize=True), *TEXTS)["embedding"]
    np.testing.assert_allclose(unit, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)


def test_a_directory_of_sentence_transformers_says_how_to_pool(encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [{"idx": n, "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(kinds)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    wanted = run(load(encoder, pooling="cls", normalize=True), *TEXTS)["embedding"]
    np.testing.assert_array_equal(run(load(tmp_path), *TEXTS)["embedding"], wanted)
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(LoaderError, match="modules that are not supported: Dense"):
        load(tmp_path)


def test_tokens_have_labels_where_they_stand_in_the_text(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    labels = {"id2label": {0: "O", 1: "B", 2: "I"}, "label2id": {"O": 0, "B": 1, "I": 2}}
    saved(transformers.BertForTokenClassification(config(**labels)), tokenizer, tmp_path)
    pipeline = transformers.pipeline("token-classification", str(tmp_path), device="cpu", ignore_labels=[])
    model = load(tmp_path)
    many = TEXTS[:3] * 12  # more than one run's
    answer = run(model, *many)
    for n, text in enumerate(many):
        told = [(each["entity"], each["start"], each["end"]) for each in pipeline(text)]
        at = np.flatnonzero(answer["labels"][n] != b"")
        found = zip(answer["labels"][n][at], *answer["offsets"][n][at].T, strict=True)
        assert [(label.decode(), start, end) for label, start, end in found] == told
        scores = [each["score"] for each in pipeline(text)]
        np.testing.assert_allclose(answer["scores"][n][at], scores, atol=1e-5)


def test_nothing_of_it_depends_on_other_threads(
    classifier: Path, from_eight_threads: Callable[[Callable[[int], bool]], bool]
) -> None:
    model = load(classifier)
    wanted = [run(model, text)["scores"] for text in TEXTS]
    assert from_eight_threads(lambda n: np.allclose(run(model, TEXTS[n % 5])["scores"], wanted[n % 5], atol=1e-5))


def test_sizes_count_weights_and_tokenizer(classifier: Path) -> None:
    model = load(classifier)
    stored = (classifier / "model.safetensors").stat().st_size
    assert stored < model.size_bytes < stored + 500_000
    assert model.size_bytes * 0.8 < LOADER.estimate_bytes(Artifact(classifier)) < model.size_bytes * 1.25
    model.unload()


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"x": np.ones((2, 2), np.float32)}, r"expected texts, BYTES of shape [n] or [n, 1], got float32 [2, 2]"),
        ({"x": np.full((2, 2), b"", object)}, "expected texts, BYTES of shape [n] or [n, 1]"),
        ({"x": np.full(1, b"\xff", object)}, "a text is not UTF-8: invalid start byte at byte 0"),
        ({"x": np.full(1, b"", object), "y": np.full(1, b"", object)}, "takes one input of texts, got 2"),
    ],
)
def test_what_is_no_text_is_refused(classifier: Path, inputs: dict[str, Tensor], says: str) -> None:
    with pytest.raises(InferError) as refused:
        load(classifier).infer(inputs, ["label"])
    assert says in str(refused.value)
    assert refused.value.bad_input


def test_a_pickle_is_refused_unless_allowed(classifier: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    shutil.copytree(classifier, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LoaderError, match="refused without --allow-code bin"):
        resolve("huggingface", str(tmp_path), allowed_code=frozenset())
    path = resolve("huggingface", str(tmp_path), allowed_code=frozenset(["bin"]))
    np.testing.assert_allclose(run(load(path), *TEXTS)["scores"], run(load(classifier), *TEXTS)["scores"], atol=1e-6)


def cut(name: str, size: int) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "parameters", "says"),
    [
        (cut("model.safetensors", 4), {}, "model.safetensors is no safetensors file, or was cut"),
        (cut("model.safetensors", 20_000), {}, "SafetensorError"),
        (cut("config.json", 9), {}, "config.json is not JSON"),
        (lambda path: (path / "config.json").unlink(), {}, "config.json does not exist"),
        (lambda path: (path / "tokenizer.json").unlink(), {}, "tokenizer.json does not exist"),
        (cut("tokenizer.json", 100), {}, "JSONDecodeError"),
        (lambda path: configured(path, model_type="none"), {}, "does not recognize this architecture"),
        (
            lambda path: configured(path, model_type="own", auto_map={"AutoConfig": "own.Config"}),
            {},
            "needs code of its author (auto_map in config.json), which is never run",
        ),
        (lambda path: configured(path, hidden_size=64), {}, "are not of the size that config.json tells"),
        (lambda path: None, {"task": "token-classification", "normalise": 1}, "unknown parameter 'normalise'"),
        (lambda path: None, {"task": "fill-mask"}, "parameter 'task' is 'fill-mask': expected text-classification,"),
        (
            lambda path: None,
            {"max_length": 17},
            "parameter 'max_length' is 17: expected a number of tokens from 1 to 16",
        ),
        (lambda path: None, {"task": "feature-extraction", "pooling": "max"}, "parameter 'pooling' is 'max'"),
        (
            lambda path: None,
            {"task": "feature-extraction", "normalize": 1},
            "parameter 'normalize' is 1: expected true",
        ),
    ],
)
def test_why_it_does_not_load(
    classifier: Path, tmp_path: Path, spoil: Callable[[Path], Any], parameters: dict[str, Any], says: str
) -> None:
    shutil.copytree(classifier, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    with pytest.raises(LoaderError) as refused:
        load(tmp_path, **parameters)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_pod_serves_it_to_any_v2_client(classifier: Path, tmp_path: Path) -> None:
    triton = pytest.importorskip("tritonclient.grpc")
    pod = LocalPod("pod-1", "memory://", tmp_path / "pod.log", {"models": str(classifier.parent)})
    pod.start()
    try:
        asyncio.run(ready([pod]))
        with triton.InferenceServerClient(pod.address) as client:
            given = triton.InferInput("array_inputs", [5], "BYTES")  # as MLServer's runtime has it
            given.set_data_from_numpy(texts(*TEXTS)["args"])
            answer = client.infer(classifier.name, [given])
            told = client.get_model_metadata(classifier.name)
    finally:
        pod.terminate()
        status = pod.wait()
    assert status == 0
    assert told.platform == "huggingface_transformers"
    wanted = run(load(classifier), *TEXTS)
    assert answer.as_numpy("label").tolist() == wanted["label"].tolist()
    np.testing.assert_allclose(answer.as_numpy("scores"), wanted["scores"], atol=1e-5)


def test_a_head_that_was_never_trained_is_refused(encoder: Path) -> None:
    # transformers would make one up at random
    with pytest.raises(LoaderError, match=r"is no text-classification model: its weights lack classifier\.bias"):
        load(encoder, task="text-classification")
