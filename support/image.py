"""Image processing as in transformers, to the bit: what its processors do with an image before any
model sees it. What belongs to one model stands in its file.
"""
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokprune import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def on_white(image: Image.Image) -> Image.Image:
    """Return the image in RGB. What is transparent becomes white, as in transformers 5
    (transformers 4 drops alpha)."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def smart_resize(height: int, width: int, factor: int, min_pixels: int,
                 max_pixels: int) -> tuple[int, int]:
    """Return the height and width nearest the image's own that are multiples of factor, their
    product within the bounds (transformers: image_processing_qwen2_vl).

    Python's round: halves go to the even multiple, as in the original. Raises InputError.
    """
    if max(height, width) > 200 * min(height, width):
        raise InputError(f"image is {width}x{height}: one side is more than 200 times the other, "
                         "want less")
    h = round(height / factor) * factor
    w = round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def normalize(image: Image.Image, mean: tuple, std: tuple) -> Tensor:
    """Return an RGB image as (3, H, W) float32, mean and std of each channel taken off.

    Rounded step by step, as the PIL processors of transformers do.
    """
    x = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    x = (x - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(x.transpose(2, 0, 1).copy())


def patchify(x: Tensor, patch: int, m: int, frames: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut (3, height, width) into patches (P, 3 * frames * patch * patch), m x m of them to a
    visual token -> the patches token by token, and the grid of tokens.

    A still image is a film of `frames` equal frames.
    """
    x = x.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))
    x = x.permute(1, 3, 0, 2, 4)                                        # (y, x, 3, patch, patch)
    grid = x.shape[0] // m, x.shape[1] // m
    x = by_token(x, m)                                                  # (P, 3, patch, patch)
    return x[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1), grid


def by_token(x: Tensor, m: int) -> Tensor:
    """Reorder (rows * m, columns * m, ...), patches in raster order -> (P, ...), the m x m patches
    of each visual token together."""
    return x.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2).flatten(0, 3)
