"""One picture, one question: the tokens each pruning method keeps, and the answer the model gives.

    python demo.py
    python demo.py --image cat.jpg --question "Is there a cat?" --layer 8 --ratio 0.9
    python demo.py --page page.html                 every layer, to look at in a browser
"""
import shlex
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from information import (check_grid, inputs_of_layers, measure_beforehand, per_token,
                         token_information)
from support import flags, report
from support.benchmarks import check_text
from support.files import read_image, read_json
from support.page import Measured, write_page
from support.pictures import overlay
from support.run import ROOT, grouped, open_folder, progress, settings_of, start, write_result
from support.statistics import from_there_on
from tokprune import (METHODS, Decoding, InputError, Stream, check_method, decode, number_kept,
                      prefill, view_of)

PICTURE = ROOT / "tiny" / "textvqa" / "train_images" / "0034.jpg"
QUESTION = "What does the purple word say?"
ANSWER = "7ns"
EXPLORE = ROOT / "tiny" / "explore.json"            # the page's questions, and a text about them


def main(argv: list[str]):
    args = parse_arguments(argv)
    if args.page:
        make_page(args)
        return
    flags.check_layer(args.layer, flags.num_layers(args))
    image = read_image(args.image)
    model = flags.load_model(args)
    out = open_folder(args, settings_of(args, model, {}))
    decoding = flags.decoding(args)
    stream = model.begin(image, args.question)          # the stream at the input of layer 0
    panels = answer_with_each_method(model, stream, args.method, args.layer, args.ratio, args.seed,
                                     decoding)
    report.print_heads(["method", "kept", "answer"])
    for name, answer, kept in panels:
        report.print_row([name, str(len(kept)), answer or "(nothing)"])
    n = number_kept(args.ratio, stream.N)
    print(f"\nWith {n} of {stream.N} visual tokens from layer {args.layer} on, "
          f"{sentence(panels, args.answer)}.")
    horizon = horizon_of_question(model, stream, decoding)
    if horizon < model.num_layers:
        print(f"The horizon of this question is layer {horizon} of {model.num_layers}: with all "
              "dropped there or later, the answer stays the same.")
    else:
        print("This question has no horizon: with all dropped at the last layer, the answer still "
              "changes.")
    rows, cols = stream.grid
    if stream.N == rows * cols:
        picture = out / "overlay.svg"
        right = [is_right(answer, args.answer) for _, answer, _ in panels] if args.answer else None
        overlay(model.canvas(image), panels, stream.grid, picture, args.question, right)
        print(f"picture: {picture}")
    else:
        print(f"no picture: the {stream.N} visual tokens of this model do not tile the image, "
              f"{rows} x {cols}")
    result = {"command": args.command, "question": args.question, "horizon": horizon,
              "answers": {name: answer for name, answer, _ in panels},
              "kept": {name: kept for name, _, kept in panels}}
    write_result(out, result, args.json)


def answer_with_each_method(model, stream: Stream, methods: list[str], layer: int, ratio: float,
                            seed: int = 0, decoding: Decoding = Decoding()) -> list[tuple]:
    """Return (name, answer, kept tokens) of the unpruned model, and of each method.

    stream: at layer 0. It runs once, and each method goes on from the layer.
    """
    streams = inputs_of_layers(model, {0: stream}, [0, layer, model.num_layers])
    [unpruned] = decode(model, streams[model.num_layers], *decoding)
    panels = [("unpruned", unpruned, stream.origin[0].tolist())]
    layers_of = {method: {layer} for method in methods}
    info = measure_beforehand(model, streams, layers_of, lambda method: [unpruned])
    for method in methods:
        pruned_stream = prefill(model, streams[layer], [(layer, method, ratio)], seed, info)
        [answer] = decode(model, pruned_stream, *decoding)
        panels.append((method, answer, pruned_stream.origin[0].tolist()))
    return panels


def sentence(panels: list[tuple], gold: str | None) -> str:
    """Say which methods keep the answer, or are right where the right one is known."""
    answers = {name: answer for name, answer, _ in panels}
    unpruned = answers.pop("unpruned")
    without = answers.pop("none", None)
    wanted = gold or unpruned
    same = [name for name, answer in answers.items() if is_right(answer, wanted)]
    methods = f"{len(same)} of {len(answers)} methods"
    if same:
        methods += f" ({report.listed(same)})"
    verb = "gives" if len(same) == 1 else "give"
    text = f"{methods} {verb} the {'right' if gold else 'unpruned'} answer, {wanted!r}"
    if without is not None:
        gives = "gives it too" if is_right(without, wanted) else f"gives {without!r}"
        text += f"; dropping all {gives}"
    return text


