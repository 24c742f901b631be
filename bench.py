"""How fast a model is, unpruned and pruned by each method.

    python bench.py                                the model at hand: the built-in one
    python bench.py --model FOLDER --layer 2,20 --ratio 0.9
    python bench.py --shape qwen-7b --depth 4      a published shape, no checkpoint needed
    python bench.py --against transformers         and as ratios to transformers, if it is installed
    python bench.py --sweep                        the sweep and information, against one by one

A time is the median of --rounds [lowest, highest], after one that warms up. What is compared takes
turns in one run. A shape's weights are drawn at random, on the device: they give times, no answers.
"""
import importlib.util
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from eval import Cell, answer_cells
from information import token_information, windows_of
from support import checkpoint, flags, report
from support.files import read_image
from support.run import ROOT, open_folder, provenance, start, write_result
from support.timing import (STEPS, cache_bytes, copy_rate, decode, device_name, extra_memory,
                            floor_ms, matrix_rate, span, time_call, time_in_turns, time_prefill)
from tokprune import (METHODS, InputError, check_method, flops, format_schedule, keep, number_kept,
                      parse_schedule, prefill, prune, visual_tokens)

PICTURE = ROOT / "tiny" / "textvqa" / "train_images" / "0007.jpg"
QUESTION = "What does the purple word say?"
TIMED = [name for name, method in METHODS.items() if not method.measure and not method.keeps_none]
MiB = 2 ** 20


# ---- a model under schedules ---------------------------------------------------------------------

def measure(model, image, question: str, schedules: dict[str, tuple], rounds: int) -> dict:
    """Return {"tower_ms", "weight_bytes", "matrix_flops", "copy_bytes", "speed"}: image and tower,
    the weights, the device's FLOPs and bytes a second. "speed" has a row for each schedule:
    milliseconds, bytes, FLOPs, ratios to the first, and shares of what the device can do.

    schedules: by name; the first is the unpruned model's.
    """
    weight = next(model.parameters())
    stream = model.begin(image, question)
    found = {"tower_ms": time_call(lambda: model.begin(image, question), rounds, weight.device),
             "weight_bytes": bytes_of(model), "matrix_flops": matrix_rate(weight, min(rounds, 5)),
             "copy_bytes": copy_rate(weight.device, min(rounds, 5)), "speed": []}
    layer_bytes = [bytes_of(layer) for layer in layers_of(model)]
    prefill_ms = time_prefill(model, stream, schedules, rounds)
    for name, schedule in schedules.items():
        rows = [stream.x.shape[1] - stream.N + V
                for V in visual_tokens(schedule, stream.N, model.num_layers)]
        layer_flops = [flops(model.config.text, [n]) for n in rows]
        ms = prefill_ms[name]["median"]
        row = {"name": name, "schedule": format_schedule(schedule), "prefill_ms": prefill_ms[name],
               "gflops": sum(layer_flops) / 1e9,
               "select_ms": time_selection(model, stream, schedule, rounds)}
        row |= measure_prefilled(model, stream, schedule, rounds)
        first = found["speed"][0] if found["speed"] else row
        row["times_as_fast"] = first["prefill_ms"]["median"] / ms
        row["times_fewer_flops"] = first["gflops"] / row["gflops"]
        row["share_of_flops_ratio"] = row["times_as_fast"] / row["times_fewer_flops"]
        row["share_of_matrix_rate"] = sum(layer_flops) / (ms / 1000) / found["matrix_flops"]
        row["share_of_floor"] = floor_ms(layer_flops, layer_bytes, found["matrix_flops"],
                                         found["copy_bytes"]) / ms
        found["speed"].append(row)
    return found


def measure_prefilled(model, stream, schedule: tuple, rounds: int) -> dict:
    """Return the time of a decoded token, the cache, and prefill's peak memory beside the weights.
    """
    device = stream.x.device
    full_stream = prefill(model, stream, schedule)
    decoding = time_call(lambda: decode(model, full_stream), rounds, device)
    return {"decode_ms": {key: ms / STEPS for key, ms in decoding.items()},
            "cache_bytes": cache_bytes(full_stream),
            "peak_bytes": extra_memory(lambda: prefill(model, stream, schedule), device)}


def time_selection(model, stream, schedule: tuple, rounds: int) -> float:
    """Return the milliseconds that only the prunings of a schedule take."""
    total = 0.0
    for layer, method, amount in schedule:
        stream = model.run(stream, stop=layer)
        n = number_kept(amount, stream.N)
        ms = time_call(lambda: prune(model, stream, method, n), rounds, stream.x.device)
        total += ms["median"]
        stream = prune(model, stream, method, n)
    return total


