"""Means with their uncertainty. Knows arrays, not models.

Questions about one image are not independent, so every error and interval of a mean is clustered by
image: `image` holds, for each question, the number of its image, 0, 1, ...
"""
import functools
import math

import numpy as np

DRAWS = 2000                    # of a bootstrap, always from the same seed
FEW = 10                        # images: a bootstrap over fewer gives no interval worth the name
NOISE = 0.01                    # information below this counts as none: bfloat16 resolves no better


def standard_error(scores: np.ndarray, image: np.ndarray) -> float | None:
    """Return the standard error of the mean; None where there is only one image."""
    sums = np.bincount(image, scores - scores.mean())
    clusters = len(sums)
    if clusters < 2:
        return None
    variance = (sums ** 2).sum() * clusters / (clusters - 1)
    return float(np.sqrt(variance) / len(scores))


@functools.cache
def resampled_images(clusters: int) -> np.ndarray:
    """Draw numbers of images (draws, clusters) with replacement: the same in every comparison."""
    return np.random.default_rng(0).integers(0, clusters, (DRAWS, clusters))


def paired_difference(scores: np.ndarray, other: np.ndarray, image: np.ndarray) -> tuple:
    """Return the mean of scores - other on the same questions, and its 95 % interval by percentile
    bootstrap over images: (mean, low, high); low and high are None where there are too FEW."""
    sums = np.bincount(image, scores - other)
    sizes = np.bincount(image)
    if len(sums) < FEW:
        return float((scores - other).mean()), None, None
    draws = resampled_images(len(sums))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float((scores - other).mean()), float(low), float(high)


def horizon_interval(curves: np.ndarray, image: np.ndarray, rule) -> dict:
    """Return the layer that a rule reads off the mean curve, and its 95 % interval by bootstrap
    over images: {"layer", "low", "high", "draws"}; low and high are None where there are too FEW.

    curves: (questions, points). rule(mean curve) -> layer.
    """
    sums = np.array([np.bincount(image, point) for point in curves.T])          # (points, images)
    sizes = np.bincount(image)
    found = {"layer": rule(curves.mean(0)), "low": None, "high": None, "draws": []}
    if len(sizes) >= FEW:
        for pick in resampled_images(len(sizes)):
            found["draws"].append(rule(sums[:, pick].sum(1) / sizes[pick].sum()))
        found["low"], found["high"] = map(float, np.percentile(found["draws"], [2.5, 97.5]))
    return found


def gini(values: np.ndarray) -> float:
    """Return the Gini coefficient of the absolute values: 0 where all are equal, towards 1 where
    one is all."""
    x = np.sort(abs(values))
    if not x.any():
        return 0.0
    rank = np.arange(1, len(x) + 1)
    return float(((2 * rank - len(x) - 1) * x).sum() / (len(x) * x.sum()))


SUMMARIES = {                   # of the windows of one question at one layer
    "mean": np.mean,
    "spread": np.std,
    "gini": gini,
    "share": lambda values: np.mean(abs(values) > NOISE),
    "negative": lambda values: np.mean(values < -NOISE),
}


def information_by_layer(maps: list[np.ndarray], image: np.ndarray, layers: list[int]) -> list:
    """Return a row for each layer: every one of SUMMARIES over the windows of a question, averaged
    over questions, and its standard error. maps: (layers, rows, cols) for each question."""
    rows = []
    for i, layer in enumerate(layers):
        row = {"layer": layer, "standard_errors": {}}
        for name, summary in SUMMARIES.items():
            values = np.array([summary(of_question[i].ravel()) for of_question in maps])
            row[name] = float(values.mean())
            row["standard_errors"][name] = standard_error(values, image)
        rows.append(row)
    return rows


def from_there_on(holds: list[bool]) -> int:
    """Find the first layer from which on something holds at every layer: the one after the last
    where it does not."""
    return max((layer + 1 for layer, held in enumerate(holds) if not held), default=0)


def mean_of_layer_1(rows: list[dict]) -> float:
    """Return layer 1's mean, since layer 0's can be far higher than any other's; 0 where layer 1
    was not measured."""
    return next((row["mean"] for row in rows if row["layer"] == 1), 0.0)


def layer_without_information(rows: list[dict]) -> int | None:
    """Return the first layer from which on the mean stays under 1 % of layer 1's; None if there is
    none, as where layer 1's is not above 0 or was not measured."""
    base = mean_of_layer_1(rows)
    place = from_there_on([abs(row["mean"]) < 0.01 * base for row in rows])
    return rows[place]["layer"] if place < len(rows) else None


def at_most(count: int, of: int, share: float) -> float:
    """Return the probability that at most `count` of so many independent questions change, if a
    share 0 < share < 1 of all questions does."""
    logs = [math.log(math.comb(of, i)) + i * math.log(share) + (of - i) * math.log1p(-share)
            for i in range(count + 1)]
    return min(1.0, math.fsum(map(math.exp, logs)))


def share_interval(count: int, of: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share, of which `count` of so many independent questions
    are seen (Clopper and Pearson)."""
    def edge(lies_below) -> float:                      # the share where that ends
        low, high = 1e-12, 1 - 1e-12
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if lies_below(middle) else (low, middle)
        return low
    low = edge(lambda share: 1 - at_most(count - 1, of, share) < 0.025) if count else 0.0
    high = edge(lambda share: at_most(count, of, share) > 0.025) if count < of else 1.0
    return low, high