def is_right(answer: str, gold: str) -> bool:
    return answer.strip().lower() == gold.strip().lower()


def horizon_of_question(model, stream: Stream, decoding: Decoding = Decoding()) -> int:
    """Find the layer from which on dropping every visual token leaves the answer as it is, to the
    letter. `information.horizon` has the rule for a benchmark."""
    L = model.num_layers
    streams = inputs_of_layers(model, {0: stream}, range(L + 1))
    unpruned = decode(model, streams[L], *decoding)
    for layer in reversed(range(L)):                    # the deepest change decides
        without_stream = prefill(model, streams[layer], [(layer, "none", 0)])
        if decode(model, without_stream, *decoding) != unpruned:
            return layer + 1
    return 0


# ---- the page ------------------------------------------------------------------------------------

def make_page(args):
    """Measure every method at every layer, of the question asked or of the bundled ones, and write
    the page. The bundled ones are asked of both built-in models, unless --model is another."""
    folders = [args.model]
    asked = [(args.image, args.question, args.answer)]
    guide = []
    if not args.question:
        explore = read_json(EXPLORE)
        asked = [(ROOT / "tiny" / entry["image"], entry["question"], entry["gold"])
                 for entry in explore["questions"]]
        built_in = [ROOT / name for name in explore["models"]]
        if args.model.resolve() in built_in:
            folders = built_in
            guide = explore["guide"] if is_untouched(args) else []
    plain = parse_arguments(["--page", str(args.page)])
    more = flags.repeated(args, plain, "dtype", "min_pixels", "max_pixels", "max_new_tokens",
                          "repetition_penalty")
    questions = [[] for _ in asked]
    for folder in folders:
        args.model = folder
        model = flags.load_model(args)
        for models, (image, question, gold) in zip(questions, asked):
            measured = measure_every_layer(model, read_image(image), question, gold, args.method,
                                           args.ratio, args.seed, flags.decoding(args))
            measured.model = short(folder)
            measured.command = shlex.join(
                ["python", "demo.py", "--model", short(folder), "--image", short(image),
                 "--question", question, "--ratio", str(args.ratio), "--seed", str(args.seed),
                 *more])
            models.append(measured)
    about = f"{100 * args.ratio:.4g} % of the tokens removed at once, at any one layer"
    size = write_page(args.page, questions, about, guide)
    print(f"page: {args.page} ({size / 1000:.0f} kB, for a browser; it needs no other file)")


def is_untouched(args) -> bool:
    """Tell whether no flag changes what the text about the bundled questions speaks of."""
    plain = vars(parse_arguments(["--page", str(args.page)]))
    return all(getattr(args, name) == plain[name] for name in plain
               if name not in ("command", "model", "device"))


