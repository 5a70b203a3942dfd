"""What must be said under the table, so that its numbers can be compared and repeated."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from sit_atconv.evaluation.report import Report, title
from sit_atconv.evaluation.scoring.bootstrap import COVERAGE
from sit_atconv.sampling.settings import OF_GUIDANCE, SamplerSettings
from sit_atconv.study.table.contents import Table
from sit_atconv.study.table.rows import Subject

_ROUNDING = (
    "samples are bytes before they are scored: 127.5 x + 128 for a pixel x from -1 to 1, clamped to 0 and 255 and "
    "rounded down, hence to the nearest, as in ADM, DiT and SiT."
)
_LABELS = (
    "random ones are uniform and independent; balanced ones contain every class once in as many successive samples as "
    "there are classes. Compare rows with the same labels only: on ImageNet, FID differs by about 0.1 between the two."
)
_SHORT = 8  # characters of a digest


def notes(table: Table) -> list[tuple[str, str]]:
    """Terms and sentences about them."""
    conditional = any(subject.labels != (None,) for subject in table.subjects)
    return [
        *((subject.name, _about_model(table, subject)) for subject in table.subjects),
        ("sampling", _about_sampling(table)),
        *([("guidance", _about_guidance(table))] if table.drawn.guided else []),
        *([("labels", _LABELS)] if conditional else []),
        ("samples", f"{table.drawn.num_samples:,} in each row, seed {table.drawn.seed}, every set drawn once."),
        ("rounding to bytes", _ROUNDING),
        ("reference", _joined(_reference(scored.report.reference) for scored in table.scored)),
        ("features", _joined(_features(facts) for scored in table.scored for facts in _all_features(scored.report))),
        *([("FDr", text)] if (text := _about_ratios(table)) else []),
        *([("MIND", text)] if (text := _about_floors(table)) else []),
        ("intervals", _about_intervals(table)),
        ("rounding of numbers", _about_decimals(table)),
        *([("missing", text)] if (text := _about_missing(table)) else []),
        ("versions", _joined(_versions(scored.report.versions) for scored in table.scored)),
        *(("warning", warning) for warning in warnings(table)),
        ("command", table.command),
    ]


def warnings(table: Table) -> list[str]:
    """The warnings of all reports, each once, after the rows that it is about if these are not all."""
    rows: dict[str, list[str]] = {}
    for scored in table.scored:
        for warning in scored.report.warnings:
            rows.setdefault(warning, []).append(str(scored.set))
    everyone = len(table.scored)
    return [text if len(names) == everyone else f"{'; '.join(names)}: {text}" for text, names in rows.items()]


def digests(table: Table, subject: Subject) -> dict[str, dict[str, str]]:
    """The sha256 of the files of a model and of what it was used with, by setting and name."""
    found: dict[str, dict[str, str]] = {}
    for scored in table.of(subject):
        found |= scored.drawn["sha256"]
    return found


def _about_model(table: Table, subject: Subject) -> str:
    calls = "; ".join(f"{kind} {_calls(count)}" for kind, count in subject.calls.items())
    files = _files(digests(table, subject)["checkpoint"])
    kinds = "" if "guided" in subject.calls or not table.drawn.guided else f" It has no guided rows: {_lacks(table)}."
    return (
        f"{subject.weights} ({files}). Autoencoder: {subject.autoencoder}. "
        f"Calls of networks for a sample: {calls}.{kinds}"
    )


def _lacks(table: Table) -> str:
    return "no null class" if table.drawn.guided.internal_guidance == 1 else "no second head, or no null class"


def _calls(count: object) -> str:
    return "as many as dopri5 chooses, which differ from sample to sample" if count is None else str(count)


def _about_sampling(table: Table) -> str:
    settings, usual = table.drawn.unguided, asdict(SamplerSettings())
    steps = "" if settings.solver == "dopri5" else f", {settings.steps} steps"
    left_out = ("solver", "steps", *OF_GUIDANCE)
    if settings.solver == "dopri5":
        shown = {"atol": settings.atol, "rtol": settings.rtol}
    elif settings.stochastic:
        shown = {name: getattr(settings, name) for name in ("diffusion", "diffusion_scale", "last_step")}
        shown |= {} if settings.last_step == "none" else {"last_step_size": settings.last_step_size}
    else:
        shown = {}
    shown |= {name: value for name, value in asdict(settings).items() if value != usual[name]}
    options = "".join(f", {name.replace('_', ' ')} {v}" for name, v in shown.items() if name not in left_out)
    return f"{settings.solver}{steps}{options}."


def _about_guidance(table: Table) -> str:
    settings = table.drawn.guided
    internal = f"Internal Guidance by the model's second head, scale {settings.internal_guidance:g} "
    internal += _at_times(settings.internal_interval)
    if settings.guidance == 1:
        return f"{internal}; unguided rows have none."
    channels = f", of the first {settings.guidance_channels} channels only" if settings.guidance_channels else ""
    base = "the null class"
    if table.drawn.weak_checkpoint:
        guided = next(scored for scored in table.scored if scored.set.guided)
        base = f"the model {table.drawn.weak_checkpoint} ({_files(guided.drawn['sha256']['weak_checkpoint'])})"
    where = _at_times(settings.interval)
    also = "" if settings.internal_guidance == 1 else f"; {internal}"
    return f"scale {settings.guidance:g} {where}{channels}, away from {base}{also}; unguided rows have none."


def _at_times(interval: tuple[float, float]) -> str:
    low, high = interval
    return "at all times" if (low, high) == (0, 1) else f"at times from {low:g} to {high:g} (1 is noise)"


def _about_intervals(table: Table) -> str:
    resamples = table.scored[0].report.settings["bootstrap"]
    if not resamples:
        return "none were asked for (--bootstrap)."
    kernel = any(column.key.startswith("kid") for column in table.columns)
    return (
        f"in brackets, {COVERAGE[1] - COVERAGE[0]:g} % of {resamples} bootstrap resamples of the samples (for recall, "
        "of the reference), shifted to have the number as their mean; the spread between trainings is not in them."
        + (" KID's is normal, from the spread of its subsets." if kernel else "")
    )


def _about_decimals(table: Table) -> str:
    decimals = ", ".join(f"{column.title} to {column.decimals}" for column in table.columns)
    return f"decimals: {decimals}. table.json has all digits."


def _about_missing(table: Table) -> str:
    titles = {column.key: column.title for column in table.columns}
    reasons = {key: text for scored in table.scored for key, text in scored.report.unsupported.items()}
    return "; ".join(f"{titles[key]}: {reason}" for key, reason in reasons.items())


def _all_features(report: Report) -> list[dict[str, Any]]:
    return [report.features, *report.other_features]


def _about_ratios(table: Table) -> str:
    """What FDr divides by; nothing without it."""
    found = {name: part["divisor"] for scored in table.scored for name, part in scored.report.ratios.items()}
    listed = ", ".join(f"{name} {divisor:.4g}" for name, divisor in found.items())
    return f"the mean over features of the Fréchet distance, divided by that of real images: {listed}." if found else ""


def _about_floors(table: Table) -> str:
    """MIND between parts of the reference; nothing without it."""
    found = {name: floor for scored in table.scored for name, floor in scored.report.floors.items()}
    return "".join(
        f"{title(name)}: {floor['value']:.4f} between {floor['count']:.0f} references and as many others. "
        for name, floor in found.items()
    ).rstrip()


def _reference(facts: dict[str, Any]) -> str:
    count = "an unknown number of" if facts["count"] is None else f"{facts['count']:,}"
    kind = "statistics of " if facts["kind"] == "statistics" else ""
    text = (
        f"{facts['path']}: {kind}{count} images, sha256 {(facts.get('file_sha256') or facts['images_sha256'])[:_SHORT]}"
    )
    if points := facts.get("images_in_arr_0"):
        text += f"; precision and recall: {points['count']:,} images, sha256 {points['images_sha256'][:_SHORT]}"
    return text


def _features(facts: dict[str, Any]) -> str:
    weights = f", weights sha256 {facts['weights_sha256'][:_SHORT]}" if facts["weights_sha256"] else ""
    return f"{facts['title']}{weights}, {facts['precision']} on {facts['device']}, {facts['neighbours']} neighbours"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _files(hashes: dict[str, str]) -> str:
    weights = {name: digest for name, digest in hashes.items() if name != "config.json"}
    return ", ".join(f"{name}: sha256 {digest[:_SHORT]}" for name, digest in weights.items())


def _joined(texts: Iterable[str]) -> str:
    """Different texts, each once."""
    return "; ".join(dict.fromkeys(texts)) + "."
