"""Both models equal transformers 5.23 on the recordings of make_golden.py, from every layout a checkpoint comes in."""
import json
import re
import shutil
from pathlib import Path

import mutants
import pytest
import torch
from checkpoints import GOLDEN, MODULES, PRECISIONS, begin, decoder, greedy, load, recording
from published import HUB_7B
from safetensors.torch import load_file, save_file

import model_llava
import model_qwen
import tokprune


@pytest.fixture(scope="module", params=MODULES)
def golden(request):
    return request.param, *recording(request.param)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_hidden_states_logits_and_greedy_text_equal_transformers(golden, dtype, tolerance):
    name, cases, want = golden
    model = load(name, dtype)
    for case in cases:
        hidden, stream = want[case["name"] + ".hidden"], begin(model, case)
        assert stream.x.shape[1] == len(want[case["name"] + ".ids"])
        for layer in range(model.num_layers):               # the recording's last entry is after the final norm
            torch.testing.assert_close(model.run(stream, stop=layer).x[0], hidden[layer].to(dtype), rtol=0, atol=tolerance)
        full = model.run(stream)
        torch.testing.assert_close(model.final_norm(full.x)[0], hidden[-1].to(dtype), rtol=0, atol=tolerance)
        steps = len(want[case["name"] + ".tokens"])
        logits, tokens = greedy(model, full, steps)
        torch.testing.assert_close(logits, want[case["name"] + ".logits"].float(), rtol=0, atol=tolerance)
        assert tokens.equal(want[case["name"] + ".tokens"])
        model.eos = set()
        assert model.decode(full, steps) == [case["text"]]
        assert model.decode(full, steps, repetition_penalty=1.5) == [case["penalised_text"]]


def test_the_recorded_penalty_changes_an_answer(golden):
    """Otherwise the last line above shows nothing."""
    assert any(case["text"] != case["penalised_text"] for case in golden[1])


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_removing_rows_equals_masking_their_keys_in_transformers(golden, dtype, tolerance):
    """Prefill and decoding: positions kept, caches of different lengths, decoding from the original length on."""
    name, cases, want = golden
    model = load(name, dtype)
    for case in cases:
        for key, (layer, kept) in case["pruned"].items():
            stream = tokprune.keep(model.run(begin(model, case), stop=layer), torch.tensor(kept, dtype=torch.long))
            logits, tokens = greedy(model, model.run(stream), len(want[key + ".tokens"]))
            torch.testing.assert_close(logits, want[key + ".logits"].float(), rtol=0, atol=tolerance)
            assert tokens.equal(want[key + ".tokens"])


def test_prompt_becomes_the_recorded_ids_with_the_image_in_place(golden):
    name, cases, want = golden
    model = load(name)
    for case in cases:
        ids, stream = want[case["name"] + ".ids"], begin(model, case)
        start, V = stream.visual
        assert stream.ids.equal(ids)
        assert (ids == model.config.image_token).nonzero()[:, 0].tolist() == list(range(start, start + V))
        text = torch.cat([ids[:start], ids[start + V:]])
        rows = torch.cat([stream.x[0, :start], stream.x[0, start + V:]])
        assert rows.equal(decoder(model).embed_tokens(text))


# The recorded LLaVA files are layout B of the four in use, the Qwen files are named as published; from these the others.
NEW_LLAVA = [(r"^language_model\.lm_head", "lm_head"), (r"^language_model\.model", "model.language_model"),
             (r"^multi_modal_projector", "model.multi_modal_projector")]
LAYOUTS = {
    "llava A, the hub's": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "llava B, transformers 5": [],
    "llava C, transformers 5 in memory": NEW_LLAVA + [(r"^vision_tower", "model.vision_tower")],
    "llava D, transformers 4 in memory": NEW_LLAVA + [(r"^vision_tower\.", "model.vision_tower.vision_model.")],
    "qwen, the hub's": [],
    "qwen, in memory": [(r"^visual\.", "model.visual."), (r"^model\.(?!visual)", "model.language_model.")]}


