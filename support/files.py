"""Text, JSON, JSON lines and images, read or refused in one line; text written whole or not at all.
"""
import contextlib
import json
from pathlib import Path

from PIL import Image

from tokprune import InputError


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises InputError."""
    try:
        return file.read_text("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{file}: not found")
    except UnicodeDecodeError as e:
        raise InputError(f"{file}: not UTF-8 ({e.reason} at byte {e.start})")
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror})")


def read_json(file: Path) -> dict:
    """The object that a JSON file holds. Raises InputError."""
    text = read_text(file)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:       # not JSON, a number of 5,000 digits, too deep
        raise InputError(f"{file}: not valid JSON ({e})")
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds a {type(found).__name__}, want a JSON object")
    return found


def read_lines(file: Path, **fields) -> list[dict]:
    """The objects of a file of JSON lines, each with these fields of these types.

    Raises InputError, which names the line.
    """
    found = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InputError(f"{file}: line {number} is not valid JSON ({e})")
        found.append(require(entry, file, f"line {number}", **fields))
    return found


def require(entry, file: Path, where: str, **fields) -> dict:
    """The entry, if it is an object that has these fields, of these types. Raises InputError.

    fields: a type, or a tuple of types, for each name. true and false are not numbers.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{file}: {where} {json.dumps(entry)[:100]}: want an object")
    for name, kind in fields.items():
        value = entry.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{file}: {where} {json.dumps(entry)[:100]}: want "
                             f"{', '.join(fields)}; {name} is {json.dumps(value)[:40]}")
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


def read_image(file: Path) -> Image.Image:
    """The whole image, decoded. Raises InputError, but MemoryError where memory runs out."""
    try:
        image = Image.open(file)
        image.load()
    except FileNotFoundError:
        raise InputError(f"{file}: not found; want an image")
    except MemoryError:
        raise
    except Exception as e:          # Pillow raises OSError, ValueError, SyntaxError and its own
        raise InputError(f"{file}: cannot be read as an image ({e})")
    return image


def image_size(file: Path) -> tuple[int, int]:
    """Return width and height, from the header. Raises InputError."""
    try:
        with Image.open(file) as image:
            return image.size
    except FileNotFoundError:
        raise InputError(f"{file}: not found; want an image")
    except Exception as e:
        raise InputError(f"{file}: cannot be read as an image ({e})")
