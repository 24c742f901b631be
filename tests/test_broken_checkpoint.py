"""A checkpoint folder that is broken, or of another model, is refused in one line that says why."""
import json
import re
import shutil

import pytest
import torch
from checkpoints import GOLDEN, MODULES, ONE_OF_EACH
from safetensors.torch import load_file, save_file

from support import checkpoint
from tokprune import InputError


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def cut_shard(folder):
    content = shard(folder).read_bytes()
    shard(folder).write_bytes(content[:5000])


def remove_shards(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def only_bin_files(folder):
    remove_shards(folder)
    (folder / "pytorch_model.bin").touch()


def drop_tensor(folder):
    tensors = load_file(shard(folder))
    tensors.popitem()
    save_file(tensors, shard(folder))


def add_tensor(folder):
    tensors = load_file(shard(folder))
    save_file(tensors | {"model.extra.weight": torch.zeros(2)}, shard(folder))


def add_twin(folder):
    """A file of another saving is left beside the others, and there is no index."""
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(shard(folder), folder / "model-00009.safetensors")


def change_shape(folder):
    tensors = load_file(shard(folder))
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:-1].clone()}, shard(folder))


def write_file(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove_file(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize("change, message", [
    (lambda folder: shard(folder).unlink(), "missing: model-00001-of-"),
    (cut_shard, "cannot be read as safetensors"),
    (remove_shards, "no model.safetensors, its index or model-*.safetensors found"),
    (only_bin_files, "its .bin files are not read"),
    (drop_tensor, "tensors are missing, the first is"),
    (change_shape, "config.json wants"),
    (add_tensor, "unknown tensor model.extra.weight"),
    (add_twin, "is a duplicate"),
    (write_file("model.safetensors.index.json", "[1]"), "holds a list, want a JSON object"),
    (write_file("model.safetensors.index.json", '{"weight_map": "x"}'), "want an object"),
    (write_file("model.safetensors.index.json", '{"weight_map": {"a": [1]}}'), "missing: [1]"),
    (write_file("config.json", "{"), "not valid JSON"),
    (write_file("config.json", "[]"), "holds a list, want a JSON object"),
    (remove_file("config.json"), "config.json: not found"),
    (write_file("tokenizer.json", "{}"), "not a valid tokenizer"),
    (remove_file("tokenizer.json"), "tokenizer.json: not found"),
    (write_file("generation_config.json", '{"eos_token_id": "</s>"}'), "want token ids"),
    (shutil.rmtree, "no such folder")])
def test_a_broken_folder_is_refused_in_one_line_that_names_it(change, message, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(GOLDEN / "llava_grouped", folder)
    change(folder)
    with pytest.raises(InputError, match=re.escape(message)) as e:
        checkpoint.load_model(folder, "cpu")
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


def edit(section=None, **fields):
    """What changes an entry of config.json, or of a section of it."""
    def change(config):
        place = config[section] if section else config
        place.update(fields)
    return change


ANY_MODEL = [
    (edit(model_type="llama"), "model_type is 'llama'"),
    (edit(text_config="x"), "text_config is 'x', want an object"),
    (edit("text_config", hidden_size=-64), "hidden_size is -64, want a whole number above 0"),
    (edit("text_config", hidden_size="64"), "hidden_size is '64', want a whole number above 0"),
    (edit("text_config", hidden_size=True), "hidden_size is True, want a whole number above 0"),
    (edit("text_config", rms_norm_eps="a"), "rms_norm_eps is 'a', want a number above 0"),
    (edit("text_config", rope_scaling={"type": "linear", "factor": 2}), "type of the rotary"),
    (edit("text_config", rope_scaling={"type": "yarn"}), "is 'yarn', want 'default' or 'mrope'"),
    (edit("text_config", rope_parameters={"rope_type": "linear"}), "is 'linear'"),
    (edit("text_config", rope_scaling="x"), "rope_scaling is 'x', want an object"),
    (edit("vision_config", patch_size=0), "patch_size is 0")]
LLAVA = [
    (edit(mm_vision_tower="openai/clip-vit-large-patch14-336"), "llava-hf/llava-1.5-7b-hf"),
    (edit("text_config", hidden_act=1), "hidden_act is 1, want 'silu'"),
    (edit("text_config", hidden_act="gelu"), "text_config.hidden_act is 'gelu'"),
    (edit("vision_config", hidden_act="gelu"), "vision_config.hidden_act is 'gelu'"),
    (edit(vision_feature_layer=-5), "vision_feature_layer is -5"),
    (edit(vision_feature_select_strategy="full"), "vision_feature_select_strategy is 'full'")]
QWEN = [
    (edit("text_config", rope_scaling={"type": "yarn", "factor": 4, "mrope_section": [1, 1, 2]}),
     "is 'yarn'"),
    (edit("text_config", rope_scaling={"rope_type": "yarn", "type": "mrope"}), "is 'yarn'"),
    (edit("text_config", rope_parameters={"mrope_section": "112"}), "mrope_section is '112'"),
    (edit("text_config", use_sliding_window=True), "use_sliding_window is True"),
    (edit("text_config", rms_norm_eps=None), "rms_norm_eps is not there"),
    (edit("text_config", rope_scaling=None, rope_parameters=None), "mrope_section is not there")]
BROKEN = [(name, *case) for name in ONE_OF_EACH for case in ANY_MODEL]
BROKEN += [("llava_grouped", *case) for case in LLAVA]
BROKEN += [("qwen_untied", *case) for case in QWEN]


@pytest.mark.parametrize("name, change, message", BROKEN)
def test_a_config_of_another_model_is_refused_in_one_line(name, change, message, tmp_path):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=re.escape(message)) as e:
        MODULES[name].read_config(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("entries, message", [
    ({"min_pixels": "a"}, "min_pixels is 'a', want a whole number above 0"),
    ({"min_pixels": 0}, "min_pixels is 0, want a whole number above 0"),
    ({"size": {"longest_edge": 1.5}}, "max_pixels is 1.5"),
    ({"size": "large"}, "size is 'large', want an object"),
    ({"size": {"height": 336, "width": 336}}, "size has height, width, want shortest_edge")])
def test_bounds_that_are_no_areas_are_refused(entries, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=message):
        checkpoint.read_bounds(tmp_path)
