"""The contract of a model, as tokprune's docstring has it, on every checkpoint; and a fork of a
model that keeps the contract, but whose visual rows do not tile the image."""
import copy
import inspect
from dataclasses import replace

import pytest
import torch
from checkpoints import MODULES, ONE_OF_EACH, Counted, decoder_of, greedy, load
from PIL import Image
from samples import QUESTIONS, images

import information
import model_llava
from tokprune import KV, METHODS, InputError, keep, prefill, prune, together, view_of


@pytest.fixture(scope="module", params=MODULES)
def model(request):
    return load(request.param)


@pytest.fixture(scope="module")
def start(model):
    return model.begin(images()["wide"], QUESTIONS[0])


@pytest.fixture(scope="module")
def full(model, start):
    return model.run(start)


# ---- the module ----------------------------------------------------------------------------------

@pytest.mark.parametrize("module", sorted(set(MODULES.values()), key=lambda m: m.__name__))
def test_a_module_has_a_prompt_for_a_question_and_a_load_with_defaults(module):
    assert module.PROMPT.count("{question}") == 1
    parameters = inspect.signature(module.load).parameters
    assert list(parameters)[:3] == ["path", "device", "dtype"]
    assert all(parameters[name].default is None for name in list(parameters)[1:])


# ---- begin ---------------------------------------------------------------------------------------

def test_begin_is_layer_0_of_one_prompt_whose_visual_rows_tile_the_image(model, start):
    start_row, V = start.visual
    rows, cols = start.grid
    _, T, C = start.x.shape
    assert (start.layer, len(start.x), C) == (0, 1, model.config.text.hidden_size)
    assert V == start.N == rows * cols
    assert model.num_layers == model.config.text.num_hidden_layers == len(decoder_of(model).layers)
    assert start.origin.tolist() == [list(range(V))]
    assert 0 < start_row and start_row + V < T
    assert start.pos.shape[-2:] == (1, T)
    assert start.next_pos == start.pos.max() + 1
    assert start.ids.shape == (1, T) and start.embeds.equal(start.x)
    assert start.cache == [None] * model.num_layers and start.queries is None
    saliency = start.saliency()
    assert saliency.shape == (1, V) and saliency.dtype == torch.float32 and (saliency > 0).all()


def test_saliency_is_worked_out_once_a_question(model):
    """A sweep asked for it again at every layer, and for each variant."""
    start = model.begin(images()["wide"], QUESTIONS[0])
    with Counted() as counted:
        start.saliency()
    assert counted.ops["_softmax"] == 1
    with Counted() as counted:
        later = keep(model.run(start, stop=1), torch.tensor([[0, 2], [1, 3]]))
        later.saliency()
        replace(start).saliency()
    assert counted.ops["_softmax"] == 0


def test_canvas_is_the_picture_that_the_grid_divides_and_preprocess_stands_for_it(model, start):
    pixels = model.preprocess(images()["wide"])
    assert model.begin(pixels, QUESTIONS[0]).x.equal(start.x)
    canvas = model.canvas(images()["wide"])
    rows, cols = start.grid
    assert canvas.mode == "RGB"
    assert canvas.height % rows == 0 and canvas.width % cols == 0
    assert canvas.height // rows == canvas.width // cols


def test_visual_rows_are_in_raster_order(model):
    """A stain on one token of the picture changes the row of that token most."""
    canvas = model.canvas(images()["partial"].resize((112, 112)))       # 4 x 4 tokens in each model
    clean = model.begin(canvas, QUESTIONS[0])
    rows, cols = clean.grid
    first, V = clean.visual
    side = canvas.width // cols
    for y, x in ((0, cols - 1), (rows - 1, 0)):
        stained = canvas.copy()
        stained.paste(Image.new("RGB", (side, side), "red"), (x * side, y * side))
        change = model.begin(stained, QUESTIONS[0]).x - clean.x
        change = change[0, first:first + V].norm(dim=1)
        assert change.argmax() == y * cols + x


def test_a_question_with_a_second_image_is_refused(model):
    token = model.tokenizer.id_to_token(model.config.image_token)
    with pytest.raises(InputError, match="prompt holds 2 .* tokens .*, want 1"):
        model.begin(images()["square"], f"What is {token}?")


# ---- run -----------------------------------------------------------------------------------------

