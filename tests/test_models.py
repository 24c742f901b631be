"""Every model equals transformers 5.23 on the recordings of make_golden.py."""
import hashlib
import json
import sys

import pytest
import torch
from checkpoints import (GOLDEN, MODULES, ONE_OF_EACH, Counted, begin, decoder_of, load,
                         logits_of_answer, recording)
from samples import images

import model_llava
import model_qwen3
import tokprune
from model_qwen import Qwen
from model_qwen3 import Qwen3
from support import checkpoint

# of the recorded images, in tokens. Qwen2.5-VL: square, oblong, a token wide, windows cut off on
# both sides and on none. Qwen3-VL: smaller and larger than the 3 x 3 tokens of its learned
# positions, and longer in one direction alone
QWEN_GRIDS = {(2, 2), (2, 5), (7, 1), (6, 9), (4, 8)}
GRIDS = {"qwen_untied": QWEN_GRIDS, "qwen_tied": QWEN_GRIDS,
         "qwen3_untied": {(2, 2), (2, 5), (6, 1), (3, 6), (2, 3)},
         "qwen3_tied": {(2, 3), (4, 5), (2, 5)}}


@pytest.fixture(scope="module", params=MODULES)
def golden(request):
    return request.param, *recording(request.param)


@pytest.fixture(params=[(torch.float32, 1e-4), (torch.float64, 1e-5)], ids=["float32", "float64"])
def precision(request):
    """-> dtype, and how far the results may be from the recording in float64: less where the order
    of summation hides nothing."""
    return request.param


def one_per_image(cases):
    """The second question about an image is recorded too; it takes no other way."""
    first = {}
    for case in cases:
        first.setdefault(case["image"], case)
    return list(first.values())


def check_close(got, want, tolerance):
    torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=tolerance)


def test_hidden_states_and_logits_equal_transformers(golden, precision):
    """Of every layer of the prompt and, in one pass through its cache, of every answer token."""
    name, cases, want = golden
    dtype, tolerance = precision
    model = load(name, dtype)
    cases = one_per_image(cases)
    for case in cases if dtype == torch.float64 else cases[-1:]:
        hidden = want[case["name"] + ".hidden"]
        stream = begin(model, case)
        for layer in range(model.num_layers):       # the recording's last is after the final norm
            stream = model.run(stream, stop=layer)
            check_close(stream.x[0], hidden[layer], tolerance)
        full = model.run(stream)
        check_close(model.final_norm(full.x)[0], hidden[-1], tolerance)
        tokens = want[case["name"] + ".tokens"]
        logits = logits_of_answer(model, full, tokens)
        check_close(logits, want[case["name"] + ".logits"], tolerance)


def test_greedy_text_equals_transformers_with_and_without_a_penalty(golden, monkeypatch):
    """On a question whose answer the penalty changes."""
    name, cases, want = golden
    model = load(name)
    monkeypatch.setattr(model, "eos", set())
    case = next(case for case in cases if case["text"] != case["penalised_text"])
    steps = len(want[case["name"] + ".tokens"])
    full = model.run(begin(model, case))
    assert model.decode(full, steps) == [case["text"]]
    assert model.decode(full, steps, repetition_penalty=1.5) == [case["penalised_text"]]


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("repeated, another", [(-1.0, -1.2), (0.9, 0.8)])
def test_a_penalty_lowers_a_repeated_token_whatever_the_sign_of_its_logit(
        name, repeated, another, monkeypatch):
    """The recorded answers all have positive logits."""
    model = load(name)
    full = model.run(begin(model, recording(name)[0][0]))
    in_prompt = set(full.ids[0].tolist())
    words = [i for i in range(200) if model.tokenizer.decode([i]).strip()]
    said = next(i for i in words if i in in_prompt)
    unsaid = next(i for i in words if i not in in_prompt)
    logits = torch.full((1, 320), -9.0)
    logits[0, said] = repeated
    logits[0, unsaid] = another
    monkeypatch.setattr(model, "logits", lambda stream: logits.clone())
    for penalty, token in ((1.0, said), (1.5, unsaid)):
        assert model.decode(full, 1, penalty) == [model.tokenizer.decode([token]).strip()]


