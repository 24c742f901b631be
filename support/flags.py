"""The flags that programs share, and what they stand for: the model, the questions, layers. Below
the programs, only this file and run.py take the parsed `args`."""
import argparse
import difflib
import math
import random
import re
import shlex
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from support import checkpoint
from support.benchmarks import BENCHMARKS, FILES, STYLES, Question, load_benchmark
from support.run import LOCAL_RANK, ROOT, WORLD
from tokprune import METHODS, Decoding, InputError, check_method, parse_schedule


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors. An unknown flag is answered with the nearest one."""

    def __init__(self, program: str, description: str):
        wide_help = partial(argparse.HelpFormatter, max_help_position=36, width=150)
        super().__init__(prog=program, description=description, allow_abbrev=False,
                         usage=f"{program} [flags]", formatter_class=wide_help)

    def error(self, message):
        raise InputError(message)

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.7)
            advice = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
            raise InputError(f"{flag}: no such flag; {advice}")
        args.command = shlex.join([self.prog, *argv])
        return args


def whole(low: int):
    """Return a type for argparse: a whole number from `low` on."""
    def convert(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,10}", text) or not low <= int(text) < 2 ** 31:
            raise argparse.ArgumentTypeError(f"{text}, want {low} or more, below 2^31")
        return int(text)
    return convert


def whole_or_all(text: str) -> int | None:
    """Read a whole number from 1 on, or None from "all": a type for argparse."""
    return None if text == "all" else whole(1)(text)


def number_that(fits, want: str):
    """Return a type for argparse: a number that fits."""
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan                            # fits nowhere
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text}, want {want}")
        return value
    return convert


share = number_that(lambda value: 0 <= value <= 1, "0 to 1")             # nan is not
positive = number_that(lambda value: 0 < value < math.inf, "a number above 0")


def add_pruning_flags(group, methods, layer: str):
    """Add which methods prune, where, and how much. `resolve_pruning` fills in the defaults; layer
    is the one that the help names."""
    group.add_argument("--method", metavar="NAMES",
                       help=f"comma-separated, of {', '.join(methods)} (default: all)")
    group.add_argument("--layer", help="layers at whose input tokens leave: 20, or 2,10,20, or all "
                       f"(default: {layer})")
    group.add_argument("--ratio", type=share,
                       help="fraction of the visual tokens removed, 0 to 1 (default: 0.9)")
    group.add_argument("--schedule", action="append", metavar="S", help="in place of --method, "
                       "--layer and --ratio: 'dart@2=252 none@20'; repeatable")


def resolve_pruning(args, layer: str):
    """Fill in the defaults of the pruning flags. Raises InputError if --schedule was given with a
    flag that it replaces: the parser has no defaults of its own, so that this can be told."""
    if args.schedule and (args.method, args.layer, args.ratio) != (None, None, None):
        raise InputError("--schedule: stands for --method, --layer and --ratio; want it or them")
    args.layer = layer if args.layer is None else args.layer
    args.ratio = 0.9 if args.ratio is None else args.ratio


def add_model_flags(p: Parser):
    group = p.add_argument_group("model")
    group.add_argument("--model", type=Path, default=ROOT / "tiny" / "llava", metavar="FOLDER",
                       help="checkpoint folder, or its name in the Hugging Face cache (default: "
                            "tiny/llava)")
    group.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                       help="precision of the weights (default: bfloat16 on cuda, float32 on cpu)")
    group.add_argument("--min-pixels", type=whole(1), metavar="N",
                       help="least area of a resized image (default: the checkpoint's; Qwen only)")
    group.add_argument("--max-pixels", type=whole(1), metavar="N",
                       help="largest area of a resized image (default: the checkpoint's)")
    return group


def add_answer_flags(group):
    group.add_argument("--max-new-tokens", type=whole(1), default=16, metavar="N",
                       help="most tokens of an answer (default: 16)")
    group.add_argument("--repetition-penalty", type=positive, default=1.0, metavar="P",
                       help="divides the logits of tokens in prompt or answer (default: 1, none)")


def add_data_flags(p: Parser, limit: int | None = None):
    group = p.add_argument_group("questions")
    group.add_argument("--data", type=Path, default=ROOT / "tiny", metavar="FOLDER",
                       help="where the benchmarks' files lie, at any depth (default: tiny)")
    group.add_argument("--bench", default="mme,textvqa", metavar="NAMES",
                       help=f"comma-separated, of {', '.join(BENCHMARKS)}, your own .jsonl files "
                            "and VLMEvalKit's .tsv (default: %(default)s)")
    group.add_argument("--prompt-style", choices=STYLES,
                       help="llava: TextVQA's questions show OCR tokens (default: they do not)")
    group.add_argument("--limit", type=whole_or_all, default=limit, metavar="N",
                       help="ask about N questions a benchmark, whole images, or all (default: "
                            f"{limit or 'all'})")
    group.add_argument("--batch", type=whole(1), default=16, metavar="N",
                       help="most questions answered together (default: 16); decides no answer in "
                            "float32")
    group.add_argument("--seed", type=whole(0), default=0, metavar="N",
                       help="draws the questions of --limit and the tokens of random (default: 0)")
    return group


def add_information_flags(group):
    group.add_argument("--answers", choices=["gold", "own"], default="gold",
                       help="measure information of the gold or the model's own answer (default: "
                            "gold)")
    add_memory_flag(group)


def add_memory_flag(group):
    group.add_argument("--max-batch-tokens", type=whole(1), default=2 ** 15, metavar="N",
                       help="most rows computed at once (default: 32768; for information on a CPU "
                            "at most 4096); decides no answer")


def add_output_flags(p: Parser, plot: str = ""):
    """Add --out and --json, and --plot with this help where the program draws a picture."""
    group = p.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="run folder; an interrupted run "
                       "resumes from it (default: runs/<program>-<model>-<settings>)")
    group.add_argument("--json", action="store_true",
                       help="print result.json's object as the last line, too")
    if plot:
        group.add_argument("--plot", type=Path, metavar="SVG", help=plot)
    return group


def repeated(args, plain, *names: str) -> list[str]:
    """Return the flags of these names as they are typed, without those that have their default.

    plain: the arguments of a command that gives none of them.
    """
    words = []
    for name in names:
        if getattr(args, name) != getattr(plain, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return words


def decoding(args) -> Decoding:
    return Decoding(args.max_new_tokens, args.repetition_penalty)


def at_once(args, variants: int):
    """Return a function: rows of a prompt -> how many prompts, of so many variants each, run
    together."""
    def prompts(rows: int) -> int:
        return max(1, min(args.batch, args.max_batch_tokens // (rows * variants)))
    return prompts


def parse_layers(text: str, num_layers: int) -> list[int]:
    """Parse "20", "2,10,20" or "all" -> layers. Raises InputError."""
    if text == "all":
        return list(range(num_layers))
    if not re.fullmatch(r"-?\d{1,9}(,-?\d{1,9})*", text):
        raise InputError(f"--layer {text[:100]}: want layers as 20 or 2,10,20 or all")
    layers = [int(part) for part in text.split(",")]
    for layer in layers:
        check_layer(layer, num_layers)
    return layers


def schedules_of(args, always: list[str], default, num_layers: int) -> list[tuple]:
    """Return each --schedule; or a schedule of one stage for each method at each layer: those named
    always, and those of --method or the default ones.

    A method that cannot act at layer 0 is left out, unless both are named. Raises InputError.
    """
    schedules = [tuple(parse_schedule(text)) for text in args.schedule or []]
    if () in schedules:
        raise InputError("--schedule: empty, want e.g. 'dart@2=252 none@20'")
    for schedule in schedules:
        for layer, _, _ in schedule:
            check_layer(layer, num_layers)
    if schedules:
        return schedules
    methods = default if args.method is None else args.method.split(",")
    both_are_named = args.method and args.layer != "all"
    for layer in parse_layers(args.layer, num_layers):
        for name in dict.fromkeys([*always, *methods]):
            cannot_act = layer == 0 and name in METHODS and METHODS[name].needs_layer
            if cannot_act and not both_are_named:
                continue
            check_method(name, layer)
            amount = 0 if METHODS[name].keeps_none else args.ratio
            schedules.append(((layer, name, amount),))
    return schedules


def check_layer(layer: int, num_layers: int):
    """Raise InputError unless the model has that layer."""
    if not 0 <= layer < num_layers:
        raise InputError(f"layer {layer} is out of range; this model has layers 0 to "
                         f"{num_layers - 1}")


def check_picture(path: Path | None):
    """Raise InputError now, rather than when the picture has been worked out."""
    if path and (path.suffix != ".svg" or not path.parent.is_dir()):
        raise InputError(f"--plot {path}: want a .svg in a folder that exists")


# ---- model and questions -------------------------------------------------------------------------

def usable_device(name: str | None) -> str:
    """Return the device of that name, or the default one. Raises InputError if it is not usable."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"                     # torch wants a number; 0 without torchrun
    elif name.startswith("cuda:") and WORLD > 1:
        raise InputError(f"--device {name}: all {WORLD} processes would share this one card; "
                         "want cuda, a card each")
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ValueError("want cpu or cuda")
        torch.empty(0, device=name)
    except Exception as e:                              # torch raises what the backend raises
        raise InputError(f"--device {name}: not usable here ({str(e).splitlines()[0]})")
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return name


