"""How much of a vision-language model's score is left when a method prunes its visual tokens.

    python eval.py --layer 20 --ratio 0.9                  every method on the built-in model and benchmarks
    python eval.py --layer all --ratio 0.9 --plot c.png    score against layer, a method a line
    python eval.py --image cat.jpg --question "Is there a cat?" --layer 20 --ratio 0.9
    torchrun --nproc-per-node 8 eval.py ...                the same results, the questions shared by eight processes

In this order: the one loop over questions, information and horizon, statistics, speed, report, command line.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import model_llava
import model_qwen
import pictures
from benchmarks import (BENCHMARKS, COGNITION, COLUMNS, PERCEPTION, STYLES, TOTALS, Question, join_answers, load_benchmark,
                        paths_under, read_json, score)
from tokprune import (METHODS, NEED_A_LAYER, ORACLES, InputError, at_budget, check_method, count, flops, format_schedule,
                      horizon, information_flops, parse_schedule, per_token, prefill, prune, token_information, visual_tokens,
                      with_room)

HERE = Path(__file__).resolve().parent
# config.json's model_type -> the file that implements it; it refuses llava_llama and says what to use instead
MODELS = {"llava": model_llava, "llava_llama": model_llava, "qwen2_5_vl": model_qwen}
ROUNDS = 10                     # that --speed takes the median of
NOISE = 0.01                    # information below this is called none: bfloat16 resolves a probability no better
RANK, WORLD, LOCAL_RANK = ((int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
                           if "TORCHELASTIC_RUN_ID" in os.environ else (0, 1, 0))          # set by torchrun


# ---- the one loop -----------------------------------------------------------------------------------------------

def draw(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """About `limit` of them, by seed, all if None; the questions of an image stay together."""
    about = Counter(q.image for q in questions)
    images = sorted(about)
    random.Random(seed).shuffle(images)
    chosen, room = set(), len(questions) if limit is None else limit
    for image in images:
        if room > 0:
            chosen.add(image)
            room -= about[image]
    return [q for q in questions if q.image in chosen]


@dataclass(frozen=True)
class Cell:
    """A schedule run with one seed."""
    row: str                    # the name of its row in the table
    schedule: tuple
    seed: int
    first: tuple = ()           # the schedule it is also compared with

    @property
    def key(self) -> str:
        """What its answers stand under in answers.jsonl."""
        return f"{format_schedule(self.schedule)} seed {self.seed}" if self.schedule else "unpruned"


def answer_cells(model, question: Question, image, cells: list[Cell], args) -> dict:
    """The answer of every cell to one question; visual and text rows of its prompt; milliseconds, of all and of the oracle.

    The unpruned stream runs once; at each layer where a schedule begins, pruned copies of it go through the rest. Cells
    that keep equally many tokens at the same layers are one batch of variants. image: PIL, or what `preprocess` makes of it.
    """
    began = now()
    stream = model.begin(image, question.prompt)
    N = stream.visual[1]
    stages = [stage for cell in cells for stage in cell.schedule]
    at, s = {}, stream
    for layer in sorted({layer for layer, _, _ in stages}):
        s = at[layer] = model.run(s, stop=layer)
    full = model.run(s) if any(not cell.schedule for cell in cells) else None
    measuring = now()
    oracle, layers = {}, sorted({layer for layer, method, _ in stages if method in ORACLES})
    maps = token_information(model, stream, question.gold, layers, args.window, target="each",
                             max_batch_tokens=args.max_batch_tokens) if layers else []
    for layer, found in zip(layers, maps):              # (rows, cols, tokens of the answer)
        oracle[layer] = {"info": per_token(found[..., 0], stream.grid, args.window),
                         "info-answer": per_token(found.sum(-1), stream.grid, args.window)}
    measured = now()
    batches = defaultdict(list)
    for cell in cells:
        batches[tuple((layer, count(amount, N)) for layer, _, amount in cell.schedule)].append(cell)
    answers, tokens = {}, {}
    for plan, batch in batches.items():
        s = at[plan[0][0]] if plan else full
        for i, (layer, n) in enumerate(plan):
            s = prune(model, model.run(s, stop=layer), [cell.schedule[i][1] for cell in batch], n,
                      [cell.seed + question.seed for cell in batch], oracle.get(layer, {}), args.positions)
        said = model.decode(model.run(s), args.max_new_tokens, args.repetition_penalty)
        answers |= dict(zip([cell.key for cell in batch], said))
    for cell in cells:
        alive = visual_tokens(cell.schedule, N, model.num_layers)
        tokens[cell.key] = [[layer, n] for layer, n in enumerate(alive) if layer == 0 or n != alive[layer - 1]]
    return {"answers": answers, "visual_tokens": tokens, "text_rows": stream.x.shape[1] - N,
            "ms": round(now() - began, 1), "oracle_ms": round(measured - measuring, 1)}


def now() -> float:
    """Milliseconds, with the device's queue emptied."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * time.perf_counter()


def evaluate(model, benchmark: str, questions: list[Question], cells: list[Cell], args, out: Path) -> list[dict]:
    """Every question in every cell, a line each appended to this process's answers as it comes; what stands there is done.

    A line's visual_tokens are [layer, how many from there on]. Where memory ran out, the line says failed, scored 0.
    """
    done = gather(out, benchmark, questions)
    file = out / ("answers.jsonl" if WORLD == 1 else f"answers.rank{RANK}.jsonl")
    mine = [question for question in questions[RANK::WORLD] if (benchmark, question.id) not in done]
    began, right = time.time(), 0.0
    for i, (question, image) in enumerate(ahead(lambda q: model.preprocess(read_image(q.image)), mine, args.workers), 1):
        line = attempt(lambda: answer_cells(model, question, image(), cells, args), f"{benchmark} {question.id}")
        if line:
            read = {key: score(answer, question) for key, answer in line["answers"].items()}
            append(file, {"benchmark": benchmark, "id": question.id, "prompt": short_hash(question.prompt), **line,
                          "parsed": {key: parsed for key, (parsed, _) in read.items()},
                          "scores": {key: points for key, (_, points) in read.items()}})
            right += read[cells[0].key][1]
        progress(benchmark, i, len(mine), began, f"unpruned {100 * right / i:.1f}")
    done = gather(out, benchmark, questions)
    failed = {"failed": True, "scores": {cell.key: 0.0 for cell in cells}, "ms": 0, "oracle_ms": 0}
    lines = [done.get((benchmark, question.id), failed) for question in questions]
    if all("failed" in line for line in lines):
        raise InputError(f"{benchmark}: memory ran out on every question")
    return lines


def ahead(work, items: list, workers: int):
    """Each item with a function that returns work(item), in order; a few threads work ahead of who asks."""
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for i in range(len(items) + 2 * workers):
            if i < len(items):
                waiting.append((items[i], pool.submit(work, items[i])))
            if i >= 2 * workers:
                item, future = waiting.popleft()
                yield item, future.result
    finally:
        pool.shutdown(cancel_futures=True)


def attempt(work, what: str):
    """What work() returns, or None where memory runs out, which is reported; the run goes on."""
    try:
        return work()
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
    print(f"\neval.py: {what}: out of memory, failed", file=sys.stderr)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """torch has a type of its own for its allocator on CUDA only."""
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or re.search("can't allocate memory|out of memory|ALLOC_FAILED", str(error)) is not None)


