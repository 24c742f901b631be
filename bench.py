"""How fast a model is, unpruned and pruned by each method.

    python bench.py                                the model at hand: the built-in one
    python bench.py --model FOLDER --layer 2,20 --ratio 0.9
    python bench.py --shape qwen-7b --depth 4      a published shape, no checkpoint needed
    python bench.py --batch 1,8 --method random    questions answered together, time a question
    python bench.py --against transformers         and as ratios to transformers, if it is installed
    python bench.py --sweep --layer all            the sweep and information, against one by one

A time is the median of --rounds [lowest, highest], after one that warms up. What is compared takes
turns in one run. A shape's weights are drawn at random, on the device: they give times, no answers.
"""
import importlib.util
import re
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from eval import Cell, answer_cells
from information import token_information, windows_of
from support import checkpoint, flags, report
from support.files import read_image
from support.run import grouped, open_folder, provenance, start, write_result
from support.timing import (STEPS, cache_bytes, decode_steps, device_rates, divided,
                            extra_memory, floor_ms, span, time_call, time_in_turns)
from tokprune import (METHODS, InputError, flops, format_schedule, keep, prefill, together,
                      visual_tokens)

QUESTION = "What does the sign on the left say?"
SIDE = 24                               # rows and columns of visual tokens, without --image
TIMED = [name for name, method in METHODS.items() if not method.measure and not method.keeps_none]
MiB = 2 ** 20


# ---- a model under schedules ---------------------------------------------------------------------

def measure(model, stream, schedules: list[tuple], sizes: list[int], rounds: int) -> dict:
    """Return {"matrix_flops", "copy_bytes", "reading_ms", "speed"}: what the device does a second,
    the time to read the weights that a decoded token needs, and a row for each schedule and number
    of questions together.

    A row's times, bytes and FLOPs are those of a question. "promised": how many times as fast as
    the first row it would be if each took the least time that FLOPs and weights allow.
    """
    device = stream.x.device
    config = model.config.text
    rate, bandwidth = device_rates(stream.x)
    layer_bytes = flops(config, [1]) / 2 * stream.x.element_size()      # two FLOPs a weight
    token_bytes = model.num_layers * layer_bytes + model.lm_head.weight.nbytes
    streams = {P: together([stream] * P) for P in sizes}
    calls = {(schedule, P): partial(first_logits, model, streams[P], schedule)
             for schedule in schedules for P in sizes}
    prefill_ms = time_in_turns(calls, rounds, device)
    speed = []
    for (schedule, P), call in calls.items():
        full_stream = prefill(model, streams[P], schedule)
        decode_ms = time_call(lambda: decode_steps(model, full_stream), rounds, device)
        text_rows = stream.x.shape[1] - stream.N
        layer_flops = [flops(config, [text_rows + V])
                       for V in visual_tokens(schedule, stream.N, model.num_layers)]
        name = format_schedule(schedule) or "unpruned"
        row = {"name": f"{name}, {P} together" if P > 1 else name, "questions": P,
               "prefill_ms": divided(prefill_ms[schedule, P], P),
               "decode_ms": divided(decode_ms, STEPS * P),
               "cache_bytes": cache_bytes(full_stream) / P,
               "peak_bytes": extra_memory(call, device) / P,
               "gflops": sum(layer_flops) / 1e9,
               "floor_ms": floor_ms(layer_flops, layer_bytes / P, rate, bandwidth)}
        speed.append(row)
        row["times_as_fast"] = speed[0]["prefill_ms"]["median"] / row["prefill_ms"]["median"]
        row["promised"] = speed[0]["floor_ms"] / row["floor_ms"]
    return {"matrix_flops": rate, "copy_bytes": bandwidth,
            "reading_ms": 1000 * token_bytes / bandwidth, "speed": speed}


def first_logits(model, stream, schedule: tuple) -> torch.Tensor:
    return model.logits(prefill(model, stream, schedule))


