"""How fast a model is, unpruned and pruned by each method; and comparisons as ratios.

    python bench.py                               the model at hand: the built-in one
    python bench.py --model FOLDER --layer 2,20 --ratio 0.9
    python bench.py --parts pruning,sweep         comparisons, and whether each reaches its aim
    python bench.py --parts transformers          against transformers, which it needs installed

Comparisons run on made-up checkpoints of 7B width or on the built-in model. A time is the median of
--rounds [lowest, highest], after one that warms up. What is compared takes turns in one run.
"""
import importlib.util
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

from information import information_flops, token_information, windows_of
from support import comparisons, flags, made_up, report, run
from support.benchmarks import load_benchmark
from support.checkpoint import load_model
from support.comparisons import TIMED, MiB, Setting, Table
from support.files import read_image
from support.timing import (STEPS, cache_bytes, decode, device_name, extra_memory, matrix_rate, now,
                            span, time_call, time_in_turns, time_prefill)
from tokprune import (METHODS, InputError, check_method, flops, format_schedule, keep, number_kept,
                      parse_schedule, prefill, prune, visual_tokens)

TINY = run.ROOT / "tiny"
PICTURE = TINY / "textvqa" / "train_images" / "0007.jpg"
QUESTION = "What does the purple word say?"


# ---- the model at hand ---------------------------------------------------------------------------

def measure(model, image, question: str, schedules: dict[str, tuple], rounds: int) -> dict:
    """{"tower_ms", "weight_bytes", "matrix_flops", "speed"}: image and tower, the weights, FLOPs a
    second of a matrix product. "speed" has a row for each schedule: milliseconds, bytes, FLOPs, and
    ratios to the first.

    schedules: by name; the first is the unpruned model's.
    """
    weight = next(model.parameters())
    stream = model.begin(image, question)
    tower = time_call(lambda: model.begin(image, question), rounds, weight.device)
    rate = matrix_rate(weight, min(rounds, 5))
    prefill_ms = time_prefill(model, stream, schedules, rounds)
    rows = []
    for name, schedule in schedules.items():
        row = {"name": name, "schedule": format_schedule(schedule), "prefill_ms": prefill_ms[name]}
        row["select_ms"] = time_selection(model, stream, schedule, rounds)
        row |= measure_prefilled(model, stream, schedule, rounds)
        first = rows[0] if rows else row
        ms = row["prefill_ms"]["median"]
        row["times_as_fast"] = first["prefill_ms"]["median"] / ms
        row["times_fewer_flops"] = first["gflops"] / row["gflops"]
        row["share_of_flops_ratio"] = row["times_as_fast"] / row["times_fewer_flops"]
        row["share_of_matrix_rate"] = row["gflops"] * 1e9 / (ms / 1000) / rate
        rows.append(row)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"tower_ms": tower, "weight_bytes": weights, "matrix_flops": rate, "speed": rows}


def measure_prefilled(model, stream, schedule: tuple, rounds: int) -> dict:
    """Decoding time, cache, peak memory beside the weights, and FLOPs of prefill."""
    device = stream.x.device
    full = prefill(model, stream, schedule)
    decoding = time_call(lambda: decode(model, full), rounds, device)
    text_rows = stream.x.shape[1] - stream.N
    rows = [text_rows + V for V in visual_tokens(schedule, stream.N, model.num_layers)]
    return {"decode_ms": {key: ms / STEPS for key, ms in decoding.items()},
            "cache_bytes": cache_bytes(full),
            "peak_bytes": extra_memory(lambda: prefill(model, stream, schedule), device),
            "gflops": flops(model.config.text, rows) / 1e9}


def time_selection(model, stream, schedule: tuple, rounds: int) -> float:
    """Milliseconds of the prunings of a schedule alone."""
    total = 0.0
    for layer, method, amount in schedule:
        reached = model.run(stream, stop=layer)
        n = number_kept(amount, reached.N)
        ms = time_call(lambda: prune(model, reached, method, n), rounds, reached.x.device)
        total += ms["median"]
        stream = prune(model, reached, method, n)
    return total