def append(file: Path, line: dict):
    try:
        with file.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as e:
        raise InputError(f"{file}: cannot be written ({e.strerror}); the answers before are in it, and the same command goes on")


def gather(out: Path, benchmark: str, questions: list[Question]) -> dict[tuple[str, str], dict]:
    """All answers by benchmark and id, those of every process that wrote here, made one file in the order of the questions."""
    wait()
    if RANK == 0:
        files, done = [file for name in ("answers.jsonl", "answers.rank*.jsonl") for file in sorted(out.glob(name))], {}
        for file in files:
            done |= {(line["benchmark"], line["id"]): line for line in read_answers(file)}
        place = {(benchmark, question.id): i for i, question in enumerate(questions)}
        merged = "".join(json.dumps(done[key], ensure_ascii=False) + "\n" for key in sorted(done, key=lambda k: place.get(k, -1)))
        write(out / "answers.jsonl", merged)
        for file in files:
            if file.name != "answers.jsonl":
                file.unlink()
    wait()
    return {(line["benchmark"], line["id"]): line for line in read_answers(out / "answers.jsonl")}


def write(file: Path, text: str):
    """All of it or nothing."""
    new = file.with_name(file.name + ".new")
    try:
        new.write_text(text, "utf-8")
        new.replace(file)
    except OSError as e:
        raise InputError(f"{file}: cannot be written ({e.strerror}); want a folder that can be written to, with room")


def read_answers(file: Path) -> list[dict]:
    """The lines of an earlier run; a half-written last one is left out, so that its question is asked again."""
    try:
        lines = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
        assert all({"benchmark", "id", "answers", "scores"} <= line.keys() for line in lines), "not lines of answers"
    except (OSError, ValueError, AttributeError, AssertionError) as e:
        raise InputError(f"{file}: cannot be read as the answers of an earlier run ({e})")
    return lines


def wait():
    """Until every process of the run is here. Raises InputError if one has died."""
    if WORLD == 1:
        return
    try:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=30))         # the slowest may have a lot to do
        dist.barrier()
    except RuntimeError as e:                           # gloo's, of several lines
        raise InputError(DIED) from e


DIED = "another process of this run has ended; what was answered is kept, and the same command goes on, with as many as you like"


