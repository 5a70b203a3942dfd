"""Writes evaluation_values.npz: synthetic features and the numbers they must give.

    python tests/data/make_evaluation_values.py

Every number is computed here a second way, straight from its definition and in float64: the Fréchet distance by scipy's
Schur-based matrix square root, precision and recall by sorting whole distance matrices, the inception score by summing
KL divergences image by image, the kernel distance over all pairs. Nothing is imported from sit_atconv. The program's
functions also agree with the ADM evaluator itself (tests/test_evaluation_golden.py, which needs ../shared).
"""

from pathlib import Path

import numpy as np
from scipy.linalg import sqrtm


def features(generator: np.random.Generator, count: int, mixing: np.ndarray, offset: float) -> np.ndarray:
    """Non-negative, correlated features (count, d), float32 as a network gives them."""
    return np.maximum(generator.standard_normal((count, len(mixing))) @ mixing + offset, 0).astype(np.float32)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to x and y."""
    (m1, s1), (m2, s2) = ((a.mean(0), np.cov(a, rowvar=False)) for a in (x.astype(float), y.astype(float)))
    return float(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real))


def prdc(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    """Precision and recall from whole distance matrices."""
    r, s = reference.astype(float), samples.astype(float)
    rr, ss, rs = (((a[:, None] - b[None]) ** 2).sum(-1) for a, b in ((r, r), (s, s), (r, s)))
    radii_r, radii_s = np.sort(rr, 1)[:, k], np.sort(ss, 1)[:, k]
    return float((rs <= radii_r[:, None]).any(0).mean()), float((rs <= radii_s[None]).any(1).mean())


def inception_score(p: np.ndarray, chunk: int) -> float:
    """Mean over chunks of exp(mean over images of KL(p | chunk mean))."""
    scores = []
    for first in range(0, len(p), chunk):
        part = p[first : first + chunk].astype(float)
        mean = part.mean(0)
        scores.append(np.exp(np.mean([(row * (np.log(row) - np.log(mean))).sum() for row in part])))
    return float(np.mean(scores))


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 over all pairs."""
    x, y, d = x.astype(float), y.astype(float), x.shape[1]
    n, m = len(x), len(y)
    xx = sum((x[i] @ x[j] / d + 1) ** 3 for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum((y[i] @ y[j] / d + 1) ** 3 for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return float(xx + yy - 2 * ((x @ y.T / d + 1) ** 3).mean())


def main() -> None:
    """Draw the features, compute the numbers, write both."""
    generator = np.random.default_rng(20151205)
    mixing = generator.standard_normal((32, 32)) / 4
    reference, samples = features(generator, 300, mixing, 0.4), features(generator, 400, mixing * 0.95, 0.45)
    few = samples[:20]
    logits = generator.standard_normal((50, 40)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.savez_compressed(
        Path(__file__).with_name("evaluation_values.npz"),
        reference=reference,
        samples=samples,
        probabilities=probabilities.astype(np.float32),
        frechet=frechet(samples, reference),
        frechet_few=frechet(few, reference),
        precision_recall=prdc(reference, samples, 3),
        precision_recall_k5=prdc(reference, samples, 5),
        inception_score=inception_score(probabilities.astype(np.float32), 50),
        inception_score_chunks_of_12=inception_score(probabilities.astype(np.float32), 12),
        squared_mmd=squared_mmd(reference[:60], samples[:60]),
    )


if __name__ == "__main__":
    main()
