"""Inputs shared by the tests and by the script that records golden data from the originals."""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

QUESTIONS = ["What does the sign say?", "Is there a cat? Answer yes or no."]


def images() -> dict[str, Image.Image]:
    """Every mode and shape that preprocessing must get right, from one seed."""
    rng = np.random.default_rng(0)

    def noise(w, h, channels, mode):
        coarse = rng.integers(0, 256, (h // 6 + 1, w // 6 + 1, channels), dtype=np.uint8)      # blobs: bicubic has to work
        full = coarse.repeat(6, 0).repeat(6, 1)[:h, :w]
        return Image.fromarray(full[..., 0] if channels == 1 else full, mode)
    palette = noise(50, 64, 1, "L")
    palette = Image.frombytes("P", palette.size, palette.tobytes())
    palette.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    palette.info["transparency"] = 7
    return {"square": noise(56, 56, 3, "RGB"), "wide": noise(150, 61, 3, "RGB"), "tall": noise(37, 90, 3, "RGB"),
            "tiny": noise(9, 5, 3, "RGB"), "grey": noise(70, 41, 1, "L"), "rgba": noise(48, 77, 4, "RGBA"),
            "grey_alpha": noise(64, 64, 2, "LA"), "palette": palette, "cmyk": noise(81, 60, 4, "CMYK"),
            # for windows of 4x4 visual tokens of 28 pixels: smaller at both edges, whole, and a line that is one wide
            "partial": noise(250, 170, 3, "RGB"), "whole": noise(224, 112, 3, "RGB"), "sign": noise(31, 200, 3, "RGB")}


def kept(V: int, layer: int, seed: int = 0) -> list[int]:
    """A kept set for the removal-equals-masking tests: about a third of V tokens."""
    return torch.randperm(V, generator=torch.Generator().manual_seed(100 * seed + layer))[:V // 3].sort().values.tolist()


def official_files(root: Path) -> Path:
    """A question or two of each benchmark in its official layout, with what lies about in real folders."""
    def save(name, text):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text if isinstance(text, str) else json.dumps(text))
    for image in ("MME/OCR/0001.jpg", "MME/artwork/images/10002.jpg", "vqa/train_images/1.jpg", "sqa/images/test/7/image.png",
                  "coco/val2014/COCO_val2014_000000000042.jpg"):
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(root / image)
    save("MME/OCR/0001.txt", "\ufeffIs it? Please answer yes or no. \tYes\r\n\nIs it not?  Please answer yes or no.\tNo \n")
    save("MME/artwork/questions_answers_YN/10002.txt", "A cat? Please answer yes or no.\tNo\nA dog? Please answer yes or no.\tYes\n")
    save("MME/.DS_Store", "x")
    save("__MACOSX/OCR/0001.txt", "x")
    save("vqa/TextVQA_0.5.1_val.json", {"data": [{"question": "WHAT?", "question_id": 0, "image_id": "1", "answers": ["a"] * 10}]})
    save("vqa/TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "1", "ocr_tokens": ["Acme", "5"]}]})
    problem = {"question": "Which?", "choices": ["this", "that"], "answer": 1, "hint": "Look.", "image": "image.png", "split": "test"}
    save("sqa/problems.json", {"7": problem, "8": problem | {"image": None}, "9": problem | {"hint": ""}})
    save("sqa/pid_splits.json", {"train": ["9"], "test": ["7", "8"]})
    for name in ("random", "popular", "adversarial"):
        lines = [{"question_id": i + 1, "image": "COCO_val2014_000000000042.jpg", "text": f"Is there a {thing} in the image?", "label": label}
                 for i, (thing, label) in enumerate([("cat", "yes"), ("dog", "no")])]
        save(f"pope/coco_pope_{name}.json", "".join(json.dumps(line) + "\n" for line in lines))
    return root