def test_removing_rows_equals_masking_their_keys_in_transformers(golden, precision, monkeypatch):
    """Positions kept, caches of different lengths, the answer from the original length on."""
    name, cases, want = golden
    dtype, tolerance = precision
    model = load(name, dtype)
    monkeypatch.setattr(model, "eos", set())                # as recorded: nothing stops early
    pruned = [case for case in cases if case["pruned"]]
    for case in pruned[-2:] if dtype == torch.float64 else pruned[-1:]:
        stream = begin(model, case)
        for key, (layer, kept) in case["pruned"].items():
            stream = model.run(stream, stop=layer)          # recorded in the order of the layers
            kept = torch.tensor(kept, dtype=torch.long)
            short = model.run(tokprune.keep(stream, kept))
            tokens = want[key + ".tokens"]
            logits = logits_of_answer(model, short, tokens)
            check_close(logits, want[key + ".logits"], tolerance)
            if layer == model.num_layers - 1:
                text = model.tokenizer.decode(tokens.tolist()).strip()
                assert model.decode(short, len(tokens)) == [text]


@pytest.mark.parametrize("name, file, bounds", [
    ("qwen_tied", "pixels", "qwen 3136 12845056"), ("qwen_tied", "pixels", "qwen 784 3136"),
    ("qwen_tied", "pixels", "qwen 23520 31360"), ("qwen3_tied", "qwen3_pixels", "65536 16777216"),
    ("qwen3_tied", "qwen3_pixels", "4096 24576"), ("qwen3_tied", "qwen3_pixels", "9216 12288")])
def test_pixels_equal_the_pil_processor_bit_for_bit(name, file, bounds):
    """Some halves must go to the even multiple: grey's width 70 is 2.5 tokens of 28 pixels."""
    low, high = map(int, bounds.split()[-2:])
    model = MODULES[name].load(GOLDEN / name, "cpu", min_pixels=low, max_pixels=high)
    recorded = json.loads((GOLDEN / f"{file}.json").read_text())
    for image_name, image in images().items():
        (_, rows, cols), digest = recorded[image_name][bounds]
        pixels, grid = model.preprocess(image)
        assert grid == (rows // 2, cols // 2), image_name
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == digest, image_name


@pytest.mark.parametrize("name", GRIDS)
def test_towers_planes_saliency_and_positions_equal_transformers(name, precision):
    """Saliency is the mean over heads and rows of the eager attention of the last block (of full
    attention), tokens put back in raster order."""
    dtype, tolerance = precision
    model = load(name, dtype)
    cases, want = recording(name)
    grids = set()
    for case in one_per_image(cases):
        stream = begin(model, case)
        first, V = stream.visual
        outputs = {"features": stream.x[0, first:first + V], "saliency": stream.saliency()[0]}
        if MODULES[name] is model_qwen3:
            outputs["planes"] = torch.cat(stream.planes)
        for key, got in outputs.items():
            check_close(got, want[f"{case['name']}.{key}"], tolerance)
        assert stream.pos[:, 0].equal(want[f"{case['name']}.pos"])
        assert stream.next_pos == want[f"{case['name']}.next_pos"].item()
        grids.add(stream.grid)
    assert grids == GRIDS[name]


def test_prompt_becomes_the_recorded_ids_with_the_image_in_place(golden):
    name, cases, want = golden
    model = load(name)
    for case in one_per_image(cases):
        ids = want[case["name"] + ".ids"]
        stream = begin(model, case)
        start, V = stream.visual
        assert stream.ids[0].equal(ids)
        places = (ids == model.config.image_token).nonzero()[:, 0].tolist()
        assert places == list(range(start, start + V))
        text = torch.cat([ids[:start], ids[start + V:]])
        rows = torch.cat([stream.x[0, :start], stream.x[0, start + V:]])
        assert rows.equal(decoder_of(model).embed_tokens(text))


def test_answer_tokens_are_those_that_follow_the_prompt(golden):
    """After "ASSISTANT:" a blank comes before the answer; ChatML's answer begins a line."""
    name, _, _ = golden
    model = load(name)
    space = " " if MODULES[name] is model_llava else ""
    prompt = MODULES[name].PROMPT.format(question="what?")
    ids = model.tokenizer.encode(prompt).ids
    assert model.answer_ids("Yes") == model.tokenizer.encode(prompt + space + "Yes").ids[len(ids):]
    assert model.answer_ids("") == []


@pytest.mark.parametrize("name", ["llava_tied", "qwen_untied", "qwen3_tied"])
def test_the_mask_of_a_gpu_changes_no_bit(name, monkeypatch):
    """Rows behind a cache attend as under the form that `causal_mask` has on CUDA, in three dtypes.
    On the CPU torch lays it out."""
    from torch.nn.attention.bias import causal_lower_right
    cases, _ = recording(name)
    masks = []

    def gpu_mask(T, S, device):
        masks.append(causal_lower_right(T, S))
        return masks[-1]

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = load(name, dtype)
        full = model.run(begin(model, cases[0]))
        rows = model.append(full, torch.tensor([[5, 6, 7], [8, 9, 10]]))
        got = model.run(rows).x
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[type(model).__module__], "causal_mask", gpu_mask)
            assert got.equal(model.run(rows).x)
    assert len(masks) == 3 * model.num_layers


