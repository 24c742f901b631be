"""What the READMEs show works: each command on a question or two, each link, each program."""
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from official import official_files

from support.run import ROOT

TINY = ROOT / "tiny"
READMES = [ROOT / "README.md", TINY / "README.md", ROOT / "tests" / "README.md"]
# behind the flags of a command, to make it small: the last of a flag counts
SMALL = {"bench": "--rounds 1 --layer 22 --method random",
         "demo": "--layer 22 --max-new-tokens 1",
         "eval": "--limit 1 --seeds 1 --max-new-tokens 1",
         "information": "--limit 1 --layer 22 --window 4 --max-new-tokens 1"}
# begins with -> why no test of this file runs it
NOT_HERE = {
    "python3 -m venv": "installs packages; .ci/run does it",
    "python -m pytest": "runs the tests",
    "python tests/make_golden": "needs transformers",
    "python tiny/make.py": "trains for hours; test_tiny.py runs parts of it",
    "python bench.py --shape": "takes minutes at 7B width; test_bench.py runs small shapes",
    "python demo.py --page": "measures sixteen questions; test_page.py measures one",
    "python plan.py": "answers a hundred schedules; test_plan.py runs the program on a few",
    "python tiny/promise.py": "takes an hour; its arithmetic is plan.py's",
}


def commands() -> list[str]:
    """Each line of a block, without a language, that begins with a program."""
    found = []
    for file in READMES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", file.read_text(), re.M | re.S):
            lines = [] if language else block.splitlines()
            found += [re.sub(r"\s+#.*", "", line) for line in lines
                      if re.match(r"(python3?|torchrun)\s", line)]
    return [command for command in dict.fromkeys(found)
            if not command.startswith(tuple(NOT_HERE))]


def test_there_are_commands():
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command, tmp_path, monkeypatch, capsys):
    """On the built-in models and made-up files where the real ones are not at hand. torchrun's
    processes are those of test_runs.py: here it is one."""
    monkeypatch.chdir(tmp_path)
    official_files(Path("benchmarks"))
    Path("tiny").mkdir()                                # pictures are written there
    Path("llava-1.5-7b-hf").symlink_to(TINY / "llava")
    _, program, rest = re.fullmatch(r"(python|torchrun .*?) (\S+)\.py(.*)", command).groups()
    flags = [*shlex.split(rest), *SMALL[program].split(), "--out", "out"]
    if program == "eval" and "--schedule" not in flags:
        flags += ["--method", "dart,info"]              # all of them: test_eval.py
        if re.search(r"--layer (all|\d+,)", command):
            flags += ["--layer", "2,20"]
    import_module(program).main(flags)
    assert "result: out/result.json" in capsys.readouterr().out
    result = json.loads(Path("out/result.json").read_text())
    assert result["command"].startswith(f"{program}.py")


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_leads_somewhere(file):
    """A heading's name is GitHub's: lower case, hyphens for spaces, no other punctuation."""
    for path, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", file.read_text()):
        target = file.parent / path if path else file
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
                       for heading in headings]
            assert anchor in anchors, f"{path}#{anchor}"
