"""What every program does in the same way: flags, model and questions, the folder of a run, where a
result comes from, and errors in one line."""
import argparse
import difflib
import hashlib
import json
import math
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch

from support import checkpoint
from support.benchmarks import BENCHMARKS, FILES, STYLES, Question, load_benchmark
from support.files import read_json, write_text
from support.records import DIED, GOES_ON, LOCAL_RANK, RANK, WORLD, is_out_of_memory, wait
from support.timing import device_name
from tokprune import InputError

try:
    import fcntl
except ImportError:                                     # Windows has no such locks
    fcntl = None

ROOT = Path(__file__).resolve().parents[1]


# ---- flags ---------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Errors are InputErrors. A flag that does not exist is answered with the nearest that does."""

    def __init__(self, program: str, description: str):
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


def wide_help(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=36, width=150)


def whole(low: int):
    """A type for argparse: a whole number from `low` on."""
    def convert(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,10}", text) or not low <= int(text) < 2 ** 31:
            raise argparse.ArgumentTypeError(f"{text}, want {low} or more, below 2^31")
        return int(text)
    return convert


def number_that(fits, want: str):
    """A type for argparse: a number that fits."""
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text}, want {want}")
        return value
    return convert


share = number_that(lambda value: 0 <= value <= 1, "0 to 1")             # nan is not
positive = number_that(lambda value: 0 < value < math.inf, "a number above 0")


def add_model_flags(p: Parser):
    group = p.add_argument_group("model")
    group.add_argument("--model", type=Path, default=ROOT / "tiny" / "llava", metavar="FOLDER",
                       help="checkpoint folder (default: tiny/llava)")
    group.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                       help="default: bfloat16 on cuda, float32 on cpu")
    group.add_argument("--min-pixels", type=whole(1), metavar="N",
                       help="area of a resized image, where a model has bounds for it")
    group.add_argument("--max-pixels", type=whole(1), metavar="N", help="and at most")
    return group


def add_data_flags(p: Parser):
    group = p.add_argument_group("questions")
    group.add_argument("--data", type=Path, default=ROOT / "tiny", metavar="FOLDER",
                       help="where the benchmarks' files lie, at any depth (default: tiny)")
    group.add_argument("--bench", default="mme,textvqa", metavar="NAMES",
                       help=f"comma-separated, of {', '.join(BENCHMARKS)} and .jsonl files of your "
                            "own (default: %(default)s)")
    group.add_argument("--prompt-style", choices=STYLES,
                       help="llava: with TextVQA's OCR tokens (default: LLaVA's without them)")
    group.add_argument("--limit", type=whole(1), metavar="N",
                       help="about N a benchmark, whole images, drawn by seed (default: all)")
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="default: 0")
    group.add_argument("--workers", type=whole(1), default=4, metavar="N",
                       help="threads that read images ahead of the model (default: 4)")


def add_measuring_flags(p: Parser):
    group = p.add_argument_group("measuring information")
    group.add_argument("--window", type=whole(1), default=2, metavar="N",
                       help="in windows of N x N visual tokens (default: 2)")
    group.add_argument("--answers", choices=["gold", "own"], default="gold",
                       help="of the gold answer, or of the model's own (default: gold)")
    group.add_argument("--max-batch-tokens", type=whole(1), default=2 ** 15, metavar="N",
                       help="most rows in a batch of windows (default: 32768)")
    group.add_argument("--threshold", type=share, default=0.002, metavar="T",
                       help="divergence past the horizon, as a share of layer 0's (default: 0.002)")
    group.add_argument("--calibrate", type=whole(1), default=20, metavar="N",
                       help="questions that a horizon is measured on; the others are scored "
                            "(default: 20)")
    group.add_argument("--tolerance", type=share, default=0.01, metavar="T",
                       help="score past the horizon that may be lost, as a share (default: 0.01)")
    return group


def add_answer_flags(group):
    group.add_argument("--max-new-tokens", type=whole(1), default=16, metavar="N",
                       help="default: 16")
    group.add_argument("--repetition-penalty", type=positive, default=1.0, metavar="P",
                       help="divides the logits of tokens seen (default: 1, no penalty)")


def add_output_flags(p: Parser):
    group = p.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="FOLDER",
                       help="of the run, which goes on there (default: runs/<flags>-<settings>)")
    group.add_argument("--json", action="store_true",
                       help="print result.json's object as the last line, too")
    return group


