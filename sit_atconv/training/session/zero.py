"""DeepSpeed's ZeRO, stages 1 and 2: every process holds all weights and averages, and its shard of Adam's moments.

DeepSpeed concatenates the weights, divides them into one part per process, and each process updates a copy of its part.
It clips gradients and skips non-finite steps itself, within `Accelerator.backward`.
"""

import importlib.util
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sit_atconv.config import Config
from sit_atconv.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")


def asked_for_zero() -> bool:
    """Whether the launcher asks for DeepSpeed. Raises `InputError` when a package for it is missing."""
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return False
    for package in ("deepspeed", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"DeepSpeed needs {package}, which is not installed: pip install 'sit-atconv[deepspeed]'.")
    return True


def uses_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed runs."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def configure_zero(accelerator: Accelerator, config: Config) -> None:
    """Set DeepSpeed's options from a run's configuration.

    Raises `InputError` for options that would give other weights than without DeepSpeed, or shard the weights.
    """
    settings = accelerator.deepspeed_plugin.deepspeed_config
    zero = settings["zero_optimization"]
    stage = zero.get("stage", 0)  # DeepSpeed's default
    offloaded = [zero.get(f"offload_{what}") or {} for what in ("optimizer", "param")]
    refused = {
        f"ZeRO stage {stage}": stage not in (1, 2),
        "offloading": any(each.get("device", "none") != "none" for each in offloaded),
        "an optimizer or a scheduler": bool({"optimizer", "scheduler"} & settings.keys()),
        "a precision": any(settings.get(kind, {}).get("enabled") for kind in ("bf16", "fp16", "amp", "torch_autocast")),
    }
    for what, asked in refused.items():
        if asked:
            raise InputError(
                f"The DeepSpeed configuration asks for {what}, which is not supported: start from "
                "configs/accelerate/deepspeed.yaml (stage 1 or 2), leave precision and optimizer to the training "
                "configuration, and take configs/accelerate/fsdp2.yaml to split the weights too."
            )
    training = config.training
    if training.precision == "fp16":
        raise InputError("fp16 under DeepSpeed is not supported: take training.precision bf16.")
    if config.optimizer.name == "muon":
        raise InputError(
            "Muon under DeepSpeed is not supported: ZeRO concatenates the weights, and Muon needs whole matrices. Take "
            "configs/accelerate/fsdp2.yaml or ddp.yaml, or optimizer.name adamw."
        )
    settings["gradient_accumulation_steps"] = training.accumulation
    settings["gradient_clipping"] = config.optimizer.clip_norm or 0.0
    settings["train_batch_size"] = training.batch_size
    per_process = training.batch_size // (training.accumulation * accelerator.num_processes)
    settings["train_micro_batch_size_per_gpu"] = max(per_process, 1)  # the loader refuses what does not divide


def begin_moments(adam: Optimizer, parameters: Iterable[Parameter]) -> None:
    """Create zero moments for this process's part, as Adam would in its first step, and link them to the weights.

    This makes it possible to load or save a checkpoint before the first step.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state  # optional, and slow to import

    ((part,),) = (group["params"] for group in adam.param_groups)
    adam.state[part] = {
        "step": torch.zeros((), device=part.device),
        **{key: torch.zeros_like(part) for key in MOMENTS},
    }
    lazy_init_hp_params_optimizer_state(list(parameters), part, adam.state)


def whole_moments(adam: Optimizer, parameter: Parameter) -> dict[str, Tensor]:
    """Step and complete moments of a parameter, on the CPU. All processes call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    (state,) = adam.state.values()
    moments = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in MOMENTS}
    return {"step": state["step"].clone(), **moments}


def set_whole(adam: Optimizer, parameter: Parameter, values: Tensor, step: Tensor, moments: list[Tensor]) -> None:
    """Set a parameter, its copy in the processes' parts, and its Adam state from complete tensors."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    with torch.no_grad():
        parameter.copy_(values)
    safe_set_full_fp32_param(parameter, parameter.detach())
    (state,) = adam.state.values()
    state["step"].copy_(step)
    for key, moment in zip(MOMENTS, moments, strict=True):
        safe_set_full_optimizer_state(parameter, moment.to(parameter.device), key)