def test_run_stops_at_any_layer_and_goes_on_from_there(model, start, full):
    before = start.x.clone()
    for stop in range(model.num_layers + 1):
        stream = model.run(start, stop=stop)
        assert stream.layer == stop
        assert [kv is not None for kv in stream.cache] \
            == [layer < stop for layer in range(model.num_layers)]
        assert model.run(stream, stop=stop).x.equal(stream.x)
        assert model.run(stream).x.equal(full.x)
    for stop in (1, 99):
        with pytest.raises(AssertionError, match=f"stop is {stop}, want 2"):
            model.run(model.run(start, stop=2), stop=stop)
    assert start.layer == 0 and start.cache == [None] * model.num_layers and start.x.equal(before)


def test_run_leaves_keys_values_and_the_queries_of_its_last_layer(model, start):
    stream = model.run(start, stop=2)
    text = model.config.text
    T = start.x.shape[1]
    assert stream.queries.shape == (1, text.num_attention_heads, T, text.head_dim)
    for kv in stream.cache[:2]:
        assert isinstance(kv, KV)
        assert kv.keys.shape == kv.values.shape == (1, text.num_key_value_heads, T, text.head_dim)


# ---- append, logits, decode ----------------------------------------------------------------------

def test_appended_tokens_go_on_from_the_position_of_the_whole_prompt(model, start):
    pruned = keep(model.run(start, stop=1), torch.tensor([1, 3]))
    first = start.visual[0]
    assert pruned.pos[..., first:first + 2].equal(start.pos[..., [first + 1, first + 3]])
    new = model.append(model.run(pruned), torch.tensor([[5, 6], [7, 8]]))
    assert (new.layer, new.x.shape[:2], new.queries) == (0, (2, 2), None)
    assert new.next_pos == start.next_pos + 2
    axes = new.pos.flatten(0, -2)
    assert all(axis.tolist() == [start.next_pos, start.next_pos + 1] for axis in axes)


def test_tokens_appended_together_are_tokens_appended_one_by_one(model, full):
    ids = torch.tensor([[5, 6, 7]])
    at_once = model.run(model.append(full, ids))
    stream = full
    for i in range(3):
        stream = model.run(model.append(stream, ids[:, i:i + 1]))
        # sums in another order: float32, as against the recordings
        torch.testing.assert_close(at_once.x[:, i:i + 1], stream.x, rtol=0, atol=1e-4)


def test_logits_are_float32_of_the_row_that_is_asked_for(model, start, full):
    logits = model.logits(full)
    assert logits.shape == (1, model.config.text.vocab_size) and logits.dtype == torch.float32
    shorter = replace(full, x=full.x[:, :4])
    assert model.logits(full, row=3).equal(model.logits(shorter))
    assert logits.equal(model.lm_head(model.final_norm(full.x[:, -1])))
    with pytest.raises(AssertionError, match=f"stream is at layer 0, want {model.num_layers}"):
        model.logits(start)


def test_decode_is_greedy_for_each_variant_until_its_eos_and_leaves_the_stream_as_it_was(
        model, full, monkeypatch):
    """Two variants of other last rows, so that they answer otherwise. One ends, the other goes on.
    """
    other = replace(full, x=full.x.roll(3, 1))
    both = replace(full, x=torch.cat([full.x, other.x]))
    alone = [greedy(model, stream, 4)[1].tolist() for stream in (full, other)]
    want = [model.tokenizer.decode(ids).strip() for ids in alone]
    assert want[0] != want[1]
    monkeypatch.setattr(model, "eos", set())
    assert model.decode(both, 4) == model.decode(both, 4) == want
    assert model.decode(both, 0) == ["", ""]
    for ends in (0, 1):
        eos = next(token for token in alone[ends] if token not in alone[1 - ends])
        monkeypatch.setattr(model, "eos", {eos})
        cut = list(want)
        cut[ends] = model.tokenizer.decode(alone[ends][:alone[ends].index(eos)]).strip()
        assert model.decode(both, 4) == cut


# ---- several prompts -----------------------------------------------------------------------------

@pytest.mark.parametrize("image", ["wide", "tall", "square"])
def test_shape_is_known_from_the_size_of_an_image(model, image):
    stream = model.begin(images()[image], QUESTIONS[0])
    rows, first, grid = model.shape(images()[image].size, QUESTIONS[0])
    assert (rows, first, grid) == (stream.x.shape[1], stream.visual[0], stream.grid)


