"""Speeds as ratios, both sides measured in turn in one run, on made-up checkpoints of 7B width:
against transformers, against the FLOPs, against reading the files, against what a GPU can do; and
how they grow.

Each part takes a Table, which gets its rows, and a Setting.
"""
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from support import made_up, report
from support.checkpoint import load_model
from support.files import read_image
from support.timing import (STEPS, decode, extra_memory, now, span, time_call, time_in_turns,
                            time_prefill)
from tokprune import METHODS, flops, prefill, prune, visual_tokens

MiB = 2 ** 20
TIMED = [name for name, method in METHODS.items() if not method.measure]
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Setting:
    device: torch.device
    layers: int                 # of made-up models
    rounds: int                 # timed, after one that warms up
    small: bool                 # tiny shapes: what runs, not how fast
    folder: Path                # for made-up checkpoints
    picture: Path               # of growth

    @property
    def side(self) -> int:
        """Of an image, in visual tokens."""
        return 8 if self.small else 24


@dataclass
class Table:
    """The rows of a table, printed as they come, and the aims that were missed."""
    small: bool                 # tiny shapes have no aims
    rows: list = field(default_factory=list)

    def add(self, what: str, value: float, aim: float | None = None, at_most: bool = False,
            note: str = ""):
        held = None
        verdict = ""
        if aim is not None and not self.small:
            held = value <= aim if at_most else value >= aim
            verdict = f"{'at most' if at_most else 'at least'} {aim:g}: "
            verdict += "held" if held else "MISSED"
        self.rows.append({"what": what, "value": value, "aim": aim, "held": held, "note": note})
        report.print_row([what, f"{value:.3g}", verdict, note])
        sys.stdout.flush()


# ---- against transformers ------------------------------------------------------------------------

