"""A user's own picture is read as a viewer shows it, a benchmark's as its scripts read it."""
import re
import unicodedata
import warnings

import numpy as np
import pytest
from checkpoints import copy_of
from official import lines, official_files
from PIL import Image
from PIL.PngImagePlugin import putchunk

import eval as evaluation
import information
from support.benchmarks import load_benchmark, remarks
from support.checkpoint import find_folder
from support.files import Published, read_header, read_image
from support.run import ROOT
from tokprune import InputError

UPRIGHT = (np.arange(6).reshape(2, 3) * 40).repeat(8, 0).repeat(8, 1).astype(np.uint8)
# what is stored so that a viewer who follows the EXIF tag shows UPRIGHT
STORED = {1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
          5: UPRIGHT.T, 6: np.rot90(UPRIGHT), 7: UPRIGHT.T[::-1, ::-1], 8: np.rot90(UPRIGHT, -1)}


def pixels(image):
    return np.asarray(read_image(image))


@pytest.mark.parametrize("format", ["png", "jpg"])
def test_a_picture_of_ones_own_is_turned_as_exif_says(format, tmp_path):
    """Phone photos lay on their side, and the model read them so."""
    for tag, stored in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        file = tmp_path / f"{tag}.{format}"
        Image.fromarray(np.ascontiguousarray(stored)).save(file, exif=exif, quality=100)
        # JPEG changes a pixel a little
        assert np.allclose(pixels(file), UPRIGHT, atol=3)
        assert np.allclose(pixels(Published(file)), stored, atol=3)
        assert read_header(file) == ((24, 16), tag > 1, False)
        assert read_header(Published(file)).size == stored.shape[::-1]


def test_where_exif_stands_is_the_same_for_the_header_and_the_pixels(tmp_path):
    """Pillow turns a TIFF by itself, and finds what lies behind a PNG's pixels only with them: two
    prompts said to be of one shape were not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(STORED[6]))
    stored.save(tmp_path / "a.tif", exif=exif, compression="tiff_lzw")
    assert (pixels(tmp_path / "a.tif") == UPRIGHT).all()
    assert read_header(tmp_path / "a.tif").size == UPRIGHT.shape[1::-1]
    Image.fromarray(UPRIGHT).save(tmp_path / "b.png")
    with (tmp_path / "b.png").open("r+b") as file:
        file.seek(-12, 2)                               # where the last chunk begins, IEND
        putchunk(file, b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        putchunk(file, b"IEND", b"")
    assert pixels(tmp_path / "b.png").shape[1::-1] == read_header(tmp_path / "b.png").size


def test_broken_exif_turns_nothing(tmp_path):
    Image.fromarray(UPRIGHT).save(tmp_path / "a.png", exif=b"Exif\0\0what is this")
    assert (pixels(tmp_path / "a.png") == UPRIGHT).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_is_scaled(name, tmp_path):
    """It was cut off at 255: white all over."""
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / name)
    assert pixels(tmp_path / name).tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_grey_of_32_bits_is_refused(kind, tmp_path):
    """A depth map from 0 to 1 was black all over."""
    Image.fromarray(np.array([[0, 2 ** 20]], kind)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a.tif: .*\(32 bits a pixel; want 8 or 16 "):
        read_image(tmp_path / "a.tif")


def transparent(mode: str) -> Image.Image:
    """Black, but transparent at the left."""
    image = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8))
    if mode == "P":
        image = Image.frombytes("P", (2, 1), bytes([1, 0]))
        image.putpalette([0] * 768)
        image.info["transparency"] = bytes([255, 0, 128])
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(mode, tmp_path):
    """LLaVA saw the hidden color; Pillow's warnings about palettes were shown."""
    file = tmp_path / "a.png"
    transparent(mode).save(file)
    with warnings.catch_warnings(record=True) as shown:
        warnings.filterwarnings("ignore", module="PIL")         # pytest takes the project's off
        assert pixels(file).tolist() == [[[255] * 3, [0] * 3]]
        published = read_image(Published(file))
        published.convert("RGB")
    assert published.mode == mode and read_header(file).transparent and shown == []


def test_an_image_that_would_take_too_much_memory_is_refused_by_name(tmp_path):
    """Padded to a square, a line of 60000 pixels takes 10 GiB."""
    file = tmp_path / "long.png"
    Image.new("L", (60000, 1)).save(file)
    for read in (read_image, read_header):
        with pytest.raises(InputError, match="long.png: is 60000x1; padded to a square it"):
            read(file)


def test_a_benchmark_says_how_many_of_its_images_a_viewer_shows_otherwise(tmp_path):
    data = official_files(tmp_path / "data")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 20)).save(data / "MME/OCR/0001.jpg", exif=exif)
    transparent("RGBA").save(data / "MME/artwork/images/10002.jpg", "PNG")
    assert remarks(load_benchmark("mme", data)) == ["2 of 14 subtasks",
                                                    "images turned by EXIF and read as stored: 1",
                                                    "images with transparent parts: 1"]
    assert remarks(load_benchmark("textvqa", data)) == []


@pytest.mark.parametrize("stored, asked", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_file_is_found_whose_name_is_stored_in_the_other_unicode_form(stored, asked, tmp_path):
    name = "Stra\u00dfe \u00e4/\u00e9.png"
    file = tmp_path / unicodedata.normalize(stored, name)
    file.parent.mkdir()
    Image.new("RGB", (2, 3)).save(file)
    bench = tmp_path / unicodedata.normalize(stored, "f\u00fcr.jsonl")
    bench.write_text(lines({"id": 1, "image": unicodedata.normalize(asked, name), "question": "?",
                            "answers": ["a"], "metric": "exact"}))
    [question] = load_benchmark(unicodedata.normalize(asked, str(bench)), tmp_path)
    assert read_image(question.image).size == (2, 3) and question.image == file
    assert read_image(tmp_path / unicodedata.normalize(asked, name)).size == (2, 3)
    official_files(file.parent)
    assert load_benchmark("mme", tmp_path / unicodedata.normalize(asked, name[:8]))
    copy_of("llava_tied", file.parent)
    assert find_folder(tmp_path / unicodedata.normalize(asked, name[:8])) == file.parent


@pytest.mark.parametrize("change, message", [
    ({"image": "thin.png"}, "image is 1x300: one side is more than 200 times the other"),
    ({"image": "none.png"}, "none.png: cannot be read as an image"),
    ({"question": "<|image_pad|>?"}, "prompt holds 2 <|image_pad|> tokens"),
    ({"question": "word " * 600}, "max_position_embeddings")])
@pytest.mark.parametrize("program", [evaluation, information])
def test_all_questions_of_a_run_are_looked_at_before_the_first_is_answered(program, change, message,
                                                                           tmp_path):
    """Those of a second benchmark were not, and a run of hours ended at the first of these."""
    Image.new("RGB", (60, 60)).save(tmp_path / "ok.png")
    Image.new("RGB", (1, 300)).save(tmp_path / "thin.png")
    (tmp_path / "none.png").write_text("no image")
    good = {"id": "x", "image": "ok.png", "question": "?", "answers": ["a"], "metric": "exact"}
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text(lines(good))
    second.write_text(lines(good, good | {"id": "y"} | change))
    with pytest.raises(InputError, match=f"second.jsonl: question y .*{re.escape(message)}"):
        program.main(["--model", str(ROOT / "tiny" / "qwen"), "--bench", f"{first},{second}",
                      "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
