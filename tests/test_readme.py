"""What the READMEs show works: each command on a question or two, each link, each program."""
import json
import re
import shlex
from pathlib import Path

import pytest
from official import official_files
from PIL import Image

import bench
import demo
import eval as evaluation
import information
from support.run import ROOT

TINY = ROOT / "tiny"
READMES = [ROOT / "README.md", TINY / "README.md", ROOT / "tests" / "README.md"]
READMES = [file for file in READMES if file.exists()]
PROGRAMS = {"bench.py": bench, "demo.py": demo, "eval.py": evaluation,
            "information.py": information}
# begins with -> why no test of this file runs it
NOT_HERE = {
    "python3 -m venv": "installs packages; .ci/run does it",
    "pip install": "installs packages",
    "python -m pytest": "runs the tests",
    "python tests/make_golden": "needs transformers",
    "python tiny/make.py": "trains for hours; test_tiny.py runs parts of it",
    "python bench.py --against transformers": "needs transformers",
    "python bench.py --shape": "takes minutes at 7B width; test_bench.py runs small shapes",
    "python demo.py --page": "measures sixteen questions; test_page.py measures one",
    "python plan.py": "answers a hundred schedules; test_plan.py runs the program on a few",
    "python tiny/promise.py": "takes an hour; its arithmetic is plan.py's",
    "huggingface-cli download": "needs the network",
    "hf download": "needs the network",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def commands() -> list[str]:
    """Of the blocks without a language or of a shell: each line that begins with a program. Cells
    of tables and backticks in a sentence hold flags alone, and are not commands."""
    found = {}
    for file in READMES:
        for language, block in FENCE.findall(file.read_text()):
            if language in ("", "sh", "bash", "console", "shell"):
                for line in block.replace("\\\n", " ").splitlines():
                    line = re.sub(r"\s+#.*", "", line).removeprefix("$ ").strip()
                    if re.match(r"(python|python3|torchrun|pip|hf|huggingface-cli)\s", line):
                        found.setdefault(line, file)
    return list(found)


def is_here(command: str) -> bool:
    return not command.startswith(tuple(NOT_HERE))


def stand_in(name: str) -> Path:
    """A checkpoint that is at hand, for one that is not."""
    name = name.lower()
    if "qwen3" in name:
        return ROOT / "tests" / "golden" / "qwen3_untied"
    return TINY / ("qwen" if "qwen" in name else "llava")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with what the commands name: benchmarks, files of one's own, a picture."""
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(TINY)
    Path("tests").mkdir()                               # a picture may be written there
    official_files(Path("benchmarks"))
    own = {"image": "cat.jpg", "question": "Is there a cat?", "answers": ["x"], "metric": "exact"}
    Path("mine.jsonl").write_text("".join(json.dumps(own | {"id": i}) + "\n" for i in range(3)))
    Image.new("RGB", (90, 60), "orange").save("cat.jpg")
    return tmp_path


def value_after(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def replace_value(words: list[str], flag: str, value: str):
    if flag in words:
        words[words.index(flag) + 1] = value
    else:
        words += [flag, value]


def shortened(words: list[str], program: str) -> list[str]:
    """The same command on a question or two, its results and pictures in this folder."""
    words = list(words)
    model = value_after(words, "--model")
    if model and not Path(model).exists():
        Path(model).parent.mkdir(parents=True, exist_ok=True)
        Path(model).symlink_to(stand_in(model))
    replace_value(words, "--out", "out")
    if "--plot" in words:
        replace_value(words, "--plot", "plot.svg")
    if program == "bench.py":
        replace_value(words, "--rounds", "1")
        replace_value(words, "--layer", "22")
    if program in ("eval.py", "information.py"):
        replace_value(words, "--limit", "1")
    if program == "information.py" and value_after(words, "--layer") in (None, "all"):
        replace_value(words, "--layer", "22")
        replace_value(words, "--window", "4")
    if program == "eval.py":
        replace_value(words, "--seeds", "1")
        if not {"--method", "--schedule"} & set(words):
            words += ["--method", "dart,info"]          # all of them: test_eval.py
        layers = value_after(words, "--layer") or ""
        if layers == "all" or "," in layers:
            replace_value(words, "--layer", "2,20")
    return words


def words_of(command: str) -> tuple[str, list[str]]:
    """The program and its flags. torchrun's processes are those of test_runs.py: here it is one."""
    words = shlex.split(command)
    while not words[0].endswith(".py"):
        words.pop(0)
    return Path(words[0]).name, words[1:]


# ---- tests ---------------------------------------------------------------------------------------

COMMANDS = [command for command in commands() if is_here(command)]


def test_the_readmes_show_commands_and_what_is_not_run_is_said_why():
    named = {words_of(command)[0] for command in COMMANDS}
    assert "eval.py" in named and len(COMMANDS) >= 4
    assert named <= PROGRAMS.keys(), f"{named - PROGRAMS.keys()} run nowhere: name why in NOT_HERE"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, elsewhere, capsys):
    """On the built-in models and made-up files where the real ones are not at hand."""
    program, words = words_of(command)
    PROGRAMS[program].main(shortened(words, program))
    printed = capsys.readouterr().out
    assert "result: out/result.json" in printed.splitlines()[-2:] + printed.splitlines()[-1:]
    result = json.loads((elsewhere / "out" / "result.json").read_text())
    assert result["command"].startswith(program)


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(file):
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", file.read_text())
    relative = [link for link in links if "://" not in link]
    gone = [link for link in relative if not (file.parent / link).exists()]
    assert not gone


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_to_a_section_has_its_heading(file):
    """As GitHub names it: lower case, hyphens for blanks, no other punctuation."""
    for path, anchor in re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", file.read_text()):
        target = file.parent / path if path else file
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
        anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
                   for heading in headings]
        assert anchor in anchors, f"{path}#{anchor}"