def short(path: Path) -> str:
    """Return a path as it is typed in the project's folder."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def measure_every_layer(model, image: Image.Image, question: str, gold: str | None,
                        methods: list[str], ratio: float = 0.9, seed: int = 0,
                        decoding: Decoding = Decoding()) -> Measured:
    """Return what the page shows of a question: at each layer the answer and kept tokens of each
    method, the information of the model's own answer, and the attention that FastV reads.

    The unpruned stream runs once. At each layer the methods that keep equally many tokens go on
    from it as one batch.
    """
    L = model.num_layers
    stream = model.begin(image, question)
    check_grid(stream)
    first, N = stream.visual
    streams = inputs_of_layers(model, {0: stream}, range(L + 1))
    [unpruned] = decode(model, streams[L], *decoding)
    methods = list(dict.fromkeys(["none", *methods]))
    layers_of = {method: set(range(L)) for method in methods}
    info = measure_beforehand(model, streams, layers_of, lambda method: [unpruned])
    answers = {method: [None] * L for method in methods}
    kept = {method: np.zeros((L, N), bool) for method in methods}
    attended = np.zeros((L, N))
    began = time.time()
    for layer in range(L):
        reached = streams[layer]
        if layer > 0:
            last = torch.tensor([reached.x.shape[1] - 1])
            probability = view_of(model, reached, 0, seed).attention(last)      # (H, 1, T)
            attended[layer] = probability[:, 0, first:first + N].mean(0).cpu()
        able = [name for name in methods if layer > 0 or not METHODS[name].needs_layer]
        # a batch keeps equally many: those that keep none are one of their own
        for batch in grouped(able, lambda name: METHODS[name].keeps_none).values():
            pruned_stream = prefill(model, reached, [(layer, batch, ratio)], seed, info)
            found = decode(model, pruned_stream, *decoding)
            for name, answer, origin in zip(batch, found, pruned_stream.origin):
                answers[name][layer] = answer
                kept[name][layer, origin.tolist()] = True
        progress("layer", layer + 1, L, began)
    said = {unpruned, *(answer for row in answers.values() for answer in row if answer is not None)}
    return Measured(question, gold, model.canvas(image), stream.grid, unpruned, answers, kept,
                    right={answer for answer in said if is_right(answer, gold or unpruned)},
                    horizon=from_there_on([answer == unpruned for answer in answers["none"]]),
                    attention=attended,
                    information=information_of_answer(model, stream, unpruned))


def information_of_answer(model, stream: Stream, answer: str) -> np.ndarray:
    """Return the information (L, N) of an answer by layer, each token with that of its 2x2 window;
    that of an empty answer is 0."""
    layers = list(range(model.num_layers))
    if not answer:
        return np.zeros((len(layers), stream.N))
    windows = token_information(model, stream, answer, layers, window=2, target="answer")
    return torch.stack([per_token(values, stream.grid, 2) for values in windows]).numpy()


# ---- the program ---------------------------------------------------------------------------------

def parse_arguments(argv: list[str]):
    p = flags.Parser("demo.py", "What each pruning method keeps of a picture, and the answers.")
    group = p.add_argument_group("what to ask, and how to prune")
    group.add_argument("--image", type=Path, help="picture to ask about (default: a bundled one)")
    group.add_argument("--question", help=f"question about it (default: {QUESTION})")
    group.add_argument("--answer", help="right answer, if known: the picture marks who gives it")
    group.add_argument("--layer", type=flags.whole(0), metavar="N",
                       help="layer at whose input tokens leave (default: 8)")
    group.add_argument("--ratio", type=flags.share, default=0.9,
                       help="fraction of the visual tokens removed (default: 0.9)")
    group.add_argument("--method", metavar="NAMES",
                       help="comma-separated methods (default: all that need no gold answer)")
    group.add_argument("--seed", type=flags.whole(0), default=0, metavar="N",
                       help="draws the tokens of random (default: 0)")
    flags.add_model_flags(p)
    flags.add_answer_flags(p)
    group = flags.add_output_flags(p)
    group.add_argument("--page", type=Path, metavar="HTML",
                       help="write a page for the browser instead: every layer of the question, or "
                            "of the bundled ones")
    args = p.parse_args(argv)
    if args.page:
        check_page(args)
    args.layer = 8 if args.layer is None else args.layer
    if args.question is not None and not args.question.strip():
        raise InputError("--question: is empty")
    check_text(f"{args.question} {args.answer}", "--question and --answer")
    if args.image and not args.question:
        raise InputError("--image: needs --question, what to ask about it")
    if not args.question and not args.page:
        args.question = QUESTION
        args.answer = args.answer or ANSWER
    args.image = args.image or PICTURE
    if args.method is not None:
        args.method = args.method.split(",")
    else:
        args.method = [name for name, method in METHODS.items() if not method.needs_gold
                       and (args.layer > 0 or not method.needs_layer)]
    for method in args.method:
        check_method(method, args.layer)
        if METHODS[method].needs_gold:
            raise InputError(f"--method {method}: it needs the gold answer, which eval.py has; "
                             "want another")
    return args


def check_page(args):
    """Raise InputError now, rather than when all is measured."""
    if args.page.suffix != ".html" or not args.page.parent.is_dir():
        raise InputError(f"--page {args.page}: want a .html in a folder that exists")
    if args.layer is not None or args.out or args.json:
        raise InputError("--page: measures every layer and writes the page alone; want it without "
                         "--layer, --out and --json")
    if args.answer and not args.question:
        raise InputError("--answer: needs --question, what it answers")


if __name__ == "__main__":
    start(main)
