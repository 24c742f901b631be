"""The page: what was measured of some questions, as arrays -> one HTML file for the browser.

page.html is the page without its data: markup, style and script. This file writes the data as one
block of JSON into it. The file asks for nothing else, and its Content-Security-Policy lets it ask
for nothing. What users wrote (questions, answers, file names) is data in that block, never markup.
"""
import base64
import hashlib
import io
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from support.files import read_text, write_text
from tokprune import METHODS

TEMPLATE = Path(__file__).with_name("page.html")
LARGEST = 768                       # pixels of the longer side of an image on the page
SCALES = {"information": 1000, "attention": 10000}      # stored as multiples of 1 / scale


@dataclass
class Measured:
    """What the page shows of one question, asked of one model of L layers and N visual tokens."""
    question: str
    gold: str | None                        # the right answer, where it is known
    image: Image.Image                      # that the visual tokens tile
    grid: tuple[int, int]                   # rows and columns of them
    unpruned: str                           # the unpruned model's answer
    answers: dict[str, list[str | None]]    # of each method, by layer; None where it cannot act
    kept: dict[str, np.ndarray]             # (L, N) of bool
    right: set[str]                         # those equal to gold, or to unpruned if there is none
    horizon: int                            # from this layer on no token is needed; L if none is
    information: np.ndarray                 # (L, N) of the unpruned answer
    attention: np.ndarray                   # (L, N) of the last prompt row, in the layer before
    model: str = ""                         # its name
    command: str = ""                       # that asks the same; the page adds --layer, --method


def write_page(file: Path, questions: list[list[Measured]], about: str,
               guide: list[dict] = ()) -> int:
    """Write the page -> its size in bytes. Raises InputError.

    questions: each as it was measured with one model or several. about: what was measured of each,
    in words. guide: steps of a text about them, {"title", "text", "state"}; state is what stands
    behind the # of the address, such as "q=1&layer=18&method=dart".
    """
    page = page_of(data_block(questions, about, guide))
    write_text(file, page)
    return len(page.encode())


def page_of(data: dict) -> str:
    """Return the page. Its Content-Security-Policy names its one script and its one style by their
    hashes, so that no other ever runs."""
    page = read_text(TEMPLATE)
    for kind in ("script", "style"):
        [inside] = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        page = page.replace(f"{{hash of {kind}}}", f"'sha256-{digest}'")
    block = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return page.replace("{data}", block.replace("<", "\\u003c"))      # no "<" ends the element


def data_block(questions: list[list[Measured]], about: str, guide: list[dict] = ()) -> dict:
    """Return what page.html reads. An image that questions or models share is in it once."""
    images = {}
    entries = []
    for models in questions:
        entries.append([])
        for measured in models:
            number = images.setdefault(data_url(measured.image), len(images))
            entries[-1].append(entry_of(measured) | {"image": number})
    methods = {}
    for name in entries[0][0]["methods"]:
        says = " ".join((METHODS[name].function.__doc__ or "").split())
        methods[name] = {"color": METHODS[name].color, "says": says.split(". ")[0]}
    return {"images": list(images), "methods": methods, "questions": entries, "measured": about,
            "scales": SCALES, "guide": list(guide)}


def data_url(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def entry_of(measured: Measured) -> dict:
    """Return a question's part of the data block: answers by their number in `said`, sets of kept
    tokens as bits, other numbers as they are rounded on the page."""
    given = [measured.unpruned, *itertools.chain(*measured.answers.values())]
    said = [answer for answer in dict.fromkeys(given) if answer is not None]
    methods = {}
    for name, row in measured.answers.items():
        number = [-1 if answer is None else said.index(answer) for answer in row]
        bits = np.packbits(measured.kept[name], axis=1)         # each layer begins a byte
        methods[name] = {"said": number, "kept": base64.b64encode(bits).decode()}
    rows, cols = measured.grid
    return {"model": measured.model, "command": measured.command, "question": measured.question,
            "gold": measured.gold, "unpruned": measured.unpruned, "rows": rows, "cols": cols,
            "layers": len(measured.attention), "horizon": measured.horizon,
            "start": opening(measured), "said": said,
            "right": [answer in measured.right for answer in said], "methods": methods,
            "information": numbers(measured.information, SCALES["information"]),
            "attention": numbers(measured.attention, SCALES["attention"])}


def numbers(values: np.ndarray, scale: int) -> str:
    """Write values times `scale`, rounded, as base64 of 16-bit integers, little-endian."""
    values = np.clip(np.round(values * scale), -32767, 32767)
    return base64.b64encode(values.astype("<i2").tobytes()).decode()


def opening(measured: Measured) -> dict:
    """Return what the page opens with: the first layer where most methods are right though random,
    and no token at all, are wrong; the first of these methods, and random beside it. Where there is
    no such layer, the horizon."""
    right = {name: [answer in measured.right for answer in answers]
             for name, answers in measured.answers.items()}
    beside = "random" if "random" in right else "none"
    last = len(measured.attention) - 1
    start = {"layer": min(measured.horizon, last), "method": list(right)[-1], "with": beside}
    most = 0
    for layer in range(last + 1):
        ahead = [name for name in right if right[name][layer]]
        if len(ahead) > most and not right[beside][layer] and not right["none"][layer]:
            most = len(ahead)
            start |= {"layer": layer, "method": ahead[0]}
    return start