def print_speed(found: dict):
    print(f"vision tower {span(found['tower_ms'])} ms; the device multiplies matrices at "
          f"{found['matrix_flops'] / 1e12:.3g} TFLOP/s and copies at "
          f"{found['copy_bytes'] / 1e9:.0f} GB/s; to read the weights once, for a decoded token, "
          f"takes {found['reading_ms']:.2f} ms\n")
    report.print_heads(["a question", "prefill ms", "times as fast", "promised",
                        "decode ms a token", "cache MiB", "prefill MiB", "GFLOPs", "of floor"])
    for row in found["speed"]:
        report.print_row([
            row["name"], span(row["prefill_ms"]), f"{row['times_as_fast']:.2f}",
            f"{row['promised']:.2f}", span(row["decode_ms"], 2),
            f"{row['cache_bytes'] / MiB:.2f}", f"{row['peak_bytes'] / MiB:.2f}",
            report.significant(row["gflops"]),
            f"{row['floor_ms'] / row['prefill_ms']['median']:.0%}"])
    print()


def print_verdicts(rows: list[dict]):
    """Print the slowest and the fastest prefill of the rows that promise the same."""
    for group in grouped(rows[1:], lambda row: (row["gflops"], row["questions"])).values():
        slow = min(group, key=lambda row: row["times_as_fast"])
        fast = max(group, key=lambda row: row["times_as_fast"])
        said = f"{slow['name']} makes prefill {slow['times_as_fast']:.1f} times as fast"
        if fast is not slow:
            said += f", {fast['name']} {fast['times_as_fast']:.1f} times"
        print(f"{said}; FLOPs and weights promise {slow['promised']:.1f}.")


# ---- published shapes ----------------------------------------------------------------------------

SHAPES = {}                             # by name: class and config
for module in checkpoint.MODELS.values():
    SHAPES |= getattr(importlib.import_module(module), "SHAPES", {})


def made_up(shape: str, depth: int, device, dtype):
    """Return a model of a published shape with `depth` decoder layers and random weights."""
    model_class, config = SHAPES[shape]
    image = sys.modules[model_class.__module__].IMAGE
    # a token a word, the same for all but the image: prompts are about as long as published ones
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([image])
    config = replace(config, text=replace(config.text, num_hidden_layers=depth),
                     image_token=tokenizer.token_to_id(image))
    device, dtype = checkpoint.device_and_dtype(device, dtype)
    model = checkpoint.empty(model_class, config, tokenizer, set())
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name] = torch.ones(parameter.shape, device=device, dtype=dtype)
        if "norm" not in name:
            weights[name].normal_(std=0.02)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False)        # `to` for buffers


def noise(model) -> Image.Image:
    """Return an image of SIDE x SIDE visual tokens; a model may resize it."""
    side = SIDE * getattr(model.config, "factor", 14)           # pixels a token
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


# ---- against transformers ------------------------------------------------------------------------

@torch.inference_mode()
def against_transformers(model, pixels, rounds: int) -> dict:
    """Time the unpruned model and transformers' in turns. Print and return the ratios."""
    theirs = in_transformers(model)
    stream = model.begin(pixels, QUESTION)
    device = stream.x.device
    full_stream = model.run(stream)
    their_logits, past = their_prefill(theirs, stream)
    calls = {"tower": (lambda: model.begin(pixels, QUESTION), lambda: their_tower(theirs, pixels)),
             "prefill": (lambda: model.logits(model.run(stream)),
                         lambda: their_prefill(theirs, stream)),
             "decode": (lambda: decode_steps(model, full_stream),
                        lambda: their_decode(theirs, past, stream))}
    rows = []
    for name, (ours, others) in calls.items():
        ms = time_in_turns({"here": ours, "there": others}, rounds, device)
        rows.append({"name": f"{name}, ms", "here": span(ms["here"]), "there": span(ms["there"]),
                     "ratio": ms["there"]["median"] / ms["here"]["median"]})
    for name in ("tower", "prefill"):
        here, there = (extra_memory(call, device) / MiB for call in calls[name])
        rows.append({"name": f"{name}, MiB", "here": f"{here:.1f}", "there": f"{there:.1f}",
                     "ratio": there / here})
    report.print_heads(["against transformers", "here", "there", "there / here"])
    for row in rows:
        report.print_row([row["name"], row["here"], row["there"], f"{row['ratio']:.2f}"])
    difference = (model.logits(full_stream) - their_logits).abs().max() / their_logits.abs().max()
    print(f"\nLogits differ by at most {difference:.1e} of the largest. Decoding is of {STEPS} "
          "tokens, memory the peak beside the weights.")
    return {"rows": rows, "difference_of_logits": difference.item()}


