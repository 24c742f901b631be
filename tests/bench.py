"""Speed as ratios, measured side by side in one run on the machine that the first line names.

    python tests/bench.py                             every part; --parts picks some
    python tests/bench.py --parts transformers        against transformers 5.23, which has to be installed for this part alone
    python tests/bench.py --smoke                     every part but that on tiny shapes, for what runs, not for how fast

Checkpoints of LLaVA-1.5-7B and Qwen2.5-VL-7B width, cut to --layers, are made up in the temporary folder; parts that need a
deeper model use those layers in turn. On a CUDA device, if there is one (--device cpu: not on it). Each bar is aim or promise;
what misses one is marked. The last line is JSON.
"""
import argparse
import json
import math
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import eval as evaluation  # noqa: E402
import model_llava  # noqa: E402
import model_qwen  # noqa: E402
import tokprune  # noqa: E402
from benchmarks import load_benchmark  # noqa: E402
from checkpoints import decoder  # noqa: E402
from published import HUB_7B  # noqa: E402

MODULES = {"llava": model_llava, "qwen": model_qwen}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (672, 672, 3), dtype=np.uint8))   # 576 visual tokens in both
QUESTION = "What is written on the sign above the door, and which of the two people in front of it looks at the other one?"
SPECIAL = {"llava": ["<image>"],
           "qwen": ["<|image_pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]}
ROUNDS = 10
STEPS = 8                                               # tokens decoded at a time
METHODS = [method for method in tokprune.METHODS if method not in tokprune.ORACLES]


# ---- checkpoints ------------------------------------------------------------------------------------------------

def write_checkpoint(folder: Path, kind: str, layers: int, small: bool) -> int:
    """A model of 7B width with random bfloat16 weights, in shards under transformers' names -> bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["<unk>", *sorted(set(re.findall(r"\w+|[^\w\s]+", MODULES[kind].PROMPT + QUESTION)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))      # about as many as published
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL[kind])
    tokenizer.save(str(folder / "tokenizer.json"))
    image_token = tokenizer.token_to_id(SPECIAL[kind][0])
    if kind == "llava":
        text = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 32064, "rms_norm_eps": 1e-5}
        vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                  "patch_size": 14, "num_attention_heads": 16, "num_hidden_layers": 24, "projection_dim": 768,
                  "vocab_size": 32000}
        if small:
            text |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
            vision |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3,
                       "image_size": 112}
        config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": image_token,
                  "text_config": text, "vision_config": vision, "vision_feature_layer": -2,
                  "vision_feature_select_strategy": "default"}
    else:
        config = HUB_7B | {"num_hidden_layers": layers, "image_token_id": image_token,
                           "vocab_size": HUB_7B["vocab_size"] if layers == HUB_7B["num_hidden_layers"] else 32064,
                           "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
        if small:
            config |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
                       "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
                       "vision_config": HUB_7B["vision_config"] | {
                           "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
                           "fullatt_block_indexes": [1]}}
    (folder / "config.json").write_text(json.dumps(config))
    read, cls = MODULES[kind].read_config(folder), model_llava.Llava if kind == "llava" else model_qwen.Qwen
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in cls(read, None, {2}).named_parameters()}
    pattern, weight_map, part, size = (torch.randn(2 ** 20) * 0.02).bfloat16(), {}, {}, 0

    def save():
        name = f"model-{len(list(folder.glob('*.safetensors')))}.safetensors"
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
        part.clear()
    for name, shape in shapes.items():
        there = re.sub(r"^(?!lm_head)", "model.", re.sub(r"^model\.", "language_model.", name))
        n, is_norm = shape.numel(), "norm" in name and name.endswith("weight")
        values = torch.ones(n, dtype=torch.bfloat16) if is_norm else pattern.repeat(-(-n // len(pattern)))[:n]
        part[there] = values.view(shape)
        size += 2 * n
        if sum(t.numel() for t in part.values()) > 2 ** 30:
            save()
    save()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return size


# ---- timing -----------------------------------------------------------------------------------------------------

def deepen(model, depth: int):
    """The model with `depth` layers on the weights of the few it has, used in turn: the work of a deep one in less memory."""
    few = list(decoder(model).layers)
    decoder(model).layers = torch.nn.ModuleList(few[i % len(few)] for i in range(depth))
    model.num_layers = model.config.text.num_hidden_layers = depth


class Report:
    """The lines of a table as they come, and the bars that were missed; tiny shapes have none."""
    def __init__(self, plot: str, small: bool):
        self.found, self.missed, self.plot, self.small = [], [], plot, small

    def say(self, what: str, value: float, bar: float | None = None, at_most: bool = False, note: str = ""):
        bar = None if self.small else bar
        held = bar is None or (value <= bar if at_most else value >= bar)
        want = "" if bar is None else f"want {'at most' if at_most else 'at least'} {bar:g}: " + ("held" if held else "MISSED")
        self.found.append({"what": what, "value": value, "bar": bar, "held": held, "note": note})
        self.missed += [] if held else [what]
        print(f"| {what} | {value:.3g} | {want} | {note} |", flush=True)


def milliseconds(*spans) -> str:
    return " against ".join(f"{span['median']:.1f} ms [{span['low']:.1f}, {span['high']:.1f}]" for span in spans)


# ---- parts ------------------------------------------------------------------------------------------------------

def part_transformers(report: Report, folder: Path, device, layers: int, rounds: int, small: bool):
    """1. Prefill, decode and tower of the unpruned model against transformers: same weights, prompt, dtype, batch 1, sdpa."""
    import transformers
    for kind, name in (("llava", "LlavaForConditionalGeneration"), ("qwen", "Qwen2_5_VLForConditionalGeneration")):
        path = folder / kind
        write_checkpoint(path, kind, layers, small)
        for dtype in (torch.float32, torch.bfloat16):
            ours = MODULES[kind].load(path, device, dtype)
            theirs = getattr(transformers, name).from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()
            compare(report, f"{kind}, {str(dtype)[6:]}", kind, ours, theirs, device, rounds)
            del ours, theirs


@torch.inference_mode()
def compare(report, label, kind, ours, theirs, device, rounds):
    pixels = ours.preprocess(IMAGE)
    stream = ours.begin(pixels, QUESTION)
    text, dtype = theirs.model.language_model, stream.x.dtype

    def our_tower():
        if kind == "llava":
            return ours.multi_modal_projector(ours.vision_tower(pixels[None].to(device, dtype))[0])
        return ours.visual(pixels[0][None].to(device, dtype), pixels[1])[0]

    def their_tower():
        if kind == "llava":
            return theirs.model.get_image_features(pixel_values=pixels[None].to(device, dtype), vision_feature_layer=-2)
        patches = torch.tensor([[1, *(2 * side for side in pixels[1])]], device=device)
        return theirs.model.visual(pixels[0].to(device, dtype), grid_thw=patches)

    def their_prefill():
        out = text(inputs_embeds=stream.x, position_ids=stream.pos, use_cache=True)
        return theirs.lm_head(out.last_hidden_state[:, -1]), out.past_key_values
    full, token = ours.run(stream), stream.ids[-1:][None]
    past = their_prefill()[1]
    at = torch.full((1, 1) if kind == "llava" else (3, 1, 1), stream.next_pos, device=device)
    wanted = their_prefill()[0].float()
    difference = ((ours.logits(full) - wanted).abs().max() / wanted.abs().max()).item()

    def our_decode():
        stream = tokprune.with_room(full)
        for _ in range(STEPS):
            stream = ours.run(ours.append(stream, token))
            ours.logits(stream)

    def their_decode():
        for step in range(STEPS):
            out = text(inputs_embeds=text.embed_tokens(token), position_ids=at + step, past_key_values=past, use_cache=True)
            theirs.lm_head(out.last_hidden_state[:, -1])
        past.crop(-STEPS)                               # the same length every time
    decoding = f"decoding {STEPS} tokens"
    bars = {"tower": 1.05, "prefill": 1.0, decoding: 1.3 if device.type == "cuda" else 1.0}
    calls = {"tower": (our_tower, their_tower), "prefill": (lambda: ours.logits(ours.run(stream)), their_prefill),
             decoding: (our_decode, their_decode)}
    for name, (one, other) in calls.items():
        spent = evaluation.in_turns({"ours": one, "theirs": other}, rounds)
        report.say(f"{label}: {name}, times faster than transformers", spent["theirs"]["median"] / spent["ours"]["median"],
                   bars[name], note=milliseconds(spent["ours"], spent["theirs"]))
    for name in ("tower", "prefill"):
        memory = [evaluation.extra_memory(call, device) / 2 ** 20 for call in calls[name]]
        report.say(f"{label}: peak memory of {name}, share of transformers'", memory[0] / memory[1], 1.0, at_most=True,
                   note="{:.1f} MiB against {:.1f} MiB, beside the weights".format(*memory))
    report.say(f"{label}: difference of logits, share of the largest", difference, 1e-4 if dtype == torch.float32 else 0.05,
               at_most=True)


def part_pruning(report: Report, folder: Path, device, layers: int, rounds: int, small: bool):
    """2. The speed-up of prefill at layer 2 of 32 against the FLOPs ratio, and what selecting costs of an unpruned prefill."""
    path, depth = folder / "llava", layers if small else 32
    write_checkpoint(path, "llava", layers, small)
    model = model_llava.load(path, device, torch.bfloat16)
    deepen(model, depth)
    stream = model.begin(IMAGE, QUESTION)
    N, T = stream.visual[1], stream.x.shape[1]
    at = model.run(stream, stop=2)
    schedules = {f"{method}, {ratio:.0%} pruned": ((2, method, ratio),) for ratio in (0.5, 0.75, 0.9) for method in METHODS}
    spent = evaluation.time_prefill(model, stream, {"": ()} | schedules, "keep", min(rounds, 3))
    full, work = spent.pop(""), tokprune.flops(model.config.text, [T] * depth)

    def product(rows):
        x = torch.ones(rows, model.config.text.hidden_size, dtype=torch.bfloat16, device=device)
        return lambda: [layer.mlp.gate_proj(x) for layer in decoder(model).layers[:layers]]
    bare = evaluation.in_turns({T - N + n: product(T - N + n) for n in (N, N // 2, N // 4, N // 10)}, rounds)
    for rows, ms in bare.items():
        report.say(f"a bare matrix product of {rows} rows: share of the rate of {T} rows",
                   rows / ms["median"] / (T / bare[T]["median"]), note=milliseconds(ms))
    for name, ms in spent.items():
        rows = [T - N + n for n in tokprune.visual_tokens(schedules[name], N, depth)]
        fewer = work / tokprune.flops(model.config.text, rows)
        report.say(f"{name} at layer 2 of {depth}: speed-up, share of the FLOPs ratio {fewer:.2f}",
                   full["median"] / ms["median"] / fewer, 0.85, note=milliseconds(ms, full))
    bars = {"random": 0.02, "fastv": 0.02, "dart": 0.05, "scope": 0.05, "divprune": 0.05, "sparsevlm": 0.10}
    for method in METHODS:
        select = evaluation.time_calls(lambda: tokprune.prune(model, at, method, N // 2), rounds)
        report.say(f"{method}: selecting {N // 2} of {N}, share of an unpruned prefill",
                   select["median"] / full["median"], bars.get(method), at_most=True, note=milliseconds(select))


def part_sweep(report: Report, folder: Path, device, layers: int, rounds: int, small: bool):
    """3. All layers, all methods, 90 % on the built-in model: one pass a question against every cell on its own, same answers."""
    args = evaluation.parse_arguments(["--layer", "0,20" if small else "all", "--ratio", "0.9", "--seeds", "1"])
    model = model_llava.load(ROOT / "tiny" / "llava", device, torch.float32)
    cells = evaluation.parse_cells(args, model.num_layers)
    few = [cell for cell in cells if not cell.schedule or cell.schedule[0][0] == 20]
    questions = [q for name in ("mme", "textvqa") for q in load_benchmark(name, ROOT / "tiny")[:1 if small else 4]]
    together, alone, same = 0.0, 0.0, True
    for question in questions:
        image = evaluation.read_image(question.image)
        evaluation.answer_cells(model, question, image, few, args)                  # warms up
        start = evaluation.now()
        answers = evaluation.answer_cells(model, question, image, cells, args)["answers"]
        together += evaluation.now() - start
        start = evaluation.now()
        for cell in cells:
            same &= evaluation.answer_cells(model, question, image, [cell], args)["answers"][cell.key] == answers[cell.key]
        alone += evaluation.now() - start
    report.say(f"sweep of {len(cells)} cells, times faster than each on its own", alone / together, 5,
               note=f"{together / 1000:.1f} s against {alone / 1000:.1f} s")
    report.say("sweep: share of answers that are the same", float(same), 1)
    image = evaluation.read_image(questions[0].image)
    memory = [evaluation.extra_memory(lambda: evaluation.answer_cells(model, questions[0], image, part, args), device)
              for part in (few, cells)]
    report.say(f"sweep: peak memory of {len(cells)} cells above that of {len(few)}, MiB", (memory[1] - memory[0]) / 2 ** 20,
               note="of one question, beside the weights")


def part_information(report: Report, folder: Path, device, layers: int, rounds: int, small: bool):
    """4. All layers of keep-one: FLOPs against the official procedure at LLaVA-1.5-7B's shape, time against the naive loop."""
    text = model_llava.TextConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                                  num_key_value_heads=32, vocab_size=32064)
    spent, official = tokprune.information_flops(text, (35, 30), (24, 24), list(range(1, 32)))
    report.say("information of 31 layers at LLaVA-1.5-7B's shape: times fewer FLOPs than officially", official / spent, 20)
    model = model_llava.load(ROOT / "tiny" / "llava", device, torch.float32)
    question = load_benchmark("textvqa", ROOT / "tiny")[0]
    stream = model.begin(evaluation.read_image(question.image), question.prompt)
    wanted, y = [1, 20] if small else list(range(1, model.num_layers)), model.answer_id(question.gold)

    def naive():
        found = []
        for layer in wanted:
            for kept in [torch.zeros(0, dtype=torch.long), *tokprune.windows_of(stream.grid, 2)]:
                s = model.run(tokprune.keep(model.run(stream, stop=layer), kept))
                found.append(model.logits(s).softmax(-1)[0, y])
        return torch.stack(found).view(len(wanted), -1)

    def ours():
        return tokprune.token_information(model, stream, question.gold, wanted)
    spent = evaluation.in_turns({"ours": ours, "naive": naive}, min(rounds, 3))
    report.say("information on the built-in model: times faster than the naive loop",
               spent["naive"]["median"] / spent["ours"]["median"], 10, note=milliseconds(spent["ours"], spent["naive"]))
    values = naive()
    gap = ours().flatten(1) - (values[:, 1:] - values[:, :1]).cpu()
    report.say("information: largest difference from the naive loop", gap.abs().max().item(), 1e-5, at_most=True)


LOAD_AND_ASK = """
import re, sys, time, torch, model_llava
from PIL import Image
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, start = peak(), time.time()
model = model_llava.load(sys.argv[1], "cpu", torch.bfloat16)
for p in model.parameters():
    p.view(-1)[::512].sum()
print(peak() - before, time.time() - start)
start = time.time()
model.answer(Image.new("RGB", (640, 480), "red"), "What is this?", max_new_tokens=4)
print(time.time() - start)
"""


def part_loading(report: Report, folder: Path, device, layers: int, rounds: int, small: bool):
    """6. A whole made-up LLaVA-1.5-7B: memory and time of loading it on the CPU, and one question answered on it."""
    path = folder / "whole"
    size = write_checkpoint(path, "llava", 2 if small else 32, small)

    def read():
        start, buffer = time.time(), bytearray(2 ** 24)
        for shard in path.glob("*.safetensors"):
            with shard.open("rb", buffering=0) as f:
                while f.readinto(buffer):
                    pass
        return time.time() - start
    read()                                              # both find the files in the page cache
    reading = read()
    lines = subprocess.check_output([sys.executable, "-c", LOAD_AND_ASK, path], cwd=ROOT, text=True).split()
    report.say(f"loading {size / 1e9:.1f} GB: peak memory, share of the checkpoint", int(lines[0]) / size, 1.1, at_most=True)
    report.say("loading and touching every page, times as long as reading the files", float(lines[1]) / reading, 1.3,
               at_most=True, note=f"{float(lines[1]):.1f} s against {reading:.1f} s, in the page cache")
    report.say("one question answered end to end in bfloat16 on the CPU, s", float(lines[2]))


def part_growth(report: Report, folder: Path, device, layers: int, rounds: int, small: bool):
    """7. Prefill time and memory against visual tokens and layers, whole and pruned; selections up to 2,025 tokens."""
    path, depth, rounds = folder / "qwen", layers if small else 28, min(rounds, 3)
    schedules = {"whole": (), "90 % pruned at layer 2": ((2, "random", 0.9),)}
    write_checkpoint(path, "qwen", layers, small)
    model = model_qwen.load(path, device, torch.bfloat16, max_pixels=4096 * 784)
    panels = {(unit, axis): {name: [] for name in schedules} for unit in ("ms", "MiB") for axis in ("visual tokens", "layers")}

    def measure(stream, axis, at):
        spent = evaluation.time_prefill(model, stream, schedules, "keep", rounds)
        for name, schedule in schedules.items():
            memory = evaluation.extra_memory(lambda: tokprune.prefill(model, stream, schedule), device) / 2 ** 20
            report.say(f"by {axis}: {stream.visual[1]} tokens, {model.num_layers} layers, {name}: prefill ms",
                       spent[name]["median"], note=f"{memory:.0f} MiB at the peak, beside the weights")
            panels["ms", axis][name].append((at, spent[name]["median"]))
            panels["MiB", axis][name].append((at, memory))
    deepen(model, depth)
    for side in (8, 16) if small else (8, 16, 24, 32, 45, 64):
        stream = model.begin(IMAGE.resize((28 * side, 28 * side)), QUESTION)
        measure(stream, "visual tokens", side * side)
        at = model.run(stream, stop=2)
        for method in METHODS if side * side <= 2048 else ():
            select = evaluation.time_calls(lambda: tokprune.prune(model, at, method, side * side // 10), rounds)
            report.say(f"{side * side} visual tokens: {method}, ms to keep a tenth", select["median"])
    for few in (3,) if small else (4, 8, 16, depth):
        deepen(model, few)
        measure(model.begin(IMAGE, QUESTION), "layers", few)
    draw(panels, Path(report.plot))


def draw(panels: dict, path: Path):
    """Prefill time and memory against visual tokens and layers, both axes logarithmic."""
    picture = Image.new("RGB", (1240, 800), "white")
    pen = ImageDraw.Draw(picture)
    for panel, ((unit, axis), curves) in enumerate(panels.items()):
        left, top = 620 * (panel % 2), 400 * (panel // 2)
        points = np.log([point for curve in curves.values() for point in curve])
        (x0, y0), (x1, y1) = points.min(0), points.max(0)
        pen.text((left + 310, top + 388), axis, "black", anchor="mm")
        for number, ((name, curve), ink) in enumerate(zip(curves.items(), ("#7f7f7f", "#d62728"))):
            dots = [(left + 60 + 500 * (math.log(x) - x0) / max(x1 - x0, 1e-9),
                     top + 350 - 290 * (math.log(y) - y0) / max(y1 - y0, 1e-9)) for x, y in curve]
            pen.line(dots, ink, 2)
            pen.text((left + 60, top + 14 + 14 * number), f"{name}, {unit} of prefill", ink)
            for (px, py), (x, y) in zip(dots, curve):
                pen.ellipse((px - 3, py - 3, px + 3, py + 3), ink)
                pen.text((px, py - 12), f"{y:.0f}", ink, anchor="mm")
                pen.text((px, top + 370), f"{x}", "black", anchor="mm")
    picture.save(path)


def part_cuda(report: Report, folder: Path, device, layers: int, rounds: int, small: bool):
    """8. Whole models on a CUDA device: shares of its matrix rate and bandwidth, each method at layers 2 and 20, a run; and
    whether the CPU says the same."""
    if device.type != "cuda" and not small:
        print("| on CUDA | not measured | no CUDA device | |")
        return
    for kind in MODULES:
        path, depth = folder / f"{kind}-whole", layers if small else {"llava": 32, "qwen": 28}[kind]
        write_checkpoint(path, kind, depth, small)
        model = MODULES[kind].load(path, device, torch.bfloat16)
        weights = sum(p.numel() * p.element_size() for part in (*decoder(model).layers, model.lm_head) for p in part.parameters())
        a = torch.empty(2 ** 24 if small else 2 ** 31, dtype=torch.uint8, device=device)
        bandwidth = 2 * len(a) / evaluation.time_calls(a.clone, rounds)["low"] * 1000
        del a
        deep = [layer for layer in (2, 20) if layer < depth]
        args = evaluation.parse_arguments(["--layer", ",".join(map(str, deep)), "--ratio", "0.9", "--seeds", "1"])
        rows = evaluation.measure_speed(model, IMAGE, QUESTION, evaluation.parse_cells(args, depth), args, rounds)
        for row in rows:
            name = f"{kind}, {row['schedule'] or 'unpruned'}"
            full = row is rows[0]
            report.say(f"{name}: prefill, share of the matrix rate", row["share_of_peak"], 0.55 if full else None,
                       note=milliseconds(row["prefill_ms"]) + f", {row['gflops'] / row['prefill_ms']['median']:.1f} TFLOP/s of "
                       f"{row['peak_flops'] / 1e12:.1f}; {row['peak_bytes'] / 2 ** 30:.2f} GiB at the peak, beside the weights")
            report.say(f"{name}: decode, share of the bandwidth", weights / bandwidth / row["decode_ms"]["median"] * 1000,
                       0.60 if full else None, note=milliseconds(row["decode_ms"]) + f" a token; {bandwidth / 1e9:.0f} GB/s")
        images = [folder / f"{i}.jpg" for i in range(4 if small else 40)]
        for file in images:
            IMAGE.resize((640, 480)).save(file)
        model.answer(IMAGE, QUESTION, max_new_tokens=4)
        start = evaluation.now()
        for file in images:
            model.answer(evaluation.read_image(file), "Is there a dog in the image? Please answer yes or no.", max_new_tokens=4)
        report.say(f"{kind}: MME-shaped questions per second, images of 640x480 read too",
                   1000 * len(images) / (evaluation.now() - start))
        stream = model.begin(IMAGE, QUESTION)
        spent = evaluation.time_calls(lambda: tokprune.token_information(model, stream, "Yes", list(range(1, depth))), 1)
        report.say(f"{kind}: information of all layers of one question, s", spent["median"] / 1000)
        on_cpu = MODULES[kind].load(path, "cpu", torch.bfloat16)
        here, there = (m.logits(m.run(m.begin(IMAGE, QUESTION))).cpu() for m in (model, on_cpu))
        report.say(f"{kind}: difference of logits from the CPU's, share of the largest",
                   ((here - there).abs().max() / there.abs().max()).item(), 0.05, at_most=True)
        del model, on_cpu


PARTS = {name[5:]: part for name, part in globals().copy().items() if name.startswith("part_")}


def main(argv: list[str]) -> dict:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--parts", help=f"comma-separated, of {', '.join(PARTS)} (default: all that can run)")
    p.add_argument("--layers", type=int, default=4, help="decoder layers of the cut models (default: 4)")
    p.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed rounds, after one that warms up (default: {ROUNDS})")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--plot", default="growth.png", help="picture of part growth (default: growth.png)")
    p.add_argument("--smoke", action="store_true", help="tiny shapes, one round")
    args = p.parse_args(argv)
    parts = args.parts.split(",") if args.parts else [name for name in PARTS if not (args.smoke and name == "transformers")]
    if unknown := set(parts) - set(PARTS):
        p.error(f"--parts: unknown {', '.join(unknown)}; want some of {', '.join(PARTS)}")
    device, report = torch.device(args.device), Report(args.plot, args.smoke)
    layers, rounds = (3, 1) if args.smoke else (args.layers, args.rounds)
    name = evaluation.device_name(device)
    packages = ["torch", "transformers"] if "transformers" in parts else ["torch"]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    print(f"{name}, {torch.get_num_threads()} threads, {versions}, Python {platform.python_version()}; median of {rounds} "
          f"rounds, of fewer where a round takes minutes [lowest, highest]\n\n| what | value | bar | note |\n|---|---:|---|---|")
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](report, Path(folder), device, layers, rounds, args.smoke)
    result = {"device": name, "versions": versions, "threads": torch.get_num_threads(), "missed": report.missed,
              "found": report.found}
    print("\n" + json.dumps(result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