def schedules_of(args, L: int) -> dict[str, tuple]:
    """Unpruned; each --schedule or, at each --layer, everything dropped and each --method."""
    schedules = {"unpruned": ()}
    for text in args.schedule or []:
        schedules[text] = tuple(parse_schedule(text))
        if not schedules[text]:
            raise InputError("--schedule: empty, want e.g. 'dart@2=252 random@20:0.9'")
    if not args.schedule:
        for layer in flags.parse_layers(args.layer, L):
            schedules[f"none at layer {layer}"] = ((layer, "random", 0),)
            for method in methods_at(args, layer):
                schedules[f"{method} at layer {layer}"] = ((layer, method, args.ratio),)
    for schedule in schedules.values():
        for layer, method, _ in schedule:
            flags.check_layer(layer, L)
            if METHODS[method].measure:
                raise InputError(f"{method}: what it needs is measured in other runs of the model, "
                                 f"so it is not timed; want some of {', '.join(TIMED)}")
    return schedules


def methods_at(args, layer: int) -> list[str]:
    """Those of --method, or all that can act there."""
    if args.method is not None:
        methods = args.method.split(",")
        for method in methods:
            check_method(method, layer)
        return methods
    return [method for method in TIMED if layer > 0 or not METHODS[method].needs_layer]


def print_speed(found: dict):
    print(f"image and tower {span(found['tower_ms'])} ms; weights "
          f"{found['weight_bytes'] / MiB:.1f} MiB; a matrix product reaches "
          f"{found['matrix_flops'] / 1e9:.0f} GFLOP/s\n")
    report.print_heads(["schedule", "prefill ms", "times as fast", "times fewer FLOPs",
                        "select ms", "decode ms/token", "tokens/s", "cache MiB", "prefill MiB",
                        "GFLOPs", "of matrix rate"])
    for row in found["speed"]:
        token = row["decode_ms"]
        report.print_row([
            row["name"], span(row["prefill_ms"]), f"{row['times_as_fast']:.2f}",
            f"{row['times_fewer_flops']:.2f}", f"{row['select_ms']:.2f}", span(token, 2),
            f"{1000 / token['median']:.0f}", f"{row['cache_bytes'] / MiB:.2f}",
            f"{row['peak_bytes'] / MiB:.2f}", f"{row['gflops']:.3g}",
            f"{row['share_of_matrix_rate']:.0%}"])
    print()


def print_verdicts(rows: list[dict], schedules: dict[str, tuple], args):
    """What the times mean: a sentence for each --schedule or --layer."""
    by_name = {row["name"]: row for row in rows}
    for name in args.schedule or []:
        row = by_name[name]
        print(f"{name} makes prefill {row['times_as_fast']:.1f} times as fast, "
              f"{row['share_of_flops_ratio']:.2f} of what the FLOPs promise.")
    by_layer = {}
    for name, schedule in schedules.items():
        if schedule and not args.schedule:
            by_layer.setdefault(schedule[0][0], []).append(by_name[name])
    for layer, (nothing, *pruned) in by_layer.items():
        print(f"Pruning {args.ratio:.0%} at layer {layer} makes prefill "
              f"{extremes(pruned, 'times_as_fast', 1)} times as fast, "
              f"{extremes(pruned, 'share_of_flops_ratio', 2)} of what the FLOPs promise; dropping "
              f"everything makes it {nothing['times_as_fast']:.1f} times as fast.")


def extremes(rows: list[dict], key: str, digits: int) -> str:
    """As 1.6 (scope) to 2.1 (random)."""
    low = min(rows, key=lambda row: row[key])
    high = max(rows, key=lambda row: row[key])
    ends = [low] if low is high else [low, high]
    return " to ".join(f"{row[key]:.{digits}f} ({row['name'].split()[0]})" for row in ends)


