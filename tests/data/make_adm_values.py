"""Writes adm_values.npz: synthetic features, and the numbers that the ADM evaluator itself gives for them.

    python tests/data/make_adm_values.py ../shared/golden/adm_evaluator.npz

The ADM evaluator (guided-diffusion's TensorFlow program) was run on random features that have the shape of a network's
(half of them zero, correlated), and on the class probabilities that its graph gave for 36 images. This takes the arrays
that no network is needed for, and the numbers in the JSON beside them. Precision and recall exist twice: ADM computes
distances in fp16 where it can, and in fp32 for features scaled by 400, beyond what fp16 holds.
"""

import json
import sys
from pathlib import Path

import numpy as np

KEPT = ("reference_features", "sample_features", "few_features", "radii_squared_first50_scaled_by_400")


def main(source: str) -> None:
    """Copy what is kept."""
    numbers = json.loads(Path(source).with_suffix(".json").read_text())
    with np.load(source) as golden:
        arrays = {name: golden[name] for name in KEPT}
        arrays["probabilities"] = np.concatenate([golden["softmax_64"], golden["softmax_256"]])
    np.savez_compressed(Path(__file__).with_name("adm_values.npz"), **arrays, **numbers)


if __name__ == "__main__":
    main(*sys.argv[1:])
