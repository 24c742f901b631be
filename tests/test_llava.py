"""model_llava equals transformers 5.23 on the recordings of make_golden.py, from every layout a checkpoint comes in."""
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from mutants import MUTANTS
from samples import images

import model_llava
import tokprune

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ["llava_grouped", "llava_tied"]               # two query heads a key head and untied; tied
# float32 against a float64 original; and both in float64, where the order of summation hides nothing
PRECISIONS = [(torch.float32, 1e-4), (torch.float64, 1e-5)]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def golden(request):
    cases = json.loads((GOLDEN / f"{request.param}.json").read_text())["cases"]
    return GOLDEN / request.param, cases, load_file(GOLDEN / f"{request.param}.safetensors")


def begin(model, case):
    return model.begin(model.preprocess(images()[case["image"]], "crop"), case["question"])


def greedy(model, stream, steps):
    """The logits of each step and the tokens, never stopping early."""
    logits, tokens = [], []
    for _ in range(steps):
        logits.append(model.logits(stream)[0])
        tokens.append(logits[-1].argmax())
        stream = model.run(model.append(stream, tokens[-1][None]))
    return torch.stack(logits), torch.stack(tokens)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_hidden_states_logits_and_greedy_text_equal_transformers(golden, dtype, tolerance):
    folder, cases, want = golden
    model = model_llava.load(folder, "cpu", dtype)
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


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_removing_rows_equals_masking_their_keys_in_transformers(golden, dtype, tolerance):
    """Prefill and decoding: positions kept, caches of different lengths, decoding from the original length on."""
    folder, cases, want = golden
    model = model_llava.load(folder, "cpu", dtype)
    for case in cases:
        for key, (layer, kept) in case["pruned"].items():
            stream = tokprune.keep(model.run(begin(model, case), stop=layer), torch.tensor(kept, dtype=torch.long))
            logits, tokens = greedy(model, model.run(stream), len(want[key + ".tokens"]))
            torch.testing.assert_close(logits, want[key + ".logits"].float(), rtol=0, atol=tolerance)
            assert tokens.equal(want[key + ".tokens"])


def test_prompt_becomes_the_recorded_ids_with_the_image_in_place(golden):
    folder, cases, want = golden
    model = model_llava.load(folder, "cpu")
    for case in cases:
        ids, stream = want[case["name"] + ".ids"], begin(model, case)
        start, V = stream.visual
        assert (ids == 300).nonzero()[:, 0].tolist() == list(range(start, start + V))
        text = torch.cat([ids[:start], ids[start + V:]])
        rows = torch.cat([stream.x[0, :start], stream.x[0, start + V:]])
        assert rows.equal(model.language_model.embed_tokens(text))


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("name", images())
def test_pixels_equal_the_pil_processors_bit_for_bit(name, mode):
    model = model_llava.load(GOLDEN / "llava_tied", "cpu")
    want = json.loads((GOLDEN / "pixels.json").read_text())[name][mode]
    assert hashlib.sha256(model.preprocess(images()[name], mode).numpy().tobytes()).hexdigest() == want