def read_image(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except MemoryError:
        raise
    except Exception as e:                              # Pillow raises OSError, ValueError, SyntaxError, TypeError and its own
        raise InputError(f"{path}: cannot be read as an image ({e})")
    return image


def progress(what: str, i: int, of: int, began: float, note: str = ""):
    """Overwrites itself, and is gone at the end; silent where nobody watches."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        rate = i / (time.time() - began)
        line = f"{what} {i}/{of}  {note}  {rate:.1f}/s  {timedelta(seconds=round((of - i) / rate))} left" if i < of else ""
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


# ---- information and horizon ------------------------------------------------------------------------------------

def measure_information(model, benchmark: str, questions: list[Question], layers: list[int], args, out: Path) -> list:
    """(question, map (layers, rows, cols)) of each, all maps in out/information.npz, which is written anew every ten seconds
    and at the end, whatever ends it; what stands there is done. Questions that memory was too small for are left out."""
    maps = gather_maps(out)
    file, own = (out / "information.npz", maps) if WORLD == 1 else (out / f"information.rank{RANK}.npz", {})
    mine = [question for question in questions[RANK::WORLD] if f"{benchmark}/{question.id}" not in maps]
    began = saved = time.time()
    own["layers"] = np.array(layers)
    try:
        for i, (question, image) in enumerate(ahead(lambda q: model.preprocess(read_image(q.image)), mine, args.workers), 1):
            found = attempt(lambda: token_information(
                model, model.begin(image(), question.prompt), question.gold, layers, args.window, args.information, args.target,
                args.max_batch_tokens), f"{benchmark} {question.id}")
            if found is not None:
                own[f"{benchmark}/{question.id}"] = found.numpy()
            if time.time() > saved + 10:
                save_maps(file, own)
                saved = time.time()
            progress(f"{benchmark} information", i, len(mine), began)
    finally:
        save_maps(file, own)
    maps = gather_maps(out)
    measured = [(q, maps[f"{benchmark}/{q.id}"]) for q in questions if f"{benchmark}/{q.id}" in maps]
    if not measured:
        raise InputError(f"{benchmark}: memory ran out on every question; want --max-batch-tokens below {args.max_batch_tokens}")
    return measured


def gather_maps(out: Path) -> dict[str, np.ndarray]:
    """`gather` for maps of information."""
    wait()
    if RANK == 0:
        maps, files = {}, [file for name in ("information.npz", "information.rank*.npz") for file in sorted(out.glob(name))]
        for file in files:
            maps |= read_maps(file)
        save_maps(out / "information.npz", maps)
        for file in files:
            if file.name != "information.npz":
                file.unlink()
    wait()
    return read_maps(out / "information.npz")


def read_maps(file: Path) -> dict[str, np.ndarray]:
    try:
        return dict(np.load(file))
    except Exception as e:                              # numpy raises what zip, pickle and the file system raise
        raise InputError(f"{file}: cannot be read as the information of an earlier run ({e})")


def save_maps(file: Path, maps: dict):
    try:
        with file.with_name(file.name + ".new").open("wb") as f:
            np.savez(f, **maps)
        file.with_name(file.name + ".new").replace(file)
    except OSError as e:
        raise InputError(f"{file}: cannot be written ({e.strerror})")


def summarise_information(measured: list, layers: list[int]) -> list[dict]:
    """For each layer, over the windows of a question and averaged over questions, each with its standard error: mean, standard
    deviation, Gini coefficient of the absolute values, share of windows that move the probability by more than NOISE."""
    image = images_of([question for question, _ in measured])
    measures = {"mean": np.mean, "std": np.std, "gini": gini, "share": lambda v: np.mean(abs(v) > NOISE)}
    rows = []
    for i, layer in enumerate(layers):
        values = {name: np.array([measure(found[i].ravel()) for _, found in measured]) for name, measure in measures.items()}
        rows.append({"layer": layer, **{name: float(value.mean()) for name, value in values.items()},
                     "standard_errors": {name: standard_error(value, image) for name, value in values.items()}})
    return rows


def layer_information_is_gone(rows: list[dict]) -> int | None:
    """The first layer from which on the mean stays under 1 % of layer 1's (the first measured, where 1 is not); None where
    nothing is told there already, or something to the end."""
    base = next((row["mean"] for row in rows if row["layer"] == 1), rows[0]["mean"])
    told = [row["layer"] for row in rows if abs(row["mean"]) >= 0.01 * base]
    return next((row["layer"] for row in rows if row["layer"] > max(told)), None) if base > 0 else None


def gini(values: np.ndarray) -> float:
    """0 where all windows tell equally much, towards 1 where one tells all."""
    x = np.sort(abs(values))
    return float(((2 * np.arange(1, len(x) + 1) - len(x) - 1) * x).sum() / (len(x) * x.sum())) if x.any() else 0.0


def drop_all(args, num_layers: int) -> list[Cell]:
    """The unpruned model, and every visual token dropped at the input of each layer in turn."""
    schedules = [((layer, "random", 0),) for layer in range(num_layers)]
    return [Cell("unpruned", (), args.seed), *(Cell("all dropped", schedule, args.seed) for schedule in schedules)]


def measure_horizon(questions: list[Question], done: list[dict], cells: list[Cell], tolerance: float) -> dict:
    """`tokprune.horizon` of the cells of `drop_all`: {layer, low, high, draws}, its 95 % interval by bootstrap over images."""
    image = images_of(questions)
    scores = np.array([[line["scores"][cell.key] for cell in cells] for line in done])          # (questions, 1 + layers)
    sums = np.array([np.bincount(image, column) for column in scores.T])                        # (1 + layers, images)
    picks = np.random.default_rng(0).integers(0, sums.shape[1], (2000, sums.shape[1]))
    draws = [horizon(total[1:], total[0], tolerance) for total in (sums[:, pick].sum(1) for pick in picks)]
    low, high = np.percentile(draws, [2.5, 97.5])
    total = scores.mean(0)
    return {"layer": horizon(total[1:], total[0], tolerance), "low": float(low), "high": float(high), "draws": draws,
            "scores": [100 * float(score) for score in total[1:]], "unpruned": 100 * float(total[0])}


def layers_of_oracle(rows: list[dict], oracle: str) -> tuple[list[int], list[int]]:
    """Of a sweep: the layers at which the oracle beats every method, and those at which some method beats it, by paired 95 %
    intervals."""
    differences = defaultdict(list)
    for row in rows:
        if row["method"] in METHODS and row["method"] not in ORACLES and oracle in row["minus_oracles"]:
            differences[row["layer"]].append(row["minus_oracles"][oracle])
    return ([layer for layer, found in differences.items() if all(high < 0 for _, _, high in found)],
            [layer for layer, found in differences.items() if any(low > 0 for _, low, _ in found)])


def layer_no_method_beats_random(rows: list[dict]) -> int:
    """Of a sweep: the first layer from which on no method but the oracles has a paired 95 % interval wholly above random's."""
    better = [row["layer"] for row in rivals_of_random(rows) if row["minus_random"][1] > 0]
    later = [layer for layer in layers_of(rows) if layer > max(better, default=-1)]
    return later[0] if later else layers_of(rows)[-1] + 1


def layers_of(rows: list[dict]) -> list[int]:
    """Where methods prune; several in a sweep. Rows of a schedule have no one layer."""
    return sorted({row["layer"] for row in rows if row["method"] in METHODS})


def rivals_of_random(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["method"] in METHODS and row["method"] not in ORACLES and row["minus_random"]]


# ---- statistics -------------------------------------------------------------------------------------------------

def images_of(questions: list[Question]) -> np.ndarray:
    """The number of each question's image, for statistics clustered by it."""
    return np.unique([str(q.image) for q in questions], return_inverse=True)[1]


def standard_error(scores: np.ndarray, image: np.ndarray) -> float:
    """Of the mean, clustered by image: questions about one image are not independent."""
    sums = np.bincount(image, scores - scores.mean())
    return float(np.sqrt((sums ** 2).sum() * len(sums) / max(len(sums) - 1, 1)) / len(scores))


def paired_difference(scores: np.ndarray, other: np.ndarray, image: np.ndarray) -> tuple[float, float, float]:
    """Mean of scores - other on the same questions, and its 95 % interval: percentile bootstrap over images, fixed seed."""
    sums, sizes = np.bincount(image, scores - other), np.bincount(image)
    draws = np.random.default_rng(0).integers(0, len(sums), (2000, len(sums)))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    return float((scores - other).mean()), *np.percentile(means, [2.5, 97.5]).tolist()


def summarise(model, benchmark: str, questions: list[Question], done: list[dict], cells: list[Cell]) -> list[dict]:
    """A row for each schedule, its seeds averaged: score and differences in percent, tokens, FLOPs, counts of odd answers."""
    image = images_of(questions)
    answered = [line for line in done if "failed" not in line]
    seeds = defaultdict(list)
    for cell in cells:
        seeds[format_schedule(cell.schedule)].append(cell)
    scores = {spec: [[line["scores"][cell.key] for line in done] for cell in runs] for spec, runs in seeds.items()}
    means = {spec: 100 * np.mean(runs, 0) for spec, runs in scores.items()}
    rows = []
    for spec, runs in seeds.items():                    # as text: 0 == 0.0
        s, (cell, *_) = means[spec], runs
        schedule, first = cell.schedule, format_schedule(cell.first)
        instead = {m: format_schedule((layer, m, amount) for layer, _, amount in schedule) for m in ("random", *ORACLES)}
        against = {m: paired_difference(s, means[other], image) for m, other in instead.items()
                   if other in means and other != spec}
        tokens = [visual_tokens(schedule, line["visual_tokens"]["unpruned"][0][1], model.num_layers) for line in answered]
        rows.append({
            "method": cell.row, "schedule": spec, "layer": schedule[0][0] if schedule else None, "score": float(s.mean()),
            "standard_error": standard_error(s, image), "seeds": len(runs),
            "minus_unpruned": paired_difference(s, means[""], image) if spec else None,
            "minus_random": against.pop("random", None), "minus_oracles": against,
            "minus_first": paired_difference(s, means[first], image) if first and spec not in ("", first) else None,
            "kept": float(np.mean([t[-1] for t in tokens])), "mean_visual_tokens": float(np.mean(tokens)),
            "gflops": float(np.mean([flops(model.config.text, [line["text_rows"] + v for v in t])
                                     for line, t in zip(answered, tokens)])) / 1e9,
            "totals": totals(benchmark, questions, scores[spec]),
            "empty": sum(not line["answers"][cell.key].strip() for line in answered for cell in runs),
            "unparsed": sum(line["parsed"][cell.key] is None for line in answered for cell in runs),
            "failed": len(done) - len(answered)})
    return rows


def totals(benchmark: str, questions: list[Question], runs: list[list[float]]) -> dict:
    """What the benchmark's paper reports, the mean over the seeds' runs; nothing where that is the score itself."""
    found = [TOTALS[benchmark](questions, np.array(run)) for run in runs] if benchmark in TOTALS else [{}]
    return {name: float(np.mean([total[name] for total in found])) for name in found[0]}


# ---- speed ------------------------------------------------------------------------------------------------------

def spread(milliseconds: list[float]) -> dict:
    return {"median": float(np.median(milliseconds)), "low": min(milliseconds), "high": max(milliseconds)}


def in_turns(calls: dict, rounds: int) -> dict[str, dict]:
    """Milliseconds of each call, the calls taking turns, in this order and back, after a round that warms up."""
    spent, order = defaultdict(list), list(calls)
    for _ in range(rounds + 1):
        for name in order:
            start = now()
            calls[name]()
            spent[name].append(now() - start)
        order.reverse()
    return {name: spread(ms[1:]) for name, ms in spent.items()}


def time_calls(call, rounds: int) -> dict:
    return in_turns({"": call}, rounds)[""]


def time_prefill(model, stream, schedules: dict[str, tuple], positions: str, rounds: int) -> dict[str, dict]:
    """Milliseconds from the input of layer 0 to the first logits, by spec, alone in its batch; specs take turns."""
    return in_turns({spec: lambda schedule=schedule: model.logits(prefill(model, stream, schedule, positions=positions))
                     for spec, schedule in schedules.items()}, rounds)


def timed(cells: list[Cell]) -> dict[str, tuple]:
    """The schedules of the cells by spec, without oracles, whose time is the measuring's."""
    schedules = {format_schedule(cell.schedule): cell.schedule for cell in cells}
    return {spec: stages for spec, stages in schedules.items() if not {*ORACLES} & {method for _, method, _ in stages}}


def measure_speed(model, image, prompt: str, cells: list[Cell], args, rounds: int, new_tokens: int = 8) -> list[dict]:
    """A row for each schedule: tower (image and prompt to the input of layer 0), prefill, its selections alone, a decoded token;
    bytes of the cache, and of prefill at its peak beside the weights; prefill FLOPs, and their rate as a share of a bare matrix
    product's on this device."""
    weight = next(model.parameters())
    stream = model.begin(image, prompt)
    N, T = stream.visual[1], stream.x.shape[1]
    tower, peak = time_calls(lambda: model.begin(image, prompt), rounds), matrix_rate(weight)
    schedules = timed(cells)
    spent, rows = time_prefill(model, stream, schedules, args.positions, rounds), []
    token = torch.full((1, 1), int(stream.ids[-1]), device=weight.device)
    for spec, schedule in schedules.items():
        s, select = stream, 0.0
        for layer, method, amount in schedule:
            at = model.run(s, stop=layer)
            select += time_calls(lambda: prune(model, at, method, count(amount, N), positions=args.positions), rounds)["median"]
            s = prune(model, at, method, count(amount, N), positions=args.positions)
        memory = extra_memory(lambda: prefill(model, stream, schedule, positions=args.positions), weight.device)
        full = prefill(model, stream, schedule, positions=args.positions)

        def decode():
            s = with_room(full)
            for _ in range(new_tokens):
                s = model.run(model.append(s, token))
                model.logits(s)
        step = {key: ms / new_tokens for key, ms in time_calls(decode, rounds).items()}
        work = flops(model.config.text, [T - N + n for n in visual_tokens(schedule, N, model.num_layers)])
        rows.append({"schedule": spec, "tower_ms": tower, "prefill_ms": spent[spec], "select_ms": select, "decode_ms": step,
                     "tokens_per_second": 1000 / step["median"], "cache_bytes": cache_bytes(full), "peak_bytes": memory,
                     "gflops": work / 1e9, "share_of_peak": work / spent[spec]["median"] * 1000 / peak, "peak_flops": peak})
    return rows


def cache_bytes(stream) -> int:
    """What the cache of a stream keeps in memory: the storages its tensors lie in, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for pair in stream.cache for t in pair}
    return sum(storages.values())


def matrix_rate(like: torch.Tensor, rounds: int = 5) -> float:
    """FLOPs per second of a large square matrix product on this device, in this dtype."""
    n = 8192 if like.device.type == "cuda" else 2048
    a = torch.ones(n, n, device=like.device, dtype=like.dtype)
    return 2 * n ** 3 / time_calls(lambda: a @ a, rounds)["low"] * 1000


def device_name(device) -> str:
    """The GPU with its driver and CUDA version, or the CPU's model where Linux tells."""
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if shutil.which("nvidia-smi") else []
        return f"{torch.cuda.get_device_name(device)}, driver {(driver or ['unknown'])[0]}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.machine()


def extra_memory(call, device) -> int:
    """Most bytes that torch holds for a call at once, beside what it held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ["KINETO_LOG_LEVEL"] = "6"                # else the profiler says on stderr that it starts and stops
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), initial=0))


# ---- report -----------------------------------------------------------------------------------------------------

def print_head(benchmark: str, questions: list[Question], known: list[Question], template: str) -> str:
    """What is asked: how much of the benchmark, and the first question as the model gets it, which is returned."""
    images, subtasks = len({q.image for q in questions}), len({q.group for q in known})
    prompt = template.format(question=questions[0].prompt)
    print(f"\n{benchmark}: {part_of(questions, known)}, {images} images"
          + f", {subtasks} of {len(PERCEPTION + COGNITION)} subtasks" * (benchmark == "mme")
          + f"; the first: {json.dumps(prompt)}\n")
    return prompt


def print_table(benchmark: str, rows: list[dict]):
    """A row a schedule, everything known of it."""
    columns, first = COLUMNS.get(benchmark, ()), any(row["minus_first"] for row in rows)
    print_heads([benchmark, "score", "±", *columns, "- unpruned", "- random", *["- first"] * first, "kept", "mean tokens",
                 "GFLOPs"])
    for row in rows:
        values = [row["method"], f"{row['score']:.1f}", f"{row['standard_error']:.1f}",
                  *(f"{row['totals'][column]:.5g}" for column in columns),
                  difference(row["minus_unpruned"]), difference(row["minus_random"]), *[difference(row["minus_first"])] * first,
                  f"{row['kept']:.3g}", f"{row['mean_visual_tokens']:.1f}", f"{row['gflops']:.3g}"]
        print("| " + " | ".join(values) + " |")
    print()


def print_odd(benchmark: str, rows: list[dict]):
    """Answers that are not there, or that the metric cannot read, where there are any."""
    for kind in ("failed", "empty", "unparsed"):
        if counts := ", ".join(f"{row['schedule'] or 'unpruned'} {row[kind]}" for row in rows if row[kind]):
            print(f"{benchmark}, {kind} answers: {counts}\n")


def print_sweep(benchmark: str, rows: list[dict]):
    """A row a layer, a method a column, scores alone; then what the paper asks of a sweep, in paired 95 % intervals."""
    methods, layers = [m for m in METHODS if any(row["method"] == m for row in rows)], layers_of(rows)
    by = {(row["method"], row["layer"]): row for row in rows}
    print(f"| {benchmark}, layer | " + " | ".join(methods) + " |\n" + "|---:" * (1 + len(methods)) + "|")
    for name, layer in (("unpruned", None), ("no image", 0)):
        print(f"| {name} |" + f" {by[name, layer]['score']:.1f} |" * len(methods))
    for layer in layers:
        print(f"| {layer} | " + " | ".join(f"{by[m, layer]['score']:.1f}" if (m, layer) in by else "-" for m in methods) + " |")
    deep, rivals = layer_no_method_beats_random(rows), rivals_of_random(rows)
    print(f"\n{benchmark}: no method beats random from layer {deep} on (our rule; oracles apart)")
    if rivals:
        most = max(rivals, key=lambda row: row["minus_random"][0])
        print(f"{benchmark}: the most over random is {difference(most['minus_random'])}, {most['method']} at layer "
              f"{most['layer']}")
    if past := [row["minus_random"] for row in rivals if row["layer"] >= deep]:
        print(f"{benchmark}: from layer {deep} on every method is within "
              f"[{min(low for _, low, _ in past):+.1f}, {max(high for _, _, high in past):+.1f}] of random")
    for oracle in (m for m in methods if m in ORACLES and rivals):
        best, beaten = (", ".join(map(str, layers)) or "none" for layers in layers_of_oracle(rows, oracle))
        leads = []
        for layer in {row["layer"] for row in rivals}:
            rival = max((row for row in rivals if row["layer"] == layer), key=lambda row: row["score"])
            mean, low, high = rival["minus_oracles"][oracle]
            leads.append((-mean, -high, -low, rival["method"], layer))
        *lead, method, layer = max(leads)
        print(f"{benchmark}: {oracle} beats every method at layers {best}; some method beats it at {beaten}; "
              f"it leads most at {layer}, {difference(lead)} over the best there, {method}")
    print()


def report_given(file: Path, data: dict, paths: list[Path]) -> dict:
    """Scores of a file of answers made elsewhere, a row for each cell where it holds several."""
    report = {}
    for name, given in join_answers(file, data, paths).items():
        questions, columns = [question for question, _ in given], COLUMNS.get(name, ())
        image, rows = images_of(questions), report.setdefault(name, {})
        print(f"\n{name}: {part_of(questions, data[name])} answered\n")
        print_heads([name, "score", "±", *columns, "empty", "unparsed"])
        for key in given[0][1]:
            said = [answers[key] for _, answers in given]
            parsed, points = zip(*(score(answer, question) for answer, question in zip(said, questions)))
            percent = 100 * np.array(points)
            row = rows[key] = {"score": float(percent.mean()), "standard_error": standard_error(percent, image),
                               "totals": totals(name, questions, [points]), "empty": sum(not answer.strip() for answer in said),
                               "unparsed": parsed.count(None)}
            print(f"| {key} | {row['score']:.1f} | {row['standard_error']:.1f} | "
                  + "".join(f"{row['totals'][column]:.5g} | " for column in columns) + f"{row['empty']} | {row['unparsed']} |")
        print()
    return report


def print_heads(heads: list[str]):
    print("| " + " | ".join(heads) + " |\n|---|" + "---:|" * (len(heads) - 1))


def part_of(questions: list[Question], known: list[Question]) -> str:
    part = f"partial, {len(questions)} of its" if len(questions) < len(known) else "all"
    return f"{part} {len(known)} questions"


def difference(values) -> str:
    return "-" if values is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(value + 0.0 for value in values))   # -0.0 is 0


def show_image(model, image: Image.Image, prompt: str, cells: list[Cell], args, out: Path) -> dict:
    """One picture, one question: the answer with and without each pruning, and an overlay of what was kept."""
    stream = model.begin(image, prompt)
    answers, panels = {}, []
    for cell in cells:
        s = prefill(model, stream, cell.schedule, cell.seed, args.positions)
        answers[cell.key] = model.decode(s, args.max_new_tokens, args.repetition_penalty)[0]
        panels.append((f"{cell.row}: {answers[cell.key]}", s.origin[0].tolist()))
        print(f"{cell.row:12} {s.visual[1]:5} visual tokens    {answers[cell.key]}")
    pictures.overlay(model.canvas(image), panels, stream.grid, out / "overlay.png")
    print(f"overlay: {out / 'overlay.png'}")
    return answers


# ---- command line -----------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The flags, each checked as far as it can be without the model. Raises InputError."""
    p = Parser(prog="eval.py", description="Scores of a vision-language model with its visual tokens pruned.")
    p.add_argument("--model", default=HERE / "tiny" / "llava", type=Path, help="checkpoint folder (default: tiny/llava)")
    p.add_argument("--data", default=HERE / "tiny", type=Path, help="folder that holds the benchmarks (default: tiny)")
    p.add_argument("--bench", default="mme,textvqa",
                   help=f"comma-separated, of {', '.join(BENCHMARKS)} and .jsonl files of your own (default: %(default)s)")
    p.add_argument("--prompt-style", choices=STYLES, help="the prompts of LLaVA's scripts, TextVQA's OCR tokens included, or of "
                   "lmms-eval (default: LLaVA's without OCR tokens)")
    p.add_argument("--method", help=f"comma-separated, of {', '.join(METHODS)} (default: all); random is always added")
    p.add_argument("--layer", help="0-based, tokens leave at its input: one, several as 2,10,20, all, or horizon, the measured "
                   "one (default: 20)")
    p.add_argument("--ratio", help="fraction of the visual tokens removed, 0 to 1 (default: 0.9)")
    p.add_argument("--schedule", action="append", metavar="S",
                   help="instead of these three: 'dart@2=252 random@20:0.9'; repeatable")
    p.add_argument("--budget", metavar="B", help="shares of the visual tokens, mean over the layers, as 1/3,1/9: each method "
                   "alone, with random and with nothing from --layer on (default: horizon)")
    p.add_argument("--score", type=Path, metavar="JSONL", help="score these answers, made elsewhere, instead of running a model")
    p.add_argument("--speed", action="store_true", help="time the unpruned model and each method on one question instead")
    p.add_argument("--information", nargs="?", const="keep-one", choices=["keep-one", "leave-one-out"],
                   help="measure token information and the horizon instead (default: keep-one)")
    p.add_argument("--target", choices=["first", "answer"], default="first",
                   help="information of the gold answer's first token or of all of it (default: first)")
    p.add_argument("--window", type=int, default=2, metavar="N",
                   help="information is measured in windows of N x N tokens (default: 2)")
    p.add_argument("--max-batch-tokens", type=int, default=2 ** 15, metavar="N",
                   help="bound of a batch of windows, in rows (default: 32768)")
    p.add_argument("--tolerance", type=float, default=0.01, metavar="T",
                   help="share of the score that may be lost past the horizon (default: 0.01)")
    p.add_argument("--calibrate", type=int, default=60, metavar="N",
                   help="questions that --layer horizon is measured on; they are not scored (default: 60)")
    p.add_argument("--limit", type=int, metavar="N",
                   help="about N questions a benchmark, drawn by seed, whole images (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of random pruning and of --limit (default: 0)")
    p.add_argument("--seeds", type=int, default=3, help="how many seeds random is averaged over (default: 3)")
    p.add_argument("--out", type=Path,
                   help="folder for answers and pictures; a run goes on there (default: runs/<flags>-<settings>)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: bfloat16 on cuda, float32 on cpu)")
    p.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="(default: 16)")
    p.add_argument("--repetition-penalty", type=float, default=1.0, metavar="P",
                   help="logits of tokens seen are divided by it (default: 1, no penalty)")
    p.add_argument("--min-pixels", type=int, metavar="N",
                   help="area of a resized image at least; Qwen (default: the checkpoint's)")
    p.add_argument("--max-pixels", type=int, metavar="N", help="and at most")
    p.add_argument("--workers", type=int, default=4, metavar="N", help="threads that read images ahead of the model (default: 4)")
    p.add_argument("--positions", choices=["keep", "compact"], default="keep",
                   help="of kept tokens: original or renumbered; LLaVA (default: keep)")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw score against layer")
    p.add_argument("--image", type=Path, help="one picture instead of the benchmarks; with --question")
    p.add_argument("--question", help="what to ask about --image")
    args = p.parse_args(argv)
    args.bench = args.bench.split(",")
    args.horizon = any("horizon" in text for text in (args.layer or ("horizon" if args.budget else ""), *(args.schedule or [])))
    check_arguments(args)
    return args


