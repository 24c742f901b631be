"""A checkpoint folder: every layout it comes in loads to the same model; which of its files count,
and where it is found."""
import json
import re

import pytest
import torch
from checkpoints import GOLDEN, MODULES, ONE_OF_EACH, copy_of, decoder_of, load, tensors_of
from safetensors.torch import save_file
from tokenizers import Tokenizer

from support import checkpoint, flags
from support.run import ROOT
from tokprune import InputError

# ---- layouts -------------------------------------------------------------------------------------

# the recorded LLaVA files are layout B of the four in use, the Qwen files are named as published;
# the others are made of these
IN_MEMORY = [(r"^language_model\.lm_head", "lm_head"),
             (r"^language_model\.model", "model.language_model"),
             (r"^multi_modal_projector", "model.multi_modal_projector")]
A = [(r"^vision_tower\.", "vision_tower.vision_model.")]                        # the hub's
B = []                                                                          # transformers 5
C = IN_MEMORY + [(r"^vision_tower", "model.vision_tower")]                      # 5, in memory
D = IN_MEMORY + [(r"^vision_tower\.", "model.vision_tower.vision_model.")]      # 4, in memory
QWEN = [(r"^visual\.", "model.visual."), (r"^model\.(?!visual)", "model.language_model.")]


def write(tensors, shards, folder):
    """Replace the weights of a folder by those tensors, in so many files without an index."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    for i in range(shards):
        part = sorted(tensors)[i::shards]
        save_file({key: tensors[key] for key in part}, folder / f"model-{i}.safetensors")


@pytest.mark.parametrize("name, layout, shards", [
    ("llava_grouped", A, 1), ("llava_grouped", B, 3), ("llava_tied", C, 1), ("llava_grouped", D, 3),
    ("qwen_tied", QWEN, 1)])
def test_every_layout_of_names_loads_to_the_same_weights(name, layout, shards, tmp_path):
    tensors = tensors_of(GOLDEN / name)
    for pattern, new in layout:
        tensors = {re.sub(pattern, new, key): tensor for key, tensor in tensors.items()}
    if layout in (C, QWEN):
        recorded = json.loads((GOLDEN / f"{name}.json").read_text())["in_memory_keys"]
        assert tensors.keys() == set(recorded) - {"lm_head.weight"}     # both checkpoints are tied
    write(tensors, shards, copy_of(name, tmp_path))
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
    write(tensors_of(GOLDEN / name) | {head: 2 * embedding.bfloat16()}, 1, copy_of(name, tmp_path))
    untied = MODULES[name].load(tmp_path, "cpu")
    assert untied.lm_head.weight.equal(2 * embedding)
    assert decoder_of(untied).embed_tokens.weight.equal(embedding)


def test_float16_files_load_to_their_values_in_any_precision(tmp_path):
    tensors = {key: tensor.half() for key, tensor in tensors_of(GOLDEN / "qwen_tied").items()}
    write(tensors, 1, copy_of("qwen_tied", tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        got = MODULES["qwen_tied"].load(tmp_path, "cpu", dtype).model.norm.weight
        assert got.equal(tensors["model.norm.weight"].to(dtype))


# ---- which files count ---------------------------------------------------------------------------

def test_model_safetensors_counts_before_an_index_an_index_before_the_rest_and_nothing_else(
        tmp_path):
    """Shards of an older saving were loaded, and a second format was an unknown tensor."""
    path = copy_of("llava_tied", tmp_path)
    tensors = tensors_of(path)
    key = "language_model.model.embed_tokens.weight"
    for name in ("consolidated", "model.fp16", "adapter_model", "optimizer", ".hidden"):
        save_file({"w": torch.zeros(2)}, path / f"{name}.safetensors")
    (path / "training_args.bin").symlink_to("gone")

    def loaded():
        return checkpoint.load_model(path, "cpu").language_model.embed_tokens.weight
    assert loaded().equal(tensors[key].float())
    (path / "model.safetensors.index.json").unlink()
    assert loaded().equal(tensors[key].float())
    (path / "model.safetensors.index.json").write_text("an older one")
    save_file(tensors | {key: tensors[key] + 1}, path / "model.safetensors")
    assert loaded().equal((tensors[key] + 1).float())
    files = {file.name for file in checkpoint.files_read(path)}
    assert files == {"tokenizer.json", "model.safetensors"}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_tokenizer_saved_with_truncation_and_padding_gives_the_whole_prompt(name, tmp_path):
    """Training leaves both in tokenizer.json: a prompt lost its end, and was answered all the
    same."""
    file = copy_of(name, tmp_path) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64, direction="left")
    tokenizer.save(str(file))
    prompt = MODULES[name].PROMPT.format(question="?" * 64)
    assert len(tokenizer.encode(prompt).ids) == 64
    got = MODULES[name].load(tmp_path, "cpu").tokenizer
    for text in (prompt, "no"):
        assert got.encode(text).ids == load(name).tokenizer.encode(text).ids


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


DEFAULT = "transformers' default"
IN_SIZE = {"size": {"shortest_edge": 5000, "longest_edge": 6000}}


@pytest.mark.parametrize("files, given, want", [
    ({}, {}, f"3136 to 1003520 ({DEFAULT})"),
    ({"preprocessor_config": {"max_pixels": 6272}}, {},
     f"3136 to 6272 ({DEFAULT}, preprocessor_config.json)"),
    ({"preprocessor_config": IN_SIZE}, {"max_pixels": 7000},
     "5000 to 7000 (preprocessor_config.json, as given)"),
    ({"preprocessor_config": IN_SIZE | {"min_pixels": 4000}}, {},
     "4000 to 6000 (preprocessor_config.json)"),
    ({"processor_config": {"image_processor": IN_SIZE}}, {},
     "5000 to 6000 (processor_config.json)")])
def test_bounds_come_from_the_folder_in_each_form_and_a_run_says_so(files, given, want, tmp_path):
    model = checkpoint.load_model(copy_of("qwen_tied", tmp_path, **files), "cpu", **given)
    assert flags.where(model).endswith("pixels " + want)


# ---- the device, and the files of models --------------------------------------------------------

def test_on_cuda_cudnn_plans_no_attention_and_rounds_no_convolution(monkeypatch):
    switched = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert checkpoint.device_and_dtype("cpu", None) == (torch.device("cpu"), torch.float32)
    assert switched == []
    assert checkpoint.device_and_dtype("cuda:1", None)[1] == torch.bfloat16
    assert switched == [False] and not torch.backends.cudnn.allow_tf32


def test_names_of_models_stand_in_one_place():
    """No program, nothing below stairs and no other model asks which models exist."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        assert not re.search(r"\b(import|from) model_", file.read_text()), file


