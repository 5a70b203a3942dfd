"""FID, sFID, inception score, precision and recall as the ADM evaluator defines them, without TensorFlow."""

from sit_atconv.evaluation.evaluate import Options, SampleStream, evaluate
from sit_atconv.evaluation.features.inception import InceptionFeatures
from sit_atconv.evaluation.features.kinds import create_features
from sit_atconv.evaluation.metrics.cmmd import cmmd
from sit_atconv.evaluation.metrics.distances import frechet_distance, inception_score, kernel_distance
from sit_atconv.evaluation.metrics.neighbours import precision_recall
from sit_atconv.evaluation.metrics.sliced import mind
from sit_atconv.evaluation.reading.references import Reading, read_reference
from sit_atconv.evaluation.reading.writing import write_reference
from sit_atconv.evaluation.report import Report

__all__ = [
    "InceptionFeatures",
    "Options",
    "Reading",
    "Report",
    "SampleStream",
    "cmmd",
    "create_features",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "mind",
    "precision_recall",
    "read_reference",
    "write_reference",
]