# ---- comparisons with other ways to do the same --------------------------------------------------

def sweep_against_cells(table: Table, setting: Setting):
    """All layers, all methods, 90 % on the built-in model: one pass a question against each cell on
    its own; the answers have to be the same."""
    import eval as evaluation                           # a program: nothing else needs it here
    flags = ["--layer", "all", "--ratio", "0.9", "--seeds", "1"]
    if setting.small:
        flags = ["--layer", "20", "--method", "grid", "--seeds", "1"]
    args = evaluation.parse_arguments(flags)
    model = load_model(TINY / "llava", setting.device, torch.float32)
    cells = evaluation.parse_cells(args, model.num_layers)
    few = [cell for cell in cells if not cell.schedule or cell.schedule[0][0] == 20]
    questions = []
    for benchmark in ("textvqa", "mme"):
        questions += load_benchmark(benchmark, TINY)[:4]
    if setting.small:
        questions = questions[:1]
    together = 0.0
    alone = 0.0
    same = []
    for question in questions:
        image = read_image(question.image)

        def answers(cells):
            stream = model.begin(image, question.prompt)
            return evaluation.answer_cells(model, stream, question, cells, args)
        answers(few)                                    # warms up
        start = now(setting.device)
        wanted = answers(cells)
        together += now(setting.device) - start
        start = now(setting.device)
        for cell in cells:
            same.append(answers([cell])[cell.key] == wanted[cell.key])
        alone += now(setting.device) - start
    table.add(f"sweep of {len(cells)} cells, times as fast as each on its own", alone / together,
              5, note=f"{together / 1000:.1f} against {alone / 1000:.1f} s")
    table.add("sweep: share of answers that are the same", sum(same) / len(same), 1)
    memory = extra_memory(lambda: answers(cells), setting.device)
    memory_of_few = extra_memory(lambda: answers(few), setting.device)
    table.add(f"sweep: peak memory of {len(cells)} cells above that of {len(few)}, MiB",
              (memory - memory_of_few) / MiB, note="of one question, beside the weights")


def information_against_naive(table: Table, setting: Setting):
    """All layers of keep-one: FLOPs against the official procedure at LLaVA-1.5-7B's shape, time
    against the naive loop on the built-in model."""
    shape = SimpleNamespace(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                            num_attention_heads=32, num_key_value_heads=32, head_dim=128)
    ours, official = information_flops(shape, (35, 30), (24, 24), list(range(1, 32)))
    table.add("information of 31 layers at LLaVA-1.5-7B's shape: times fewer FLOPs than officially",
              official / ours, 20)
    single, official = information_flops(shape, (35, 30), (24, 24), list(range(1, 32)), window=1)
    table.add("the same of single tokens: times the FLOPs of windows", single / ours)
    table.add("the same of single tokens: times fewer FLOPs than officially", official / single)
    model = load_model(TINY / "llava", setting.device, torch.float32)
    question = load_benchmark("textvqa", TINY)[0]
    stream = model.begin(read_image(question.image), question.prompt)
    layers = [20] if setting.small else list(range(1, model.num_layers))
    calls = {"ours": lambda: token_information(model, stream, question.gold_normalized, layers),
             "naive": lambda: naive_information(model, stream, question.gold_normalized, layers)}
    ms = time_in_turns(calls, min(setting.rounds, 3), setting.device)
    table.add("information on the built-in model: times as fast as the naive loop",
              ms["naive"]["median"] / ms["ours"]["median"], 10,
              note=f"{span(ms['ours'])} against {span(ms['naive'])} ms")
    gap = calls["ours"]().flatten(1) - calls["naive"]()
    table.add("information: largest difference from the naive loop", gap.abs().max().item(), 1e-5,
              at_most=True)