def num_layers(args) -> int:
    """Return the layers of --model, before it is loaded. Raises InputError."""
    return checkpoint.read_config(args.model).text.num_hidden_layers


def load_model(args):
    """Return --model on --device. Raises InputError."""
    device = usable_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    bounds = {name: getattr(args, name) for name in ("min_pixels", "max_pixels")
              if getattr(args, name) is not None}
    return checkpoint.load_model(args.model, device, dtype, **bounds)


def load_data(args, gold: bool = True) -> dict[str, list[Question]]:
    """Return the questions of each benchmark of --bench. gold: they need gold answers."""
    data = {}
    for name in benchmarks_of(args):
        if name not in BENCHMARKS and Path(name).suffix.lower() not in FILES:
            raise InputError(f"--bench: unknown benchmark {name!r}; want one of "
                             f"{', '.join(BENCHMARKS)} or a .jsonl or .tsv file")
        short = Path(name).name
        if short in data:
            raise InputError(f"--bench: {args.bench}: two of one name; want each once")
        data[short] = load_benchmark(name, args.data, args.prompt_style, gold=gold)
    return data


def benchmarks_of(args) -> list[str]:
    """Return the names in --bench; a file may have a comma in its own."""
    return [args.bench] if Path(args.bench).is_file() else args.bench.split(",")


