"""Inputs shared by the tests and by the script that records golden data from the originals."""
import numpy as np
from PIL import Image

QUESTIONS = ["What does the sign say?", "Is there a cat? Answer yes or no."]


def images() -> dict[str, Image.Image]:
    """Every mode and shape that preprocessing must get right, from one seed."""
    rng = np.random.default_rng(0)

    def noise(w, h, channels, mode):
        blobs = (h // 6 + 1, w // 6 + 1, channels)          # so that bicubic has to work
        coarse = rng.integers(0, 256, blobs, dtype=np.uint8)
        full = coarse.repeat(6, 0).repeat(6, 1)[:h, :w]
        return Image.fromarray(full[..., 0] if channels == 1 else full, mode)
    palette = noise(50, 64, 1, "L")
    palette = Image.frombytes("P", palette.size, palette.tobytes())
    palette.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    palette.info["transparency"] = 7
    return {
        "square": noise(56, 56, 3, "RGB"), "wide": noise(150, 61, 3, "RGB"),
        "tall": noise(37, 90, 3, "RGB"), "tiny": noise(9, 5, 3, "RGB"),
        "grey": noise(70, 41, 1, "L"), "rgba": noise(48, 77, 4, "RGBA"),
        "grey_alpha": noise(64, 64, 2, "LA"), "palette": palette,
        "cmyk": noise(81, 60, 4, "CMYK"),
        # for windows of 4x4 visual tokens of 28 pixels: smaller at both edges, whole, and a line
        "partial": noise(250, 170, 3, "RGB"), "whole": noise(224, 112, 3, "RGB"),
        "sign": noise(31, 200, 3, "RGB")}
