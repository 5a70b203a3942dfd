"""FID, sFID, inception score, precision and recall as the ADM evaluator defines them, without TensorFlow."""

from sit_atconv.evaluation.inception import InceptionFeatures
from sit_atconv.evaluation.metrics import frechet_distance, inception_score, kernel_distance
from sit_atconv.evaluation.neighbours import precision_recall

__all__ = ["InceptionFeatures", "frechet_distance", "inception_score", "kernel_distance", "precision_recall"]