def against_transformers(table: Table, setting: Setting):
    """Tower, prefill and decoding of the unpruned model: same weights, prompt, precision, sdpa."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for kind, config in made_up.CONFIGS.items():
        path = setting.folder / kind
        made_up.write_checkpoint(path, kind, setting.layers, setting.small)
        theirs_class = getattr(transformers, config["architectures"][0])
        for dtype in (torch.float32, torch.bfloat16):
            ours = load_model(path, setting.device, dtype)
            theirs = theirs_class.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
            theirs = theirs.to(setting.device).eval()
            label = f"{kind}, {str(dtype)[6:]}"
            compare(table, label, ours, theirs, setting)
            del ours, theirs


@torch.inference_mode()
def compare(table: Table, label: str, ours, theirs, setting: Setting):
    pixels = ours.preprocess(made_up.image_for(ours, setting.side))
    stream = ours.begin(pixels, made_up.QUESTION)
    device = stream.x.device
    full = ours.run(stream)
    wanted, past = their_prefill(theirs, stream)
    calls = {
        "tower": (lambda: our_tower(ours, pixels), lambda: their_tower(theirs, pixels), 1.05),
        "prefill": (lambda: ours.logits(ours.run(stream)), lambda: their_prefill(theirs, stream),
                    1.0),
        f"decoding {STEPS} tokens": (
            lambda: decode(ours, full), lambda: their_decode(theirs, past, stream),
            1.3 if device.type == "cuda" else 1.0)}
    for name, (one, other, aim) in calls.items():
        ms = time_in_turns({"ours": one, "theirs": other}, setting.rounds, device)
        table.add(f"{label}: {name}, times as fast as transformers",
                  ms["theirs"]["median"] / ms["ours"]["median"], aim,
                  note=f"{span(ms['ours'])} against {span(ms['theirs'])} ms")
    for name in ("tower", "prefill"):
        one, other, _ = calls[name]
        memory = extra_memory(one, device) / MiB
        their_memory = extra_memory(other, device) / MiB
        table.add(f"{label}: peak memory of {name}, share of transformers'",
                  memory / their_memory, 1.0, at_most=True,
                  note=f"{memory:.1f} against {their_memory:.1f} MiB, beside the weights")
    gap = (ours.logits(full) - wanted.float()).abs().max() / wanted.abs().max()
    table.add(f"{label}: difference of logits, share of the largest", gap.item(),
              1e-4 if stream.x.dtype == torch.float32 else 0.05, at_most=True)


def our_tower(model, pixels):
    weight = made_up.decoder_of(model).embed_tokens.weight
    if isinstance(pixels, tuple):                       # patches and their grid
        patches = pixels[0][None].to(weight.device, weight.dtype)
        return model.visual(patches, pixels[1])
    features, _ = model.vision_tower(pixels[None].to(weight.device, weight.dtype))
    return model.multi_modal_projector(features)


def their_tower(model, pixels):
    weight = model.lm_head.weight
    if isinstance(pixels, tuple):
        rows, cols = pixels[1]
        grid = torch.tensor([[1, 2 * rows, 2 * cols]], device=weight.device)
        return model.model.visual(pixels[0].to(weight.device, weight.dtype), grid_thw=grid)
    return model.model.get_image_features(
        pixel_values=pixels[None].to(weight.device, weight.dtype), vision_feature_layer=-2)


def their_prefill(model, stream) -> tuple:
    """-> logits of the last row, cache."""
    planes = {}
    if stream.planes:
        start, V = stream.visual
        is_visual = torch.zeros(stream.x.shape[:2], dtype=torch.bool, device=stream.x.device)
        is_visual[:, start:start + V] = True
        planes = {"visual_pos_masks": is_visual, "deepstack_visual_embeds": list(stream.planes)}
    out = model.model.language_model(inputs_embeds=stream.x, position_ids=stream.pos,
                                     use_cache=True, **planes)
    return model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values


def their_decode(model, past, stream):
    text = model.model.language_model
    token = stream.ids[-1:][None]
    place = torch.full((*stream.pos.shape[:-1], 1), stream.next_pos, device=stream.x.device)
    for step in range(STEPS):
        out = text(inputs_embeds=text.embed_tokens(token), position_ids=place + step,
                   past_key_values=past, use_cache=True)
        model.lm_head(out.last_hidden_state[:, -1])
    past.crop(-STEPS)                                   # the same length every time


# ---- pruning against the FLOPs -------------------------------------------------------------------

def pruning(table: Table, setting: Setting):
    """The speed-up of prefill at layer 2 of 32 against the ratio of FLOPs, and what a selection
    costs of an unpruned prefill."""
    path = setting.folder / "llava"
    made_up.write_checkpoint(path, "llava", setting.layers, setting.small)
    model = load_model(path, setting.device, torch.bfloat16)
    depth = setting.layers if setting.small else 32
    made_up.deepen(model, depth)
    stream = model.begin(made_up.image_for(model, setting.side), made_up.QUESTION)
    N = stream.N
    T = stream.x.shape[1]
    rounds = min(setting.rounds, 3)                     # a round takes minutes
    schedules = {"": ()}
    for ratio in (0.5, 0.75, 0.9):
        for method in TIMED:
            schedules[f"{method}, {ratio:.0%} pruned"] = ((2, method, ratio),)
    ms = time_prefill(model, stream, schedules, rounds)
    full = ms.pop("")
    matrix_products(table, model, [T - N + n for n in (N, N // 2, N // 4, N // 10)], setting)
    for name, pruned in ms.items():
        rows = [T - N + n for n in visual_tokens(schedules[name], N, depth)]
        ratio = flops(model.config.text, [T] * depth) / flops(model.config.text, rows)
        table.add(f"{name} at layer 2 of {depth}: speed-up, share of the FLOPs ratio {ratio:.2f}",
                  full["median"] / pruned["median"] / ratio, 0.85,
                  note=f"{span(pruned)} against {span(full)} ms")
    reached = model.run(stream, stop=2)
    for method in TIMED:
        ms = time_call(lambda: prune(model, reached, method, N // 2), rounds, setting.device)
        table.add(f"{method}: selecting {N // 2} of {N}, share of an unpruned prefill",
                  ms["median"] / full["median"], 0.05, at_most=True, note=f"{span(ms)} ms")


def matrix_products(table: Table, model, sizes: list[int], setting: Setting):
    """What fewer rows can gain at best: a weight is read whole for few rows, too."""
    weight = next(model.parameters())
    layers = made_up.decoder_of(model).layers[:setting.layers]

    def product(rows):
        x = torch.ones(rows, model.config.text.hidden_size, dtype=weight.dtype,
                       device=weight.device)
        return lambda: [layer.mlp.gate_proj(x) for layer in layers]
    calls = {rows: product(rows) for rows in sizes}
    ms = time_in_turns(calls, min(setting.rounds, 3), setting.device)
    most = sizes[0]
    for rows in sizes:
        rate = rows / ms[rows]["median"]
        table.add(f"a bare matrix product of {rows} rows: share of the rate of {most} rows",
                  rate / (most / ms[most]["median"]), note=f"{span(ms[rows])} ms")


# ---- loading -------------------------------------------------------------------------------------

def loading(table: Table, setting: Setting):
    """A whole made-up LLaVA-1.5-7B: memory and time of loading it on the CPU, and one question."""
    path = setting.folder / "whole"
    layers = 2 if setting.small else made_up.depth_of("llava")
    size = made_up.write_checkpoint(path, "llava", layers, setting.small)
    read_files(path)                                    # now they are in the page cache
    reading = read_files(path)
    code = "import sys; from support.comparisons import load_and_ask; load_and_ask(sys.argv[1])"
    printed = subprocess.check_output([sys.executable, "-c", code, path], cwd=ROOT, text=True)
    memory, seconds, asking = map(float, printed.split())
    table.add(f"loading {size / 1e9:.1f} GB: peak memory, share of the checkpoint", memory / size,
              1.1, at_most=True)
    table.add("loading and touching every page, times as long as reading the files",
              seconds / reading, 1.3, at_most=True,
              note=f"{seconds:.1f} against {reading:.1f} s, in the page cache")
    table.add("one question answered end to end in bfloat16 on the CPU, s", asking)


def read_files(path: Path) -> float:
    """Seconds."""
    start = time.time()
    buffer = bytearray(2 ** 24)
    for shard in path.glob("*.safetensors"):
        with shard.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return time.time() - start


def load_and_ask(path: str):
    """Prints, of a fresh process: bytes and seconds of loading, seconds of an answer."""
    before = peak_memory()
    start = time.time()
    model = load_model(Path(path), "cpu", torch.bfloat16)
    for parameter in model.parameters():
        parameter.view(-1)[::512].sum()                 # loading alone does not read a page
    print(peak_memory() - before, time.time() - start)
    start = time.time()
    stream = model.begin(Image.new("RGB", (640, 480), "red"), "What is this?")
    model.decode(model.run(stream), 4)
    print(time.time() - start)


def peak_memory() -> int:
    """Of this process, in bytes, where Linux tells it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