@pytest.mark.parametrize("module", sorted(set(MODULES.values()), key=lambda m: m.__name__))
def test_a_norm_is_rounded_before_its_weight_as_in_the_original(module):
    """And worked out in float32, which the kernel does by itself for narrower numbers: equal to the
    bit with casts before and after it, for vectors of every size."""
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for C in (7, 64, 3584):
            norm = module.RMSNorm(C, 1e-5)
            norm.weight.data = torch.randn(C, generator=g)
            norm.to(dtype)
            for size in (1e-4, 1, 300):
                x = (size * torch.randn(50, C, generator=g)).to(dtype)
                normed = torch.nn.functional.rms_norm(x.float(), (C,), eps=1e-5).to(dtype)
                assert norm(x).equal(norm.weight * normed)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_no_layer_converts_between_precisions_for_a_token_in_bfloat16(name):
    """Each norm did, there and back: 130 launches a token in LLaVA-1.5-7B. What is left is the
    rotary embedding's, once for all layers."""
    model = load(name, torch.bfloat16)
    full = model.run(begin(model, recording(name)[0][0]))
    token = model.append(full, torch.tensor([[5]]))
    with Counted() as counted:
        logits = model.logits(model.run(token))
    assert full.x.dtype == torch.bfloat16 and logits.dtype == torch.float32
    # the position to float32, cos and sin to bfloat16, and the logits to float32
    assert counted.ops["to"] == 4


@pytest.mark.parametrize("model_class, recorded, size, parameters, says", [
    (Qwen, "qwen", "3B", 3754622976, (1e6, [16, 24, 24], 128, 28, True)),
    (Qwen, "qwen", "7B", 8292166656, (1e6, [16, 24, 24], 128, 28, False)),
    (Qwen3, "qwen3", "4B", 4437815808, (5e6, [24, 20, 20], 128, 32, True)),
    (Qwen3, "qwen3", "8B", 8767123696, (5e6, [24, 20, 20], 128, 32, False))])
def test_published_and_resaved_configs_say_the_same(model_class, recorded, size, parameters, says,
                                                    tmp_path):
    """As published, and as transformers 4.57 and 5.23 save it again, also with a text field at the
    root, where the one in its section counts. The parameters are counted on the hub."""
    def read(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return sys.modules[model_class.__module__].read_config(tmp_path)
    configs = json.loads((GOLDEN / f"{recorded}_configs.json").read_text())
    assert list(configs) == ["published", "4.57.6", "5.23.0"]
    want = read(configs["published"][size])
    for version in ("4.57.6", "5.23.0"):
        assert read(configs[version][size]) == want
        assert read(configs[version][size] | {"hidden_size": 1}) == want
    text = want.text
    assert says == (text.rope_theta, text.mrope_section, text.head_dim, want.factor,
                    want.tie_word_embeddings)
    assert (want.min_pixels, want.max_pixels) == (56 * 56, 1280 * 28 * 28)      # no file says more
    model = checkpoint.empty(model_class, want, None, set())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    if want.tie_word_embeddings:
        del sizes["lm_head.weight"]
    assert sum(sizes.values()) == parameters
