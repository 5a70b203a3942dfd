"""The typed schema of the training of image networks (`python -m sit_atconv.zoo.train`)."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from sit_atconv.config.outputs import LogConfig
from sit_atconv.config.ranges import (
    ClosedUnitInterval,
    Decay,
    NonNegativeFloat,
    Number,
    OpenUnitInterval,
    PositiveFloat,
    Ratio,
    Seconds,
    Steps,
)
from sit_atconv.config.schema import Settings
from sit_atconv.errors import InputError
from sit_atconv.randomness import MAX_SEED
from sit_atconv.runtime.reading import Text

_Share = Annotated[float, Meta(gt=0, le=1)]


@dataclass(frozen=True)
class NetworkConfig:
    """Which network to train; the number of classes is that of the data.

    Args:
        name: a name of timm, or of ours (docs/zoo.md).
        drop_path_rate: rate of the last block's branches that are left out; null for the network's own.
        options: further arguments of the network, such as {mixer: dwconv}.
        plugins: modules to import that register mixers of your own (docs/mixers.md).
        init_from: fine-tune from this file of weights; the classifier begins anew where the classes are others.
    """

    name: Text = "attnet_t2"
    drop_path_rate: ClosedUnitInterval | None = None
    options: dict[str, Any] = field(default_factory=dict)
    plugins: list[str] = field(default_factory=list)
    init_from: Text | None = None


@dataclass(frozen=True)
class PicturesConfig:
    """What to train on, and what the network sees of it.

    Args:
        path: pictures with classes: a folder or zip of class folders, hf:NAME:SPLIT, or any source of docs/own_data.md.
        heldout: what accuracy is measured on: a share of the data, such as 0.1, which is then not trained on and the
            same for every seed; or other data, as for `path`; null for nothing.
        image_size: side of the pictures in training and validation.
        interpolation: of resizing; null for the network's, as the following keys.
        crop_pct: side of the centre crop in validation over the shorter side of the resized picture.
        mean, std: of each channel, for normalisation.
        workers: loader processes for each training process.
    """

    path: Text = "data/imagenet/train"
    heldout: OpenUnitInterval | Text | None = "data/imagenet/val"
    image_size: Annotated[int, Meta(ge=1, le=4096)] = 224
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"] | None = None
    crop_pct: _Share | None = None
    mean: tuple[ClosedUnitInterval, ClosedUnitInterval, ClosedUnitInterval] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    workers: Annotated[int, Meta(ge=0, le=1_024)] = 4


@dataclass(frozen=True)
class AugmentationConfig:
    """timm's augmentation. Each picture's is a function of (training.seed, position in the order of the data).

    Args:
        scale: range of the area of the random crop over that of the picture.
        ratio: range of its width over height.
        flip: probability of a mirrored picture.
        auto: timm's description of RandAugment or AutoAugment, such as rand-m9-mstd0.5-inc1; null for none.
        color_jitter: strength of random brightness, contrast and saturation; null for none. `auto` takes its place.
        erasing: probability of erasing a rectangle.
        mixup, cutmix: the parameter of the Beta distribution of the mixing weight; 0 for none. Where both are set, each
            micro-batch takes one of them, with equal probability.
        smoothing: of labels.
        repeats: how often each picture comes in a row, each time with an augmentation of its own (repeated
            augmentation, arXiv 1902.05509).
    """

    scale: tuple[_Share, _Share] = (0.08, 1.0)
    ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    flip: ClosedUnitInterval = 0.5
    auto: Text | None = None
    color_jitter: ClosedUnitInterval | None = None
    erasing: ClosedUnitInterval = 0.0
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    repeats: Annotated[int, Meta(ge=1, le=100)] = 1

    def __post_init__(self) -> None:
        if self.auto is not None and self.color_jitter is not None:
            raise InputError("augmentation.color_jitter would do nothing beside augmentation.auto: set one to null.")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise InputError(f"augmentation.{name} is a range from low to high, not {low:g} to {high:g}.")


@dataclass(frozen=True)
class ImageOptimizerConfig:
    """The optimizer and its learning rate. Biases and norms, all tensors of one dimension, do not decay.

    Args:
        name: "adamw", or "sgd" with momentum.
        lr: learning rate after warm-up.
        betas, eps: AdamW's.
        momentum: SGD's.
        weight_decay: decoupled in AdamW, part of the gradient in SGD.
        clip_norm: gradients with a larger global norm are scaled down to it; null for no clipping.
        schedule: "cosine" decay from step 0 to the last step, or "constant".
        warmup_steps: steps of linear warm-up, in the time of which the cosine goes on.
        warmup_lr: where it begins.
        min_lr: where the cosine ends.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    momentum: Decay = 0.9
    weight_decay: NonNegativeFloat = 0.05
    clip_norm: PositiveFloat | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Annotated[int, Meta(ge=0, le=10**12)] = 0
    warmup_lr: NonNegativeFloat = 1e-6
    min_lr: NonNegativeFloat = 1e-6

    def __post_init__(self) -> None:
        if self.name == "adamw" and self.momentum != 0.9:
            raise InputError("optimizer.momentum would do nothing: it is SGD's. Set optimizer.name to sgd, too.")
        if self.name == "sgd" and (self.betas != (0.9, 0.999) or self.eps != 1e-8):
            raise InputError("optimizer.betas and eps would do nothing: they are AdamW's.")


@dataclass(frozen=True)
class ImageTrainingConfig:
    """Length, size and precision of a run.

    Args:
        steps: optimizer steps.
        max_seconds: seconds of training after which a run ends before its last step; null for no limit.
        batch_size: pictures per step, over all processes and micro-batches.
        accumulation: micro-batches per step; BatchNorm, mixup and cutmix see one micro-batch of one process.
        precision: "bf16" runs the network in autocast; weights, loss and EMA stay in fp32. "fp16" does the same with a
            loss scaler, for GPUs without bf16. "no" is fp32.
        ema_decay: decay per step of the averaged weights, which are saved as the model.
        max_bad_steps: a step whose loss or gradient is not finite is skipped; this many in a row stop the run.
        gradient_checkpointing: recompute blocks in the backward pass, to save memory.
        compile: compile the network with torch.compile.
        seed: of initial weights, data order, augmentation and dropped paths.
    """

    steps: Steps = 93_600
    max_seconds: Seconds | None = None
    batch_size: Number = 4096
    accumulation: Number = 1
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    ema_decay: OpenUnitInterval = 0.9999
    max_bad_steps: Steps = 20
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.seed > MAX_SEED:  # too large for msgspec's ranges
            raise InputError(f"training.seed: Expected `int` <= {MAX_SEED}.")


@dataclass(frozen=True)
class ValidationConfig:
    """Top-1 and top-5 accuracy and loss on data.heldout, of the weights in training and of their average.

    Args:
        every: steps between validations; the last step always has one.
        batch_size: for each process; does not change the scores.
    """

    every: Steps = 3_120
    batch_size: Number = 256


@dataclass(frozen=True)
class ImageConfig(Settings):
    """The training of an image network."""

    model: NetworkConfig = field(default_factory=NetworkConfig)
    data: PicturesConfig = field(default_factory=PicturesConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: ImageOptimizerConfig = field(default_factory=ImageOptimizerConfig)
    training: ImageTrainingConfig = field(default_factory=ImageTrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
