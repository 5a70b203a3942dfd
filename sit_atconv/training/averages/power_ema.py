"""Averages of any width after training: the post-hoc EMA of EDM2 (arXiv 2312.02696, section 3.1 and appendix C).

During training, two or more averages with power-function profiles are kept, and snapshots of them are written. The
profile of a snapshot with exponent γ at step t is p(τ) = (γ + 1) τ^γ / t^(γ+1) on [0, t]. Any other profile is
approximated by the linear combination of snapshots that is nearest in the least-squares sense.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.runtime.whole_files import whole_folder
from sit_atconv.training.averages.ema import PowerFunction, exponent_of_width


def save_snapshot(
    folder: Path, step: int, averages: Mapping[str, dict[str, Tensor]], write_config: Callable[[Path], object]
) -> None:
    """Write RUN/ema/step-0010000/power-0.05.safetensors … and config.json, whole or not at all.

    averages: the complete tensors of each power-function average, by its name. write_config: writes the model's
    config.json into a folder.
    """
    folder.mkdir(exist_ok=True)  # not its parent: the directory of a moved run is not created again
    with whole_folder(folder / f"step-{step:07d}") as unfinished:
        write_config(unfinished)
        for name, tensors in averages.items():
            save_file(tensors, unfinished / f"{name}.safetensors")


def profile_product(exponent_a: ArrayLike, end_a: ArrayLike, exponent_b: ArrayLike, end_b: ArrayLike) -> NDArray:
    """∫ p_a(τ) p_b(τ) dτ of two power-function profiles that end at steps t_a, t_b; broadcasts."""
    a, b, ta, tb = (np.asarray(v, np.float64) for v in (exponent_a, exponent_b, end_a, end_b))
    # (a+1)(b+1)/(a+b+1) · min^(a+b+1) / (ta^(a+1) tb^(b+1)), with ratios ≤ 1 so that nothing overflows
    first = np.minimum(ta, tb)
    return (a + 1) * (b + 1) / (a + b + 1) * (first / ta) ** a * (first / tb) ** b * first / (ta * tb)


def combination(exponents: ArrayLike, ends: ArrayLike, exponent: float, end: float) -> NDArray:
    """Weights (n,) of snapshots whose combined profile is nearest to the profile of `exponent` at step `end`.

    exponents, ends: (n,) γ and step of each snapshot.
    """
    gammas, steps = np.asarray(exponents, np.float64), np.asarray(ends, np.float64)
    products = profile_product(gammas[:, None], steps[:, None], gammas[None], steps[None])
    return np.linalg.lstsq(products, profile_product(gammas, steps, exponent, end), rcond=1e-14)[0]


def reconstruct(folder: Path, width: float, step: int | None = None) -> SiT:
    """The model averaged with relative width `width` at `step` (None: the last), from the snapshots in RUN/ema.

    Raises `InputError` when there are no snapshots up to that step.
    """
    PowerFunction(width)  # raises for an impossible width
    snapshots = [
        (int(path.parent.name.removeprefix("step-")), float(path.stem.removeprefix("power-")), path)
        for path in sorted(folder.glob("step-*/power-*.safetensors"))
    ]
    steps = sorted({at for at, _, _ in snapshots})
    end = steps[-1] if step is None and steps else step
    if end not in steps:
        raise InputError(
            f"{folder} holds no snapshots of step {end}: there are {steps or 'none'}. Train with training.power_ema "
            "[0.05, 0.1], and choose a step of training.power_ema_every."
        )
    chosen = [snapshot for snapshot in snapshots if snapshot[0] <= end]
    gammas = [exponent_of_width(snapshot_width) for _, snapshot_width, _ in chosen]
    weights = combination(gammas, [at for at, _, _ in chosen], exponent_of_width(width), end)
    model = SiT.from_config(SiT.load_config(chosen[-1][2].parent))
    total: dict[str, Tensor] = {}
    for weight, (_, _, path) in zip(weights.tolist(), chosen, strict=True):
        for name, tensor in load_file(path).items():
            total[name] = total.get(name, 0) + weight * tensor.double()
    model.load_state_dict({name: tensor.float() for name, tensor in total.items()})
    return model.eval()