def in_transformers(model):
    """Return transformers' model of the same config on the same weights, with sdpa."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)      # of names that its next version changes
    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.text.rope_theta,
            "mrope_section": list(getattr(c.text, "mrope_section", []))}
    model_types = {file: model_type for model_type, file in checkpoint.MODELS.items()}
    config = transformers.AutoConfig.for_model(
        model_types[type(model).__module__], text_config=vars(c.text) | {"rope_parameters": rope},
        vision_config=vars(c.vision), tie_word_embeddings=c.tie_word_embeddings)
    weights = {}
    for name, published in checkpoint.empty(type(model), c, None, set()).named_parameters():
        # a model may have widened it by zeros, for a GPU: the part that was published
        weight = model.get_parameter(name)[tuple(map(slice, published.shape))]
        name = re.sub(r"^model\.", "language_model.", name)
        weights[name if name.startswith("lm_head") else f"model.{name}"] = weight
    theirs_class = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    theirs = theirs_class.from_pretrained(None, config=config, state_dict=weights,
                                          dtype=weight.dtype, attn_implementation="sdpa")
    return theirs.to(weight.device).eval()


def their_tower(theirs, pixels):
    weight = theirs.lm_head.weight
    grid = {}
    if isinstance(pixels, tuple):                       # patches, and the grid of visual tokens
        pixels, (rows, cols) = pixels
        grid["image_grid_thw"] = torch.tensor([[1, 2 * rows, 2 * cols]], device=weight.device)
    else:
        pixels = pixels[None]
    return theirs.model.get_image_features(pixels.to(weight.device, weight.dtype), **grid)


def their_prefill(theirs, stream) -> tuple:
    """Return the last row's logits, float32, and the cache."""
    planes = {}
    if stream.planes:                                   # added to the visual rows
        is_visual = stream.ids == stream.ids[0, stream.visual[0]]
        planes = {"visual_pos_masks": is_visual, "deepstack_visual_embeds": list(stream.planes)}
    out = theirs.model.language_model(inputs_embeds=stream.x, position_ids=stream.pos,
                                      use_cache=True, **planes)
    return theirs.lm_head(out.last_hidden_state[:, -1]).float(), out.past_key_values


def their_decode(theirs, past, stream):
    text = theirs.model.language_model
    place = torch.full((*stream.pos.shape[:-1], 1), stream.next_pos, device=stream.x.device)
    for step in range(STEPS):
        out = text(stream.ids[:, -1:], position_ids=place + step, past_key_values=past,
                   use_cache=True)
        theirs.lm_head(out.last_hidden_state[:, -1])
    past.crop(-STEPS)                                   # the same length every time


# ---- the sweep and information, against doing each on its own ------------------------------------

def time_sweep(model, stream, schedules: list[tuple], rounds: int) -> list[dict]:
    """Time a question's schedules in one pass against a pass each, and information at their layers
    against a run of the whole prompt for each layer and window. Print and return the ratios."""
    cells = [Cell("", schedule) for schedule in schedules]
    layers = sorted({layer for schedule in schedules for layer, _, _ in schedule})
    calls = {
        "sweep": (
            lambda: answer_cells(model, {0: stream}, cells, {}, [0]),
            lambda: [answer_cells(model, {0: stream}, [cell], {}, [0]) for cell in cells]),
        "information": (
            lambda: token_information(model, stream, "yes", layers),
            lambda: information_one_by_one(model, stream, "yes", layers))}
    rows = []
    print(f"One question, {len(cells)} schedules, information at {len(layers)} of "
          f"{model.num_layers} layers.\n")
    report.print_heads(["against one by one", "times as fast", "ms together", "ms one by one"])
    for name, (as_one, apart) in calls.items():
        ms = time_in_turns({"together": as_one, "one by one": apart}, rounds, stream.x.device)
        times = ms["one by one"]["median"] / ms["together"]["median"]
        rows.append({"name": name, "ms": ms, "times_as_fast": times})
        report.print_row([name, f"{times:.1f}", span(ms["together"]), span(ms["one by one"])])
    return rows