# ---- the Hugging Face cache ----------------------------------------------------------------------

@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The cache's folder of a repository, of one snapshot: relative links to blobs."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    path = tmp_path / "home/hub/models--org--tiny.v1"
    snapshot = path / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    for file in copy_of("llava_tied", path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return path


def test_a_name_finds_its_snapshot_in_the_cache(cached, monkeypatch, tmp_path):
    snapshot = cached / "snapshots" / ("ab" * 20)
    assert checkpoint.find_folder("org/tiny.v1") == snapshot == checkpoint.find_folder(cached)
    assert checkpoint.load_model("org/tiny.v1", "cpu").num_layers == 3
    assert checkpoint.read_config("org/tiny.v1").text.num_hidden_layers == 3
    assert snapshot / "tokenizer.json" in checkpoint.files_read("org/tiny.v1")
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


@pytest.mark.parametrize("lost", [
    "config.json", "generation_config.json", "tokenizer.json", "model-00002-of-00005.safetensors"])
def test_an_unfinished_download_and_a_lost_blob_name_the_command(lost, cached):
    """A default was taken for what a dangling link had said."""
    [link] = cached.glob(f"snapshots/*/{lost}")
    command = "; nothing is downloaded here, want: hf download org/tiny.v1"
    (cached / "blobs" / lost).unlink()
    with pytest.raises(InputError, match=f"{lost}: a link to a file that is gone{command}"):
        checkpoint.load_model("org/tiny.v1", "cpu")
    link.unlink()
    if lost != "generation_config.json":                # which a model need not have
        with pytest.raises(InputError, match=f"{lost}.*{command}"):
            checkpoint.load_model("org/tiny.v1", "cpu")
