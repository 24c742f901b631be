"""What Qwen2.5-VL alone has: images of every shape, windows, M-RoPE, and a config in three forms."""
import hashlib
import json

import pytest
import torch
import torch.nn.functional as F
from checkpoints import GOLDEN, PRECISIONS, begin, load, recording
from PIL import Image
from published import HUB_3B, HUB_7B
from samples import images

import model_qwen
from tokprune import InputError, keep


# ---- image ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, bounds", [(name, bounds) for name, found in json.loads((GOLDEN / "pixels.json").read_text()).items()
                                          for bounds in found if bounds.startswith("qwen")])
def test_pixels_equal_the_pil_processor_bit_for_bit(name, bounds):
    """Some halves must go to the even multiple: grey's width 70 is 2.5 tokens of 28 pixels."""
    (_, rows, cols), want = json.loads((GOLDEN / "pixels.json").read_text())[name][bounds]
    low, high = map(int, bounds.split()[1:])
    model = model_qwen.load(GOLDEN / "qwen_tied", "cpu", min_pixels=low, max_pixels=high)
    pixels, grid = model.preprocess(images()[name])
    assert grid == (rows // 2, cols // 2)
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == want


@pytest.mark.parametrize("size, want", [((70, 42), (56, 56)), ((98, 126), (112, 112)), ((100, 60), (112, 56))])
def test_sides_go_to_the_nearest_multiple_and_halves_to_the_even_one(size, want):
    assert model_qwen.smart_resize(*size, 28, 1, 10 ** 9) == want


def test_image_too_long_is_refused_by_its_size():
    model = load("qwen_tied")
    with pytest.raises(InputError, match="image is 2814x14: one side is more than 200 times the other"):
        model.begin(Image.new("RGB", (2814, 14)), "?")
    assert model.preprocess(Image.new("RGB", (2800, 14)))[1] == (1, 29)


def test_bounds_come_from_the_checkpoint_in_each_form_or_from_the_caller(tmp_path):
    def bounds(**files):
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / "config.json").write_text(json.dumps(HUB_7B))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        c = model_qwen.read_config(tmp_path)
        return c.min_pixels, c.max_pixels
    assert bounds() == (3136, 12845056)
    assert bounds(preprocessor_config={"min_pixels": 5000, "max_pixels": 6000}) == (5000, 6000)
    assert bounds(preprocessor_config={"size": {"shortest_edge": 5000, "longest_edge": 6000}}) == (5000, 6000)
    assert bounds(processor_config={"image_processor": {"size": {"shortest_edge": 5000, "longest_edge": 6000}}}) == (5000, 6000)


# ---- tower ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("name", ["qwen_untied", "qwen_tied"])
def test_tower_and_positions_equal_transformers(name, dtype, tolerance):
    """Grids that are square, oblong, one token wide, with windows cut off on both sides and on none. Saliency is the mean over heads and rows
    of the eager attention of transformers' last block, tokens put back in raster order."""
    model = load(name, dtype)
    cases, want = recording(name)
    grids = set()
    for case in cases:
        stream = begin(model, case)
        start, V = stream.visual
        close = lambda got, key: torch.testing.assert_close(got, want[f"{case['name']}.{key}"].to(got.dtype), rtol=0, atol=tolerance)
        close(stream.x[0, start:start + V], "features")
        close(stream.saliency(), "saliency")
        assert stream.pos[:, 0].equal(want[f"{case['name']}.pos"]) and stream.next_pos == want[f"{case['name']}.next_pos"].item()
        grids.add(stream.grid)
    assert grids == {(2, 2), (2, 5), (7, 1), (6, 9), (4, 8)}


def test_patch_embedding_is_the_checkpoints_conv3d():
    tower = load("qwen_tied", torch.float64).visual
    patches = torch.randn(7, 3 * 2 * 14 * 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = tower.patch_embed.proj.weight
    want = F.conv3d(patches.view(7, 3, 2, 14, 14), weight, stride=(2, 14, 14)).flatten(1)
    torch.testing.assert_close(F.linear(patches, weight.flatten(1)), want)


def test_windows_of_a_5_by_6_grid_are_the_ones_drawn_by_hand():
    """Windows of 4x4 tokens, one patch a token: 16, then 8 at the right, 4 at the bottom, 2 in the corner."""
    index, back, mask = model_qwen.windows((5, 6), 4, 1, "cpu")
    found = [row[there[0]].tolist() for row, there in zip(index, mask)]
    assert found == [[r * 6 + c for r in range(4) for c in range(4)], [r * 6 + c for r in range(4) for c in (4, 5)],
                     [24, 25, 26, 27], [28, 29]]
    assert index.flatten()[back].tolist() == list(range(30))
    assert model_qwen.windows((4, 8), 4, 4, "cpu")[2] is None


# ---- positions --------------------------------------------------------------------------------------------------

def test_positions_of_a_3_by_2_image_worked_by_hand():
    pos, after = model_qwen.positions(2, (3, 2), 10)
    assert pos.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5, 6], [0, 1, 2, 2, 3, 3, 4, 4, 5, 6], [0, 1, 2, 3, 2, 3, 2, 3, 5, 6]]
    assert after == 7


@pytest.mark.parametrize("kept", [[], [0], [1, 3]])
@pytest.mark.parametrize("layer", [0, 1])
def test_decoding_goes_on_from_the_original_maximum_whatever_was_removed(layer, kept):
    model = load("qwen_untied")
    start = begin(model, recording("qwen_untied")[0][0])
    stream = keep(model.run(start, stop=layer), torch.tensor(kept, dtype=torch.long))
    first = stream.visual[0]
    assert stream.pos[:, :, first:first + len(kept)].equal(start.pos[:, :, [first + i for i in kept]])
    token = model.append(model.run(stream), torch.tensor([[5]]))
    assert token.pos.flatten().tolist() == [start.pos.max().item() + 1] * 3


def test_compact_positions_are_refused():
    model = load("qwen_tied")
    with pytest.raises(InputError, match="three positions"):
        keep(begin(model, recording("qwen_tied")[0][0]), torch.tensor([1]), "compact")


# ---- config -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, hub", [("3B", HUB_3B), ("7B", HUB_7B)])
def test_published_and_resaved_configs_say_the_same(size, hub, tmp_path):
    """As published, as transformers 4.57 and 5.23 save it again (recorded), with mrope under its newer name, and with the text
    fields both at the root and in their section, which counts."""
    def read(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model_qwen.read_config(tmp_path)
    resaved = json.loads((GOLDEN / "qwen_configs.json").read_text())
    assert list(resaved) == ["4.57.6", "5.23.0"]
    want = read(hub)
    for saved in resaved.values():
        assert want == read(saved[size]) == read(saved[size] | {"hidden_size": 1})
    assert want == read(hub | {"rope_scaling": {"rope_type": "mrope", "mrope_section": [16, 24, 24]}})
    assert (want.text.rope_theta, want.text.mrope_section, want.text.head_dim, want.factor) == (1e6, [16, 24, 24], 128, 28)
    assert want.tie_word_embeddings == (size == "3B")


@pytest.mark.parametrize("hub, size", [(HUB_3B, 7509245952), (HUB_7B, 16584333312)])
def test_published_sizes_have_the_published_number_of_bytes(hub, size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hub))
    with torch.device("meta"):
        model = model_qwen.Qwen(model_qwen.read_config(tmp_path), None, set())
    parameters = sum(p.numel() for name, p in model.named_parameters() if not (hub["tie_word_embeddings"] and "lm_head" in name))
    assert 2 * parameters == size
