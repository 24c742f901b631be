"""One picture, one question: the tokens each pruning method keeps, and the answer the model gives.

    python demo.py
    python demo.py --image cat.jpg --question "Is there a cat?" --layer 8 --ratio 0.9
"""
from pathlib import Path

import torch

from information import MEASURES, answers_without_image
from support import report, runs
from support.files import read_image
from support.pictures import is_right, overlay
from tokprune import METHODS, InputError, check_method, keep, number_kept, prune

PICTURE = runs.ROOT / "tiny" / "textvqa" / "train_images" / "0034.jpg"
QUESTION = "What does the purple word say?"
ANSWER = "7ns"


def main(argv: list[str]):
    args = parse_arguments(argv)
    runs.check_layer(args.layer, runs.num_layers(args))
    image = read_image(args.image)
    model = runs.load_model(args)
    out = runs.open_folder(args, runs.settings_of(args, model, {}))
    start = model.begin(image, args.question)           # the stream at the input of layer 0
    panels = answer_with_each_method(model, start, args)
    report.print_heads(["method", "kept", "answer"])
    for name, answer, kept in panels:
        report.print_row([name, str(len(kept)), answer or "(nothing)"])
    print("\n" + sentence(panels, start.N, args))
    horizon = horizon_of_question(model, start, args)
    if horizon < model.num_layers:
        print(f"The horizon of this question is layer {horizon} of {model.num_layers}: with all "
              "dropped there or later, the answer stays the same.")
    else:
        print("This question has no horizon: with all dropped at the last layer, the answer still "
              "changes.")
    rows, cols = start.grid
    if start.N == rows * cols:
        picture = out / "overlay.png"
        overlay(model.canvas(image), panels, start.grid, picture, args.question, args.answer)
        print(f"picture: {picture}")
    else:
        print(f"no picture: the {start.N} visual tokens of this model do not tile the image, "
              f"{rows} x {cols}")
    result = {"command": args.command, "question": args.question, "horizon": horizon,
              "answers": {name: answer for name, answer, _ in panels},
              "kept": {name: kept for name, _, kept in panels}}
    runs.write_result(out, result, args.json)


def answer_with_each_method(model, start, args) -> list[tuple[str, str, list[int]]]:
    """(name, answer, kept tokens): unpruned, with none kept, and of each method.

    start: the stream at layer 0. It runs once to the layer; each method goes on from there.
    """
    info = measure_beforehand(model, start, args)
    n = number_kept(args.ratio, start.N)
    nothing = torch.zeros(0, dtype=torch.long)
    reached = model.run(start, stop=args.layer)         # the layers before, on everything
    panels = []
    for name in ("unpruned", "none", *args.method):
        stream = reached
        if name == "none":
            stream = keep(stream, nothing)
        elif name in METHODS:
            stream = prune(model, stream, name, n, args.seed, info)
        stream = model.run(stream)                      # the other layers, short
        answer = model.decode(stream, args.max_new_tokens, args.repetition_penalty)[0]
        panels.append((name, answer, stream.origin[0].tolist()))
    return panels


def measure_beforehand(model, start, args) -> dict:
    """What some methods have to know beforehand, from an unpruned run of their own."""
    info = {}
    for method in args.method:
        if METHODS[method].measure:
            measure = MEASURES[METHODS[method].measure]
            info[method] = measure(model, start, None, [args.layer], args)[args.layer]
    return info


def sentence(panels: list[tuple], N: int, args) -> str:
    """Which methods keep the answer, or are right where the right one is known."""
    (_, unpruned, _), (_, without, _), *pruned = panels
    wanted = args.answer or unpruned
    which = "right" if args.answer else "unpruned"
    same = [name for name, answer, _ in pruned if is_right(answer, wanted)]
    methods = f"{len(same)} of {len(pruned)} methods"
    if same:
        methods += f" ({report.listed(same)})"
    verb = "gives" if len(same) == 1 else "give"
    dropping_all = "gives it too" if is_right(without, wanted) else f"gives {without!r}"
    return (f"With {number_kept(args.ratio, N)} of {N} visual tokens from layer {args.layer} on, "
            f"{methods} {verb} the {which} answer, {wanted!r}; dropping all {dropping_all}.")


def horizon_of_question(model, start, args) -> int:
    """The layer from which on dropping every visual token leaves the answer as it is, to the
    letter. `information.horizon` has the rule for a benchmark."""
    answers = answers_without_image(model, start, args.max_new_tokens, args.repetition_penalty)
    layer = model.num_layers
    while layer > 0 and answers[str(layer - 1)] == answers["unpruned"]:
        layer -= 1
    return layer


def parse_arguments(argv: list[str]):
    p = runs.Parser("demo.py", "What each pruning method keeps of a picture, and the answers.")
    group = p.add_argument_group("what to ask, and how to prune")
    group.add_argument("--image", type=Path, help="default: a bundled one")
    group.add_argument("--question", help=f"default, of the bundled one: {QUESTION}")
    group.add_argument("--answer", help="the right one, if known: the picture marks who gives it")
    group.add_argument("--layer", type=runs.whole(0), default=8, metavar="N",
                       help="tokens leave at its input (default: 8)")
    group.add_argument("--ratio", type=runs.share, default=0.9,
                       help="fraction of the visual tokens removed (default: 0.9)")
    group.add_argument("--method", metavar="NAMES",
                       help="comma-separated (default: all that need no gold answer)")
    group.add_argument("--seed", type=runs.whole(0), default=0, metavar="N", help="default: 0")
    runs.add_model_flags(p)
    runs.add_answer_flags(p)
    runs.add_output_flags(p)
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
    runs.start(main)
