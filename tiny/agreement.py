"""Compare how cheap scores rank visual tokens with how exact information ranks them.

    python tiny/agreement.py                    the built-in LLaVA
    python tiny/agreement.py tiny/qwen

Prints a table for each benchmark: Spearman's rank correlation, over the visual tokens of an image,
with the information of single tokens for the whole gold answer, of what methods rank by and of the
information of parts of the answer. Mean over questions ± standard error.
"""
import sys
from pathlib import Path

import numpy as np

TINY = Path(__file__).resolve().parent
sys.path.insert(0, str(TINY.parent))

from information import attention_of_answer, inputs_of_layers, token_information  # noqa: E402
from support.benchmarks import images_of, load_benchmark  # noqa: E402
from support.checkpoint import load_model  # noqa: E402
from support.files import read_image  # noqa: E402
from support.flags import sample  # noqa: E402
from support.report import print_heads, print_row  # noqa: E402
from support.statistics import standard_error  # noqa: E402
from tokprune import attention_of_raters, view_of  # noqa: E402

LAYERS = [6, 10, 14, 18]
QUESTIONS = 40


def correlations(model, question) -> dict[str, list[float]]:
    """Return {what ranks the tokens: rank correlation with their information at each of LAYERS}."""
    stream = model.begin(read_image(question.image), question.prompt)
    own = model.decode(model.run(stream))[0]
    [attended] = attention_of_answer(model, {0: stream}, [own], LAYERS)     # (len(LAYERS), N, t)
    streams = inputs_of_layers(model, {0: stream}, LAYERS).values()
    views = [view_of(model, at_layer, b=0, seed=0) for at_layer in streams]
    start, N = stream.visual
    image = slice(start, start + N)
    last = [stream.x.shape[1] - 1]                                          # the last prompt row

    def information(answer, mode="keep-one", target="answer"):
        return token_information(model, stream, answer, LAYERS, 1, mode, target).flatten(1, 2)
    exact = information(question.gold_written)                              # (len(LAYERS), N)
    each = information(question.gold_written, target="each")
    scores = {
        "information of the first token": information(question.gold_normalized, target="first"),
        "information of the last token": each[..., -2],
        "information of the answer's end": each[..., -1],
        "leave-one-out information": information(question.gold_written, mode="leave-one-out"),
        "attention of the own answer, as hindsight": attended.sum(2),
        "attention of the last prompt row, as FastV":
            [view.attention(last)[:, 0, image].mean(0) for view in views],
        "attention of SparseVLM's raters": [attention_of_raters(view) for view in views],
        "norm of keys, as DART's pivots":
            [view.keys[image].float().abs().sum(1) for view in views],
        "saliency of the tower": [view.saliency() for view in views]}
    if own and question.points(own) < 1:
        scores["information of the own answer, where it is wrong"] = information(own)
    return {name: [rank_correlation(*pair) for pair in zip(of_layers, exact)]
            for name, of_layers in scores.items()}


def rank_correlation(a, b) -> float:
    """Return Spearman's rank correlation of two tensors; nan where either has only one value."""
    a = ranks(a.cpu().numpy())
    b = ranks(b.cpu().numpy())
    return np.corrcoef(a, b)[0, 1] if a.std() and b.std() else np.nan


def ranks(values: np.ndarray) -> np.ndarray:
    """Return 1 for the smallest; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def print_table(benchmark: str, found: list[dict], image: np.ndarray):
    """Print a row for each name, a column for each layer. found: `correlations` by question."""
    print()
    print_heads([f"{benchmark}, at layer", "questions", *map(str, LAYERS)])
    unknown = [np.nan] * len(LAYERS)
    for name in {name: None for question in found for name in question}:
        table = np.array([question.get(name, unknown) for question in found])
        questions = (~np.isnan(table)).any(1).sum()
        print_row([name, str(questions), *(mean_and_error(column, image) for column in table.T)])


def mean_and_error(values: np.ndarray, image: np.ndarray) -> str:
    """Write mean ± standard error, clustered by image, of the values that are not nan."""
    known = ~np.isnan(values)
    if not known.any():
        return "-"
    clusters = np.unique(image[known], return_inverse=True)[1]
    error = standard_error(values[known], clusters)
    mean = f"{values[known].mean():.2f}"
    return mean if error is None else f"{mean} ± {error:.2f}"


def main(folder: Path):
    model = load_model(folder)
    for benchmark in ("mme", "textvqa"):
        questions = sample(load_benchmark(benchmark, TINY), QUESTIONS, seed=0)
        found = [correlations(model, question) for question in questions]
        print_table(benchmark, found, images_of(questions))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else TINY / "llava")