def naive_information(model, stream, answer: str, layers: list[int]) -> torch.Tensor:
    """(layers, windows): runs the whole prompt for each layer and window, as the definition says.
    """
    token = model.answer_ids(answer)[0]
    nothing = torch.zeros(0, dtype=torch.long)
    values = []
    for layer in layers:
        for kept in [nothing, *windows_of(stream.grid, 2)]:
            pruned = keep(model.run(stream, stop=layer), kept)
            values.append(model.logits(model.run(pruned)).softmax(-1)[0, token])
    values = torch.stack(values).view(len(layers), -1).cpu()
    return values[:, 1:] - values[:, :1]


def whole_models(table: Table, setting: Setting):
    """On a CUDA device: each method at layers 2 and 20 as a share of the device's rates, questions
    a second, information; and the difference from the CPU."""
    if setting.device.type != "cuda" and not setting.small:
        report.print_row(["on CUDA", "not measured", "", "no CUDA device"])
        return
    for kind in made_up.CONFIGS:
        path = setting.folder / kind
        depth = setting.layers if setting.small else made_up.depth_of(kind)
        made_up.write_checkpoint(path, kind, depth, setting.small)
        model = load_model(path, setting.device, torch.bfloat16)
        image = made_up.image_for(model, setting.side)
        schedules = {"unpruned": ()}
        for layer in [layer for layer in (2, 20) if layer < depth]:
            for method in TIMED:
                schedules[f"{method} at layer {layer}"] = ((layer, method, 0.9),)
        found = measure(model, image, made_up.QUESTION, schedules, setting.rounds)
        comparisons.shares_of_rates(table, kind, model, found, setting)
        comparisons.questions_a_second(table, kind, model, setting)
        stream = model.begin(image, made_up.QUESTION)
        layers = list(range(1, depth))
        ms = time_call(lambda: token_information(model, stream, "Yes", layers), 1, setting.device)
        table.add(f"{kind}: information of all layers of one question, s", ms["median"] / 1000)
        logits = model.logits(model.run(stream)).cpu()
        del model, stream
        on_cpu = load_model(path, "cpu", torch.bfloat16)
        wanted = on_cpu.logits(on_cpu.run(on_cpu.begin(image, made_up.QUESTION)))
        gap = (logits - wanted).abs().max() / wanted.abs().max()
        table.add(f"{kind}: difference of logits from the CPU's, share of the largest", gap.item(),
                  0.05, at_most=True)
        del on_cpu
        shutil.rmtree(path)                             # 14 to 18 GB


# ---- the program ---------------------------------------------------------------------------------

PARTS = {"transformers": comparisons.against_transformers, "pruning": comparisons.pruning,
         "sweep": sweep_against_cells, "information": information_against_naive,
         "loading": comparisons.loading, "growth": comparisons.growth, "cuda": whole_models}


def main(argv: list[str]):
    args = parse_arguments(argv)
    if args.parts:
        compare(args)
    else:
        time_model(args)


def time_model(args):
    """The model at hand under each schedule: a table, and what it means."""
    schedules = schedules_of(args, flags.num_layers(args))
    image = read_image(args.image or PICTURE)
    model = flags.load_model(args)
    out = run.open_folder(args, run.settings_of(args, model, {}))
    device = next(model.parameters()).device
    print(f"{device_name(device)}, torch {version('torch')}; {flags.where(model)}; median of "
          f"{args.rounds} rounds [lowest, highest]")
    found = measure(model, image, args.question or QUESTION, schedules, args.rounds)
    print_speed(found)
    print_verdicts(found["speed"], schedules, args)
    run.write_result(out, run.provenance(args, model, {}) | found, args.json)