# The recorded files are layout B of the four in use; from it the others.
LAYOUTS = {
    "A, the hub's": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "B, transformers 5": [],
    "C, transformers 5 in memory": [(r"^language_model\.lm_head", "lm_head"), (r"^language_model\.model", "model.language_model"),
                                    (r"^(vision_tower|multi_modal_projector)", r"model.\1")],
    "D, transformers 4 in memory": [(r"^language_model\.lm_head", "lm_head"), (r"^language_model\.model", "model.language_model"),
                                    (r"^vision_tower\.", "model.vision_tower.vision_model."),
                                    (r"^multi_modal_projector", "model.multi_modal_projector")]}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_key_layout_loads_to_the_same_weights(checkpoint, layout, shards, tmp_path):
    folder, tensors = GOLDEN / checkpoint, {}
    assert len(list(folder.glob("*.safetensors"))) > 1
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for pattern, new in LAYOUTS[layout]:
        tensors = {re.sub(pattern, new, name): t for name, t in tensors.items()}
    if layout.startswith("C"):
        recorded = set(json.loads((GOLDEN / f"{checkpoint}.json").read_text())["in_memory_keys"])
        assert tensors.keys() == recorded - ({"lm_head.weight"} if checkpoint == "llava_tied" else set())
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        shutil.copy(folder / name, tmp_path)
    names = sorted(tensors)
    files = {f"model-{i}.safetensors": names[i::shards] for i in range(shards)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    want, got = (model_llava.load(f, "cpu").state_dict() for f in (folder, tmp_path))
    assert want.keys() == got.keys() and all(want[name].equal(got[name]) for name in want)


def test_published_config_gets_the_defaults_it_leaves_out(tmp_path):
    """The 7B file names neither widths nor heads nor theta; LLaVA-1.5-7B's are meant."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llava", "image_token_index": 32000,
        "text_config": {"model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064}}))
    c = model_llava.read_config(tmp_path)
    assert (c.text.hidden_size, c.text.intermediate_size, c.text.num_hidden_layers, c.text.num_attention_heads,
            c.text.num_key_value_heads, c.text.head_dim, c.text.rope_theta, c.text.rms_norm_eps, c.text.vocab_size) == \
           (4096, 11008, 32, 32, 32, 128, 1e4, 1e-5, 32064)
    assert (c.vision.hidden_size, c.vision.intermediate_size, c.vision.num_hidden_layers, c.vision.num_attention_heads,
            c.vision.image_size, c.vision.patch_size, c.vision.layer_norm_eps, c.vision_blocks) == \
           (1024, 4096, 24, 16, 336, 14, 1e-5, 23)
    with torch.device("meta"):                              # bytes of the published index, of its 686 - 18 tensors that are used
        model = model_llava.Llava(c, None, {2})
    block = 4 * (1024 * 1024 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024
    assert 2 * (sum(p.numel() for p in model.parameters()) + block + 2 * 1024) == 14126854144


@pytest.mark.parametrize("text, theta", [({"rope_theta": 5e5}, 5e5), ({}, 1e4), ({"rope_scaling": None}, 1e4),
                                         ({"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}, 7e4)])
def test_rope_theta_is_read_in_old_and_new_form(text, theta, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    assert model_llava.read_config(tmp_path).text.rope_theta == theta


def edit_config(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
    return change


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def drop_tensor(folder):
    tensors = load_file(shard(folder))
    tensors.popitem()
    save_file(tensors, shard(folder))


def wrong_shape(folder):
    tensors = load_file(shard(folder))
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:-1].clone()}, shard(folder))


@pytest.mark.parametrize("change, message", [
    (lambda f: shard(f).unlink(), "missing: model-00001-of-"),
    (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:5000]), "cannot be read as safetensors"),
    (drop_tensor, "1 of 87 tensors are missing"),
    (wrong_shape, "config.json wants"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "config.json").unlink(), "not found"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "not a valid tokenizer"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.model alone"),
    (edit_config(model_type="qwen2_5_vl"), "model_type is 'qwen2_5_vl'"),
    (edit_config(mm_vision_tower="openai/clip-vit-large-patch14-336"), "llava-hf/llava-1.5-7b-hf"),
    (edit_config(text_config={"rope_scaling": {"type": "linear", "factor": 2}}), "rope type is 'linear'"),
    (edit_config(text_config="x"), "text_config is 'x', want an object"),
    (edit_config(text_config={"hidden_size": -64}), "hidden_size is -64"), (edit_config(text_config={"hidden_size": "64"}), "hidden_size is '64'"),
    (edit_config(text_config={"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "yarn"}}), "rope type is 'yarn'"),
    (edit_config(vision_feature_layer=-5), "vision_feature_layer -5"), (edit_config(vision_config={"patch_size": 0}), "patch_size is 0"),
    (edit_config(vision_config={"num_attention_heads": 3}), "vision hidden_size % heads"),
    (lambda f: (f / "config.json").write_text("[]"), "holds a list, want an object"),
    (edit_config(vision_feature_select_strategy="full"), "vision_feature_select_strategy is 'full'")])
def test_broken_checkpoint_is_one_line_that_names_it(change, message, tmp_path):
    shutil.copytree(GOLDEN / "llava_grouped", tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(tokprune.InputError, match=re.escape(message)) as e:
        model_llava.load(tmp_path / "m", "cpu")
    assert "\n" not in str(e.value)


def test_answer_id_is_the_token_emitted_after_the_prompt():
    model = model_llava.load(GOLDEN / "llava_tied", "cpu")
    prompt = model.tokenizer.encode("USER: what? ASSISTANT:").ids
    assert model.answer_id("Yes") == model.tokenizer.encode("USER: what? ASSISTANT: Yes").ids[len(prompt)]


def test_every_deliberate_mistake_still_applies():
    """mutants.py replaces lines of model_llava.py; a line that has changed would make it stop half-way."""
    source = Path(model_llava.__file__).read_text()
    assert not [name for name, (old, new) in MUTANTS.items() if old not in source or old == new]
