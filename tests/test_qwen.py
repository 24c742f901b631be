"""What only Qwen2.5-VL has: windows, images too long, a config that leaves defaults out."""
import json

import pytest
import torch
from checkpoints import GOLDEN, load
from PIL import Image

import model_qwen
from support.image import smart_resize
from tokprune import InputError


@pytest.mark.parametrize("size, want", [((70, 42), (56, 56)), ((98, 126), (112, 112)),
                                        ((100, 60), (112, 56))])
def test_sides_go_to_the_nearest_multiple_and_halves_to_the_even_one(size, want):
    """No recorded image has a height of which this is seen."""
    assert smart_resize(*size, 28, 1, 10 ** 9) == want


def test_image_too_long_is_refused_by_its_size():
    model = load("qwen_tied")
    with pytest.raises(InputError, match="image is 2814x14: one side is more than 200 times"):
        model.begin(Image.new("RGB", (2814, 14)), "?")
    assert model.preprocess(Image.new("RGB", (2800, 14)))[1] == (1, 29)


def test_where_all_windows_are_whole_there_is_no_mask():
    assert model_qwen.windows((4, 8), 4, 4, "cpu")[2] is None


def test_a_config_may_say_mrope_and_leave_defaults_out(tmp_path):
    """A folder that transformers 4.49 saved was refused: "depth is not there"."""
    def read(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model_qwen.read_config(tmp_path)
    hub = json.loads((GOLDEN / "qwen_configs.json").read_text())["published"]["7B"]
    want = read(hub)
    newer = {"rope_scaling": {"rope_type": "mrope", "mrope_section": [16, 24, 24]}}
    assert read(hub | newer) == want
    left = {"hidden_size", "spatial_patch_size", "tokens_per_second"}
    vision = {name: value for name, value in hub["vision_config"].items() if name in left}
    short = read(hub | {"vision_config": vision})
    short.vision.fullatt_block_indexes = list(short.vision.fullatt_block_indexes)
    assert short == want and want.vision.fullatt_block_indexes == [7, 15, 23, 31]


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