def compare(args):
    """The comparisons of --parts: a table each, and which aims are missed."""
    device = torch.device(flags.usable_device(args.device))
    packages = ["torch", "transformers"] if "transformers" in args.parts else ["torch"]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    settings = {"parts": args.parts, "made_up_layers": args.made_up_layers, "rounds": args.rounds,
                "smoke": args.smoke, "device": device_name(device), "versions": versions,
                "threads": torch.get_num_threads()}
    out = run.open_folder(args, settings)
    print(f"{settings['device']}, {settings['threads']} threads, {versions}; median of "
          f"{args.rounds} rounds, of 3 where one takes minutes [lowest, highest]\n")
    table = Table(args.smoke)
    report.print_heads(["what", "value", "aim", "note"])
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](table, Setting(device, layers=args.made_up_layers, rounds=args.rounds,
                                       small=args.smoke, folder=Path(folder),
                                       picture=out / "growth.png"))
    aims = [row for row in table.rows if row["held"] is not None]
    missed = [row["what"] for row in aims if not row["held"]]
    if aims:
        print(f"\n{len(aims) - len(missed)} of {len(aims)} aims are held"
              + (f"; missed: {'; '.join(missed)}." if missed else "."))
    if "growth" in args.parts:
        print(f"picture: {out / 'growth.png'}")
    result = {"command": args.command} | settings | {"missed": missed, "found": table.rows}
    run.write_result(out, result, args.json)


def parse_arguments(argv: list[str]):
    p = flags.Parser("bench.py", "How fast a model is, unpruned and pruned by each method.")
    group = p.add_argument_group("the model at hand")
    group.add_argument("--method", metavar="NAMES",
                       help=f"comma-separated, of {', '.join(TIMED)} (default: all)")
    group.add_argument("--layer",
                       help="tokens leave at its input: 20, or 2,10,20, or all (default: 2)")
    group.add_argument("--ratio", type=flags.share,
                       help="fraction of the visual tokens removed (default: 0.9)")
    group.add_argument("--schedule", action="append", metavar="S",
                       help="instead of these three: 'dart@2=252 random@20=38'; repeatable")
    group.add_argument("--image", type=Path, metavar="FILE", help="default: a bundled one")
    group.add_argument("--question", metavar="TEXT", help=f"default: {QUESTION}")
    flags.add_model_flags(p)
    group = p.add_argument_group("comparisons, instead of the model at hand")
    group.add_argument("--parts", metavar="NAMES", help=f"comma-separated, of {', '.join(PARTS)}")
    group.add_argument("--made-up-layers", type=flags.whole(3), default=4, metavar="N",
                       help="decoder layers of made-up models; parts that need a deeper one use "
                            "them in turn (default: 4)")
    group = p.add_argument_group("timing")
    group.add_argument("--rounds", type=flags.whole(1), default=10, metavar="N",
                       help="timed rounds, after one that warms up (default: 10)")
    group.add_argument("--smoke", action="store_true",
                       help="one round, of tiny shapes: to see what runs, not how fast")
    flags.add_output_flags(p)
    args = p.parse_args(argv)
    if args.schedule and (args.method or args.layer or args.ratio is not None):
        raise InputError("--schedule: stands for --method, --layer and --ratio; want it or them")
    check_parts(args, p)
    if args.layer is None:
        args.layer = "2"
    if args.ratio is None:
        args.ratio = 0.9
    if args.smoke:
        args.rounds = 1
        args.made_up_layers = 3
    return args


def check_parts(args, p):
    """Splits --parts into names. Raises InputError for an unknown one, and for a flag that would be
    ignored."""
    if args.parts is None:
        unused = ["made_up_layers"]
    else:
        unused = ["method", "layer", "ratio", "schedule", "image", "question", "model", "dtype",
                  "min_pixels", "max_pixels"]
        args.parts = args.parts.split(",")
        for part in args.parts:
            if part not in PARTS:
                raise InputError(f"--parts: unknown {part!r}; want some of {', '.join(PARTS)}")
        if "transformers" in args.parts and not importlib.util.find_spec("transformers"):
            raise InputError("--parts transformers: it is not installed; want pip install "
                             "transformers==5.23.0")
    for name in unused:
        if getattr(args, name) != p.get_default(name):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: goes {'with' if args.parts is None else 'without'} --parts")


if __name__ == "__main__":
    run.start(main)
