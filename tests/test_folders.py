"""What a checkpoint's folder says is followed or refused in one line; which of its files count;
where the Hugging Face cache has it; and numbers that are none end a run by the question's name."""
import json
import re
import shutil

import pytest
import torch
from checkpoints import GOLDEN, load
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import eval as eval_program
import information
import tokprune
from support import checkpoint, flags, run
from support.run import ROOT
from tokprune import InputError

LLAVA = "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
QWEN = ("{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN3 = "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
THINKS = QWEN3.replace("assistant\\n", "assistant\\n<think>\\n")
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.fixture
def folder(tmp_path):
    """Make a copy of a checkpoint whose files hold these entries, too; "a.b" is an entry of a."""
    def make(name, **files):
        path = tmp_path / name
        shutil.copytree(GOLDEN / name, path)
        for file, entries in files.items():
            file = path / f"{file}.json"
            found = json.loads(file.read_text()) if file.exists() else {}
            for entry, value in entries.items():
                *outer, last = entry.split(".")
                place = found
                for part in outer:
                    place = place.setdefault(part, {})
                place[last] = value
            file.write_text(json.dumps(found))
        return path
    return make


# ---- what a folder says --------------------------------------------------------------------------

def of_processor(name, message, **entries):
    return name, {"preprocessor_config": entries}, message


REFUSED = [
    ("llava_tied", {"config": {"text_config.model_type": "granite"}}, "model_type is 'granite'"),
    ("llava_tied", {"config": {"text_config.model_type": "mistral",
                               "text_config.sliding_window": 16}}, "sliding_window is 16"),
    ("llava_tied", {"config": {"projector_hidden_act": "relu"}}, "projector_hidden_act is 'relu'"),
    ("llava_tied", {"config": {"image_token_index": 1}}, "<image> is 1 in config.json, 300 in"),
    ("qwen_tied", {"config": {"image_token_id": True}}, "is True in config.json, 306 in"),
    ("qwen_tied", {"config": {"vision_config.hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
    ("qwen_tied", {"config": {"text_config.quantization_config": {"quant_method": "awq"}}}, "awq"),
    ("llava_tied", {"config": {"quantization_config": {"load_in_4bit": True}}}, "load_in_4bit"),
    ("qwen3_tied", {"quantize_config": {"bits": 4}}, "the weights are quantized"),
    ("qwen_tied", {"adapter_config": {"base_model_name_or_path": "a/b"}}, "an adapter of a/b"),
    of_processor("llava_tied", "image_mean is [0.5, 0.5, 0.5]", **HALF),
    of_processor("llava_tied", "size is {'shortest_edge': 224}", size={"shortest_edge": 224}),
    of_processor("qwen_tied", "image_std is", image_std=[0.5] * 3),
    of_processor("qwen_tied", "rescale_factor is 1, want 0.00392", rescale_factor=1),
    of_processor("qwen_tied", "resample is 2, want 3", resample=2),
    of_processor("qwen_tied", "do_rescale is False", do_rescale=False),
    of_processor("qwen_tied", "size has height, width", size={"height": 28, "width": 28}),
    of_processor("qwen_tied", "merge_size is 4, want 2", merge_size=4),
    of_processor("qwen3_tied", "image_mean is [0.48", image_mean=None),     # transformers' default
    ("qwen_tied", {"processor_config": {"image_processor.do_normalize": False}},
     "processor_config.json: do_normalize is False"),
    ("llava_tied", {"tokenizer_config": {"add_eos_token": True}}, "add_eos_token is True"),
    ("qwen3_tied", {"chat_template": {"chat_template": THINKS}}, "<think>', want '<|im_start|>ass"),
    ("qwen3_tied", {"chat_template": {"chat_template": QWEN}}, "system turn is ['You are a help"),
    ("qwen_tied", {"tokenizer_config": {"chat_template": THINKS}}, "opens an answer with"),
    ("llava_tied", {"chat_template": {"chat_template": "[INST]"}}, "want 'ASSISTANT:'")]


@pytest.mark.parametrize("name, files, message", REFUSED)
def test_what_a_folder_asks_for_and_is_not_implemented_is_refused(name, files, message, folder):
    """All of it was ignored in silence, and another model computed."""
    path = folder(name, **files)
    with pytest.raises(InputError, match=re.escape(message)) as e:
        checkpoint.load_model(path, "cpu")
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name, files", [
    ("llava_tied", {"preprocessor_config": {"size": {"shortest_edge": 56}, "crop_size": 56,
                                            "resample": 3, "do_center_crop": True}}),
    ("llava_tied", {"chat_template": {"chat_template": LLAVA}}),
    ("llava_tied", {"config": {"text_config.model_type": "mistral"}}),
    ("qwen_tied", {"chat_template": {"chat_template": QWEN}}),
    # the first of transformers' files counts
    ("qwen3_tied", {"chat_template": {"chat_template": QWEN3},
                    "tokenizer_config": {"chat_template": THINKS}}),
    ("qwen3_tied", {"processor_config": {"image_processor": HALF},
                    "preprocessor_config": {"image_mean": [0.1] * 3}})])
def test_what_the_published_folders_ask_for_is_implemented(name, files, folder):
    checkpoint.load_model(folder(name, **files), "cpu")


@pytest.mark.parametrize("name, single", [("llava_tied", []), ("qwen_tied", None)])
def test_a_tokenizer_that_adds_other_tokens_than_the_first_is_refused(name, single, folder):
    """A trainer had left add_eos_token on: every prompt ended with the end of an answer."""
    path = folder(name)
    raw = json.loads((path / "tokenizer.json").read_text())
    token = Tokenizer.from_file(str(path / "tokenizer.json")).id_to_token(2)
    one = {"Sequence": {"id": "A", "type_id": 0}}
    single = [one] if single == [] else [one, {"SpecialToken": {"id": token, "type_id": 0}}]
    raw["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": [one, one],
        "special_tokens": {token: {"id": token, "ids": [2], "tokens": [token]}}}
    (path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="tokenizer.json: encodes a text .* nothing else added"):
        checkpoint.load_model(path, "cpu")


def test_a_prompt_past_the_last_position_is_refused_with_both_numbers(folder):
    """LLaVA past its context babbled."""
    for name in ("llava_tied", "qwen_tied", "qwen3_tied"):
        model = load(name)
        rows, _, grid = model.shape((56, 56), "?")
        section = "" if name == "qwen" else "text_config."
        entry = {f"{section}max_position_embeddings": rows}
        model = checkpoint.load_model(folder(name, config=entry), "cpu")
        assert model.shape((56, 56), "?")[0] == rows
        with pytest.raises(InputError, match=rf"prompt has \d+ tokens, longer than the {rows} "):
            model.shape((56, 56), "??? ???")


@pytest.mark.parametrize("processor, given, want", [
    ({}, {}, "3136 to 1003520 (transformers' default)"),
    ({"max_pixels": 6272}, {}, "3136 to 6272 (transformers' default, preprocessor_config.json)"),
    ({"size": {"shortest_edge": 3136, "longest_edge": 6272}}, {"max_pixels": 7000},
     "3136 to 7000 (preprocessor_config.json, as given)")])
def test_a_run_says_which_bounds_are_in_force_and_where_they_stand(processor, given, want, folder):
    model = checkpoint.load_model(folder("qwen_tied", preprocessor_config=processor), "cpu",
                                  **given)
    assert flags.where(model).endswith("pixels " + want)


# ---- which weights count -------------------------------------------------------------------------

def test_model_safetensors_counts_before_an_index_and_nothing_else_is_read(folder):
    """Shards of an older saving were loaded, and a second format was an unknown tensor."""
    path = folder("llava_tied")
    tensors = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
    for name in ("consolidated", "model.fp16", "adapter_model", "optimizer", ".hidden"):
        save_file({"w": torch.zeros(2)}, path / f"{name}.safetensors")
    (path / "training_args.bin").symlink_to("gone")
    loaded = checkpoint.load_model(path, "cpu")
    assert loaded.lm_head.weight.equal(load("llava_tied").lm_head.weight)
    key = "language_model.model.embed_tokens.weight"
    save_file(tensors | {key: tensors[key] + 1}, path / "model.safetensors")
    got = checkpoint.load_model(path, "cpu").language_model.embed_tokens.weight
    assert got.equal((tensors[key] + 1).float())
    files = {file.name for file in checkpoint.files_read(path)}
    assert files == {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_8_bits_are_refused_though_config_json_says_nothing(dtype, folder):
    path = folder("llava_tied")
    shard = sorted(path.glob("*.safetensors"))[0]
    save_file({key: tensor.to(dtype) for key, tensor in load_file(shard).items()}, shard)
    with pytest.raises(InputError, match="quantized; want bfloat16"):
        checkpoint.load_model(path, "cpu")


# ---- the Hugging Face cache ----------------------------------------------------------------------

@pytest.fixture
def cached(tmp_path, monkeypatch, folder):
    """The cache's folder of a repository, of one snapshot: relative links to blobs."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    path = tmp_path / "home/hub/models--org--tiny.v1"
    snapshot = path / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (path / "blobs").mkdir()
    for file in folder("llava_tied").iterdir():
        file.rename(path / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return path


def test_a_name_finds_its_snapshot_in_the_cache(cached, monkeypatch, tmp_path):
    snapshot = cached / "snapshots" / ("ab" * 20)
    assert checkpoint.find_folder("org/tiny.v1") == snapshot == checkpoint.find_folder(cached)
    assert checkpoint.load_model("org/tiny.v1", "cpu").num_layers == 3
    assert checkpoint.read_config("org/tiny.v1").text.num_hidden_layers == 3
    assert snapshot / "config.json" in checkpoint.files_read("org/tiny.v1")
    (cached / "snapshots" / ("cd" * 20)).mkdir()
    with pytest.raises(InputError, match="snapshots are (ab){20}, (cd){20}, and refs/main names"):
        checkpoint.find_folder("org/tiny.v1")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("ab" * 20)
    assert checkpoint.find_folder("org/tiny.v1") == snapshot
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match=r"elsewhere/models--org--tiny.v1 \(HF_HUB_CACHE is set\); "
                                         "nothing is downloaded here, want: hf download org/tiny"):
        checkpoint.load_model("org/tiny.v1", "cpu")


@pytest.mark.parametrize("lost, message", [
    ("config.json", "config.json: a link to a file that is gone"),
    ("generation_config.json", "generation_config.json: a link to a file that is gone"),
    ("model-00002-of-00005.safetensors", "missing: model-00002-of-00005.safetensors")])
def test_an_unfinished_download_and_a_lost_blob_name_the_command(lost, message, cached):
    """A default was taken for what a dangling link had said."""
    (cached / "blobs" / lost).unlink()
    with pytest.raises(InputError, match=f"{message}.*; nothing .*: hf download org/tiny.v1"):
        checkpoint.load_model("org/tiny.v1", "cpu")


# ---- not a number --------------------------------------------------------------------------------

def test_numbers_that_overflow_end_a_run_by_the_name_of_the_question(folder, tmp_path):
    """float16 answered with exclamation marks and a score of 0, or ended in an AssertionError. Both
    questions are of one batch."""
    path = folder("qwen_tied")
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        for key in tensors.keys() & {"model.layers.0.mlp.down_proj.weight"}:
            tensors[key] *= 1e6
            save_file(tensors, shard)
    bench = tmp_path / "b.jsonl"
    bench.write_text("".join(json.dumps({
        "id": id, "image": str(ROOT / "tiny/textvqa/train_images/0034.jpg"), "question": "?",
        "metric": "exact", "answers": ["a"]}) + "\n" for id in ("q1", "q2")))
    argv = ["--model", str(path), "--dtype", "float16", "--bench", str(bench), "--layer", "2"]
    for number, (program, *method) in enumerate([
            (eval_program, "--method", "divprune"), (eval_program, "--method", "random"),
            (information,)]):
        with pytest.raises(InputError, match="question q1 .* not finite in float16; want bfloat"):
            program.main([*argv, *method, "--out", str(tmp_path / str(number))])


def test_a_method_ranks_no_hidden_state_and_no_measure_that_is_not_finite():
    x = torch.randn(8, 4)
    view = tokprune.View(layer=3, visual=(1, 6), x=x, rng=torch.Generator())
    tokprune.choose(view, "random", 2)
    view.x = x.clone()
    view.x[7, 0] = torch.nan                            # a text row: methods read those, too
    with pytest.raises(InputError, match="hidden states at layer 3 are not finite in float32"):
        tokprune.choose(view, "random", 2)


def test_a_result_is_json_whatever_it_holds(tmp_path):
    run.write_result(tmp_path, {"a": [float("nan"), 1.5], "b": (float("inf"), "x")}, False)

    def refuse(name):
        raise AssertionError(name)
    found = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert found == {"a": [None, 1.5], "b": [None, "x"]}


def test_where_the_unpruned_score_is_0_there_is_no_horizon():
    assert information.horizon([0.0, 0.0], 0.0) == 2    # 0 of 0 lost nothing at layer 0
    assert information.horizon([0.5, 1.0], 1.0) == 1
