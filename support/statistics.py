"""Means with their uncertainty. Knows arrays, not models.

Questions about one image are not independent, so every error and interval is clustered by image:
`image` holds, for each question, the number of its image, 0, 1, ...
"""
import functools

import numpy as np

DRAWS = 2000                    # of a bootstrap, always from the same seed
NOISE = 0.01                    # information below this counts as none: bfloat16 resolves no better


def standard_error(scores: np.ndarray, image: np.ndarray) -> float | None:
    """Of the mean; None where there is only one image."""
    sums = np.bincount(image, scores - scores.mean())
    clusters = len(sums)
    if clusters < 2:
        return None
    variance = (sums ** 2).sum() * clusters / (clusters - 1)
    return float(np.sqrt(variance) / len(scores))


@functools.cache
def resampled_images(clusters: int) -> np.ndarray:
    """(draws, clusters) numbers of images, with replacement: the same in every comparison."""
    return np.random.default_rng(0).integers(0, clusters, (DRAWS, clusters))


def paired_difference(scores: np.ndarray, other: np.ndarray, image: np.ndarray) -> tuple:
    """Mean of scores - other on the same questions, and its 95 % interval: (mean, low, high), by
    percentile bootstrap over images."""
    sums = np.bincount(image, scores - other)
    sizes = np.bincount(image)
    draws = resampled_images(len(sums))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float((scores - other).mean()), float(low), float(high)


def horizon_interval(curves: np.ndarray, image: np.ndarray, rule) -> dict:
    """A layer that a rule reads off the mean curve, and its 95 % interval by bootstrap over images:
    {"layer", "low", "high", "draws"}.

    curves: (questions, points). rule(mean curve) -> layer.
    """
    sums = np.array([np.bincount(image, point) for point in curves.T])          # (points, images)
    sizes = np.bincount(image)
    layers = []
    for pick in resampled_images(len(sizes)):
        layers.append(rule(sums[:, pick].sum(1) / sizes[pick].sum()))
    low, high = np.percentile(layers, [2.5, 97.5])
    return {"layer": rule(curves.mean(0)), "low": float(low), "high": float(high), "draws": layers}


def cost_elsewhere(curves: np.ndarray, scores: np.ndarray, image: np.ndarray, rule,
                   questions: int, splits: int = 500) -> float | None:
    """What a layer that a rule reads off about so many questions costs on the others: percent of
    their unpruned score, mean over random splits by image. None where the others score 0, or are
    none.

    curves: (questions, points), what the rule reads. scores: (questions, 1 + layers): unpruned, and
    with everything dropped at layer 0, 1, ...
    """
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(splits):
        order = rng.permutation(image.max() + 1)
        asked = np.cumsum(np.bincount(image)[order])
        chosen = order[:np.searchsorted(asked, questions) + 1]
        inside = np.isin(image, chosen)
        if inside.all():
            continue
        layer = rule(curves[inside].mean(0))
        others = scores[~inside].mean(0)
        if others[0] == 0:
            continue
        kept = others[0] if layer == scores.shape[1] - 1 else others[1 + layer]
        losses.append(100 * (others[0] - kept) / others[0])
    return float(np.mean(losses)) if losses else None


def gini(values: np.ndarray) -> float:
    """Of the absolute values: 0 where all are equal, towards 1 where one is all."""
    x = np.sort(abs(values))
    if not x.any():
        return 0.0
    rank = np.arange(1, len(x) + 1)
    return float(((2 * rank - len(x) - 1) * x).sum() / (len(x) * x.sum()))


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's; None where either has only one value."""
    a = ranks(a)
    b = ranks(b)
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def agreement_by_layer(of_questions: list[dict], image: np.ndarray) -> dict[str, list]:
    """{name: of each layer (mean over questions, standard error)}; questions without a correlation
    are left out. of_questions: {name: of each layer a correlation or None}."""
    found = {}
    for name in of_questions[0]:
        table = np.array([question[name] for question in of_questions], float)  # None becomes nan
        found[name] = []
        for column in table.T:
            known = ~np.isnan(column)
            if not known.any():
                found[name].append((None, None))
                continue
            of_images = np.unique(image[known], return_inverse=True)[1]
            error = standard_error(column[known], of_images)
            found[name].append((float(column[known].mean()), error))
    return found


SUMMARIES = {                   # of the windows of one question at one layer
    "mean": np.mean,
    "spread": np.std,
    "gini": gini,
    "share": lambda values: np.mean(abs(values) > NOISE),
    "negative": lambda values: np.mean(values < -NOISE),
}


def information_by_layer(maps: list[np.ndarray], image: np.ndarray, layers: list[int]) -> list:
    """A row for each layer: every one of SUMMARIES over the windows of a question, averaged over
    questions, and its standard error. maps: (layers, rows, cols) for each question."""
    rows = []
    for i, layer in enumerate(layers):
        row = {"layer": layer, "standard_errors": {}}
        for name, summary in SUMMARIES.items():
            values = np.array([summary(of_question[i].ravel()) for of_question in maps])
            row[name] = float(values.mean())
            row["standard_errors"][name] = standard_error(values, image)
        rows.append(row)
    return rows


def mean_of_layer_1(rows: list[dict]) -> float | None:
    """Layer 0's can be far higher than any other's. None where layer 1 was not measured."""
    for row in rows:
        if row["layer"] == 1:
            return row["mean"]
    return None


def layer_without_information(rows: list[dict], rounding: float = 0.0) -> int | None:
    """The first layer from which on the mean stays under 1 % of layer 1's, or under rounding; None
    if layer 1 was not measured or its mean is not above 0, or if there is some to the end."""
    base = mean_of_layer_1(rows)
    if base is None or base <= 0:
        return None
    layer = None
    for row in reversed(rows):
        if abs(row["mean"]) >= max(0.01 * base, rounding):
            break
        layer = row["layer"]
    return layer
