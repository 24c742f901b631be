"""What LLaVA-1.5 alone has: two ways with an image that is not square, and a config that leaves almost everything out."""
import hashlib
import json
from dataclasses import replace

import pytest
import torch
from checkpoints import GOLDEN, load
from samples import QUESTIONS, images

import model_llava
from tokprune import keep, prune


@pytest.fixture(scope="module")
def model():
    return load("llava_grouped")


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("name", images())
def test_pixels_equal_the_pil_processors_bit_for_bit(name, mode):
    want = json.loads((GOLDEN / "pixels.json").read_text())[name][mode]
    assert hashlib.sha256(load("llava_tied").preprocess(images()[name], mode).numpy().tobytes()).hexdigest() == want


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


def test_saliency_is_how_much_cls_attends_to_each_patch_in_the_last_block(model):
    """Recomputed with the whole softmax of the block that makes the features, mean over heads."""
    pixels = model.preprocess(images()["wide"])[None]
    tower = model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    for block in tower.encoder.layers[:-1]:
        x = block(x)[0]
    a = tower.encoder.layers[-1].self_attn
    y = tower.encoder.layers[-1].layer_norm1(x)
    q, k = (p(y).view(17, 4, 8).transpose(0, 1) for p in (a.q_proj, a.k_proj))
    want = (q @ k.transpose(1, 2) / 8 ** 0.5).softmax(-1).mean(0)[0, 1:]
    torch.testing.assert_close(model.begin(images()["wide"], "?").saliency(), want)


def test_compact_positions_renumber_and_decoding_goes_on_from_the_shortened_prompt(model):
    start = model.begin(images()["wide"], QUESTIONS[0])
    stream = prune(model, model.run(start, stop=1), "random", 4, positions="compact")
    assert stream.pos[0].tolist() == list(range(stream.x.shape[1])) and stream.next_pos == stream.x.shape[1]
    kept = prune(model, model.run(start, stop=1), "random", 4)
    assert kept.next_pos == start.next_pos == start.x.shape[1]


def test_compact_pruning_before_layer_0_is_the_model_on_a_shorter_prompt(model):
    start = model.begin(images()["wide"], QUESTIONS[0])
    idx = torch.tensor([2, 3, 11])
    first, V = start.visual
    rows = [*range(first), *(first + idx).tolist(), *range(first + V, start.x.shape[1])]
    short = replace(start, x=start.x[:, rows], pos=torch.arange(len(rows))[None], visual=(first, 3))
    assert model.run(keep(start, idx, "compact")).x.equal(model.run(short).x)