def parse_layers(text: str, num_layers: int, horizon_layer: int | None = None) -> list[int]:
    """"20", "2,10,20", "all" or, where it has been measured, "horizon" -> layers."""
    if text == "all":
        return list(range(num_layers))
    layers = []
    for part in text.split(","):
        if part == "horizon" and horizon_layer is not None:
            layers.append(horizon_layer)
        elif re.fullmatch(r"-?\d{1,9}", part):
            layers.append(int(part))
        else:
            horizon = "" if horizon_layer is None else " or horizon"
            raise InputError(f"--layer {text[:100]}: want layers as 20 or 2,10,20 or all{horizon}")
    for layer in layers:
        check_layer(layer, num_layers)
    return layers


def check_layer(layer: int, num_layers: int):
    if not 0 <= layer < num_layers:
        raise InputError(f"layer {layer} is out of range; this model has layers 0 to "
                         f"{num_layers - 1}")


def check_picture(path: Path | None):
    """Raises InputError now, rather than when the picture has been worked out."""
    if path and (path.suffix != ".png" or not path.parent.is_dir()):
        raise InputError(f"--plot {path}: want a .png in a folder that exists")


# ---- model and questions -------------------------------------------------------------------------

def usable_device(name: str | None) -> str:
    """The device by name, or the default one. Raises InputError if it is not usable here."""
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
    """Of --model, which is not loaded: flags can be checked before. Raises InputError."""
    return checkpoint.read_config(args.model).text.num_hidden_layers


def load_model(args):
    """--model on --device. Raises InputError."""
    device = usable_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    bounds = {}
    for name in ("min_pixels", "max_pixels"):
        if getattr(args, name) is not None:
            bounds[name] = getattr(args, name)
    return checkpoint.load_model(args.model, device, dtype, **bounds)


def load_data(args, **options) -> dict[str, list[Question]]:
    """The questions of each benchmark of --bench. options: see `load_benchmark`."""
    names = args.bench.split(",")
    data = {}
    for name in names:
        if name not in BENCHMARKS and not name.endswith(tuple(FILES)):
            raise InputError(f"--bench: unknown benchmark {name!r}; want one of "
                             f"{', '.join(BENCHMARKS)} or a .jsonl or .tsv file")
        short = Path(name).name
        if short in data:
            raise InputError(f"--bench: {args.bench}: two of one name; want each once")
        data[short] = load_benchmark(name, args.data, args.prompt_style, **options)
    return data


def sample(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """About `limit` of them, drawn by seed; all if None. Questions of an image stay together."""
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
    """The model's prompt, with {question} in it."""
    return sys.modules[type(model).__module__].PROMPT


def where(model) -> str:
    """Device, precision and threads, for the record."""
    weight = next(model.parameters())
    parts = [str(weight.device), str(weight.dtype)[6:], f"{torch.get_num_threads()} threads"]
    if WORLD > 1:
        parts.append(f"{WORLD} processes")
    return ", ".join(parts)


# ---- the folder of a run -------------------------------------------------------------------------

NOT_SETTINGS = {"out", "json", "workers", "plot", "command", "device", "dtype"}


def settings_of(args, model, data: dict) -> dict:
    """Everything that decides the answers: each flag but those that say where to and how fast, the
    precision and the bounds in use, and hashes of code, checkpoint and questions."""
    weight = next(model.parameters())
    settings = {}
    for name, value in vars(args).items():
        if name not in NOT_SETTINGS:
            settings[name] = str(value) if isinstance(value, Path) else value
    for bound in ("min_pixels", "max_pixels"):
        settings[bound] = getattr(model.config, bound, None)
    code = [file.read_text("utf-8") for file in sorted([*ROOT.glob("*.py"),
                                                        *ROOT.glob("support/*.py")])]
    files = [file for file in sorted(args.model.iterdir()) if file.is_file()]
    checkpoint_parts = [(file.name, file.stat().st_size, hash_of_ends(file)) for file in files]
    return settings | {
        "device": weight.device.type, "dtype": str(weight.dtype)[6:],
        "code": short_hash(code), "checkpoint": short_hash(checkpoint_parts),
        "questions": {name: short_hash(questions) for name, questions in data.items()}}


def hash_of_ends(file: Path) -> str:
    """A hash of a file's first and last MiB: reading 14 GB would take a minute."""
    with file.open("rb") as f:
        start = f.read(2 ** 20)
        f.seek(max(0, file.stat().st_size - 2 ** 20))
        return hashlib.sha256(start + f.read()).hexdigest()


def short_hash(parts: list) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]