def sample(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """Draw about `limit` of them by seed; all if None. Questions of an image stay together."""
    if limit is None:
        return questions
    of_image = Counter(question.image for question in questions)
    images = sorted(of_image)
    random.Random(seed).shuffle(images)
    chosen = set()
    while images and limit > 0:
        image = images.pop(0)
        chosen.add(image)
        limit -= of_image[image]
    return [question for question in questions if question.image in chosen]


def template(model) -> str:
    """Return the model's prompt, with {question} in it."""
    return sys.modules[type(model).__module__].PROMPT


def penalty(args) -> str:
    """Describe the repetition penalty, and the folder's where it asks for another."""
    folder = checkpoint.find_folder(args.model)
    _, entries = checkpoint.entries_of(folder, "generation_config.json")
    said = f"repetition penalty {args.repetition_penalty:g}"
    asked = entries.get("repetition_penalty", 1)
    return said if asked == args.repetition_penalty else f"{said} (the folder's is {asked})"


def where(model) -> str:
    """Describe device, precision, threads and the bounds of the image, for the record."""
    weight = next(model.parameters())
    parts = [str(weight.device), str(weight.dtype)[6:], f"{torch.get_num_threads()} threads"]
    if WORLD > 1:
        parts.append(f"{WORLD} processes")
    c = model.config
    if hasattr(c, "max_pixels"):
        parts.append(f"pixels {c.min_pixels} to {c.max_pixels} ({c.bounds_from})")
    return ", ".join(parts)