def information_one_by_one(model, stream, answer: str, layers: list[int]) -> torch.Tensor:
    """Return (layers, windows): the whole prompt runs for each, as the definition says."""
    token = model.answer_ids(answer)[0]
    nothing = torch.zeros(0, dtype=torch.long)
    values = []
    for layer in layers:
        for kept in [nothing, *windows_of(stream.grid, 2)]:
            pruned_stream = keep(model.run(stream, stop=layer), kept)
            values.append(model.logits(model.run(pruned_stream)).softmax(-1)[0, token])
    values = torch.stack(values).view(len(layers), -1).cpu()
    return values[:, 1:] - values[:, :1]


# ---- the program ---------------------------------------------------------------------------------

def main(argv: list[str]):
    args = parse_arguments(argv)
    schedules = schedules_of(args, args.depth or flags.num_layers(args))
    image = read_image(args.image) if args.image else None
    if args.shape:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model = made_up(args.shape, args.depth, flags.usable_device(args.device), dtype)
    else:
        model = flags.load_model(args)
    result = provenance(args, model)
    device = result["device_name"]
    settings = {name: str(value) for name, value in vars(args).items()
                if name not in ("command", "out", "json")}
    out = open_folder(args, settings | {"device": device})
    pixels = model.preprocess(image or noise(model))
    stream = model.begin(pixels, QUESTION)
    print(f"{device}, torch {torch.__version__}; {flags.where(model)}; {args.model}, "
          f"{model.num_layers} layers; {stream.N} visual tokens of {stream.x.shape[1]}; "
          f"median [lowest, highest] of --rounds {args.rounds}")
    if args.sweep:
        result["sweep"] = time_sweep(model, stream, schedules, args.rounds)
    else:
        result["tower_ms"] = time_call(lambda: model.begin(pixels, QUESTION), args.rounds,
                                       stream.x.device)
        result |= measure(model, stream, schedules, args.batch, args.rounds)
        print_speed(result)
        print_verdicts(result["speed"])
    if args.against:
        print()
        result["against_transformers"] = against_transformers(model, pixels, args.rounds)
    write_result(out, result, args.json)


def parse_arguments(argv: list[str]):
    p = flags.Parser("bench.py", "How fast a model is, unpruned and pruned by each method.")
    group = p.add_argument_group("what is timed")
    flags.add_pruning_flags(group, TIMED, "2")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--batch", type=sizes, default=[1], metavar="N,N",
                        help="how many questions are answered together: 1,8 (default: 1)")
    either.add_argument("--sweep", action="store_true", help="time a sweep and information, each "
                        "together and one by one, instead of the table")
    group.add_argument("--against", choices=["transformers"],
                       help="add the ratios to another implementation")
    group.add_argument("--image", type=Path, metavar="FILE",
                       help="image of the prompt (default: noise of 24 x 24 visual tokens)")
    group.add_argument("--rounds", type=flags.whole(1), default=5, metavar="N",
                       help="timed rounds, after one that warms up (default: 5)")
    group = flags.add_model_flags(p)
    group.add_argument("--shape", choices=SHAPES,
                       help="a published shape with random weights, instead of --model")
    group.add_argument("--depth", type=flags.whole(1), metavar="N",
                       help="decoder layers of the shape (default: as published)")
    flags.add_output_flags(p)
    args = p.parse_args(argv)
    flags.resolve_pruning(args, "2")
    if args.against and not importlib.util.find_spec(args.against):
        raise InputError(f"--against {args.against}: it is not installed; want pip install "
                         f"{args.against}")
    if args.depth and not args.shape:
        raise InputError("--depth: goes with --shape")
    if args.shape:
        ignored = flags.repeated(args, p.parse_args([]), "model", "min_pixels", "max_pixels")
        if ignored:
            raise InputError(f"{ignored[0]}: goes without --shape")
        args.depth = args.depth or SHAPES[args.shape][1].text.num_hidden_layers
        args.model = Path(args.shape)                           # names the run
    return args


def sizes(text: str) -> list[int]:
    return [flags.whole(1)(part) for part in text.split(",")]


def schedules_of(args, L: int) -> list[tuple]:
    """Return unpruned, and each --schedule or, at each layer, none and each --method."""
    schedules = flags.schedules_of(args, ["none"], TIMED, L)
    for schedule in schedules:
        for _, method, _ in schedule:
            if METHODS[method].measure:
                raise InputError(f"{method}: what it needs is measured in other runs of the model, "
                                 f"so it is not timed; want some of {', '.join(TIMED)}")
    return list(dict.fromkeys([(), *schedules]))


if __name__ == "__main__":
    start(main)