def check_arguments(args):
    """What can be said of the flags without the model. Raises InputError."""
    for flag, low in (("limit", 1), ("seed", 0), ("seeds", 1), ("max_new_tokens", 1), ("min_pixels", 1), ("max_pixels", 1),
                      ("window", 1), ("max_batch_tokens", 1), ("calibrate", 1), ("workers", 1)):
        value = getattr(args, flag)
        if value is not None and not low <= value < 2 ** 31:
            raise InputError(f"--{flag.replace('_', '-')}: {value}, want {low} or more, below 2^31")
    if not 0 < args.repetition_penalty < float("inf"):
        raise InputError(f"--repetition-penalty: {args.repetition_penalty}, want a number above 0; 1 is no penalty")
    for flag in ("layer", "ratio", "method", "budget"):
        if getattr(args, flag) == "":
            raise InputError(f"--{flag}: empty; leave it out for its default")
    if args.score and (args.image or args.layer or args.method or args.ratio or args.schedule or args.budget or args.information
                       or args.speed or args.limit or args.out or args.plot):
        raise InputError("--score: takes --data and --bench alone; no model runs")
    if args.speed and (args.information or args.budget):
        raise InputError("--speed: takes --method, --layer, --ratio or --schedule, and no --information or --budget")
    if len({Path(name).name for name in args.bench}) < len(args.bench):
        raise InputError(f"--bench: {', '.join(args.bench)}: two of one name; want each once")
    for benchmark in args.bench:
        if benchmark not in BENCHMARKS and not benchmark.endswith(".jsonl"):
            raise InputError(f"--bench: unknown benchmark {benchmark!r}; want one of {', '.join(BENCHMARKS)} or a .jsonl file")
    if args.schedule and (args.method or args.layer or args.ratio):
        raise InputError("--schedule: stands for --method, --layer and --ratio; want it or them")
    if args.budget and (args.schedule or args.ratio or args.image or args.layer and not re.fullmatch(r"\d+|horizon", args.layer)):
        raise InputError("--budget: takes --method and --layer, one or horizon, and no --ratio, --schedule or --image")
    if not 0 <= args.tolerance < 1:
        raise InputError(f"--tolerance: {args.tolerance}, want 0 to below 1, a share of the score")
    if args.information and (args.schedule or args.method or args.ratio or args.image or args.horizon or args.budget):
        raise InputError("--information: takes --layer as numbers or all, and no --method, --ratio, --schedule, --budget or "
                         "--image")
    if bool(args.image) != bool(args.question):
        raise InputError("--image and --question go together")
    if args.plot and (args.image or args.schedule or args.budget or args.plot.suffix != ".png" or not args.plot.parent.is_dir()):
        raise InputError(f"--plot {args.plot}: want a .png in a folder that exists, without --schedule, --budget or --image")


