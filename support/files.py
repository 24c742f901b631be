"""Text, JSON, TSVs and images, read or refused in one line; text written whole or not at all."""
import base64
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from support.image import on_white
from tokprune import InputError

warnings.filterwarnings("ignore", module="PIL")     # about palettes: right, but not for the user


def on_disk(path: Path) -> Path:
    """Return the path as the disk spells it: a letter such as ä has two Unicode forms."""
    if os.path.exists(path):
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        forms = [part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part)]
        found /= next((form for form in forms if os.path.exists(found / form)), part)
    return found


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark. Raises InputError."""
    try:
        return file.read_text("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{file}: not found")
    except UnicodeDecodeError as e:
        raise InputError(f"{file}: not UTF-8 ({e.reason} at byte {e.start})")
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror})")


def read_json(file: Path) -> dict:
    """Return the object that a JSON file holds. Raises InputError."""
    return parse_json(read_text(file), f"{file}:")


def read_lines(file: Path) -> dict[str, dict]:
    """Return the objects of a file of JSON lines, by their place: "FILE: line 3". Raises
    InputError."""
    lines = {f"{file}: line {number}": line
             for number, line in enumerate(read_text(file).split("\n"), 1) if line.strip()}
    return {place: parse_json(line, place) for place, line in lines.items()}


def parse_json(text: str, what: str) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:       # not JSON, a number of 5,000 digits, too deep
        raise InputError(f"{what} is not valid JSON ({e})")
    if not isinstance(found, dict):
        raise InputError(f"{what} holds a {type(found).__name__}, want a JSON object")
    return found


KINDS = {"text": str, "text or a whole number": (str, int), "a list": list}


def require(entry: dict, place, **fields) -> dict:
    """Return the entry if it has these fields. Raises InputError, which names the place.

    fields: one of KINDS for each name. true and false are not numbers.
    """
    for name, kind in fields.items():
        value = entry.get(name)
        if not isinstance(value, KINDS[kind]) or isinstance(value, bool):
            raise InputError(f"{place}: {name} is {json.dumps(value)[:40]}, want {kind}")
    return entry


def write_text(file: Path, text: str):
    """Replace the file by this text: all of it or nothing. Raises InputError."""
    unfinished = file.with_name(file.name + ".new")
    try:
        unfinished.write_text(text, "utf-8")
        unfinished.replace(file)
    except OSError as e:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)          # a full disk gets its room back
        raise InputError(f"{file}: cannot be written ({e.strerror}); "
                         "want a folder that can be written to, with room")


# ---- TSVs ----------------------------------------------------------------------------------------

# Put behind a TSV's last line. A cell that ends with it has a quote that is never closed.
END = "\x04"


def read_tsv(file: Path) -> Iterator[tuple[int, int, dict[str, str]]]:
    """Yield each row of a TSV, {column: text}, behind its place in the file: first byte, bytes.
    Raises InputError."""
    csv.field_size_limit(2 ** 31 - 1)                       # a cell may hold an image
    start = 0
    try:
        with file.open("rb") as f:
            lines = itertools.chain((line.decode("utf-8-sig") for line in f), [END])
            head = split_row(next(lines), lines)
            start = f.tell()
            for line in lines:
                if line == END:
                    return
                cells = split_row(line, lines)
                if cells[-1].endswith(END):
                    raise InputError(f"{file}: the row at byte {start}: a quote is never closed")
                if len(cells) == len(head):
                    yield start, f.tell() - start, dict(zip(head, cells))
                elif line.strip():
                    raise InputError(f"{file}: the row at byte {start} has {len(cells)} cells; "
                                     f"want {len(head)}")
                start = f.tell()
    except FileNotFoundError:
        raise InputError(f"{file}: not found")
    except (csv.Error, OSError, UnicodeDecodeError) as e:
        raise InputError(f"{file}: the row at byte {start} cannot be read ({e})")


def split_row(line: str, more: Iterator[str] = iter(())) -> list[str]:
    """Split a row at its tabs. Quotes are CSV's: between them may be tabs and more lines."""
    if '"' not in line:
        return line.rstrip("\r\n").split("\t")                 # in a fifth of csv's time
    return next(csv.reader(itertools.chain([line], more), delimiter="\t"))