# ---- growth --------------------------------------------------------------------------------------

GROWTH = {"whole": (), "90 % pruned at layer 2": ((2, "random", 0.9),)}


def growth(table: Table, setting: Setting):
    """Prefill time and memory against visual tokens and layers, whole and pruned; selections."""
    path = setting.folder / "qwen"
    made_up.write_checkpoint(path, "qwen", setting.layers, setting.small)
    model = load_model(path, setting.device, torch.bfloat16, max_pixels=4096 * 784)
    depth = setting.layers if setting.small else made_up.depth_of("qwen")
    made_up.deepen(model, depth)
    curves = {"visual tokens": [], "layers": []}
    for side in (8, 16) if setting.small else (8, 16, 24, 32, 45, 64):
        stream = model.begin(made_up.image_for(model, side), made_up.QUESTION)
        point = grown(table, model, stream, "visual tokens", setting)
        curves["visual tokens"].append((stream.N, point))
        if side <= 45:
            time_selections(table, model, stream, setting)
    for layers in (3,) if setting.small else (4, 8, 16, depth):
        made_up.deepen(model, layers)
        stream = model.begin(made_up.image_for(model, setting.side), made_up.QUESTION)
        point = grown(table, model, stream, "layers", setting)
        curves["layers"].append((layers, point))
    draw_growth(curves, setting.picture)


def grown(table: Table, model, stream, axis: str, setting: Setting) -> dict:
    """Milliseconds and MiB of prefill under each schedule of GROWTH."""
    ms = time_prefill(model, stream, GROWTH, min(setting.rounds, 3))
    point = {}
    for name, schedule in GROWTH.items():
        memory = extra_memory(lambda: prefill(model, stream, schedule), setting.device) / MiB
        point[name] = ms[name]["median"], memory
        table.add(f"by {axis}: {stream.N} tokens, {model.num_layers} layers, {name}: prefill ms",
                  ms[name]["median"], note=f"{memory:.0f} MiB at the peak, beside the weights")
    return point


