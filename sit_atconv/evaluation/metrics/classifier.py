"""Label agreement: the share of samples for which a classifier of real pictures predicts the requested class."""

from typing import Any

import numpy as np

from sit_atconv.errors import InputError

_FOLDS = 5


def create_classifier() -> Any:
    """A support vector classifier (scikit-learn's `SVC`): a Gaussian kernel as wide as the features vary, C = 10.

    It does not depend on the features' scale, so the same one serves pixels and features of networks. Raises
    `InputError` without scikit-learn.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise InputError("Label agreement needs scikit-learn: pip install 'sit-atconv[eval]'.") from error
    return SVC(C=10, gamma="scale")


def label_agreement(
    classifier: Any, real: np.ndarray, labels: np.ndarray, samples: np.ndarray, requested: np.ndarray
) -> tuple[float, float]:
    """Label agreement of samples, and the accuracy of its classifier, in [0, 1].

    The classifier is fitted on all `real` features (n, d) with `labels` (n,), at least two of each class, and predicts
    the class of each of the `samples` (m, d), of which `requested` (m,) was asked for. The accuracy is that of
    cross-validation on the real ones, in five folds, or in as many as the smallest class has members.
    """
    from sklearn.model_selection import cross_val_score

    folds = min(_FOLDS, int(np.unique(labels, return_counts=True)[1].min()))
    accuracy = cross_val_score(classifier, real, labels, cv=folds).mean()
    predicted = classifier.fit(real, labels).predict(samples)
    return float((predicted == requested).mean()), float(accuracy)