def parse_cells(args, num_layers: int, at: int = 0, N: int = 576) -> list[Cell]:
    """The unpruned model, no image at all, then each method at each layer or each schedule, and random beside all of them.

    at: the layer that the word horizon stands for; N: the visual tokens that a budget is divided by.
    """
    if args.budget:
        rows = parse_budgets(args, num_layers, at, N)
    else:
        rows = parse_schedules(args, at) if args.schedule else parse_methods(args, num_layers, at)
    cells = {}
    for row, schedule, first in [("unpruned", (), ()), ("no image", ((0, "random", 0),), ()), *rows]:
        for layer, method, _ in schedule:
            if not 0 <= layer < num_layers:
                raise InputError(f"layer {layer} is out of range; this model has layers 0 to {num_layers - 1}")
            if method in ORACLES and args.image:
                raise InputError(f"{method} needs a gold answer: it works on benchmarks, not on --image")
        for seed in range(args.seeds if is_drawn(schedule) and not args.image else 1):
            cell = Cell(row, schedule, args.seed + seed, first)
            cells.setdefault(cell.key, cell)            # what is asked for twice runs once
    return list(cells.values())


def is_drawn(schedule: tuple) -> bool:
    """Whether its seed matters; keeping all (0.0) or none (1.0, or a count of 0) does not depend on it."""
    return any(method == "random" and (amount > 0 if isinstance(amount, int) else 0 < amount < 1)
               for _, method, amount in schedule)


