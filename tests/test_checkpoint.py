"""A checkpoint folder: every layout it comes in loads to the same model."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import GOLDEN, MODULES, ONE_OF_EACH, decoder_of, load
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from support import checkpoint
from tokprune import InputError


def linked(name, folder, but=()):
    """The checkpoint in a new folder, without some of its files."""
    folder.mkdir()
    for file in (GOLDEN / name).iterdir():
        if file.name not in but:
            (folder / file.name).symlink_to(file)
    return folder


# ---- layouts -------------------------------------------------------------------------------------

# the recorded LLaVA files are layout B of the four in use, the Qwen files are named as published;
# the others are made of these
LLAVA_IN_MEMORY = [(r"^language_model\.lm_head", "lm_head"),
                   (r"^language_model\.model", "model.language_model"),
                   (r"^multi_modal_projector", "model.multi_modal_projector")]
LAYOUTS = {
    "A, the hub's": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "B, transformers 5": [],
    "C, transformers 5 in memory": LLAVA_IN_MEMORY + [(r"^vision_tower", "model.vision_tower")],
    "D, transformers 4 in memory":
        LLAVA_IN_MEMORY + [(r"^vision_tower\.", "model.vision_tower.vision_model.")],
    "qwen, in memory": [(r"^visual\.", "model.visual."),
                        (r"^model\.(?!visual)", "model.language_model.")]}
CASES = [("llava_grouped", "A, the hub's", 1), ("llava_grouped", "B, transformers 5", 3),
         ("llava_tied", "C, transformers 5 in memory", 1),
         ("llava_grouped", "D, transformers 4 in memory", 3), ("qwen_tied", "qwen, in memory", 1)]


def renamed(name, layout):
    """The tensors of a checkpoint under the names of another layout."""
    tensors = {}
    for file in (GOLDEN / name).glob("*.safetensors"):
        tensors |= load_file(file)
    for pattern, new in LAYOUTS.get(layout, []):
        tensors = {re.sub(pattern, new, key): tensor for key, tensor in tensors.items()}
    return tensors


def write(tensors, name, shards, folder):
    """A folder of those tensors in so many files."""
    for file in ("config.json", "tokenizer.json", "generation_config.json"):
        shutil.copy(GOLDEN / name / file, folder)
    keys = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        part = keys[i::shards]
        file = f"model-{i}.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name, layout, shards", CASES)
def test_every_layout_of_names_loads_to_the_same_weights(name, layout, shards, tmp_path):
    tensors = renamed(name, layout)
    if "C" in layout or "qwen" in layout:
        recorded = json.loads((GOLDEN / f"{name}.json").read_text())["in_memory_keys"]
        assert tensors.keys() == set(recorded) - {"lm_head.weight"}     # both checkpoints are tied
    write(tensors, name, shards, tmp_path)
    want = load(name).state_dict()
    got = MODULES[name].load(tmp_path, "cpu").state_dict()
    assert want.keys() == got.keys()
    assert all(want[key].equal(got[key]) for key in want)


@pytest.mark.parametrize("name, head", [("llava_tied", "language_model.lm_head.weight"),
                                        ("qwen_tied", "lm_head.weight")])
def test_a_tied_head_is_the_embedding_itself_and_a_head_in_the_file_is_used(name, head, tmp_path):
    model = load(name)
    embedding = decoder_of(model).embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == embedding.data_ptr()
    write(renamed(name, "as recorded") | {head: 2 * embedding.bfloat16()}, name, 1, tmp_path)
    assert MODULES[name].load(tmp_path, "cpu").lm_head.weight.equal(2 * embedding)


def test_a_folder_without_an_index_is_every_safetensors_file(tmp_path):
    folder = linked("qwen_tied", tmp_path / "m", but=["model.safetensors.index.json"])
    got = MODULES["qwen_tied"].load(folder, "cpu")
    assert got.lm_head.weight.equal(load("qwen_tied").lm_head.weight)


def test_float16_files_load_to_their_values_in_any_precision(tmp_path):
    tensors = {key: tensor.half() for key, tensor in renamed("qwen_tied", "").items()}
    write(tensors, "qwen_tied", 1, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        got = MODULES["qwen_tied"].load(tmp_path, "cpu", dtype).model.norm.weight
        assert got.equal(tensors["model.norm.weight"].to(dtype))


# ---- tokenizer and the end of an answer ----------------------------------------------------------

@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_tokenizer_saved_with_truncation_and_padding_gives_the_whole_prompt(name, tmp_path):
    """Training leaves both in tokenizer.json: a prompt lost its end, and was answered all the
    same."""
    folder = linked(name, tmp_path / "m", but=["tokenizer.json"])
    tokenizer = Tokenizer.from_file(str(GOLDEN / name / "tokenizer.json"))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64, direction="left")
    tokenizer.save(str(folder / "tokenizer.json"))
    prompt = MODULES[name].PROMPT.format(question="?" * 64)
    assert len(tokenizer.encode(prompt).ids) == 64
    got = MODULES[name].load(folder, "cpu").tokenizer
    assert got.encode(prompt).ids == load(name).tokenizer.encode(prompt).ids
    assert got.encode("no").ids == load(name).tokenizer.encode("no").ids


@pytest.mark.parametrize("generation, config, want", [
    ({"eos_token_id": 0}, {"eos_token_id": 5}, {0}), ({"eos_token_id": [7, 8]}, {}, {7, 8}),
    (None, {"eos_token_id": 5, "text_config": {"eos_token_id": 6}}, {5}),
    ({}, {"text_config": {"eos_token_id": 6}}, {6}),
    ({"eos_token_id": None}, {"eos_token_id": None, "text_config": {}}, {2}), (None, {}, {2})])
def test_eos_tokens_come_from_generation_config_then_config_then_text_config(generation, config,
                                                                             want, tmp_path):
    """config.json was not asked: without generation_config.json a model did not stop."""
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint.read_eos(tmp_path, [2]) == want


# ---- finding the model ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_model_and_its_number_of_layers_are_found_by_model_type(name, tmp_path):
    model = checkpoint.load_model(GOLDEN / name, "cpu", torch.bfloat16)
    assert type(model) is type(load(name))
    assert model.lm_head.weight.dtype == torch.bfloat16
    shutil.copy(GOLDEN / name / "config.json", tmp_path)            # no weights there
    assert checkpoint.read_config(tmp_path).text.num_hidden_layers == model.num_layers


@pytest.mark.parametrize("kind, message", [
    ("llava_llama", "model_type is 'llava_llama'"), ("qwen3_vl_moe", "mixture of experts"),
    ("qwen3_5", "linear attention"), ("gpt2", "want one of llava, qwen2_5_vl, qwen3_vl"),
    (None, "model_type is 'None'"), (["llava"], "want one of llava, ")])
def test_another_model_is_refused_by_its_name(kind, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(InputError, match=message):
        checkpoint.load_model(tmp_path, "cpu")


def test_bounds_go_to_a_model_that_has_them_and_are_refused_for_another():
    config = checkpoint.load_model(GOLDEN / "qwen_tied", "cpu", max_pixels=56 * 56 * 2).config
    assert (config.min_pixels, config.max_pixels) == (56 * 56, 56 * 56 * 2)
    with pytest.raises(InputError, match="min_pixels is 100: model_type 'llava' in .* one size"):
        checkpoint.load_model(GOLDEN / "llava_tied", "cpu", min_pixels=100)
    with pytest.raises(InputError, match="want min_pixels <= max_pixels"):
        checkpoint.load_model(GOLDEN / "qwen_tied", "cpu", min_pixels=9000, max_pixels=100)


def test_on_cuda_cudnn_plans_no_attention_and_rounds_no_convolution(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert checkpoint.device_and_dtype("cpu", None) == (torch.device("cpu"), torch.float32)
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert checkpoint.device_and_dtype("cuda:1", None)[1] == torch.bfloat16
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def test_names_of_models_stand_in_one_place():
    """Nothing else below stairs or in a program asks which models exist."""
    root = Path(__file__).parents[1]
    for file in [*root.glob("*.py"), *root.glob("support/*.py")]:
        if file.name.startswith("model_") or file.name == "checkpoint.py":
            continue
        assert not re.search(r"\b(import|from) model_", file.read_text()), file