def open_folder(args, settings: dict) -> Path:
    """The folder of this run, by default one of its own for these flags and settings. Raises
    InputError if it holds a run with other settings."""
    out = args.out
    if out is None:
        flags = re.sub(r"[^\w.,=@:-]+", "_", args.command.replace("--", ""))[:100]
        number = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        out = Path("runs") / f"{flags}-{number}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e})")
    if RANK == 0:
        hold(out)
    file = out / "settings.json"
    if file.exists() or (out / "answers.jsonl").exists():
        before = read_json(file)
        differing = []
        for key, value in json.loads(json.dumps(settings)).items():
            if before.get(key) != value:
                differing.append(f"{key} is {before.get(key)!r}, this run's is {value!r}")
        if differing:
            raise InputError(f"--out {out}: holds a run with other settings: "
                             + ", ".join(differing))
    wait()                                              # every process has looked
    if RANK == 0:
        write_text(file, json.dumps(settings, indent=1) + "\n")
    return out


held = None                             # the folder that this process writes to, open and locked


def hold(folder: Path):
    """Locks the folder until this process ends, however it ends. Raises InputError if another run
    writes there."""
    global held
    if fcntl is None:
        return
    if held is not None:
        os.close(held)
        held = None
    try:
        held = os.open(folder, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {folder}: another run is writing there; want its end, or another "
                         "folder")
    except OSError:                                     # some file systems have no locks
        pass


def provenance(args, model, data: dict) -> dict:
    """Versions, commit, machine, and the full hashes of the checkpoint's config, of each shard's
    header (names, shapes and places of its tensors) and of the files that hold the questions."""
    packages = {name: version(name) for name in ("safetensors", "tokenizers", "pillow", "numpy")}
    packages["torch"] = torch.__version__               # with its build: +cpu, +cu130
    sources = {}
    for name, questions in data.items():
        files = sorted({question.source for question in questions})
        content = b"".join(file.read_bytes() for file in files)
        sources[name] = {"files": len(files), "sha256": hashlib.sha256(content).hexdigest()}
    return {"command": args.command, "python": platform.python_version(),
            "packages": packages, "commit": commit(),
            "processes": WORLD, "threads": torch.get_num_threads(),
            "device_name": device_name(next(model.parameters()).device),
            "config_sha256": hashlib.sha256((args.model / "config.json").read_bytes()).hexdigest(),
            "shard_headers_sha256": {shard.name: header_hash(shard)
                                     for shard in sorted(args.model.glob("*.safetensors"))},
            "data_sha256": sources}


def header_hash(shard: Path) -> str:
    with shard.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return hashlib.sha256(f.read(size)).hexdigest()


def commit() -> str:
    """The commit of the code, and whether it was changed since; empty without git."""
    def git(*command):
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" and changes" if changed else "")
    except OSError:
        return ""


def write_result(out: Path, report: dict, as_json: bool):
    """result.json in the folder of the run; its path is printed, and with --json the object."""
    if RANK != 0:
        return
    file = out / "result.json"
    write_text(file, json.dumps(report, indent=1) + "\n")
    print(f"result: {file}")
    if as_json:
        print(json.dumps(report))


# ---- from start to exit code ---------------------------------------------------------------------

def start(main):
    """Run main(argv) -> how many questions failed for want of memory, or None.

    Exit code 0; 1 if questions failed; 2 with one line on stderr for input that cannot be used, a
    signal, or want of memory.
    """
    program = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, stop)                 # torchrun sends it when a process has died
    if RANK:
        sys.stdout = open(os.devnull, "w")              # one process speaks for all
    try:
        failed = main(sys.argv[1:])
        sys.stdout.flush()
    except (InputError, KeyboardInterrupt) as e:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"{program}: error: {str(e) or 'interrupted; ' + GOES_ON}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                             # ... | head: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        said = str(e).split("\n")[0] or "MemoryError"
        print(f"{program}: error: memory ran out ({said})", file=sys.stderr)
        sys.exit(2)
    if failed:
        sys.exit(f"{program}: error: {failed} questions failed for want of memory, scored 0; the "
                 "same command asks them again")


def stop(*_):
    raise InputError(DIED if WORLD > 1 else f"stopped by a signal; {GOES_ON}")