def rewritten(checkpoint, layout, shards, folder):
    """The checkpoint under other tensor names, in so many files."""
    tensors = {}
    for file in (GOLDEN / checkpoint).glob("*.safetensors"):
        tensors |= load_file(file)
    for pattern, new in LAYOUTS[layout]:
        tensors = {re.sub(pattern, new, name): t for name, t in tensors.items()}
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        shutil.copy(GOLDEN / checkpoint / name, folder)
    write(tensors, shards, folder)
    return tensors


def write(tensors, shards, folder):
    names = sorted(tensors)
    files = {f"model-{i}.safetensors": names[i::shards] for i in range(shards)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("checkpoint, layout", [(c, layout) for c in MODULES for layout in LAYOUTS if c[:4] == layout[:4]])
def test_every_key_layout_loads_to_the_same_weights(checkpoint, layout, shards, tmp_path):
    assert len(list((GOLDEN / checkpoint).glob("*.safetensors"))) > 1
    tensors = rewritten(checkpoint, layout, shards, tmp_path)
    if "5 in memory" in layout or "qwen, in memory" in layout:
        recorded = set(json.loads((GOLDEN / f"{checkpoint}.json").read_text())["in_memory_keys"])
        assert tensors.keys() == recorded - ({"lm_head.weight"} if "_tied" in checkpoint else set())
    want, got = load(checkpoint).state_dict(), MODULES[checkpoint].load(tmp_path, "cpu").state_dict()
    assert want.keys() == got.keys() and all(want[name].equal(got[name]) for name in want)


@pytest.mark.parametrize("checkpoint", ["llava_tied", "qwen_tied"])
def test_tied_head_is_the_embedding_itself_and_a_head_in_the_file_is_used(checkpoint, tmp_path):
    model = load(checkpoint)
    embed = decoder(model).embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == embed.data_ptr()
    layout = "llava B, transformers 5" if "llava" in checkpoint else "qwen, the hub's"
    tensors = rewritten(checkpoint, layout, 1, tmp_path)
    head = "language_model.lm_head.weight" if "llava" in checkpoint else "lm_head.weight"
    write(tensors | {head: 2 * embed.bfloat16()}, 1, tmp_path)
    assert MODULES[checkpoint].load(tmp_path, "cpu").lm_head.weight.equal(2 * embed)


def edit_config(section=None, **fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (config[section] if section else config).update(fields)
        (folder / "config.json").write_text(json.dumps(config))
    return change


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def drop_tensor(folder):
    tensors = load_file(shard(folder))
    tensors.popitem()
    save_file(tensors, shard(folder))


def add_tensor(folder):
    save_file(load_file(shard(folder)) | {"model.extra.weight": torch.zeros(2)}, shard(folder))


def wrong_shape(folder):
    tensors = load_file(shard(folder))
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:-1].clone()}, shard(folder))


ANY_MODEL = [
    (lambda f: shard(f).unlink(), "missing: model-00001-of-"),
    (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:5000]), "cannot be read as safetensors"),
    (lambda f: [file.unlink() for file in f.glob("*.safetensors*")], "no *.safetensors found"),
    (drop_tensor, "tensors are missing, the first is"), (wrong_shape, "config.json wants"),
    (add_tensor, "unknown tensor model.extra.weight"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "holds a list, want an object"),
    (lambda f: (f / "config.json").unlink(), "not found"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "not a valid tokenizer"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: not found"),
    (edit_config(model_type="llama"), "model_type is 'llama'"),
    (edit_config(text_config="x"), "text_config is 'x', want an object"),
    (edit_config("text_config", hidden_size=-64), "hidden_size is -64"),
    (edit_config("text_config", hidden_size="64"), "hidden_size is '64'"),
    (edit_config("text_config", hidden_act="gelu"), "hidden_act is 'gelu'"),
    (edit_config("vision_config", patch_size=0), "patch_size is 0"),
    (shutil.rmtree, "no such folder")]
