"""A question or two of each benchmark in its official layout, made up, with what lies about in real
folders."""
import json
from pathlib import Path

from PIL import Image

COCO = "COCO_val2014_000000000042.jpg"
IMAGES = ["MME/OCR/0001.jpg", "MME/artwork/images/10002.jpg", "vqa/train_images/1.jpg",
          "sqa/images/test/7/image.png", f"coco/val2014/{COCO}"]
PROBLEM = {"question": "Which?", "choices": ["this", "that"], "answer": 1, "hint": "Look.",
           "image": "image.png", "split": "test"}


def lines(*entries) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def official_files(root: Path) -> Path:
    texts = {
        "MME/OCR/0001.txt": "\ufeffIs it? Please answer yes or no. \tYes\r\n\n"
                            "Is it not?  Please answer yes or no.\tNo \n",
        "MME/artwork/questions_answers_YN/10002.txt": "A cat? Please answer yes or no.\tNo\n"
                                                      "A dog? Please answer yes or no.\tYes\n",
        "MME/.DS_Store": "x", "__MACOSX/OCR/0001.txt": "x",
        "vqa/TextVQA_0.5.1_val.json": json.dumps({"data": [
            {"question": "WHAT?", "question_id": 0, "image_id": "1", "answers": ["a"] * 10}]}),
        "vqa/TextVQA_Rosetta_OCR_v0.2_val.json": json.dumps({"data": [
            {"image_id": "1", "ocr_tokens": ["Acme", "5"]}]}),
        "sqa/problems.json": json.dumps({"7": PROBLEM, "8": PROBLEM | {"image": None},
                                         "9": PROBLEM | {"hint": ""}}),
        "sqa/pid_splits.json": json.dumps({"train": ["9"], "test": ["7", "8"]})}
    for name in ("random", "popular", "adversarial"):
        texts[f"pope/coco_pope_{name}.json"] = lines(
            {"question_id": 1, "image": COCO, "text": "Is there a cat in the image?",
             "label": "yes"},
            {"question_id": 2, "image": COCO, "text": "Is there a dog in the imange?",
             "label": "no"})
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in IMAGES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(root / name)
    return root
