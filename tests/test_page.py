"""The page: its data block says what a direct run says, and what users write is never markup."""
import base64
import contextlib
import hashlib
import io
import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import demo
from information import per_token, token_information
from support import checkpoint, flags
from support.files import read_image, read_json
from support.page import TEMPLATE, Measured, data_block, numbers, opening, page_of, write_page
from support.run import ROOT
from tokprune import METHODS, Decoding, InputError, decode, prune, view_of

EXPLORE = read_json(demo.EXPLORE)
METHODS_SHOWN = [name for name, method in METHODS.items() if not method.needs_gold]
ATTACK = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def llava():
    return checkpoint.load_model(ROOT / "tiny" / "llava")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`python demo.py --page` of the third bundled question, asked as one's own: the data block,
    and the layers that the progress line names."""
    file = tmp_path_factory.mktemp("page") / "star.html"
    found = EXPLORE["questions"][2]
    layers = []
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(demo, "progress", lambda what, number, of, began: layers.append(number))
        demo.main(["--image", str(ROOT / "tiny" / found["image"]), "--question", found["question"],
                   "--answer", found["gold"], "--max-new-tokens", "8", "--page", str(file)])
    assert f"page: {file} (" in printed.getvalue()
    return block_of(file.read_text("utf-8")), layers


@pytest.fixture(scope="module")
def entry(command):
    return command[0]["questions"][0][0]


def asked(number):
    """(image, question, gold) of a bundled question."""
    found = EXPLORE["questions"][number]
    return read_image(ROOT / "tiny" / found["image"]), found["question"], found["gold"]


def block_of(page):
    """The data block, as the browser reads it."""
    [text] = re.findall('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def said(entry, method, layer):
    number = entry["methods"][method]["said"][layer]
    return None if number < 0 else entry["said"][number]


def kept(entry, method, layer):
    """As page.html reads the bits: a layer begins a byte, the first token is its highest bit."""
    data = base64.b64decode(entry["methods"][method]["kept"])
    N = entry["rows"] * entry["cols"]
    bits = [layer * 8 * -(-N // 8) + t for t in range(N)]
    return [t for t, bit in enumerate(bits) if data[bit >> 3] >> (7 - bit % 8) & 1]


def made_up(L=24, rows=8, cols=8, methods=tuple(METHODS_SHOWN), question="?", answer="cat", **more):
    """A question measured by nobody, of any size."""
    rng = np.random.default_rng(0)
    N = rows * cols
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((336, 336))
    fields = {"question": question, "gold": None, "image": image, "grid": (rows, cols),
              "unpruned": answer, "answers": {name: [answer] * L for name in methods},
              "kept": {name: rng.random((L, N)) < 0.1 for name in methods}, "right": {answer},
              "horizon": 0, "information": rng.normal(size=(L, N)), "attention": rng.random((L, N))}
    return Measured(**fields | more)


# ---- the data block against a direct run ---------------------------------------------------------

@pytest.mark.parametrize("method", ["none", "random", "sparsevlm", "divprune"])
@pytest.mark.parametrize("layer", [1, 15])
def test_answers_and_kept_tokens_are_those_of_the_five_moves(llava, entry, method, layer):
    """From the image on, for each method anew: nothing of a batch or a layer reaches the next."""
    s = llava.begin(*asked(2)[:2])
    s = llava.run(s, stop=layer)
    s = prune(llava, s, method, 6)
    s = llava.run(s)
    assert said(entry, method, layer) == decode(llava, s, 8)[0]
    assert kept(entry, method, layer) == s.origin[0].tolist()


def test_a_method_that_cannot_act_at_layer_0_has_no_answer_there(entry):
    for method in METHODS_SHOWN:
        assert (said(entry, method, 0) is None) == METHODS[method].needs_layer


def test_information_and_attention_are_those_of_the_model_s_own_answer(llava, entry):
    s = llava.begin(*asked(2)[:2])
    windows = token_information(llava, s, entry["unpruned"], [3, 15], window=2, target="answer")
    for kind, one in (("information", 1000), ("attention", 10000)):
        data = np.frombuffer(base64.b64decode(entry[kind]), "<i2").reshape(24, 64) / one
        for i, layer in enumerate([3, 15]):
            reached = llava.run(s, stop=layer)
            start, V = reached.visual
            last = torch.tensor([reached.x.shape[1] - 1])
            want = {"information": per_token(windows[i], s.grid, 2).numpy(), "attention": view_of(
                llava, reached, 0, 0).attention(last)[:, 0, start:start + V].mean(0).numpy()}
            assert abs(data[layer] - want[kind]).max() <= 0.51 / one      # half of the last digit


def test_the_horizon_and_right_answers_are_those_of_demo(llava, entry):
    stream = llava.begin(*asked(2)[:2])
    assert entry["horizon"] == demo.horizon_of_question(llava, stream, Decoding(8))
    for answer, right in zip(entry["said"], entry["right"], strict=True):
        assert right == (answer.lower() == entry["gold"])


def test_the_page_opens_where_methods_are_right_and_random_and_none_are_wrong():
    right = {"none": "nnnny", "random": "nnyny", "grid": "nynyy", "scope": "nnyyy"}
    answers = {name: ["cat" if c == "y" else "dog" for c in row] for name, row in right.items()}
    start = opening(made_up(L=5, methods=list(right), answers=answers, horizon=4))
    assert start == {"layer": 3, "method": "grid", "with": "random"}
    nothing_lost = made_up(L=5, methods=["none", "grid"], horizon=0)
    assert opening(nothing_lost) == {"layer": 0, "method": "grid", "with": "none"}


def test_numbers_too_large_for_16_bits_are_cut_and_keep_their_sign():
    data = np.frombuffer(base64.b64decode(numbers(np.array([40., -40., -0.0126]), 1000)), "<i2")
    assert data.tolist() == [32767, -32767, -13]


# ---- the text about the bundled questions --------------------------------------------------------

def test_every_step_of_the_guide_names_a_question_a_layer_and_methods_that_are_there():
    for step in EXPLORE["guide"]:
        state = dict(part.split("=") for part in step["state"].split("&"))
        assert 1 <= int(state["q"]) <= len(EXPLORE["questions"])
        assert state["model"] in EXPLORE["models"]
        assert {state["method"], state["with"]} < set(METHODS)
        assert 0 <= int(state["layer"]) < flags.num_layers(
            demo.parse_arguments(["--model", str(ROOT / state["model"])]))
        assert state["show"] in ("tokens", "information", "attention")


def test_what_the_guide_says_of_the_third_question_is_true(entry):
    """Hindsight reads the word at every layer, no other method before layer 16; at layer 15 six
    tokens are worse than none; from layer 20 on nothing is lost."""
    gold = entry["gold"]
    assert all(said(entry, "hindsight", layer) == gold for layer in range(24))
    for method in set(METHODS_SHOWN) - {"none", "hindsight"}:
        assert all(said(entry, method, layer) != gold for layer in range(16)), method
    assert said(entry, "none", 15) == gold != said(entry, "dart", 15)
    assert all(said(entry, method, layer) == gold
               for method in METHODS_SHOWN for layer in range(20, 24))


def test_what_the_guide_says_of_the_first_question_is_true(llava):
    """Fastv keeps the word and the model reads it; random misses it, and so do four others. The
    answer lies in the two windows on the word; at layer 18 none adds more than 0.03. The horizon is
    layer 13. The page opens with the first step."""
    image, question, gold = asked(0)
    stream = llava.begin(image, question)
    panels = demo.answer_with_each_method(llava, stream, METHODS_SHOWN, 5, 0.9)
    answers = {name: answer for name, answer, _ in panels}
    wrong = {name for name, answer in answers.items() if answer != gold} - {"none"}
    assert answers["fastv"] == gold and "random" in wrong and len(wrong) == 5
    word = {2, 3, 4, 5, 10, 11, 12, 13}                     # the two windows, columns 2 to 5
    sets = {name: set(tokens) for name, _, tokens in panels}
    assert {10, 11, 12} < sets["fastv"] and not sets["random"] & word
    early, late = token_information(llava, stream, gold, [5, 18], window=2, target="answer")
    order = early.flatten().argsort(descending=True)
    assert set(order[:2].tolist()) == {1, 2} and early.flatten()[order[1]] > 0.8
    assert early.flatten()[order[2]] < 0.06 and late.max() < 0.03
    assert demo.horizon_of_question(llava, stream, Decoding(8)) == 13
    assert "q=1&model=tiny/llava&layer=5&method=fastv&with=random" in EXPLORE["guide"][0]["state"]


def test_what_the_guide_says_of_qwen_is_true():
    """Qwen answers the first question, too, but needs the image up to layer 18 of 28."""
    qwen = checkpoint.load_model(ROOT / "tiny" / "qwen")
    image, question, gold = asked(0)
    stream = qwen.begin(image, question)
    assert decode(qwen, qwen.run(stream)) == [gold]
    assert qwen.num_layers == 28 and demo.horizon_of_question(qwen, stream, Decoding(8)) == 18


# ---- the file ------------------------------------------------------------------------------------

def test_a_7b_question_is_under_250_kb_and_large_images_are_fluid_in_size():
    sized = made_up(L=32, rows=24, cols=24, answers={
        name: [f"answer {i} {name}" for i in range(32)] for name in METHODS_SHOWN})
    assert len(METHODS_SHOWN) == 9
    assert len(page_of(data_block([[sized]], ""))) < 250_000
    assert len(page_of(data_block([[made_up(L=36, rows=48, cols=48)]], ""))) < 1_000_000


def test_an_image_that_two_models_see_alike_is_in_the_page_once():
    data = data_block([[made_up(), made_up(model="other")], [made_up(question="!")]], "")
    assert len(data["images"]) == 1
    assert [[entry["image"] for entry in models] for models in data["questions"]] == [[0, 0], [0]]


def test_what_users_write_is_data_and_never_markup():
    """A question, an answer, a file's name or a model's that ends the script element would run."""
    hostile = made_up(question=ATTACK, answer=ATTACK + "{data}\u2028\udcff", gold=ATTACK,
                      command=ATTACK, model="<!--" + ATTACK)
    page = page_of(data_block([[hostile]], ATTACK))
    assert "<img" not in page and "<!--" not in page
    assert page.count("</script>") == 2                     # of the data block, and of the script
    found = block_of(page)["questions"][0][0]
    assert found["question"] == found["gold"] == found["command"] == ATTACK
    assert found["unpruned"] == ATTACK + "{data}\u2028\udcff"
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
        assert unsafe not in page


def test_the_page_asks_for_nothing_and_its_policy_forbids_it():
    page = page_of(data_block([[made_up()]], ""))
    policy = re.search('Content-Security-Policy" content="(.*?)"', page, re.DOTALL)[1]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules["default-src"] == ["'none'"] and rules["img-src"] == ["data:"]
    for kind in ("script", "style"):
        [inside] = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == [f"'sha256-{digest}'"]
    template = TEMPLATE.read_text("utf-8")
    assert not re.search(r"https?:|\w//|['\"`]//|@import|url\(|fetch|XMLHttp|Socket|Beacon",
                         template)


def test_what_the_script_uses_is_there_ids_in_the_page_and_fields_in_the_data_block():
    page = TEMPLATE.read_text("utf-8")
    ids = re.findall(r'\bid="([\w-]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'\$\("([\w-]+)"', page))
    numbered = {name + i for name in used for i in "01"} & set(ids)      # $("canvas" + i)
    assert used - {name[:-1] for name in numbered} <= set(ids) and len(numbered) == 6
    assert {"slider", "cells", "guide", "token", "data"} < used
    entry = data_block([[made_up()]], "")["questions"][0][0]
    read = set(re.findall(r"\b(?:asked|entry)\.(\w+)", page)) - {"N", "most"}
    assert read <= set(entry), read - set(entry)


# ---- the command ---------------------------------------------------------------------------------

def test_the_command_writes_a_page_of_one_s_own_question(command, entry):
    """The image and the question come from the user; the printed command asks the same again. The
    progress line begins at layer 1 of 24: at 0 it would divide by zero on a terminal."""
    data, layers = command
    assert layers == list(range(1, 25)) and data["guide"] == []
    assert list(entry["methods"]) == METHODS_SHOWN and "90 %" in data["measured"]
    found = EXPLORE["questions"][2]
    again = demo.parse_arguments(shlex.split(entry["command"])[2:] + ["--layer", "3"])
    assert again.max_new_tokens == 8
    assert again.question == found["question"] and entry["gold"] == found["gold"]
    assert (ROOT / again.image).samefile(ROOT / "tiny" / found["image"])


def test_the_guide_is_left_out_where_a_flag_changes_what_it_speaks_of():
    def untouched(*more):
        return demo.is_untouched(demo.parse_arguments(["--page", "a.html", *more]))
    assert untouched() and untouched("--device", "cpu")
    for more in ("--ratio=0.8", "--seed=1", "--method=grid", "--dtype=bfloat16"):
        assert not untouched(more)


def test_the_bundled_page_is_of_these_questions_and_under_600_kb():
    file = ROOT / "tiny" / "explore.html"
    data = block_of(file.read_text("utf-8"))
    assert file.stat().st_size < 600_000
    assert data["guide"] == EXPLORE["guide"]
    for models, found in zip(data["questions"], EXPLORE["questions"], strict=True):
        assert [entry["model"] for entry in models] == EXPLORE["models"]
        assert all((entry["question"], entry["gold"]) == (found["question"], found["gold"])
                   for entry in models)
    assert file.read_text("utf-8") == page_of(data), "run python demo.py --page tiny/explore.html"


@pytest.mark.parametrize("argv, message", [
    (["--page", "a.txt"], "--page a.txt: want a .html in a folder that exists"),
    (["--page", "no/such/folder/a.html"], "want a .html in a folder that exists"),
    (["--page", "a.html", "--layer", "3"], "--page: measures every layer"),
    (["--page", "a.html", "--json"], "--page: measures every layer"),
    (["--page", "a.html", "--answer", "cat"], "--answer: needs --question")])
def test_bad_input_is_named_in_one_line(argv, message):
    with pytest.raises(InputError) as error:
        demo.main(argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "a.html").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_page(tmp_path / "a.html", [[made_up()]], "")