def time_selections(table: Table, model, stream, setting: Setting):
    reached = model.run(stream, stop=2)
    n = stream.N // 10
    for method in TIMED:
        ms = time_call(lambda: prune(model, reached, method, n), min(setting.rounds, 3),
                       setting.device)
        table.add(f"{stream.N} visual tokens: {method}, ms to keep a tenth", ms["median"])


def draw_growth(curves: dict, path: Path):
    """A panel for time and for memory against each axis; all axes logarithmic."""
    picture = Image.new("RGB", (1240, 800), "white")
    pen = ImageDraw.Draw(picture)
    for column, (axis, points) in enumerate(curves.items()):
        for row, unit in enumerate(("ms", "MiB")):
            lines = {}
            for name in GROWTH:
                lines[f"{name}, {unit} of prefill"] = [(x, point[name][row])
                                                       for x, point in points]
            draw_panel(pen, 620 * column, 400 * row, axis, lines)
    picture.save(path)


def draw_panel(pen, left: int, top: int, axis: str, lines: dict):
    """Lines of (x, y), both axes logarithmic."""
    points = np.log([point for line in lines.values() for point in line])
    low = points.min(0)
    size = np.maximum(points.max(0) - low, 1e-9)
    pen.text((left + 310, top + 388), axis, "black", anchor="mm")
    for number, (name, line) in enumerate(lines.items()):
        ink = ("#7f7f7f", "#d62728")[number]
        pen.text((left + 60, top + 14 + 14 * number), name, ink)
        spots = []
        for x, y in line:
            along, up = (np.log([x, y]) - low) / size           # 0 to 1
            right = left + 60 + 500 * along
            down = top + 350 - 290 * up
            spots.append((right, down))
            pen.ellipse((right - 3, down - 3, right + 3, down + 3), ink)
            pen.text((right, down - 12), f"{y:.0f}", ink, anchor="mm")
            pen.text((right, top + 370), f"{x}", "black", anchor="mm")
        pen.line(spots, ink, 2)


# ---- whole models on a CUDA device ---------------------------------------------------------------

def shares_of_rates(table: Table, kind: str, model, found: dict, setting: Setting):
    """What bench.py measured of the model, as shares of the device's matrix rate and bandwidth."""
    read = [*made_up.decoder_of(model).layers.parameters(), *model.lm_head.parameters()]
    weights = sum(p.numel() * p.element_size() for p in read)       # read for every token
    block = torch.empty(2 ** 24 if setting.small else 2 ** 31, dtype=torch.uint8,
                        device=setting.device)
    copying = time_call(block.clone, setting.rounds, setting.device)["low"]
    bandwidth = 2 * len(block) / copying * 1000
    rate = found["matrix_flops"] / 1e12
    for row in found["speed"]:
        unpruned = not row["schedule"]
        share = row["share_of_matrix_rate"]
        table.add(f"{kind}, {row['name']}: prefill, share of the matrix rate", share,
                  0.55 if unpruned else None,
                  note=f"{span(row['prefill_ms'])} ms, {share * rate:.1f} of {rate:.1f} TFLOP/s; "
                  f"{row['peak_bytes'] / 2 ** 30:.2f} GiB at the peak, beside the weights")
        seconds = row["decode_ms"]["median"] / 1000
        table.add(f"{kind}, {row['name']}: decoding, share of the bandwidth",
                  weights / seconds / bandwidth, 0.60 if unpruned else None,
                  note=f"{span(row['decode_ms'])} ms a token; {bandwidth / 1e9:.0f} GB/s")


def questions_a_second(table: Table, kind: str, model, setting: Setting):
    """Shaped as MME's: an image file of 640 x 480, an answer of at most 4 tokens."""
    files = [setting.folder / f"{number}.jpg" for number in range(4 if setting.small else 40)]
    for file in files:
        made_up.image_for(model, setting.side).resize((640, 480)).save(file)

    def answer(file):
        stream = model.begin(read_image(file),
                             "Is there a dog in the image? Please answer yes or no.")
        model.decode(model.run(stream), 4)
    answer(files[0])                                    # warms up
    start = now(setting.device)
    for file in files:
        answer(file)
    seconds = (now(setting.device) - start) / 1000
    table.add(f"{kind}: MME-shaped questions a second, images of 640x480 read too",
              len(files) / seconds)