def parse_schedules(args, at: int) -> list[tuple[str, tuple, tuple]]:
    schedules = [tuple(parse_schedule(re.sub(r"@horizon(?=[:=])", f"@{at}", text))) for text in args.schedule]
    if not all(schedules):
        raise InputError("--schedule: empty, want e.g. 'dart@2=252 random@20:0.9'")
    return [(format_schedule(stages), stages, () if stages == schedules[0] else schedules[0])
            for schedule in schedules for stages in (schedule, all_random(schedule))]


def all_random(schedule: tuple) -> tuple:
    return tuple((layer, "random", amount) for layer, _, amount in schedule)


def parse_budgets(args, num_layers: int, at: int, N: int) -> list[tuple[str, tuple, tuple]]:
    """Each method at each budget: alone, then with random and with nothing from the horizon on, and random in its place."""
    rows, [deep] = [], parse_layers(args, num_layers, "horizon", at)
    for text in args.budget.split(","):
        try:
            budget = Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise InputError(f"--budget {text}: want a share of the visual tokens, as 1/3 or 0.25")
        if not 0 < budget < 1:
            raise InputError(f"--budget {text}: want more than 0 and less than 1, a share of the visual tokens")
        for method in (args.method or "dart,divprune").split(","):
            check_method(method, 1)
            alone, *others = at_budget(method, float(budget), deep, N, num_layers)
            rows += [(format_schedule(stages), stages, ()) for stages in (alone, all_random(alone))]
            rows += [(format_schedule(stages), stages, alone) for stages in others]
    return rows


