"""One picture, one question: the tokens each pruning method keeps, and the answer the model gives.

    python demo.py
    python demo.py --image cat.jpg --question "Is there a cat?" --layer 8 --ratio 0.9
"""
from pathlib import Path

from information import answers_without_image, measure_beforehand
from support import flags, report
from support.files import read_image
from support.pictures import is_right, overlay
from support.run import ROOT, open_folder, settings_of, start, write_result
from tokprune import (METHODS, Decoding, InputError, Stream, check_method, decode, number_kept,
                      prefill)

PICTURE = ROOT / "tiny" / "textvqa" / "train_images" / "0034.jpg"
QUESTION = "What does the purple word say?"
ANSWER = "7ns"


def main(argv: list[str]):
    args = parse_arguments(argv)
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
        overlay(model.canvas(image), panels, stream.grid, picture, args.question, args.answer)
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

    stream: at layer 0. It runs once to the layer, and each method goes on from there.
    """
    full_stream = model.run(stream)
    [unpruned] = decode(model, full_stream, *decoding)
    panels = [("unpruned", unpruned, full_stream.origin[0].tolist())]
    layers_of = {method: {layer} for method in methods}
    info = measure_beforehand(model, stream, layers_of, lambda method: unpruned)
    reached = model.run(stream, stop=layer)             # the layers before, on everything
    for method in methods:
        pruned_stream = prefill(model, reached, [(layer, method, ratio)], seed, info)
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


def horizon_of_question(model, stream: Stream, decoding: Decoding = Decoding()) -> int:
    """Find the layer from which on dropping every visual token leaves the answer as it is, to the
    letter. `information.horizon` has the rule for a benchmark."""
    answers = answers_without_image(model, stream, decoding)
    layer = model.num_layers
    while layer > 0 and answers[str(layer - 1)] == answers["unpruned"]:
        layer -= 1
    return layer


def parse_arguments(argv: list[str]):
    p = flags.Parser("demo.py", "What each pruning method keeps of a picture, and the answers.")
    group = p.add_argument_group("what to ask, and how to prune")
    group.add_argument("--image", type=Path, help="picture to ask about (default: a bundled one)")
    group.add_argument("--question", help=f"question about it (default: {QUESTION})")
    group.add_argument("--answer", help="right answer, if known: the picture marks who gives it")
    group.add_argument("--layer", type=flags.whole(0), default=8, metavar="N",
                       help="layer at whose input tokens leave (default: 8)")
    group.add_argument("--ratio", type=flags.share, default=0.9,
                       help="fraction of the visual tokens removed (default: 0.9)")
    group.add_argument("--method", metavar="NAMES",
                       help="comma-separated methods (default: all that need no gold answer)")
    group.add_argument("--seed", type=flags.whole(0), default=0, metavar="N",
                       help="draws the tokens of random (default: 0)")
    flags.add_model_flags(p)
    flags.add_answer_flags(p)
    flags.add_output_flags(p)
    args = p.parse_args(argv)
    if args.question == "":
        raise InputError("--question: is empty")
    if args.image and not args.question:
        raise InputError("--image: needs --question, what to ask about it")
    if not args.question:
        args.question = QUESTION
        args.answer = args.answer or ANSWER
    args.image = args.image or PICTURE
    if args.method is not None:
        args.method = args.method.split(",")
    else:
        args.method = []
        for name, method in METHODS.items():
            can_act = args.layer > 0 or not method.needs_layer
            if can_act and not method.needs_gold:
                args.method.append(name)
    for method in args.method:
        check_method(method, args.layer)
        if METHODS[method].needs_gold:
            raise InputError(f"--method {method}: it needs the gold answer, which eval.py has; "
                             "want another")
    return args


if __name__ == "__main__":
    start(main)
