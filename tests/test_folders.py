"""A checkpoint folder that is broken, of another model, or asks for what is not implemented is
refused in one line that names it; and numbers that are none end a run by the question's name."""
import json
import os
import re
import shutil

import pytest
import torch
from checkpoints import GOLDEN, ONE_OF_EACH, copy_of, load, tensors_of
from official import lines
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import eval as eval_program
import information
import model_qwen3
import tokprune
from support import checkpoint, run
from support.run import ROOT
from tokprune import InputError


def check_refused(folder, message):
    with pytest.raises(InputError, match=re.escape(message)) as e:
        checkpoint.load_model(folder, "cpu")
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


# ---- files ---------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def only_bin_files(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").touch()


def leftover(folder):
    """A file of another saving beside the others, and no index."""
    (folder / INDEX).unlink()
    shutil.copy(first_shard(folder), folder / "model-00009.safetensors")


def resaved(change):
    """Save the first shard again, {name: tensor} changed."""
    def save(folder):
        tensors = load_file(first_shard(folder))
        save_file(change(tensors), first_shard(folder))
    return save


def cast(dtype):
    return resaved(lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize("change, message", [
    (lambda folder: first_shard(folder).unlink(), "missing: model-00001-of-"),
    (lambda folder: os.truncate(first_shard(folder), 5000), "cannot be read as safetensors"),
    (only_bin_files, "model-*.safetensors found (its .bin files are not read"),
    (leftover, "is a duplicate"),
    (resaved(lambda tensors: dict([*tensors.items()][1:])), "tensors are missing, the first is"),
    (resaved(lambda tensors: tensors | {"extra.weight": torch.zeros(2)}), "unknown tensor extra"),
    (resaved(lambda tensors: {name: tensor[:-1].clone() for name, tensor in tensors.items()}),
     "config.json wants"),
    (cast(torch.int8), "is int8, quantized; want bfloat16"),
    (cast(torch.float8_e4m3fn), "is float8_e4m3fn, quantized"),
    (written(INDEX, "[1]"), "holds a list, want a JSON object"),
    (written(INDEX, '{"weight_map": "x"}'), "want an object"),
    (written(INDEX, '{"weight_map": {"a": [1]}}'), "missing: [1]"),
    (written("config.json", "{"), "not valid JSON"),
    (lambda folder: (folder / "config.json").unlink(), "config.json: not found"),
    (written("tokenizer.json", "{}"), "not a valid tokenizer"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: not found"),
    (written("tokenizer.json", POINTER), "tokenizer.json: a pointer of Git LFS, not the file"),
    (lambda folder: first_shard(folder).write_text(POINTER), "a pointer of Git LFS, not the file"),
    (written("generation_config.json", '{"eos_token_id": "</s>"}'), "want token ids"),
    (shutil.rmtree, "no such folder")])
def test_a_broken_folder_is_refused(change, message, tmp_path):
    folder = copy_of("llava_grouped", tmp_path / "m")
    change(folder)
    check_refused(folder, message)


# ---- entries -------------------------------------------------------------------------------------

LLAVA = "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
QWEN = ("{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN3 = "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
THINKS = QWEN3.replace("assistant\\n", "assistant\\n<think>\\n")
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
YARN = {"type": "yarn", "factor": 4, "mrope_section": [1, 1, 2]}


def config(message, section=None, **entries):
    place = f"{section}_config." if section else ""
    return {"config": {place + entry: value for entry, value in entries.items()}}, message


def processor(message, **entries):
    return {"preprocessor_config": entries}, message


def template(message, text, file="chat_template"):
    return {file: {"chat_template": text}}, message


REFUSED = {
    "llava_tied": [
        config("model_type is 'gpt2', want one of llava, qwen2_5_vl, qwen3_vl", model_type="gpt2"),
        config("model_type is 'None'", model_type=None),
        config("model_type is \"['llava']\", want one of", model_type=["llava"]),
        config("the converted folder, e.g. llava-hf/llava-1.5-7b-hf", model_type="llava_llama"),
        config("'qwen3_vl_moe', a mixture of experts", model_type="qwen3_vl_moe"),
        config("'qwen3_5', three of four of its layers are linear", model_type="qwen3_5"),
        config("text_config is 'x', want an object", text_config="x"),
        config("hidden_size is -64, want a whole number above 0", "text", hidden_size=-64),
        config("hidden_size is '64', want a whole number above 0", "text", hidden_size="64"),
        config("hidden_size is True, want a whole number above 0", "text", hidden_size=True),
        config("rms_norm_eps is 'a', want a number above 0", "text", rms_norm_eps="a"),
        config("rope_scaling.type is 'yarn', want 'default' or 'mrope'", "text", rope_scaling=YARN),
        config("is 'yarn'", "text", rope_scaling={"rope_type": "yarn", "type": "mrope"}),
        config("rope_type is 'linear'", "text", rope_parameters={"rope_type": "linear"}),
        config("rope_scaling is 'x', want an object", "text", rope_scaling="x"),
        config("patch_size is 0", "vision", patch_size=0),
        config("quantized: awq", "text", quantization_config={"quant_method": "awq"}),
        config("quantized: {'load_in_4bit", quantization_config={"load_in_4bit": True}),
        ({"quantize_config": {"bits": 4}}, "the weights are quantized"),
        config("quantized: {'group_size'", quantization={"group_size": 64, "bits": 4}),
        ({"generation_config": {"num_beams": 4}}, "num_beams is 4, want 1"),
        ({"generation_config": {"suppress_tokens": [7]}}, "suppress_tokens is [7], want []"),
        ({"adapter_config": {"base_model_name_or_path": "a/b"}}, "an adapter of a/b"),
        ({"tokenizer_config": {"add_eos_token": True}}, "add_eos_token is True, want False"),
        config("want the converted folder, e.g. llava-hf", mm_vision_tower="openai/clip"),
        config("model_type is 'granite'", "text", model_type="granite"),
        config("sliding_window is 16", "text", model_type="mistral", sliding_window=16),
        config("sliding_window is '9'", "text", model_type="mistral", sliding_window="9"),
        config("hidden_act is 1, want 'silu'", "text", hidden_act=1),
        config("vision_config.hidden_act is 'gelu'", "vision", hidden_act="gelu"),
        config("projector_hidden_act is 'relu'", projector_hidden_act="relu"),
        config("vision_feature_layer is -5, want -2", vision_feature_layer=-5),
        config("vision_feature_select_strategy is 'full'", vision_feature_select_strategy="full"),
        config("<image> is 1 in config.json, 300 in", image_token_index=1),
        processor("image_mean is [0.5, 0.5, 0.5]", **HALF),
        processor("size is {'shortest_edge': 224}", size={"shortest_edge": 224}),
        ({"tokenizer_config": {"add_bos_token": False}}, "add_bos_token is False, want True"),
        template("want 'ASSISTANT:'", "[INST]")],
    "qwen_tied": [
        config("mrope_section is '112'", "text", rope_parameters={"mrope_section": "112"}),
        config("mrope_section is not there", "text", rope_scaling=None, rope_parameters=None),
        config("use_sliding_window is True", "text", use_sliding_window=True),
        config("rope_theta is 5, want 10000.0", "vision", rope_parameters={"rope_theta": 5}),
        config("rms_norm_eps is not there", "text", rms_norm_eps=None),
        config("hidden_act is 'gelu'", "vision", hidden_act="gelu"),
        config("is True in config.json, 306 in", image_token_id=True),
        processor("image_std is", image_std=[0.5] * 3),
        processor("resample is 2, want 3", resample=2),
        processor("rescale_factor is 1, want 0.00392", rescale_factor=1),
        processor("do_rescale is False", do_rescale=False),
        processor("merge_size is 4, want 2", merge_size=4),
        processor("min_pixels is 'a', want a whole number above 0", min_pixels="a"),
        processor("min_pixels is 0, want a whole number above 0", min_pixels=0),
        processor("max_pixels is 1.5", size={"longest_edge": 1.5}),
        processor("size is 'large', want an object", size="large"),
        processor("size has height, width, want shortest_edge", size={"height": 28, "width": 28}),
        ({"processor_config": {"image_processor.do_normalize": False}},
         "processor_config.json: do_normalize is False"),
        template("opens an answer with", THINKS, "tokenizer_config"),
        template("'<|im_start|>assistant\\n<think>'", "<|im_start|>assistant\\n<think>\\n"),
        template("system turn is []", QWEN3)],
    "qwen3_tied": [
        config("head_dim is not there", "text", head_dim=None),
        processor("image_mean is [0.48", image_mean=None),              # transformers' default
        config("rope_theta is 5, want 10000.0", "vision", rope_parameters={"rope_theta": 5}),
        template("<think>', want '<|im_start|>assistant'", THINKS),
        template('system turn is ["You\'re one."]', QWEN.replace("You are a helpful assistant",
                                                                 "You're one")),
        template("system turn is ['You are a help", QWEN)]}


@pytest.mark.parametrize("name, files, message", [
    (name, *case) for name, cases in REFUSED.items() for case in cases])
def test_what_a_folder_asks_for_and_is_not_implemented_is_refused(name, files, message, tmp_path):
    """Most of it was ignored in silence, and another model computed."""
    check_refused(copy_of(name, tmp_path, **files), message)


def test_a_model_file_refuses_the_folder_of_another_model():
    with pytest.raises(InputError, match="model_type is 'qwen2_5_vl', want 'qwen3_vl'"):
        model_qwen3.load(GOLDEN / "qwen_tied")


# the last six: of LLaMA-Factory, which has no add_generation_prompt, and of others, which have an
# else, an expression or two strings
ACCEPTED = [
    ("llava_tied", {"preprocessor_config": {"size": {"shortest_edge": 56}, "crop_size": 56,
                                            "resample": 3, "do_center_crop": True},
                    "chat_template": {"chat_template": LLAVA},
                    "config": {"text_config.model_type": "mistral"}}),
    # a window of one token more than an image has
    ("llava_tied", {"config": {"text_config.model_type": "mistral",
                               "text_config.sliding_window": 17}}),
    ("qwen_tied", {"chat_template": {"chat_template": QWEN}}),
    # the first of transformers' files counts
    ("qwen3_tied", {"chat_template": {"chat_template": QWEN3},
                    "tokenizer_config": {"chat_template": THINKS},
                    "processor_config": {"image_processor": HALF},
                    "preprocessor_config": {"image_mean": [0.1] * 3}}),
    *[(name, {"tokenizer_config": {"chat_template": text}}) for name, text in [
        ("llava_tied",
         "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% else %}{{ 'x' }}{% endif %}"),
        ("llava_tied", "{{ 'ASSISTANT:' if add_generation_prompt }}"),
        ("qwen_tied",
         "{%- set system_message = 'You are a helpful assistant.' -%}{{ '<|im_start|>system\\n' + "
         "system_message + '<|im_end|>\\n' }}{%- for message in loop_messages -%}{{ '<|im_start|>"
         "user\\n' + content + '<|im_end|>\\n<|im_start|>assistant\\n' }}{%- endfor -%}"),
        ("qwen3_tied", "{{- '<|im_start|>system\\n' }}{{- messages[0]['content'] }}"
                       "{{- '<|im_end|>\\n' }}" + QWEN3),
        ("qwen3_tied", QWEN3.replace("start|>assistant", "start|>' + 'assistant")),
        ("qwen3_tied", QWEN3.replace("{%- endif", "{%- if enable_thinking is false %}"
                                     "{{- '<think>' }}{%- endif %}{%- endif"))]]]


@pytest.mark.parametrize("name, files", ACCEPTED)
def test_what_published_folders_ask_for_and_templates_of_the_same_prompt_are_accepted(name, files,
                                                                                      tmp_path):
    checkpoint.load_model(copy_of(name, tmp_path, **files), "cpu")


@pytest.mark.parametrize("name, adds_eos", [("llava_tied", False), ("qwen_tied", True)])
def test_a_tokenizer_that_adds_other_tokens_than_the_first_is_refused(name, adds_eos, tmp_path):
    """A trainer had left add_eos_token on: every prompt ended with the end of an answer."""
    file = str(copy_of(name, tmp_path) / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    eos = tokenizer.id_to_token(2)
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}" if adds_eos else "$A", special_tokens=[(eos, 2)])
    tokenizer.save(file)
    with pytest.raises(InputError, match="tokenizer.json: encodes a text .* nothing else added"):
        checkpoint.load_model(tmp_path, "cpu")


LAST = {"max_position_embeddings": None}                # None: as many as a prompt has rows


@pytest.mark.parametrize("name, entries", [
    ("llava_tied", LAST), ("qwen_tied", LAST), ("qwen3_tied", LAST),
    ("llava_tied", {"model_type": "mistral", "sliding_window": None})])
def test_a_prompt_past_the_last_position_or_a_window_is_refused(name, entries, tmp_path):
    """LLaVA past its context babbled. Programs ask beforehand, by `shape`; `begin` refuses, too."""
    image = Image.new("RGB", (56, 56))
    rows = load(name).shape((56, 56), "?")[0]
    entries = {f"text_config.{entry}": value or rows for entry, value in entries.items()}
    model = checkpoint.load_model(copy_of(name, tmp_path, config=entries), "cpu")
    assert model.shape(image.size, "?")[0] == model.begin(image, "?").x.shape[1] == rows
    for refuses in (lambda: model.shape(image.size, "??? ???"),
                    lambda: model.begin(image, "??? ???")):
        with pytest.raises(InputError, match=rf"prompt has \d+ tokens, longer than the {rows} "):
            refuses()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_token_that_has_no_embedding_is_refused(name, monkeypatch):
    """A tokenizer with more tokens than the model: an IndexError, after the first answers. The
    image has the largest id of a prompt."""
    model = load(name)
    image = model.config.image_token
    monkeypatch.setattr(model.config.text, "vocab_size", image)
    said = f"a token of id {image}, and the model's vocab_size is {image}"
    for refuses in (model.shape, lambda size, text: model.begin(Image.new("RGB", size), text)):
        with pytest.raises(InputError, match=said):
            refuses((56, 56), "?")


# ---- not a number --------------------------------------------------------------------------------

def test_numbers_that_overflow_end_a_run_by_the_name_of_the_question(tmp_path):
    """float16 answered with exclamation marks and a score of 0, or ended in an AssertionError. Both
    questions are of one batch."""
    path = copy_of("qwen_tied", tmp_path / "m")
    tensors = tensors_of(path)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e6
    save_file(tensors, path / "model.safetensors")
    bench = tmp_path / "b.jsonl"
    question = {"image": str(ROOT / "tiny/textvqa/train_images/0034.jpg"), "question": "?",
                "metric": "exact", "answers": ["a"]}
    bench.write_text(lines({"id": "q1"} | question, {"id": "q2"} | question))
    argv = ["--model", str(path), "--dtype", "float16", "--bench", str(bench), "--layer", "2"]
    for number, (program, *method) in enumerate([
            (eval_program, "--method", "divprune"), (eval_program, "--method", "random"),
            (information,)]):
        with pytest.raises(InputError, match="question q1 .* not finite in float16; want bfloat"):
            program.main([*argv, *method, "--out", str(tmp_path / str(number))])


def test_a_method_ranks_no_hidden_state_and_no_measure_that_is_not_finite():
    model = load("llava_grouped")
    stream = model.run(model.begin(Image.new("RGB", (8, 8)), "?"), stop=3)
    tokprune.prune(model, stream, "random", 2)
    stream.x = stream.x.clone()
    stream.x[0, -1, 0] = torch.nan                      # a text row: methods read those, too
    tokprune.prune(model, stream, "none", 0)            # which looks at nothing
    with pytest.raises(InputError, match="hidden states at layer 3 are not finite in float32"):
        tokprune.prune(model, stream, "random", 2)


def test_a_result_is_json_whatever_it_holds(tmp_path):
    run.write_result(tmp_path, {"a": [float("nan"), 1.5], "b": (float("inf"), "x")}, False)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found == {"a": [None, 1.5], "b": [None, "x"]}


def test_where_the_unpruned_score_is_0_there_is_no_horizon():
    assert information.horizon([0.0, 0.0], 0.0) == 2    # 0 of 0 lost nothing at layer 0
