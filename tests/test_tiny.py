"""The built-in benchmarks are what tiny/make.py makes, and its training computes what it should."""
import random
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import model_llava
import model_qwen
from support import checkpoint
from support.benchmarks import load_benchmark
from tiny import batches, make, questions, training
from tiny.batches import CHATML, UNASKED, VICUNA, Batches
from tiny.scenes import draw_scene
from tiny.vocabulary import llava_tokenizer, qwen_tokenizer

TINY = Path(__file__).parents[1] / "tiny"


@pytest.fixture(params=["llava", "qwen"])
def name(request):
    return request.param


@pytest.fixture
def trained(name):
    """A built-in model, and the first batch of its last stage, of one image."""
    model = checkpoint.load_model(TINY / name)
    if name == "llava":
        stage = replace(make.LLAVA_STAGES[-1], images=1)
        batch = Batches(stage, VICUNA, llava_tokenizer())[0]
    else:
        stage = replace(make.QWEN_STAGES[-1], images=1)
        batch = Batches(stage, CHATML, qwen_tokenizer())[0]
    return model, batch


# ---- benchmarks ----------------------------------------------------------------------------------

def test_builtin_benchmarks_have_the_official_layout_and_size():
    mme = load_benchmark("mme", TINY)
    text = load_benchmark("textvqa", TINY)
    for subtask in ("existence", "count", "position", "color", "OCR"):
        pairs = [question for question in mme if question.group == subtask]
        assert len({question.image for question in pairs}) == 40 and len(pairs) == 80
        assert sum(question.gold == ["Yes"] for question in pairs) == 40
    assert len(text) == 235
    assert all(3 <= len(question.gold_normalized) <= 6 for question in text)
    assert all(len(question.gold) == 10 for question in text)


def test_the_first_images_and_questions_are_made_again_byte_for_byte(tmp_path):
    questions.make_mme(tmp_path / "mme", images=3)
    questions.make_textvqa(tmp_path / "textvqa", images=3)
    files = [file for file in tmp_path.rglob("*") if file.suffix in (".jpg", ".txt")]
    assert len(files) == 5 * 6 + 3
    for file in files:
        assert file.read_bytes() == (TINY / file.relative_to(tmp_path)).read_bytes(), file


def test_no_test_image_can_be_a_training_image():
    """Every image holds a word, and a word is for one of the two by its checksum."""
    for test in (True, False):
        rng = random.Random(test)
        words = []
        for _ in range(50):
            words += [word.text for word in draw_scene(rng, test).words]
        assert len(words) >= 50
        assert {zlib.crc32(word.encode()) % 8 == 0 for word in words} == {test}
    for question in load_benchmark("textvqa", TINY):
        assert zlib.crc32(question.gold_normalized.encode()) % 8 == 0


def test_a_training_batch_shows_no_test_image(monkeypatch):
    asked_for = []

    def draw(rng, test, size):
        asked_for.append(test)
        return draw_scene(rng, test, size)
    monkeypatch.setattr(batches, "draw_scene", draw)
    Batches(replace(make.LLAVA_STAGES[0], images=2), VICUNA, llava_tokenizer())[0]
    assert asked_for == [False, False]


# ---- training ------------------------------------------------------------------------------------

def test_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    """120 steps in one go, and stopped between the checkpoint at step 100 and the end."""
    stage = replace(make.LLAVA_STAGES[0], steps=120, decay=120, images=1)
    data = Batches(stage, VICUNA, llava_tokenizer())
    model = make.make_llava(1, llava_tokenizer())
    config = replace(model.config.vision, hidden_size=32, intermediate_size=64)

    def train(folder, stop_at=None):
        monkeypatch.setattr(training, "WORK", folder)
        torch.manual_seed(0)
        tower = model_llava.VisionTower(config, 1)
        heads = training.LabelHeads(32)
        calls = []

        def loss(grid, pixels, labels):
            calls.append(grid)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return heads.loss(tower, pixels, labels)
        module = torch.nn.ModuleList([tower, heads])
        training.train(module, loss, data, torch.device("cpu"))
        return module.state_dict(), len(calls)
    want, steps = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop_at=110)
    got, rest = train(tmp_path / "stopped")
    assert (steps, rest) == (120, 20)
    assert all(want[name].equal(got[name]) for name in want)


def test_doubled_layers_compute_nearly_the_same(name):
    """To first order: where branches add little, doubling changes a small part of even that."""
    make_model = {"llava": make.make_llava, "qwen": make.make_qwen}[name]
    tokenizer = {"llava": llava_tokenizer, "qwen": qwen_tokenizer}[name]()
    torch.manual_seed(0)
    model = make_model(2, tokenizer).eval().requires_grad_(False)
    for key, p in model.named_parameters():
        in_decoder = ".layers." in key and "tower" not in key
        if in_decoder and key.endswith(("o_proj.weight", "down_proj.weight")):
            p /= 100
    doubled = training.double(model, make_model).eval().requires_grad_(False)
    image = draw_scene(random.Random(0), test=False).image
    want = model.run(model.begin(image, "What does the red word say?"))
    got = doubled.run(doubled.begin(image, "What does the red word say?"))
    added = (want.x - want.embeds).norm()
    assert doubled.num_layers == 4 and (got.x - want.x).norm() < 0.1 * added


# ---- the loss ------------------------------------------------------------------------------------

def loss_of(model, grid, pixels, *columns):
    return training.answer_loss(model, training.masked_layer, grid.tolist(), pixels, *columns)


def test_a_built_in_model_answers_what_it_was_trained_on(trained):
    """Prompt, pixels, positions and targets of a batch are those that the models were trained with:
    targets one row off would cost about 8."""
    model, batch = trained
    assert loss_of(model, *batch) < 0.2


def test_a_packed_question_has_the_loss_it_has_alone(trained):
    """Of many questions packed behind one image: same ids, same positions, same logits."""
    model, (grid, pixels, *columns) = trained
    block = columns[2]
    total = 0
    count = 0
    for number in range(1, block.max() + 1):
        rows = (block[0] == 0) | (block[0] == number)
        alone = [column[..., rows] for column in columns]
        asked = (alone[3] != UNASKED).sum()
        total += asked * loss_of(model, grid, pixels, *alone)
        count += asked
    assert block.max() > 3
    packed = loss_of(model, grid, pixels, *columns)
    torch.testing.assert_close(packed, total / count, rtol=1e-3, atol=1e-4)     # order of the sums


def test_the_training_layer_is_the_models_own_where_nothing_is_packed(name, trained):
    model, _ = trained
    image = draw_scene(random.Random(0), test=False).image
    stream = model.begin(image, "What does the red word say?")
    T = stream.x.shape[1]
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    rope = model.cos_sin(stream.pos, torch.float32)
    if name == "llava":
        layer, rotate = model.language_model.layers[0], model_llava.rotate
    else:
        layer, rotate = model.model.layers[0], model_qwen.rotate
    with torch.inference_mode():
        got = training.masked_layer(layer, stream.x, rope, mask, rotate)
    want = model.run(stream, stop=1).x
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)     # another kernel, float32