def parse_layers(args, num_layers: int, default: str, at: int = 0) -> list[int]:
    text = args.layer or default
    try:
        return list(range(num_layers)) if text == "all" else [at if part == "horizon" else int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--layer {text}: want layers as 20 or 2,10,20 or all or horizon")


def parse_methods(args, num_layers: int, at: int) -> list[tuple[str, tuple, tuple]]:
    layers = parse_layers(args, num_layers, "20", at)
    try:
        ratio = float(args.ratio or "0.9")
    except ValueError:
        raise InputError(f"--ratio {args.ratio}: want a fraction as 0.9")
    if not 0 <= ratio <= 1:
        raise InputError(f"--ratio: {args.ratio}, want 0 to 1, the fraction removed")
    if args.method:
        methods = args.method.split(",")
    else:
        methods = [method for method in METHODS if not (args.image and method in ORACLES)]
    rows = []
    for layer in layers:
        for method in dict.fromkeys(["random", *methods]):
            # "every method" or "every layer" means those that can act; a method and a layer both named must fit
            if layer == 0 and method in NEED_A_LAYER and (not args.method or args.layer == "all"):
                continue
            check_method(method, layer)
            rows.append((method, ((layer, method, ratio),), ()))
    return rows


def load_model(args):
    """How many layers --model has, its file, and a function that loads it, to be called once all flags are checked."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = f"cuda:{LOCAL_RANK}" if device == "cuda" else device
    try:
        assert torch.device(device).type in ("cpu", "cuda"), "want cpu or cuda"
        torch.empty(0, device=device)
    except Exception as e:                              # torch raises what the backend raises
        raise InputError(f"--device {device}: not usable here ({str(e).splitlines()[0]})")
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)                   # the one that `now` waits for
    if not args.model.is_dir():
        raise InputError(f"--model {args.model}: no such folder; want a checkpoint folder with config.json")
    kind = read_json(args.model / "config.json").get("model_type")
    if kind not in MODELS:
        raise InputError(f"--model {args.model}: model_type is {kind!r}, want one of {', '.join(MODELS)}")
    module, dtype, pixels = MODELS[kind], getattr(torch, args.dtype) if args.dtype else None, {}
    if module is model_qwen:
        pixels = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
        if args.positions == "compact":
            raise InputError("--positions compact: a visual token of Qwen2.5-VL has three positions, its place in the image; "
                             "want keep")
    elif args.min_pixels or args.max_pixels:
        raise InputError("--min-pixels, --max-pixels: LLaVA-1.5 sees every image at one size; these are for Qwen2.5-VL")
    return (module.read_config(args.model).text.num_hidden_layers, module,
            lambda: module.load(args.model, device, dtype, **pixels))


def short_hash(*parts) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]


def fingerprint(args, data: dict) -> dict:
    """What else decides the answers: code, checkpoint (each file's name, size, first and last MiB), questions; a hash of each."""
    def ends(file):
        with file.open("rb") as f:
            start = f.read(2 ** 20)
            f.seek(max(0, file.stat().st_size - 2 ** 20))
            return hashlib.sha256(start + f.read()).hexdigest()
    files = sorted(f for f in args.model.iterdir() if f.is_file())
    return {"code": short_hash(*(f.read_text("utf-8") for f in sorted(HERE.glob("*.py")))),
            "checkpoint": short_hash(*((f.name, f.stat().st_size, ends(f)) for f in files)),
            "questions": {name: short_hash(*questions) for name, questions in data.items()}}


def provenance(args, model, data: dict) -> dict:
    """For the record: versions, commit, device, the full hashes of the checkpoint's config and of each shard's header (names,
    shapes and places of its tensors), and of the files that hold the questions."""
    def header(shard):
        with shard.open("rb") as f:
            return f.read(int.from_bytes(f.read(8), "little"))

    def git(*command):
        try:
            return subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True).stdout.strip()
        except OSError:                                 # no git
            return ""
    device = next(model.parameters()).device
    sources = {name: sorted({q.source for q in questions}) for name, questions in data.items()}
    return {"python": platform.python_version(),
            "packages": {name: version(name) for name in ("torch", "safetensors", "tokenizers", "pillow", "numpy")},
            "commit": git("rev-parse", "HEAD") + " and changes" * bool(git("status", "--porcelain", "--untracked-files=no")),
            "processes": WORLD, "threads": torch.get_num_threads(),
            "device_name": device_name(device),
            "config_sha256": hashlib.sha256((args.model / "config.json").read_bytes()).hexdigest(),
            "shard_headers_sha256": {shard.name: hashlib.sha256(header(shard)).hexdigest()
                                     for shard in sorted(args.model.glob("*.safetensors"))},
            "data_sha256": {name: {"files": len(files), "sha256": hashlib.sha256(
                b"".join(file.read_bytes() for file in files)).hexdigest()} for name, files in sources.items()}}


def open_folder(args, argv: list[str], settings: dict) -> Path:
    """The folder of this run, by default one of its own for these flags and settings; another run's is refused."""
    name = re.sub(r"[^\w.,=@:-]+", "_", "_".join(argv).replace("--", ""))[:100] or "default"
    out = args.out or Path("runs") / f"{name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e})")
    file = out / "settings.json"
    if file.exists() or (out / "answers.jsonl").exists():
        before = read_json(file)
        other = [key for key in settings if before.get(key) != settings[key]]
        if other:
            raise InputError(f"--out {out}: holds a run with other settings: " + ", ".join(
                f"{key} is {before.get(key)!r}, this run's is {settings[key]!r}" for key in other))
    wait()                                              # every process has looked
    if RANK == 0:
        write(file, json.dumps(settings, indent=1) + "\n")
    return out


def load_data(args) -> dict[str, list[Question]]:
    return {Path(name).name: load_benchmark(name, args.data, args.prompt_style) for name in args.bench}


def main(argv: list[str]) -> int:
    """-> how many answers failed for want of memory."""
    args = parse_arguments(argv)
    command = {"command": shlex.join(["eval.py", *argv])}
    if args.score:
        print(json.dumps(command | {"benchmarks": report_given(args.score, load_data(args), paths_under(args.data))}))
        return 0
    num_layers, module, load = load_model(args)
    parse_cells(args, num_layers, num_layers - 1)       # wrong flags are named before anything is loaded
    image = read_image(args.image) if args.image else None
    data = load_data(args) if args.horizon or not image else {}
    model = load()
    weight = next(model.parameters())
    flags = ("layer", "ratio", "method", "schedule", "budget", "seed", "seeds", "limit", "positions", "max_new_tokens",
             "repetition_penalty", "prompt_style", "information", "target", "window", "tolerance", "calibrate")
    settings = {"model": str(args.model), "data": str(args.data), "device": weight.device.type, "dtype": str(weight.dtype)[6:],
                **{flag: getattr(args, flag) for flag in flags},
                **{bound: getattr(model.config, bound, None) for bound in ("min_pixels", "max_pixels")},
                **fingerprint(args, data)}
    out = open_folder(args, argv, settings)
    if image or args.speed:
        report = report_one(model, image, data, args, out)
    elif args.information:
        report = report_information(model, data, module.PROMPT, args, out)
    else:
        report = report_scores(model, data, module.PROMPT, args, out)
    if RANK == 0:
        report = command | settings | provenance(args, model, data) | report
        write(out / "result.json", json.dumps(report, indent=1) + "\n")
        print(json.dumps(report))
    return report.get("failed", 0)


def report_one(model, image: Image.Image | None, data: dict, args, out: Path) -> dict:
    """Answers to --question about --image, or the speed on it or on the first question; a horizon is the first benchmark's."""
    at = calibrate(model, *next(iter(data.items())), args, out)[0] if args.horizon else 0
    cells, prompt = parse_cells(args, model.num_layers, at), args.question
    if image is None:
        question = next(iter(data.values()))[0]
        image, prompt = read_image(question.image), question.prompt
    if args.speed:
        return report_speed(model, image, prompt, cells, args)
    return {"question": prompt, "answers": show_image(model, image, prompt, cells, args, out)}


def report_scores(model, data: dict, template: str, args, out: Path) -> dict:
    """Every cell on every benchmark, a table each; --layer horizon is measured first, on questions that are then left out."""
    report, seconds = {"prompts": {}, "benchmarks": {}, "horizon": {}, "failed": 0}, np.zeros(2)
    for benchmark, questions in data.items():
        at, known = 0, questions
        if args.horizon:
            at, questions, failed = calibrate(model, benchmark, questions, args, out)
            report["horizon"][benchmark] = at
            report["failed"] += failed
        questions = draw(questions, args.limit, args.seed)
        N = math.prod(model.begin(read_image(questions[0].image), questions[0].prompt).grid) if args.budget else 0
        cells = parse_cells(args, model.num_layers, at, N)
        report["prompts"][benchmark] = print_head(benchmark, questions, known, template)
        done = evaluate(model, benchmark, questions, cells, args, out)
        rows = report["benchmarks"][benchmark] = summarise(model, benchmark, questions, done, cells)
        report["failed"] += rows[0]["failed"]
        seconds += np.sum([(line["ms"], line["oracle_ms"]) for line in done], 0) / 1000
        if len(layers_of(rows)) > 1:
            print_sweep(benchmark, rows)
        else:
            print_table(benchmark, rows)
        print_odd(benchmark, rows)
        if len(layers_of(rows)) <= 1 and RANK == 0:
            question = next(question for question, line in zip(questions, done) if "failed" not in line)
            stream = model.begin(read_image(question.image), question.prompt)
            spent = time_prefill(model, stream, timed(cells), args.positions, rounds=7)
            rows[:] = [row | {"prefill_ms": spent.get(row["schedule"])} for row in rows]
            print(f"{benchmark}, prefill in ms: "
                  + ", ".join(f"{spec or 'unpruned'} {ms['median']:.1f}" for spec, ms in spent.items()) + "\n")
    print(f"{seconds[0]:.0f} s for the questions, {seconds[1]:.0f} s of them the oracles' measuring; {where(model)}; "
          f"repetition penalty {args.repetition_penalty:g}; answers in {out}\n")
    if args.plot and RANK == 0:
        pictures.plot(report["benchmarks"], layers_of(rows), args.plot)
    return report


