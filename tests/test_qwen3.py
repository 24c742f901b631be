"""What only Qwen3-VL has: DeepStack planes, learned positions resampled to the image's grid, norms
on queries and keys, interleaved M-RoPE."""
import hashlib
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checkpoints import GOLDEN, PRECISIONS, begin, load, recording
from PIL import Image
from samples import images

import model_qwen3
from information import token_information
from support import checkpoint
from tokprune import keep

# of the recorded images, in tokens of 2 x 2 patches; the learned positions are 6 x 6, in patches
GRIDS = {"qwen3_untied": {(2, 2), (2, 5), (6, 1), (3, 6), (2, 3)},
         "qwen3_tied": {(2, 3), (4, 5), (2, 5)}}


@pytest.fixture(scope="module")
def model():
    return load("qwen3_untied")


@pytest.fixture(scope="module")
def start(model):
    return model.begin(images()["whole"], "What is it?")        # 3 x 6 visual tokens


# ---- image ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("bounds", ["65536 16777216", "4096 24576", "9216 12288"])
def test_pixels_equal_the_pil_processor_bit_for_bit(bounds):
    low, high = map(int, bounds.split())
    model = model_qwen3.load(GOLDEN / "qwen3_tied", "cpu", min_pixels=low, max_pixels=high)
    recorded = json.loads((GOLDEN / "qwen3_pixels.json").read_text())
    for name, image in images().items():
        (_, rows, cols), digest = recorded[name][bounds]
        pixels, grid = model.preprocess(image)
        assert grid == (rows // 2, cols // 2)
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == digest


def test_a_visual_token_is_32_pixels_wide_and_halves_go_to_the_even_multiple():
    model = model_qwen3.load(GOLDEN / "qwen3_tied", "cpu", min_pixels=1)
    assert model.canvas(Image.new("RGB", (80, 112))).size == (64, 128)
    assert model.canvas(Image.new("RGB", (112, 80))).size == (128, 64)


# ---- tower ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("name", GRIDS)
def test_tower_planes_saliency_and_positions_equal_transformers(name, dtype, tolerance):
    """Grids smaller and larger than the 6 x 6 learned positions, and longer in one direction alone.
    """
    model = load(name, dtype)
    cases, want = recording(name)
    grids = set()
    for case in cases:
        stream = begin(model, case)
        first, V = stream.visual
        outputs = {"features": stream.x[0, first:first + V], "planes": torch.cat(stream.planes),
                   "saliency": stream.saliency()[0]}
        for key, got in outputs.items():
            recorded = want[f"{case['name']}.{key}"].to(got.dtype)
            torch.testing.assert_close(got, recorded, rtol=0, atol=tolerance)
        assert stream.pos[:, 0].equal(want[f"{case['name']}.pos"])
        assert stream.next_pos == want[f"{case['name']}.next_pos"].item()
        grids.add(stream.grid)
    assert grids == GRIDS[name]


def test_learned_positions_of_an_image_of_their_own_size_are_the_table_by_token(model):
    table = model.visual.pos_embed.weight.view(3, 2, 3, 2, -1).transpose(1, 2).flatten(0, 3)
    torch.testing.assert_close(model.visual.learned_positions((3, 3)), table)


def test_patch_embedding_is_the_conv3d_of_the_checkpoint_with_its_bias():
    proj = load("qwen3_tied", torch.float64).visual.patch_embed.proj
    g = torch.Generator().manual_seed(0)
    patches = torch.randn(5, 3, 2, 16, 16, dtype=torch.float64, generator=g)
    got = F.linear(patches.flatten(1), proj.weight.flatten(1), proj.bias)
    torch.testing.assert_close(got, proj(patches).flatten(1))


# ---- planes --------------------------------------------------------------------------------------

def test_a_plane_has_the_merger_of_its_place_in_the_list(model):
    """Indexes out of order took the mergers in the order of the blocks, in silence."""
    pixels, grid = model.preprocess(images()["whole"])
    _, want, _ = model.visual(pixels[None], grid)
    tower = model_qwen3.load(GOLDEN / "qwen3_untied", "cpu").visual
    tower.c.deepstack_visual_indexes.reverse()
    tower.deepstack_merger_list = tower.deepstack_merger_list[::-1]
    _, got, _ = tower(pixels[None], grid)
    assert len(got) == 3 and all(map(torch.equal, got, want))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_plane_is_added_after_its_layer_to_the_rows_of_its_own_tokens_alone(model, start, layer):
    """Two variants that keep different tokens, pruned just before the layer."""
    kept = torch.tensor([[0, 3, 9, 15], [2, 3, 14, 17]])
    pruned = keep(model.run(start, stop=layer), kept)
    got = model.run(pruned, stop=layer + 1).x
    without = model.run(replace(pruned, planes=()), stop=layer + 1).x
    first, n = pruned.visual
    want = without[:, first:first + n] + start.planes[layer][0, kept]
    assert got[:, first:first + n].equal(want)
    assert got[:, :first].equal(without[:, :first])
    assert got[:, first + n:].equal(without[:, first + n:])


def test_tokens_kept_in_two_stages_get_the_planes_they_had_at_first(model, start):
    """Red if a plane is indexed by the rows alive, not by the tokens they were."""
    stream = keep(model.run(start, stop=1), torch.tensor([4, 5, 6, 13, 17]))
    stream = keep(model.run(stream, stop=2), torch.tensor([1, 3]))
    first = stream.visual[0]
    got = model.run(stream, stop=3).x[0, first:first + 2]
    without = model.run(replace(stream, planes=()), stop=3).x[0, first:first + 2]
    assert got.equal(without + start.planes[2][0, [5, 13]])


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_running_in_steps_is_bitwise_running_through_and_leaves_the_stream_as_it_was(
        model, start, layer):
    before = start.x.clone()
    assert model.run(model.run(start, stop=layer)).x.equal(model.run(start).x)
    assert start.x.equal(before)


def test_planes_are_three_and_there_are_layers_after_them(model, start):
    """Otherwise the tests above leave out pruning past the planes."""
    assert len(start.planes) == 3 < model.num_layers - 1


def test_new_tokens_are_not_visual_and_get_no_plane(model, start):
    full = model.run(start)
    token = model.append(full, torch.tensor([[5]]))
    assert token.planes == () and token.layer == 0
    assert model.decode(full, 3) == model.decode(replace(full, planes=()), 3)


@pytest.mark.parametrize("mode", ["keep-one", "leave-one-out"])
def test_information_at_every_plane_equals_dropping_the_tokens_one_window_at_a_time(
        model, start, mode):
    """The windows run batched, behind rows of the unpruned run: origin has to name their tokens."""
    layers = [0, 1, 2, 3]
    ids = model.answer_ids("B")
    got = token_information(model, start, "B", layers, window=2, mode=mode)

    def probability(layer, kept):
        stream = model.run(keep(model.run(start, stop=layer), torch.tensor(kept, dtype=torch.long)))
        return model.logits(stream).softmax(-1)[0, ids[0]].item()
    rows, cols = start.grid
    window = {0, 1, cols, cols + 1}                             # the first of each layer
    others = sorted(set(range(rows * cols)) - window)
    for i, layer in enumerate(layers):
        if mode == "keep-one":
            want = probability(layer, sorted(window)) - probability(layer, [])
        else:
            want = probability(layer, list(range(rows * cols))) - probability(layer, others)
        assert got[i, 0, 0].item() == pytest.approx(want, abs=1e-6)


# ---- rotary embedding ----------------------------------------------------------------------------

def test_the_frequencies_of_t_row_and_column_take_turns(model, monkeypatch):
    """mrope_section 4, 2, 2 of 8: frequencies 1 and 4 turn with the row, 2 and 5 with the column,
    0, 3, 6 and 7 with t."""
    monkeypatch.setitem(model._buffers, "inv_freq", torch.ones(8))

    def turned(axis):
        pos = torch.zeros(3, 1, 1)
        pos[axis] = 1
        cos, _ = model.cos_sin(pos, torch.float64)
        return [i for i in range(8) if cos[0, 0, 0, i] != 1]
    assert [turned(0), turned(1), turned(2)] == [[0, 3, 6, 7], [1, 4], [2, 5]]


# ---- configuration -------------------------------------------------------------------------------

CONFIGS = json.loads((GOLDEN / "qwen3_configs.json").read_text())


def read(config, folder):
    (folder / "config.json").write_text(json.dumps(config))
    return model_qwen3.read_config(folder)


@pytest.mark.parametrize("size, tied, parameters", [("4B", True, 4437815808),
                                                    ("8B", False, 8767123696)])
def test_published_and_resaved_configs_say_the_same(size, tied, parameters, tmp_path):
    """As published, and as transformers 4.57 and 5.23 save it again; the parameters are counted on
    the hub."""
    want = read(CONFIGS["published"][size], tmp_path)
    assert read(CONFIGS["4.57.6"][size], tmp_path) == want
    assert read(CONFIGS["5.23.0"][size], tmp_path) == want
    text = want.text
    assert (text.rope_theta, text.mrope_section, text.head_dim) == (5e6, [24, 20, 20], 128)
    assert (want.factor, want.tie_word_embeddings) == (32, tied)
    assert (want.min_pixels, want.max_pixels) == (56 * 56, 1280 * 28 * 28)      # no file says more
    model = checkpoint.empty(model_qwen3.Qwen3, want, None, set())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    if tied:
        del sizes["lm_head.weight"]
    assert sum(sizes.values()) == parameters