def layers_of(model) -> torch.nn.ModuleList:
    """Return the decoder's layers, whatever the model's file calls the decoder."""
    return (model.language_model if hasattr(model, "language_model") else model.model).layers


def bytes_of(module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def print_speed(found: dict, on_gpu: bool):
    print(f"image and tower {span(found['tower_ms'])} ms; weights "
          f"{found['weight_bytes'] / MiB:.1f} MiB; the device multiplies matrices at "
          f"{found['matrix_flops'] / 1e9:.0f} GFLOP/s and copies at "
          f"{found['copy_bytes'] / 1e9:.0f} GB/s\n")
    report.print_heads(["schedule", "prefill ms", "times as fast", "times fewer FLOPs",
                        "select ms", "decode ms/token", "tokens/s", "cache MiB", "prefill MiB",
                        "GFLOPs", "of matrix rate"] + ["of floor"] * on_gpu)
    for row in found["speed"]:
        token = row["decode_ms"]
        report.print_row([
            row["name"], span(row["prefill_ms"]), f"{row['times_as_fast']:.2f}",
            f"{row['times_fewer_flops']:.2f}", f"{row['select_ms']:.2f}", span(token, 2),
            f"{1000 / token['median']:.0f}", f"{row['cache_bytes'] / MiB:.2f}",
            f"{row['peak_bytes'] / MiB:.2f}", f"{row['gflops']:.3g}",
            f"{row['share_of_matrix_rate']:.0%}"] + [f"{row['share_of_floor']:.0%}"] * on_gpu)
    print()


def print_verdicts(rows: list[dict], schedules: dict[str, tuple], on_gpu: bool):
    """Print what the times mean: a sentence for each schedule, or for the methods of each layer.

    With few rows a GPU waits for the weights, so that the ratio of FLOPs cannot be reached: there a
    pruned prefill is judged by its floor.
    """
    key = "share_of_floor" if on_gpu else "share_of_flops_ratio"
    promise = "of what its FLOPs and weights allow" if on_gpu else "of what the FLOPs promise"
    by_layer = {}
    for row in rows[1:]:
        schedule = schedules[row["name"]]
        if row["name"] == row["schedule"]:              # typed, not made of --method and --layer
            print(f"{row['name']} makes prefill {row['times_as_fast']:.1f} times as fast, "
                  f"{row[key]:.2f} {promise}.")
        else:
            by_layer.setdefault(schedule[0][0], []).append(row)
    for layer, (nothing, *pruned) in by_layer.items():
        _, _, ratio = schedules[pruned[0]["name"]][0]
        print(f"Pruning {ratio:.0%} at layer {layer} makes prefill "
              f"{extremes(pruned, 'times_as_fast', 1)} times as fast, {extremes(pruned, key, 2)} "
              f"{promise}; dropping everything makes it {nothing['times_as_fast']:.1f} times as "
              "fast.")


def extremes(rows: list[dict], key: str, digits: int) -> str:
    """Format the least and the most as "1.6 (scope) to 2.1 (random)"."""
    low = min(rows, key=lambda row: row[key])
    high = max(rows, key=lambda row: row[key])
    ends = [low] if low is high else [low, high]
    return " to ".join(f"{row[key]:.{digits}f} ({row['name'].split()[0]})" for row in ends)


# ---- published shapes ----------------------------------------------------------------------------

SHAPES = {}                             # by name: class and config
for module in checkpoint.MODELS.values():
    SHAPES |= importlib.import_module(module).SHAPES


def made_up(shape: str, depth: int, device, dtype):
    """Return a model of a published shape with `depth` decoder layers and random weights."""
    model_class, config = SHAPES[shape]
    tokenizer = word_tokenizer()
    image = "<|image_pad|>" if hasattr(config, "max_pixels") else "<image>"     # Qwen's, LLaVA's
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


def word_tokenizer() -> Tokenizer:
    """Return a tokenizer with a token a word, the same for all words but the image: prompts are
    about as long as the published tokenizers make them."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<image>", "<|image_pad|>"])      # LLaVA's, and Qwen's
    return tokenizer


def noise(model) -> Image.Image:
    """Return an image of 24 x 24 visual tokens."""
    vision = model.config.vision
    side = 24 * vision.patch_size * getattr(vision, "spatial_merge_size", 1)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


# ---- against transformers ------------------------------------------------------------------------

THEIRS = {"Llava": "LlavaForConditionalGeneration", "Qwen": "Qwen2_5_VLForConditionalGeneration",
          "Qwen3": "Qwen3VLForConditionalGeneration"}


def in_transformers(model):
    """Return transformers' model of the same config on the same weights, with sdpa."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)      # of names that its next version changes
    theirs_class = getattr(transformers, THEIRS[type(model).__name__])
    config = model.config
    rope = {"rope_type": "default", "rope_theta": config.text.rope_theta}
    if hasattr(config.text, "mrope_section"):
        rope["mrope_section"] = list(config.text.mrope_section)
    config = theirs_class.config_class(text_config=vars(config.text) | {"rope_parameters": rope},
                                       vision_config=vars(config.vision),
                                       tie_word_embeddings=config.tie_word_embeddings)
    weights = {}
    for name, weight in model.named_parameters():
        name = re.sub(r"^model\.", "language_model.", name)
        weights[name if name.startswith("lm_head") else f"model.{name}"] = weight
    theirs = theirs_class.from_pretrained(None, config=config, state_dict=weights,
                                          dtype=model.lm_head.weight.dtype,
                                          attn_implementation="sdpa")
    return theirs.to(model.lm_head.weight.device).eval()


@torch.inference_mode()
def against_transformers(model, image, question: str, rounds: int) -> dict:
    """Time the unpruned model and transformers' in turns. Print and return the ratios."""
    theirs = in_transformers(model)
    pixels = model.preprocess(image)
    stream = model.begin(pixels, question)
    device = stream.x.device
    full_stream = model.run(stream)
    their_logits, past = their_prefill(theirs, stream)
    calls = {"tower": (lambda: our_tower(model, pixels), lambda: their_tower(theirs, pixels)),
             "prefill": (lambda: model.logits(model.run(stream)),
                         lambda: their_prefill(theirs, stream)),
             "decode": (lambda: decode(model, full_stream),
                        lambda: their_decode(theirs, past, stream))}
    rows = []
    for name, (ours, others) in calls.items():
        ms = time_in_turns({"here": ours, "there": others}, rounds, device)
        rows.append({"name": f"{name}, times as fast", "here": ms["here"], "there": ms["there"],
                     "ratio": ms["there"]["median"] / ms["here"]["median"]})
    for name in ("tower", "prefill"):
        here, there = (extra_memory(call, device) for call in calls[name])
        rows.append({"name": f"memory of {name}, share", "here": here, "there": there,
                     "ratio": here / there})
    difference = (model.logits(full_stream) - their_logits).abs().max() / their_logits.abs().max()
    report.print_heads(["against transformers", "ratio", "here", "there"])
    for row in rows:
        sides = [f"{span(side)} ms" if isinstance(side, dict) else f"{side / MiB:.1f} MiB"
                 for side in (row["here"], row["there"])]
        report.print_row([row["name"], f"{row['ratio']:.2f}", *sides])
    print(f"\nLogits differ by at most {difference:.1e} of the largest. Decoding is of {STEPS} "
          "tokens, memory the peak beside the weights.")
    return {"rows": rows, "difference_of_logits": difference.item()}


def our_tower(model, pixels):
    weight = model.lm_head.weight
    if isinstance(pixels, tuple):                       # Qwen's patches and their grid
        patches, grid = pixels
        return model.visual(patches[None].to(weight.device, weight.dtype), grid)
    features, _ = model.vision_tower(pixels[None].to(weight.device, weight.dtype))
    return model.multi_modal_projector(features)


def their_tower(theirs, pixels):
    weight = theirs.lm_head.weight
    if isinstance(pixels, tuple):
        patches, (rows, cols) = pixels
        grid = torch.tensor([[1, 2 * rows, 2 * cols]], device=weight.device)
        return theirs.model.visual(patches.to(weight.device, weight.dtype), grid_thw=grid)
    return theirs.model.get_image_features(pixels[None].to(weight.device, weight.dtype),
                                           vision_feature_layer=-2)


def their_prefill(theirs, stream) -> tuple:
    """Return the last row's logits, float32, and the cache."""
    planes = {}
    if stream.planes:                                   # Qwen3-VL adds them to visual rows
        start, V = stream.visual
        is_visual = torch.zeros(stream.x.shape[:2], dtype=torch.bool, device=stream.x.device)
        is_visual[:, start:start + V] = True
        planes = {"visual_pos_masks": is_visual, "deepstack_visual_embeds": list(stream.planes)}
    out = theirs.model.language_model(inputs_embeds=stream.x, position_ids=stream.pos,
                                      use_cache=True, **planes)
    return theirs.lm_head(out.last_hidden_state[:, -1]).float(), out.past_key_values


def their_decode(theirs, past, stream):
    text = theirs.model.language_model
    token = stream.ids[:, -1:]
    place = torch.full((*stream.pos.shape[:-1], 1), stream.next_pos, device=stream.x.device)
    for step in range(STEPS):
        out = text(inputs_embeds=text.embed_tokens(token), position_ids=place + step,
                   past_key_values=past, use_cache=True)
        theirs.lm_head(out.last_hidden_state[:, -1])
    past.crop(-STEPS)                                   # the same length every time


# ---- the sweep and information, against doing each on its own ------------------------------------

def time_sweep(model, image, question: str, schedules: dict[str, tuple], layers: list[int],
               rounds: int) -> dict:
    """Time all schedules of a question in one pass against a pass each, and information at these
    layers against a run of the whole prompt for each layer and window. Print both ratios."""
    stream = model.begin(image, question)
    cells = [Cell(name, schedule) for name, schedule in schedules.items()]
    answer = model.decode(model.run(stream))[0] or "yes"
    calls = {
        "sweep": (lambda: answer_cells(model, stream, cells, {}, [0])[0],
                  lambda: answers_one_by_one(model, stream, cells)),
        "information": (lambda: token_information(model, stream, answer, layers),
                        lambda: information_one_by_one(model, stream, answer, layers))}
    found = {}
    for name, (together, apart) in calls.items():
        ms = time_in_turns({"together": together, "one by one": apart}, rounds, stream.x.device)
        found[name] = {"ms": ms, "times_as_fast":
                       ms["one by one"]["median"] / ms["together"]["median"]}
    answers, others = (call() for call in calls["sweep"])
    same = sum(answers[key] == others[key] for key in answers)
    values, others = (call() for call in calls["information"])
    gap = (values.flatten(1) - others).abs().max().item()
    found["sweep"] |= {"cells": len(cells), "same": same}
    found["information"] |= {"layers": len(layers), "difference": gap}
    report.print_heads(["one question", "times as fast", "ms together", "ms one by one"])
    for name, row in found.items():
        report.print_row([name, f"{row['times_as_fast']:.1f}", span(row["ms"]["together"]),
                          span(row["ms"]["one by one"])])
    print(f"\nOne pass answers {len(cells)} schedules {found['sweep']['times_as_fast']:.1f} times "
          f"as fast as a pass each, {same} of {len(cells)} with the same answer. Information at "
          f"{len(layers)} layers is {found['information']['times_as_fast']:.1f} times as fast as "
          f"a run for each window, and differs by at most {gap:.1e}.")
    return found


def answers_one_by_one(model, stream, cells: list[Cell]) -> dict[str, str]:
    answers = {}
    for cell in cells:
        answers |= answer_cells(model, stream, [cell], {}, [0])[0]
    return answers


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
    L = args.depth if args.shape else flags.num_layers(args)
    layers = flags.parse_layers(args.layer, L)
    schedules = schedules_of(args, layers, L)
    image = read_image(args.image or PICTURE)
    if args.shape:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model = made_up(args.shape, args.depth, flags.usable_device(args.device), dtype)
        image = image if args.image else noise(model)
    else:
        model = flags.load_model(args)
    device = next(model.parameters()).device
    settings = {name: str(value) for name, value in vars(args).items()
                if name not in ("command", "out", "json")}
    out = open_folder(args, settings | {"device": device_name(device)})
    print(f"{device_name(device)}, torch {torch.__version__}; {flags.where(model)}; {args.model}, "
          f"{L} layers; median of {args.rounds} rounds [lowest, highest]")
    result = provenance(args, model)
    if args.sweep:
        result["sweep"] = time_sweep(model, image, args.question, schedules, layers, args.rounds)
    else:
        result |= measure(model, image, args.question, schedules, args.rounds)
        print_speed(result, device.type == "cuda")
        print_verdicts(result["speed"], schedules, device.type == "cuda")
    if args.against:
        print()
        result["against_transformers"] = against_transformers(model, image, args.question,
                                                              args.rounds)
    write_result(out, result, args.json)


def parse_arguments(argv: list[str]):
    p = flags.Parser("bench.py", "How fast a model is, unpruned and pruned by each method.")
    group = p.add_argument_group("what is timed")
    group.add_argument("--method", metavar="NAMES",
                       help=f"comma-separated, of {', '.join(TIMED)} (default: all)")
    group.add_argument("--layer", help="layers at whose input tokens leave: 20, or 2,10,20, or all "
                       "(default: 2; all with --sweep)")
    group.add_argument("--ratio", type=flags.share,
                       help="fraction of the visual tokens removed, 0 to 1 (default: 0.9)")
    group.add_argument("--schedule", action="append", metavar="S", help="in place of --method, "
                       "--layer and --ratio: 'dart@2=252 none@20'; repeatable")
    group.add_argument("--sweep", action="store_true", help="time a sweep and information, each "
                       "together and one by one, instead of the table")
    group.add_argument("--against", choices=["transformers"],
                       help="add the ratios to another implementation")
    group.add_argument("--image", type=Path, metavar="FILE", help="image of the prompt (default: a "
                       "bundled one, or 24 x 24 tokens of noise for a shape)")
    group.add_argument("--question", metavar="TEXT", default=QUESTION,
                       help="question of the prompt (default: %(default)s)")
    group.add_argument("--rounds", type=flags.whole(1), default=5, metavar="N",
                       help="timed rounds, after one that warms up (default: 5)")
    group = flags.add_model_flags(p)
    group.add_argument("--shape", choices=SHAPES,
                       help="a published shape with random weights, instead of --model")
    group.add_argument("--depth", type=flags.whole(1), metavar="N",
                       help="decoder layers of the shape (default: as published)")
    flags.add_output_flags(p)
    args = p.parse_args(argv)
    if args.schedule and (args.method or args.layer or args.ratio is not None):
        raise InputError("--schedule: stands for --method, --layer and --ratio; want it or them")
    if args.sweep and (args.schedule or args.against):
        raise InputError("--sweep: goes without --schedule and --against")
    if args.against and not importlib.util.find_spec(args.against):
        raise InputError(f"--against {args.against}: it is not installed; want pip install "
                         f"{args.against}")
    check_shape(args, p)
    args.layer = args.layer or ("all" if args.sweep else "2")
    args.ratio = 0.9 if args.ratio is None else args.ratio
    return args


def check_shape(args, p):
    """Raise InputError for a flag that would be ignored. Complete --depth, and name the run."""
    if args.shape is None:
        if args.depth is not None:
            raise InputError("--depth: goes with --shape")
        return
    for name in ("model", "min_pixels", "max_pixels"):
        if getattr(args, name) != p.get_default(name):
            raise InputError(f"--{name.replace('_', '-')}: goes without --shape")
    published = SHAPES[args.shape][1].text.num_hidden_layers
    args.depth = args.depth or published
    if args.depth > published:
        raise InputError(f"--depth {args.depth}: want 1 to {published}, as {args.shape} has")
    args.model = Path(args.shape)


def schedules_of(args, layers: list[int], L: int) -> dict[str, tuple]:
    """Return, by name, unpruned, and each --schedule or, at each layer, none and each --method."""
    schedules = {"unpruned": ()}
    for text in args.schedule or []:
        schedule = tuple(parse_schedule(text))
        if not schedule:
            raise InputError("--schedule: empty, want e.g. 'dart@2=252 none@20'")
        schedules[format_schedule(schedule)] = schedule
    if not args.schedule:
        for layer in layers:
            for method in ["none", *methods_at(args, layer)]:
                amount = 0 if METHODS[method].keeps_none else args.ratio
                schedules[f"{method} at layer {layer}"] = ((layer, method, amount),)
    for schedule in schedules.values():
        for layer, method, _ in schedule:
            flags.check_layer(layer, L)
            if METHODS[method].measure:
                raise InputError(f"{method}: what it needs is measured in other runs of the model, "
                                 f"so it is not timed; want some of {', '.join(TIMED)}")
    return schedules


def methods_at(args, layer: int) -> list[str]:
    """Return those of --method, or all that can act at this layer."""
    names = args.method.split(",") if args.method else TIMED
    for method in names:
        check_method(method, layer if args.method and args.layer != "all" else 1)
    return [method for method in names if layer > 0 or not METHODS[method].needs_layer]


if __name__ == "__main__":
    start(main)