def where(model) -> str:
    weight = next(model.parameters())
    return f"{weight.device}, {str(weight.dtype)[6:]}, {torch.get_num_threads()} threads" + f", {WORLD} processes" * (WORLD > 1)


def calibrate(model, benchmark: str, questions: list[Question], args, out: Path) -> tuple[int, list[Question], int]:
    """The horizon of a benchmark on about --calibrate of its questions, the others, and on how many memory ran out."""
    chosen = draw(questions, args.calibrate, args.seed)
    images = {q.image for q in chosen}
    others = [q for q in questions if q.image not in images]
    if not others:
        raise InputError(f"--calibrate: {args.calibrate} questions are all that {benchmark} has; want some left to score")
    cells = drop_all(args, model.num_layers)
    (out / "calibration").mkdir(exist_ok=True)
    lines = evaluate(model, benchmark, chosen, cells, args, out / "calibration")
    answered = [(q, line) for q, line in zip(chosen, lines) if "failed" not in line]
    end = measure_horizon(*zip(*answered), cells, args.tolerance)
    if end["layer"] == model.num_layers:
        raise InputError(f"--layer horizon: {benchmark} has none; at every layer dropping all costs more than "
                         f"{args.tolerance:g} of the score")
    print(f"{benchmark}: horizon at layer {end['layer']}, measured on {len(answered)} questions; "
          f"{len(others)} others are left to score")
    return end["layer"], others, len(chosen) - len(answered)


def report_information(model, data: dict, template: str, args, out: Path) -> dict:
    """Information and the scores with everything dropped, by layer, for each benchmark: tables, horizons, a picture."""
    report, prompts, shown, layers = {}, {}, {}, sorted(set(parse_layers(args, model.num_layers, "all")))
    for benchmark, questions in data.items():
        known, questions, cells = questions, draw(questions, args.limit, args.seed), drop_all(args, model.num_layers)
        prompts[benchmark] = print_head(benchmark, questions, known, template)
        done = evaluate(model, benchmark, questions, cells, args, out)
        measured = measure_information(model, benchmark, questions, layers, args, out)
        question, maps = measured[0]
        image = read_image(question.image)
        stream = model.begin(image, question.prompt)
        start, V = stream.visual
        text = start, stream.x.shape[1] - start - V
        shown[benchmark], rows = (model.canvas(image), maps), summarise_information(measured, layers)
        cost = information_flops(model.config.text, text, stream.grid, layers, args.window, args.information)
        report[benchmark] = {"information": rows, "horizon": measure_horizon(questions, done, cells, args.tolerance),
                             "gone": layer_information_is_gone(rows), "gflops": [flops / 1e9 for flops in cost],
                             "failed": sum("failed" in line for line in done) + len(questions) - len(measured)}
        print_information(benchmark, report[benchmark], args)
    if len(report) == 2:
        (a, first), (b, second) = ((name, found["horizon"]) for name, found in report.items())
        low, high = np.percentile(np.subtract(second["draws"], first["draws"]), [2.5, 97.5])
        print(f"{b}'s horizon lies {second['layer'] - first['layer']:+d} [{low:+g}, {high:+g}] layers from {a}'s\n")
    picture = args.plot or out / "information.png"
    if RANK == 0:
        pictures.plot_information(report, shown, picture)
    print(f"{args.information}, {args.target}, windows of {args.window}x{args.window}; {where(model)}; "
          f"maps in {out / 'information.npz'}, picture in {picture}\n")
    for found in report.values():
        del found["horizon"]["draws"]
    return {"prompts": prompts, "benchmarks": report, "failed": sum(found["failed"] for found in report.values())}


def report_speed(model, image, prompt: str, cells: list[Cell], args) -> dict:
    """`measure_speed` as a table: medians, the range of prefill and decode, speed-up beside what the FLOPs promise."""
    rows = measure_speed(model, image, prompt, cells, args, ROUNDS)
    full, MiB = rows[0], 2 ** 20
    tower = full["tower_ms"]
    device, weights = next(model.parameters()).device, sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"\n{device_name(device)}, torch {torch.__version__}; {where(model)}; a matrix product reaches "
          f"{full['peak_flops'] / 1e9:.0f} GFLOP/s\nimage and tower {tower['median']:.1f} ms [{tower['low']:.1f}, "
          f"{tower['high']:.1f}]; weights {weights / MiB:.1f} MiB\n")
    print_heads(["schedule", "prefill ms", "times faster", "times fewer FLOPs", "select ms", "decode ms/token", "tokens/s",
                 "cache MiB", "prefill MiB", "GFLOPs", "of peak"])
    for row in rows:
        span, step = row["prefill_ms"], row["decode_ms"]
        print(f"| {row['schedule'] or 'unpruned'} | {span['median']:.1f} [{span['low']:.1f}, {span['high']:.1f}] | "
              f"{full['prefill_ms']['median'] / span['median']:.2f} | {full['gflops'] / row['gflops']:.2f} | "
              f"{row['select_ms']:.2f} | {step['median']:.2f} [{step['low']:.2f}, {step['high']:.2f}] | "
              f"{row['tokens_per_second']:.0f} | {row['cache_bytes'] / MiB:.2f} | {row['peak_bytes'] / MiB:.2f} | "
              f"{row['gflops']:.3g} | {row['share_of_peak']:.0%} |")
    print()
    return {"speed": rows}


def print_information(benchmark: str, found: dict, args):
    rows, end, (ours, official) = found["information"], found["horizon"], found["gflops"]
    print(f"| {benchmark}, layer | all dropped | information | spread | Gini | windows over {NOISE:g} |")
    print("|---:" * 6 + "|")
    for row in rows:
        print(f"| {row['layer']} | {end['scores'][row['layer']]:.1f} | {row['mean']:.4f} | {row['std']:.4f} ± "
              f"{row['standard_errors']['std']:.4f} | {row['gini']:.2f} | {row['share']:.0%} |")
    print(f"\n{benchmark}: unpruned {end['unpruned']:.1f}; horizon at layer {end['layer']} "
          f"[{end['low']:g}, {end['high']:g}]: from there on dropping every visual token costs at most "
          f"{args.tolerance:.0%} (our rule; 95 % bootstrap over images)")
    base = 1 if any(row["layer"] == 1 for row in rows) else rows[0]["layer"]
    print(f"{benchmark}: mean information under 1 % of layer {base}'s from layer {found['gone'] or '-'} on (our rule)")
    print(f"{benchmark}: {ours:.3g} GFLOPs for the first question; the official procedure would take {official:.3g}, "
          f"{official / ours:.1f} times as many\n")


def stop(*_):
    raise InputError(DIED if WORLD > 1 else "stopped by a signal; what was answered is kept, and the same command goes on")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)                 # torchrun sends it to the others when a process dies
    if RANK:
        sys.stdout = open(os.devnull, "w")              # one process speaks for all
    try:
        failed = main(sys.argv[1:])
    except (InputError, KeyboardInterrupt) as e:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"eval.py: error: {e or 'interrupted; what was answered is kept, and the same command goes on'}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        print(f"eval.py: error: out of memory {str(e).partition(chr(10))[0]}", file=sys.stderr)
        sys.exit(2)
    if failed:
        sys.exit(f"eval.py: error: {failed} questions failed for want of memory, scored 0; the same command asks them again")
