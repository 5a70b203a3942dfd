"""The model card (README.md) of a published model: what it is, how it was trained, and its scores."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sit_atconv.classes import Classes
from sit_atconv.models import SiT
from sit_atconv.models.checkpoint import Weights
from sit_atconv.models.mixers import describe_pattern, expand_pattern, mixer_names
from sit_atconv.models.registry import FAMILIES
from sit_atconv.runtime.reading import Count, Finite, read_json
from sit_atconv.runtime.whole_files import write_text

_LICENCE = "mit"
_TITLES = {"fid": "FID", "sfid": "sFID", "is": "Inception score", "precision": "Precision", "recall": "Recall"}

_USE = """```python
from sit_atconv import SiTPipeline

pipe = SiTPipeline.from_pretrained("{name}")
images = pipe({arguments}).images
```"""


@dataclass(frozen=True)
class ScoredSamples:
    """The number of samples that were scored, and which weights of a checkpoint drew them, if it is known."""

    count: Count
    weights: str | None = None


@dataclass(frozen=True)
class ScoredReference:
    """The reference that they were compared with."""

    path: str
    kind: str


@dataclass(frozen=True)
class Scores:
    """The part of evaluate_fid.py's JSON that a model card uses."""

    metrics: dict[str, Finite]
    samples: ScoredSamples
    reference: ScoredReference
    warnings: list[str]


def write_model_card(
    folder: Path,
    name: str,
    model: SiT,
    recipe: str | None = None,
    scores: str | Path | None = None,
    weights: Weights | None = None,
) -> None:
    """Write folder/README.md.

    Args:
        name: the name to pass to `from_pretrained`.
        recipe: the run's configuration, as YAML.
        scores: JSON that evaluate_fid.py wrote.
        weights: which of a checkpoint's weights the model has.

    Raises:
        InputError: when `scores` is not such a file.
    """
    expected = "Expected the JSON that evaluate_fid.py --json writes."
    report = None if scores is None else read_json(scores, Scores, expected)
    data = ModelCardData(
        license=_LICENCE,
        library_name="diffusers",
        tags=["sit", "atconv", "flow-matching", "diffusion-transformer", "image-generation"],
        model_name="SiT" if report else None,
        eval_results=_results(report) if report else None,
    )
    parts = ["# " + _title(model), _description(model)]
    if weights is not None and weights.name is not None:
        parts.append(f"The weights are {weights}.")
    parts += ["## Use", _use(name, model)]
    if report:
        parts += ["## Metrics", _metrics(report)]
    if recipe:
        parts += [
            "## Recipe",
            "The configuration of the run, for `train.py --config`:",
            f"```yaml\n{recipe.strip()}\n```",
        ]
    parts += ["## Licence", "MIT. The training data and the autoencoder have licences of their own."]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    write_text(folder / "README.md", str(card))


def _title(model: SiT) -> str:
    pattern = describe_pattern(model.config.mixer_pattern)
    family = {describe_pattern(of_family): name for name, of_family in FAMILIES.items()}.get(pattern)
    return f"{family or f'SiT ({pattern})'}, {model.num_parameters() / 1e6:.1f} M parameters"


def _description(model: SiT) -> str:
    config = model.config
    task = _classes(model.classes) if config.num_classes else "unconditional"
    latents = config.latents["autoencoder"] if config.latents else "not stated"
    mixers = describe_pattern(config.mixer_pattern)
    has_atconv = "atconv" in mixer_names(expand_pattern(config.mixer_pattern, config.depth))
    source = " (ATConv: arXiv 2510.20092)" if has_atconv else ""
    changed = {"RMSNorm": config.norm == "rms", "SwiGLU": config.mlp == "swiglu"}
    blocks = "".join(f", {name}" for name, used in changed.items() if used)
    internal = (
        f" A second head after block {config.internal_block} serves Internal Guidance (arXiv 2512.24176): "
        "`internal_guidance=` in a call, 1 for none."
        if config.internal_block
        else ""
    )
    few = ""
    if config.meanflow_blocks is not None:
        few = " It is a flow map (Decoupled MeanFlow, arXiv 2510.24474), which draws in one to four steps."
    return (
        f"A diffusion transformer (SiT, arXiv 2401.08740): {config.depth} blocks of width {config.hidden_size}, mixers "
        f"{mixers}{source}{blocks}, patch {config.patch_size}, {task}. It predicts the "
        f"{config.prediction} of the {config.interpolant} interpolant on {config.in_channels}-channel latents of size "
        f"{config.input_size}.{few} Autoencoder: {latents}.{internal}"
    )


def _classes(classes: Classes) -> str:
    named = f" ({classes.titles(range(len(classes.names)))})" if classes.names else ""
    unseen = f", {len(classes.empty)} of them without a picture in training" if classes.empty else ""
    return f"{classes.count} classes{named}{unseen}"


def _use(name: str, model: SiT) -> str:
    arguments, few = "num_images=4", model.config.meanflow_blocks is not None
    if model.config.num_classes:
        guidance = 4.0 if model.config.label_dropout and not few else 1.0
        arguments = f"class_labels={model.classes.learned[:1]}, guidance_scale={guidance}"
    steps = 'num_inference_steps=4, solver="meanflow"' if few else "num_inference_steps=50"
    return _USE.format(name=name, arguments=f"{arguments}, {steps}")


def _metrics(report: Scores) -> str:
    rows = [f"| {_TITLES.get(name, name)} | {value:.4g} |" for name, value in report.metrics.items()]
    lines = ["| metric | value |", "|---|---|", *rows, ""]
    drawn = f" drawn from the weights {report.samples.weights}" if report.samples.weights else ""
    lines.append(
        f"{report.samples.count} samples{drawn} against {report.reference.path}, by evaluate_fid.py of sit-atconv."
    )
    lines += [f"* {warning}" for warning in report.warnings]
    return "\n".join(lines)


def _results(report: Scores) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=report.reference.kind,
            dataset_name=report.reference.path,
            metric_type=name,
            metric_value=value,
        )
        for name, value in report.metrics.items()
    ]
