"""What only Qwen2.5-VL has: images of every shape, windows, M-RoPE, a config in three forms."""
import hashlib
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checkpoints import GOLDEN, PRECISIONS, begin, load, recording
from PIL import Image
from published import HUB_3B, HUB_7B
from samples import images

import model_qwen
from support import checkpoint
from support.image import smart_resize
from tokprune import InputError, keep

PIXELS = json.loads((GOLDEN / "pixels.json").read_text())
BOUNDS = [key for key in PIXELS["square"] if key.startswith("qwen")]


def read_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return model_qwen.read_config(folder)


# ---- image ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("bounds", BOUNDS)
def test_pixels_equal_the_pil_processor_bit_for_bit(bounds):
    """Some halves must go to the even multiple: grey's width 70 is 2.5 tokens of 28 pixels."""
    low, high = map(int, bounds.split()[1:])
    model = model_qwen.load(GOLDEN / "qwen_tied", "cpu", min_pixels=low, max_pixels=high)
    for name, image in images().items():
        (_, rows, cols), digest = PIXELS[name][bounds]
        pixels, grid = model.preprocess(image)
        assert grid == (rows // 2, cols // 2), name
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == digest, name


@pytest.mark.parametrize("size, want", [((70, 42), (56, 56)), ((98, 126), (112, 112)),
                                        ((100, 60), (112, 56))])
def test_sides_go_to_the_nearest_multiple_and_halves_to_the_even_one(size, want):
    assert smart_resize(*size, 28, 1, 10 ** 9) == want


def test_image_too_long_is_refused_by_its_size():
    model = load("qwen_tied")
    with pytest.raises(InputError, match="image is 2814x14: one side is more than 200 times"):
        model.begin(Image.new("RGB", (2814, 14)), "?")
    assert model.preprocess(Image.new("RGB", (2800, 14)))[1] == (1, 29)


# ---- tower ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("name", ["qwen_untied", "qwen_tied"])
def test_tower_and_positions_equal_transformers(name, dtype, tolerance):
    """Grids that are square, oblong, one token wide, with windows cut off on both sides and on
    none. Saliency is the mean over heads and rows of the eager attention of transformers' last
    block, tokens put back in raster order."""
    model = load(name, dtype)
    cases, want = recording(name)
    grids = set()
    for case in cases:
        if case["name"].endswith(".1"):             # the second question about the same image
            continue
        stream = begin(model, case)
        start, V = stream.visual
        for key, got in (("features", stream.x[0, start:start + V]),
                         ("saliency", stream.saliency()[0])):
            recorded = want[f"{case['name']}.{key}"].to(got.dtype)
            torch.testing.assert_close(got, recorded, rtol=0, atol=tolerance)
        assert stream.pos[:, 0].equal(want[f"{case['name']}.pos"])
        assert stream.next_pos == want[f"{case['name']}.next_pos"].item()
        grids.add(stream.grid)
    assert grids == {(2, 2), (2, 5), (7, 1), (6, 9), (4, 8)}


def test_patch_embedding_is_the_conv3d_of_the_checkpoint():
    weight = load("qwen_tied", torch.float64).visual.patch_embed.proj.weight
    g = torch.Generator().manual_seed(0)
    patches = torch.randn(7, 3 * 2 * 14 * 14, dtype=torch.float64, generator=g)
    want = F.conv3d(patches.view(7, 3, 2, 14, 14), weight, stride=(2, 14, 14)).flatten(1)
    torch.testing.assert_close(F.linear(patches, weight.flatten(1)), want)


def test_windows_of_a_5_by_6_grid_are_the_ones_drawn_by_hand():
    """Windows of 4x4 tokens, one patch a token: 16, 8 at the right, 4 at the bottom, 2 in the
    corner."""
    index, place, mask = model_qwen.windows((5, 6), 4, 1, "cpu")
    windows = [row[valid[0]].tolist() for row, valid in zip(index, mask)]
    assert windows == [[0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21],
                       [4, 5, 10, 11, 16, 17, 22, 23], [24, 25, 26, 27], [28, 29]]
    assert index.flatten()[place].tolist() == list(range(30))
    assert model_qwen.windows((4, 8), 4, 4, "cpu")[2] is None


# ---- positions -----------------------------------------------------------------------------------

def test_positions_of_a_3_by_2_image_worked_by_hand():
    pos, next_pos = model_qwen.positions(2, (3, 2), 10)
    assert pos.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
                            [0, 1, 2, 2, 3, 3, 4, 4, 5, 6],
                            [0, 1, 2, 3, 2, 3, 2, 3, 5, 6]]
    assert next_pos == 7


