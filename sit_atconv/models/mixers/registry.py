"""Token mixers by name: registered by a decorator, and built with checked options."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

import msgspec
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.errors import InputError, nearest

Mixer = TypeVar("Mixer", bound=type[nn.Module])

_MIXERS: dict[str, type[nn.Module]] = {}
_OF_THE_MODEL = ("dim", "num_heads", "block_norm")  # constructor arguments that are not options
HOW_TO_REGISTER = (
    "A mixer from elsewhere is registered when its module is imported: name the module in the environment variable "
    "SITATCONV_PLUGINS (or, in training, in model.plugins), or import it in your own program first."
)


def register_mixer(name: str) -> Callable[[Mixer], Mixer]:
    """Class decorator that makes a token mixer available to `mixer_pattern` under `name`.

    A mixer is an `nn.Module` with

    * ``__init__(self, dim, num_heads, **options)``: the width C, the number of attention heads (a mixer without heads
      leaves it out), and options with annotations and defaults, whose values JSON can hold; a mixer with norms of its
      own may also take `block_norm`, the kind of the blocks' norms, "layer" or "rms";
    * ``forward(x, grid)``: tokens (B, N, C) in raster order and their grid (H, W), N = H·W -> (B, N, C);

    and, optionally,

    * ``flops(grid) -> int``: operations for one image, a multiply-add counting as two;
    * ``initialise()``: called last, after the model has initialised every `nn.Linear`;
    * ``check_grid(grid)``: raises `InputError` for a training grid that the mixer does not support;
    * ``matrices``: for Muon, how many matrices a linear layer holds, ``{"qkv": 3}``; 0 if none (`hidden_matrices`).

    A mixer computes the same in training and evaluation mode, draws no random numbers, and treats samples
    independently.

    Raises:
        InputError: when another class has this name.
    """

    def register(mixer: Mixer) -> Mixer:
        known = _MIXERS.get(name, mixer)
        if _qualified_name(known) != _qualified_name(mixer):  # the same class may be defined again, as in a notebook
            raise InputError(
                f"The mixer name '{name}' is taken by {_qualified_name(known)}: choose another for {mixer.__name__}."
            )
        _MIXERS[name] = mixer
        return mixer

    return register


def list_mixers() -> list[str]:
    """The names of all registered mixers."""
    return sorted(_MIXERS)


def find_mixer(name: str) -> type[nn.Module]:
    """The class registered as `name`. Raises `InputError` when there is none, and says how to register one."""
    if name not in _MIXERS:
        raise InputError(
            f"Unknown mixer '{name}': {nearest(name, _MIXERS)} Registered: {', '.join(list_mixers())}. "
            f"{HOW_TO_REGISTER}"
        )
    return _MIXERS[name]


def create_mixer(name: str, dim: int, num_heads: int = 1, block_norm: str = "layer", **options: Any) -> nn.Module:
    """Build the mixer called `name` for tokens of width `dim`; mixers get `num_heads` and `block_norm` if they take it.

    Raises `InputError` for an unknown name or option, and for a value of the wrong type.
    """
    mixer = find_mixer(name)
    known = {"num_heads": num_heads, "block_norm": block_norm}
    taken = {key: value for key, value in known.items() if key in inspect.signature(mixer).parameters}
    return mixer(dim, **taken, **check_options(name, options))


def mixer_options(name: str) -> dict[str, Any]:
    """The options of a mixer and their defaults."""
    parameters = inspect.signature(find_mixer(name)).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in _OF_THE_MODEL}


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, converted to the annotated types. Raises `InputError` for an unknown option or a wrong type."""
    known, types = mixer_options(name), get_type_hints(find_mixer(name).__init__)
    checked = {}
    for option, value in options.items():
        if option not in known:
            hint = nearest(option, known) if known else "it has none."
            raise InputError(f"The mixer '{name}' has no option '{option}': {hint}")
        try:
            checked[option] = msgspec.convert(value, types.get(option, Any))
        except msgspec.ValidationError as error:
            raise InputError(f"The mixer '{name}' does not accept {option} = {value!r}: {error}.") from None
    return checked


def mixer_flops(mixer: nn.Module, grid: tuple[int, int], dim: int | None = None) -> int:
    """Operations of a mixer for one image of `grid` (H, W) tokens, a multiply-add counting as two.

    This is the mixer's own count or, for a mixer without `flops`, torch's count of its products for tokens of width
    `dim`.
    """
    if hasattr(mixer, "flops"):
        return mixer.flops(grid)
    twin = copy.deepcopy(mixer).to("meta")
    with FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, grid[0] * grid[1], dim, device="meta"), grid)
    return counter.get_total_flops()


def _qualified_name(mixer: type) -> str:
    return f"{mixer.__module__}.{mixer.__qualname__}"