@pytest.mark.parametrize("model", ONE_OF_EACH, indirect=True)
@pytest.mark.parametrize("layer", [0, 1])
def test_prompts_together_are_pruned_and_answered_as_each_alone(model, layer):
    """Red if a method reads the embeddings, saliency, planes, keys or information of the wrong
    prompt."""
    picture = images()["wide"]
    pictures = [picture, picture.transpose(Image.Transpose.ROTATE_180)]
    streams = [model.begin(one, QUESTIONS[0]) for one in pictures]
    names = [name for name, method in METHODS.items()
             if not method.keeps_none and (layer or not method.needs_layer)]
    layers_of = {name: {layer} for name in names}
    info = information.measure_beforehand(model, {0: together(streams)}, layers_of,
                                          lambda method: ["Yes", "No, a dog"])
    schedule = [(layer, names * 2, 3)]
    both_stream = prefill(model, together(streams), schedule, list(range(2 * len(names))), info)
    answers = model.decode(both_stream, 4)
    for i, stream in enumerate(streams):
        own = {layer: {name: values[i:i + 1] for name, values in info[layer].items()}}
        part = slice(i * len(names), (i + 1) * len(names))
        seeds = list(range(part.start, part.stop))
        alone = prefill(model, stream, [(layer, names, 3)], seeds, own)
        assert both_stream.origin[part].equal(alone.origin)
        # sums of a larger batch are in another order
        torch.testing.assert_close(both_stream.x[part], alone.x, rtol=0, atol=1e-4)
        assert answers[part] == model.decode(alone, 4)


# ---- a fork: visual rows that do not tile the image ----------------------------------------------

class WithNewlines(model_llava.Llava):
    """A newline row ends each row of the image, as in later LLaVAs: N = rows * (cols + 1)."""

    def begin(self, image, question):
        stream = super().begin(image, question)
        rows, cols = stream.grid
        first, V = stream.visual
        N = rows * (cols + 1)
        newline = self.tokenizer.token_to_id("\n")
        ending = self.language_model.embed_tokens.weight[newline].expand(rows, 1, -1)
        tiles = stream.x[0, first:first + V].unflatten(0, (rows, cols))
        visual = torch.cat([tiles, ending], 1).flatten(0, 1)                    # (N, C)
        x = torch.cat([stream.x[0, :first], visual, stream.x[0, first + V:]])
        T = len(x)
        before, after = stream.ids[0, :first], stream.ids[0, first + V:]
        ids = torch.cat([before, torch.full((N,), newline), after])
        return replace(stream, x=x[None], pos=torch.arange(T)[None], next_pos=T,
                       visual=(first, N), origin=torch.arange(N)[None], N=N, ids=ids[None],
                       embeds=x[None])


@pytest.fixture(scope="module")
def fork():
    model = copy.copy(load("llava_grouped"))
    model.__class__ = WithNewlines
    return model, model.begin(images()["wide"], QUESTIONS[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_prunes_a_fork_with_separators_or_refuses_it(fork, method):
    """IndexErrors came from methods that took N for rows x cols."""
    model, start = fork
    assert start.N == 4 * 5 and start.grid == (4, 4)
    stream = model.run(start, stop=1)
    try:
        info = information.measure_beforehand(model, {0: start}, {method: {1}},
                                              lambda _: ["Yes"])
        pruned = prune(model, stream, method, 6, info=info.get(1))
    except InputError as e:
        assert "windows of a grid" in str(e) or "saliency" in str(e)
        assert "20" in str(e) and "\n" not in str(e)
        return
    first, n = pruned.visual
    assert n == (0 if METHODS[method].keeps_none else 6)
    assert (pruned.origin[0].diff() > 0).all() and (pruned.origin < 20).all()
    if not METHODS[method].merges:
        kept = stream.x[:, first + pruned.origin[0]]
        assert pruned.x[:, first:first + n].equal(kept)
    assert len(model.decode(model.run(pruned), 2)) == 1


def test_text_of_the_fork_begins_behind_its_last_newline_row(fork):
    """The newline rows behind the first rows * cols were read as text."""
    model, start = fork
    view = view_of(model, model.run(start, stop=1), 0, 0, None)
    first, N = view.embeds_visual
    tail = model_llava.PROMPT.format(question=QUESTIONS[0]).split("<image>")[1]
    ids = model.tokenizer.encode("<image>" + tail, add_special_tokens=False).ids[1:]
    text = model.language_model.embed_tokens(torch.tensor(ids))
    assert view.embeds[first + N:].equal(text)