@pytest.mark.parametrize("layer, kept", [(0, []), (0, [1, 3]), (1, [0])])
def test_decoding_goes_on_from_the_original_maximum_whatever_was_removed(layer, kept):
    model = load("qwen_untied")
    start = begin(model, recording("qwen_untied")[0][0])
    stream = keep(model.run(start, stop=layer), torch.tensor(kept, dtype=torch.long))
    first, _ = stream.visual
    rows = [first + i for i in kept]
    assert stream.pos[:, :, first:first + len(kept)].equal(start.pos[:, :, rows])
    token = model.append(model.run(stream), torch.tensor([[5]]))
    assert token.pos.flatten().tolist() == [start.pos.max().item() + 1] * 3


def test_compact_positions_are_refused():
    model = load("qwen_tied")
    with pytest.raises(InputError, match="three positions"):
        keep(begin(model, recording("qwen_tied")[0][0]), torch.tensor([1]), "compact")


# ---- config --------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, hub", [("3B", HUB_3B), ("7B", HUB_7B)])
def test_published_and_resaved_configs_say_the_same(size, hub, tmp_path):
    """As published, as transformers 4.57 and 5.23 save it again (recorded), with mrope under its
    newer name, and with text fields at the root too, where those in their section count."""
    resaved = json.loads((GOLDEN / "qwen_configs.json").read_text())
    assert list(resaved) == ["4.57.6", "5.23.0"]
    want = read_config(tmp_path, hub)
    for saved in resaved.values():
        assert read_config(tmp_path, saved[size]) == want
        assert read_config(tmp_path, saved[size] | {"hidden_size": 1}) == want
    newer = {"rope_scaling": {"rope_type": "mrope", "mrope_section": [16, 24, 24]}}
    assert read_config(tmp_path, hub | newer) == want
    assert (want.text.rope_theta, want.text.mrope_section) == (1e6, [16, 24, 24])
    assert (want.text.head_dim, want.factor) == (128, 28)
    assert want.tie_word_embeddings == (size == "3B")


def test_what_transformers_4_49_leaves_out_of_a_config_has_its_defaults(tmp_path):
    """A folder that it saved was refused: "depth is not there"."""
    left = {"hidden_size", "spatial_patch_size", "tokens_per_second"}
    vision = {name: value for name, value in HUB_7B["vision_config"].items() if name in left}
    short = read_config(tmp_path, HUB_7B | {"vision_config": vision}).vision
    assert list(short.fullatt_block_indexes) == [7, 15, 23, 31]
    assert replace(short, fullatt_block_indexes=[7, 15, 23, 31]) == read_config(
        tmp_path, HUB_7B).vision


@pytest.mark.parametrize("indexes, scored", [([1, 9], 1), ([], 3)])
def test_saliency_is_of_the_last_full_block_that_is_there_or_of_the_last(indexes, scored,
                                                                         monkeypatch):
    """A NameError where a small model kept the indexes of a large one."""
    tower = load("qwen_tied").visual
    seen = {}
    for i, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda block, args, out, i=i: seen.update({i: out[1:]}))
    monkeypatch.setattr(tower.c, "fullatt_block_indexes", indexes)
    _, saliency = tower(torch.randn(1, 16, 1176), (2, 2))
    q, k = seen[scored]
    want = model_qwen.column_mean(q, k).unflatten(1, (-1, 4)).mean(2)
    assert saliency().equal(want)
    for block in tower.blocks:
        block._forward_hooks.clear()


@pytest.mark.parametrize("hub, size", [(HUB_3B, 7509245952), (HUB_7B, 16584333312)])
def test_published_sizes_have_the_published_number_of_bytes(hub, size, tmp_path):
    config = read_config(tmp_path, hub)
    model = checkpoint.empty(model_qwen.Qwen, config, None, set())
    parameters = sum(p.numel() for p in model.parameters())
    if config.tie_word_embeddings:
        parameters -= model.lm_head.weight.numel()
    assert 2 * parameters == size