BROKEN = [("llava_grouped", *x) for x in ANY_MODEL] + [("qwen_untied", *x) for x in ANY_MODEL] + [("llava_grouped", *x) for x in [
    (edit_config(mm_vision_tower="openai/clip-vit-large-patch14-336"), "llava-hf/llava-1.5-7b-hf"),
    (edit_config(text_config={"rope_scaling": {"type": "linear", "factor": 2}}), "rope type is 'linear'"),
    (edit_config(text_config={"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "yarn"}}), "rope type is 'yarn'"),
    (edit_config(vision_feature_layer=-5), "vision_feature_layer -5"),
    (edit_config("vision_config", num_attention_heads=3), "vision hidden_size % heads"),
    (edit_config(vision_feature_select_strategy="full"), "vision_feature_select_strategy is 'full'")]] + [("qwen_untied", *x) for x in [
    (edit_config("text_config", rope_scaling={"type": "yarn", "factor": 4, "mrope_section": [1, 1, 2]}), "is 'yarn'"),
    (edit_config("text_config", rope_scaling={"rope_type": "yarn", "type": "mrope"}), "is 'yarn'"),
    (edit_config("text_config", rope_parameters={"rope_type": "linear"}), "is 'linear'"),
    (edit_config("text_config", rope_parameters={"mrope_section": [1, 1, 1]}), "sum of mrope_section is 3, want 4"),
    (edit_config("text_config", rope_parameters={"mrope_section": "112"}), "mrope_section is '112'"),
    (edit_config("text_config", num_attention_heads=5), "hidden_size % heads is 3"),
    (edit_config("text_config", num_key_value_heads=4), "heads % key/value heads is 2"),
    (edit_config("text_config", use_sliding_window=True), "use_sliding_window is True"),
    (edit_config("text_config", rms_norm_eps=None), "rms_norm_eps is not there"),
    (edit_config("vision_config", fullatt_block_indexes=[1, 4]), "fullatt_block_indexes is [1, 4], want blocks of 0..3"),
    (edit_config("vision_config", fullatt_block_indexes=[]), "fullatt_block_indexes is []"),
    (edit_config("vision_config", window_size=100), "window_size % visual token"),
    (edit_config("vision_config", out_hidden_size=64), "out_hidden_size is 64, want 48"),
    (lambda f: (f / "preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pixels": 100}'), "want min_pixels <= max_pixels"),
    (lambda f: (f / "preprocessor_config.json").write_text('{"min_pixels": "a"}'), "min_pixels is 'a'")]]


@pytest.mark.parametrize("checkpoint, change, message", BROKEN)
def test_broken_checkpoint_is_one_line_that_names_it(checkpoint, change, message, tmp_path):
    shutil.copytree(GOLDEN / checkpoint, tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(tokprune.InputError, match=re.escape(message)) as e:
        MODULES[checkpoint].load(tmp_path / "m", "cpu")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("checkpoint, space", [("llava_tied", " "), ("qwen_tied", "")])
def test_answer_id_is_the_token_emitted_after_the_prompt(checkpoint, space):
    """LLaVA answers after "ASSISTANT:" and puts a blank before; Qwen begins a line."""
    model = load(checkpoint)
    prompt = MODULES[checkpoint].PROMPT.format(question="what?")
    ids = model.tokenizer.encode(prompt).ids
    assert model.answer_id("Yes") == model.tokenizer.encode(prompt + space + "Yes").ids[len(ids)]


def test_cache_of_a_token_in_the_published_sizes(tmp_path):
    """Grouped queries: in bfloat16 half a MiB a token in LLaVA-1.5-7B, 56 KiB in Qwen2.5-VL-7B."""
    (tmp_path / "config.json").write_text(json.dumps(HUB_7B))
    sizes = [2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
             for c in (model_llava.TextConfig(), model_qwen.read_config(tmp_path).text)]
    assert sizes == [512 * 1024, 56 * 1024]


@pytest.mark.parametrize("module", mutants.MUTANTS)
def test_every_deliberate_mistake_still_applies(module):
    """mutants.py replaces lines of the model files; a line that has changed would make it stop half-way."""
    source = (Path(__file__).parents[1] / module).read_text()
    assert not [name for name, (old, new) in mutants.MUTANTS[module].items() if old not in source or old == new]
