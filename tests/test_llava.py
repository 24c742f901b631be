"""What only LLaVA-1.5 has: two ways with an image that is not square, and a config that leaves
almost everything out."""
import hashlib
import json
from dataclasses import replace

import pytest
import torch
from checkpoints import GOLDEN, cropped, load
from samples import QUESTIONS, images

import model_llava
from support import checkpoint
from tokprune import keep


@pytest.fixture(scope="module")
def model():
    return load("llava_grouped")


@pytest.fixture(scope="module")
def start(model):
    return model.begin(images()["wide"], QUESTIONS[0])


def test_pixels_equal_the_pil_processors_bit_for_bit(model):
    """Padded, as the model sees them; and cropped, as the tests show it recorded images."""
    recorded = json.loads((GOLDEN / "pixels.json").read_text())
    for name, image in images().items():
        crop = cropped(image, model.config.vision.image_size)
        for way, pixels in (("pad", model.preprocess(image)), ("crop", crop)):
            digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
            assert digest == recorded[name][way], name


def test_published_config_gets_the_defaults_it_leaves_out(tmp_path):
    """The 7B file names neither widths nor heads nor theta; LLaVA-1.5-7B's are meant."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llava", "image_token_index": 32000,
        "text_config": {"model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064}}))
    config = model_llava.read_config(tmp_path)
    assert config.text == model_llava.TextConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, rope_theta=1e4, rms_norm_eps=1e-5, vocab_size=32064)
    assert config.vision == model_llava.VisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, layer_norm_eps=1e-5)
    assert config.vision_blocks == 23
    # the published index counts the bytes of 686 tensors, of which 18 are not used: a block of CLIP
    # and the norm behind it
    model = checkpoint.empty(model_llava.Llava, config, None, {2})
    block = 4 * (1024 * 1024 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024
    parameters = sum(p.numel() for p in model.parameters())
    assert 2 * (parameters + block + 2 * 1024) == 14126854144


@pytest.mark.parametrize("text, theta", [
    ({"rope_theta": 5e5}, 5e5), ({}, 1e4), ({"rope_scaling": None}, 1e4),
    ({"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}, 7e4),
    # as in transformers 5
    ({"rope_scaling": {"rope_theta": 7.0}, "rope_parameters": {"rope_theta": 8.0}}, 7)])
def test_rope_theta_is_read_in_old_and_new_form_and_rope_scaling_counts(text, theta, tmp_path):
    config = {"model_type": "llava", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_llava.read_config(tmp_path).text.rope_theta == theta


def test_saliency_is_how_much_cls_attends_to_each_patch_in_the_last_block(model, start):
    """Recomputed with the whole softmax of the block that makes the features, mean over heads."""
    tower = model.vision_tower
    pixels = model.preprocess(images()["wide"])[None]
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    for block in tower.encoder.layers[:-1]:
        x = block(x)[0]
    last = tower.encoder.layers[-1]
    y = last.layer_norm1(x)
    q = last.self_attn.q_proj(y).view(17, 4, 8).transpose(0, 1)
    k = last.self_attn.k_proj(y).view(17, 4, 8).transpose(0, 1)
    want = (q @ k.transpose(1, 2) / 8 ** 0.5).softmax(-1).mean(0)[0, 1:]
    torch.testing.assert_close(start.saliency()[0], want)


def test_compact_pruning_before_layer_0_is_the_model_on_a_shorter_prompt(model, start):
    """And decoding goes on from its end, otherwise from the end of the whole prompt."""
    idx = torch.tensor([2, 3, 11])
    first, V = start.visual
    rows = [*range(first), *(first + idx).tolist(), *range(first + V, start.x.shape[1])]
    short = replace(start, x=start.x[:, rows], pos=torch.arange(len(rows))[None],
                    visual=(first, 3))
    compact = keep(start, idx, "compact")
    assert compact.pos.equal(short.pos) and compact.next_pos == len(rows)
    assert keep(start, idx).next_pos == start.next_pos == start.x.shape[1]
    assert model.run(compact).x.equal(model.run(short).x)