# ---- images --------------------------------------------------------------------------------------

@dataclass(frozen=True, order=True)
class Published:
    """An image of a published benchmark, which is read as the benchmark's own scripts read it: a
    file, or the base64 text in one cell of a TSV. A path alone is an image of a user's own."""
    file: Path
    start: int = 0                      # in a TSV: the first byte of its row
    size: int = 0                       # bytes of its row; 0: the whole file is the image
    column: int = 0
    name: str = ""                      # how the TSV calls it

    def __str__(self) -> str:
        return f"{self.file}, byte {self.start}" if self.size else str(self.file)

    def open(self) -> Path | io.BytesIO:
        """Return what Pillow opens. A TSV's row is read only now: all of them may be a GB."""
        if not self.size:
            return self.file
        with self.file.open("rb") as f:
            f.seek(self.start)
            row = f.read(self.size).decode("utf-8-sig")
        text = split_row(row)[self.column].strip("[]'\" ")     # or a list of one, as text
        return io.BytesIO(base64.b64decode(text.split(",")[-1]))    # behind data:image/png;base64,


class Header(NamedTuple):
    size: tuple[int, int]               # width, height of what `read_image` returns
    turned: bool                        # EXIF says so
    transparent: bool                   # in parts


@functools.cache
def read_header(image: Path | Published) -> Header:
    """Return what an image's header says; its pixels are not decoded. Raises InputError."""
    with opened(image) as found:
        # Pillow turns a TIFF by itself
        turns = found.format != "TIFF" and not isinstance(image, Published)
        lies_on_its_side = turns and orientation(found) >= 5
        size = found.size[::-1] if lies_on_its_side else found.size
        return Header(size, orientation(found) > 1, found.has_transparency_data)


def read_image(image: Path | Published) -> Image.Image:
    """Return the whole image, decoded: one of a user's own as a viewer shows it (turned, grey of 16
    bits scaled, laid on white), one of a published benchmark as its scripts read it. Raises
    InputError, but MemoryError where memory runs out."""
    with opened(image) as found:
        turned = orientation(found) > 1                 # asked of the header, as `read_header` does
        found.load()
        if isinstance(image, Published):
            return found
        if turned:
            found = ImageOps.exif_transpose(found)
        if found.mode.startswith(("I", "F")):               # more than 8 bits of grey
            grey = np.asarray(found)
            if found.mode == "F" or grey.max() > 65535:     # nobody says which number is white
                raise ValueError("32 bits a pixel; want 8 or 16 bits a channel")
            grey = (grey / 257).round().clip(0)             # 65535 is white
            found = Image.fromarray(grey.astype(np.uint8))
        return on_white(found) if found.has_transparency_data else found


MOST_MEMORY = 2 ** 31                   # bytes of an image, padded to a square as LLaVA does


@contextlib.contextmanager
def opened(image: Path | Published):
    try:
        with Image.open(image.open() if isinstance(image, Published) else on_disk(image)) as found:
            need = 3 * max(found.size) ** 2
            if need > MOST_MEMORY:
                raise InputError(f"{image}: is {found.width}x{found.height}; padded to a square it "
                                 f"takes {need / 2**30:.0f} GiB, want at most "
                                 f"{MOST_MEMORY / 2**30:.0f}")
            yield found
    except FileNotFoundError:
        raise InputError(f"{image}: not found; want an image")
    except (InputError, MemoryError):
        raise
    except Exception as e:          # Pillow raises OSError, ValueError, SyntaxError and its own
        raise InputError(f"{image}: cannot be read as an image ({e})")


def orientation(image: Image.Image) -> int:
    """Return how EXIF asks a viewer to turn or mirror the image: 2 to 8; 1: not at all. Broken EXIF
    asks nothing."""
    with contextlib.suppress(Exception):
        # the class's own, since PNG's decodes the pixels; 0x0112 is the tag of the orientation
        value = Image.Image.getexif(image).get(0x0112, 1)
        return value if value in range(2, 9) else 1
    return 1
