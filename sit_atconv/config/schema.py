"""The typed schema of every training configuration.

Each field is set in `configs/*.yaml` under its section, or on the command line by ``--section.field value``.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

import yaml
from msgspec import Meta

from sit_atconv.config.meanflow import MeanFlowConfig
from sit_atconv.config.outputs import EvaluationConfig, LogConfig, PreviewConfig
from sit_atconv.config.ranges import (
    Classes,
    ClosedUnitInterval,
    Decay,
    Few,
    NonNegativeFloat,
    Number,
    OpenUnitInterval,
    PositiveFloat,
    Ratio,
    Seconds,
    Steps,
    Width,
    if_set,
)
from sit_atconv.errors import InputError
from sit_atconv.randomness import MAX_SEED
from sit_atconv.runtime.reading import Text


@dataclass(frozen=True)
class ModelConfig:
    """Which SiT to build. Keys that are null follow from the name or from the data.

    Args:
        name: a registered name, SiT-<Mixer>-{S, B, L, XL}/{1, 2, 4, 8}: mixers, size and patch. SiT alone has
            attention, SiT-Hybrid attention and ATConv in alternation; the others are in docs/mixers.md.
        hidden_size: width, if not that of the named size.
        depth: number of blocks, if not that of the named size.
        num_heads: attention heads, if not those of the named size.
        mlp_ratio: MLP width over hidden_size.
        num_classes: null for the number of classes of the data, 0 for an unconditional model.
        mixer_pattern: if not that of the named family: a mixer, "hybrid" (even blocks ATConv), or a list with an entry
            for each block; a shorter list is repeated. An entry is a mixer, {name: …, option: …}, or
            {parallel: [entry, …]}, which sums mixers.
        plugins: modules to import that register mixers of your own (docs/mixers.md).
        kernel_size: K of every ATConv whose entry in the pattern does not set it.
        pool: the pooling of these ATConvs: "grid" (the paper) or "raster" (the released code).
        activation: the activation φ of these ATConvs.
        position: "sincos", or "none" (the released code's FFHQ runs of pure ATConv).
        init_from: fine-tune from the weights of this `model/` directory, made by a run or by sit_atconv.convert.
        norm: "layer", DiT's, or "rms", RMSNorm with a learnt gain (docs/techniques.md, as the following keys).
        mlp: "gelu", DiT's, or "swiglu", a gated MLP with as many parameters.
        qk_norm: norm the queries and keys of every attention and window whose entry in the pattern does not set it.
        rope: turn these queries and keys by their row and column.
        internal_block: Internal Guidance: a second head predicts after this block, counted from 1; null for none. Its
            paper takes 4 for B, 8 for L and XL.
    """

    name: Text = "SiT-ATConv-XL/2"
    hidden_size: Width | None = None
    depth: Few | None = None
    num_heads: Few | None = None
    mlp_ratio: Ratio = 4.0
    num_classes: Classes | None = None
    mixer_pattern: str | list[str | dict[str, Any]] | None = None
    plugins: list[str] = field(default_factory=list)
    kernel_size: Few = 3
    pool: Literal["grid", "raster"] = "grid"
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    position: Literal["sincos", "none"] = "sincos"
    init_from: Text | None = None
    norm: Literal["layer", "rms"] = if_set("layer")
    mlp: Literal["gelu", "swiglu"] = if_set("gelu")
    qk_norm: bool = if_set(False)
    rope: bool = if_set(False)
    internal_block: Few | None = if_set(None)


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Args:
        path: a directory written by `python -m sit_atconv.data.prepare` or prepared for REPA, the address of one of the
            former, such as s3://BUCKET/NAME, or "digits:train@16".
        flip: mirror half of the images (the data must have been prepared with flips).
        workers: loader processes for each training process.
        verify: check every shard against its digest before the first step.
        heldout: what the held-out loss is measured on: a share of the data, such as 0.05, which is then not trained on
            and the same for every seed; or the path or name of other data, as for `path`; null for nothing.
    """

    path: Text = "data/imagenet256"
    flip: bool = False
    workers: Annotated[int, Meta(ge=0, le=1_024)] = 2
    verify: bool = True
    heldout: OpenUnitInterval | Text | None = None


@dataclass(frozen=True)
class FlowConfig:
    """The flow-matching objective.

    Args:
        interpolant: path between data and noise.
        prediction: what the network learns to predict; samplers turn it into a velocity.
        weighting: of noise and score errors: "velocity" gives the loss of the implied velocity, "likelihood" that of
            maximum likelihood. Velocity and data predictions allow only "none".
        times: distribution of training times.
        shift: > 1 moves training times towards noise; 1 leaves them unchanged.
        label_dropout: share of labels replaced by the null class, for guidance; ignored by unconditional models.
        times_mean: of the normal numbers behind logit-normal times; negative ones move times towards data.
        times_std: their standard deviation.
        cosine: weight of LightningDiT's term 1 − cos(v̂, v) over the channels of a position; 0 for none.
        internal_weight: weight of the loss of the head after model.internal_block.
        dispersion: weight of the dispersive loss, which drives apart the hidden tokens of different samples; null for
            none.
        dispersion_block: the block after which it acts, counted from 1; null for a quarter of the depth.
        dispersion_tau: its temperature.
        dispersion_group: samples that are compared with one another, successive ones in the order of the data; it
            divides every process's micro-batch.
        objective: "flow-matching", or "meanflow": average velocities, for sampling in one to four steps.
        meanflow: settings of that objective.
    """

    interpolant: Literal["linear", "cosine", "vp"] = "linear"
    prediction: Literal["velocity", "noise", "score", "data"] = "velocity"
    weighting: Literal["none", "velocity", "likelihood"] = "none"
    times: Literal["uniform", "logit-normal"] = "uniform"
    shift: PositiveFloat = 1.0
    label_dropout: ClosedUnitInterval = 0.1
    times_mean: Annotated[float, Meta(ge=-100, le=100)] = if_set(0.0)
    times_std: Annotated[float, Meta(gt=0, le=100)] = if_set(1.0)
    cosine: NonNegativeFloat = if_set(0.0)
    internal_weight: PositiveFloat = if_set(0.5)
    dispersion: PositiveFloat | None = if_set(None)
    dispersion_block: Few | None = if_set(None)
    dispersion_tau: PositiveFloat = if_set(0.5)
    dispersion_group: Number = if_set(32)
    objective: Literal["flow-matching", "meanflow"] = if_set("flow-matching")
    meanflow: MeanFlowConfig = if_set(MeanFlowConfig())


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen vision encoder from timm, or the clean latents themselves.

    Args:
        name: timm's name of a vision transformer, or "latents" for the latents that are trained on (SRA 2), which need
            no weights.
        weights: "hub" to let timm download them, a path to a local file, or "random" (for trials).
        cached: read its tokens from data that were prepared with this --teacher, instead of running it in every step.
    """

    name: Text = "vit_base_patch14_dinov2.lvd142m"
    weights: Text = "hub"
    cached: bool = False

    @property
    def live(self) -> bool:
        """Whether it is a network that runs in every step."""
        return not self.cached and self.name != "latents"


@dataclass(frozen=True)
class AlignmentConfig:
    """REPA: align hidden tokens with a teacher's.

    Args:
        coefficient: weight of the alignment loss.
        block: tokens after this block are aligned; blocks are counted from 1.
        variant: "repa", or "irepa": 3×3 convolutions as projectors, and teacher tokens normalised over each picture.
        projector_width: hidden width of REPA's projectors.
        stop_after: number of steps after which the alignment ends and no teacher runs; null for never.
        teachers: one projector each; their losses are averaged.
    """

    coefficient: NonNegativeFloat = 0.5
    block: Few = 8
    variant: Literal["repa", "irepa"] = "repa"
    projector_width: Width = 2048
    stop_after: Steps | None = None
    teachers: Annotated[list[TeacherConfig], Meta(min_length=1)] = field(default_factory=lambda: [TeacherConfig()])


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, fused where torch has it, or Muon with it.

    Args:
        lr: learning rate after warm-up.
        betas: decay of the first and second moment.
        weight_decay: 0 in all published runs.
        eps: added to the denominator.
        clip_norm: gradients with a larger global norm are scaled down to it; null for no clipping.
        warmup_steps: steps of linear warm-up from 0.
        schedule: "constant", as in all published runs, or "linear" decay to 0 at the last step, for short runs; with
            training.max_seconds, by the share of the steps or of the time, whichever is larger.
        name: "adamw", or "muon" for the matrices of mixers and MLPs, with AdamW for all other weights.
        momentum: of Muon.
    """

    lr: PositiveFloat = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    eps: PositiveFloat = 1e-8
    clip_norm: PositiveFloat | None = 1.0
    warmup_steps: Annotated[int, Meta(ge=0, le=10**12)] = 0
    schedule: Literal["constant", "linear"] = "constant"
    name: Literal["adamw", "muon"] = if_set("adamw")
    momentum: Annotated[float, Meta(ge=0, lt=1)] = if_set(0.95)

    def __post_init__(self) -> None:
        if self.name == "adamw" and self.momentum != 0.95:
            raise InputError("optimizer.momentum would do nothing: it is Muon's. Set optimizer.name to muon, too.")


@dataclass(frozen=True)
class TrainingConfig:
    """Length, size and precision of a run.

    Args:
        steps: optimizer steps.
        max_seconds: seconds of training after which a run ends before its last step; null for no limit. Checkpoints,
            grids and evaluations do not count.
        batch_size: images per step, over all processes and micro-batches.
        accumulation: micro-batches per step.
        precision: "bf16" runs the network in autocast; weights, losses and EMA stay in fp32. "fp16" does the same with
            a loss scaler, for GPUs without bf16. "no" is fp32.
        ema_decay: decay per step of the averaged weights, which are saved as the model and used for sampling.
        more_ema_decays: decays of further averages, saved in each checkpoint as model-DECAY/.
        power_ema: relative widths of EDM2's power-function averages, such as [0.05, 0.1], saved as model-power-WIDTH/;
            from their snapshots `python -m sit_atconv.training.power_ema` computes any other width afterwards.
        power_ema_every: steps between these snapshots, which stay in RUN/ema/.
        max_bad_steps: a step whose loss or gradient is not finite is skipped; this many in a row stop the run.
        gradient_checkpointing: what the backward pass recomputes to save memory: "mixers", the norm, modulation and
            token mixer of each block; "blocks", whole blocks, for about a third more time; "none" keeps everything.
            True and false, as in earlier files, mean "blocks" and "none".
        compile: compile the repeated blocks with torch.compile.
        seed: of initial weights, data order and all noise.
    """

    steps: Steps = 400_000
    max_seconds: Seconds | None = None
    batch_size: Number = 256
    accumulation: Number = 1
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    ema_decay: OpenUnitInterval = 0.9999
    more_ema_decays: list[OpenUnitInterval] = field(default_factory=list)
    power_ema: list[PositiveFloat] = field(default_factory=list)
    power_ema_every: Steps = 10_000
    max_bad_steps: Steps = 20
    gradient_checkpointing: Literal["none", "blocks", "mixers"] | bool = "none"
    compile: bool = False
    seed: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.seed > MAX_SEED:  # too large for msgspec's ranges
            raise InputError(f"training.seed: Expected `int` <= {MAX_SEED}.")
        if isinstance(self.gradient_checkpointing, bool):
            object.__setattr__(self, "gradient_checkpointing", "blocks" if self.gradient_checkpointing else "none")


class Settings:
    """A whole configuration, as a file can hold it."""

    def to_yaml(self) -> str:
        """The configuration as a file that `--config` accepts; keys made by `if_set` only where they are set."""
        return yaml.safe_dump(_plain(_set_keys(self)), sort_keys=False)

    def to_dict(self) -> dict[str, Any]:
        """All keys, as YAML can hold them."""
        return _plain(asdict(self))


@dataclass(frozen=True)
class Config(Settings):
    """A training run; with `alignment: null` without REPA, with `evaluation: null` without scores during training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    alignment: AlignmentConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    evaluation: EvaluationConfig | None = None


OPTIONAL_SECTIONS = {"alignment": AlignmentConfig, "evaluation": EvaluationConfig}


def config_keys(schema: type = Config, prefix: str = "", every: bool = True) -> list[str]:
    """All keys of the schema, dotted: "model.name", …; without those made by `if_set` unless `every`."""
    keys = []
    for f in fields(schema):
        section = OPTIONAL_SECTIONS.get(f.name, f.type)
        if is_dataclass(section):
            keys += config_keys(section, f"{prefix}{f.name}.", every) if every or not f.metadata.get("if_set") else []
        elif every or not f.metadata.get("if_set"):
            keys.append(prefix + f.name)
    return keys


def _set_keys(config: Any) -> dict[str, Any]:
    """A dataclass of sections as a dictionary, without the keys made by `if_set` that have their default."""
    values = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if not (f.metadata.get("if_set") and value == f.default):
            values[f.name] = _set_keys(value) if is_dataclass(value) else value
    return values


def _plain(value: Any) -> Any:
    """Tuples to lists and dataclasses to dictionaries, recursively: what YAML can hold."""
    if is_dataclass(value):
        return _plain(_set_keys(value))
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
