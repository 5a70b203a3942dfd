"""Every warning that a comparison deserves, whatever form the reference has."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluation_fixtures import StandIn
from PIL import Image

from sit_atconv.data.prepare import __main__ as prepare
from sit_atconv.evaluation import Options, evaluate, write_reference

WARNINGS = {
    "size": "Samples are 9x9, reference images 8x8",
    "lossy": "Some reference images are stored lossily",
    "few": "FID: 12 references give a rank-deficient covariance",
    "points": "Precision and recall use 12 reference images",
    "same": "Samples and reference are the same images",
    "weights": "The reference was made with other weights",
    "uncounted": "does not say how many images its statistics come from",
    "unnamed": "does not name the network of its statistics",
}
# What each form can tell; "weights" concerns stored statistics only, and "lossy" files of pictures.
IMAGES = {"size", "few", "points", "same"}
FORMS = {
    "folder": {*IMAGES, "lossy"},
    "pictures.zip": {*IMAGES, "lossy"},
    "images.npz": IMAGES,
    "prepared": IMAGES,
    "written.npz": {*IMAGES, "lossy", "weights"},  # by evaluate_fid.py reference
    "statistics.npz": {"size", "few", "same", "lossy", "weights"},  # the same without its images
    "adm.npz": {"size", "points", "same", "uncounted", "unnamed"},  # statistics and images, and nothing about them
    "others.npz": {"uncounted", "unnamed"},  # mu and sigma alone
}


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Path:
    """The same 12 pictures, JPEG files to begin with, in every form; "other.npz" are others of another size."""
    root = tmp_path_factory.mktemp("references")
    random = np.random.default_rng(0)
    (root / "folder").mkdir()
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(root / "folder" / f"{i:02d}.jpg")
    shutil.make_archive(str(root / "pictures"), "zip", root / "folder")
    pictures = np.stack([np.asarray(Image.open(path)) for path in sorted((root / "folder").iterdir())])
    np.savez(root / "images.npz", arr_0=pictures)
    np.savez(root / "other.npz", arr_0=random.integers(0, 256, (12, 9, 9, 3), np.uint8))
    prepare.main([str(root / "folder"), str(root / "prepared"), "--resolution", "8", "--vae", "identity", "--images"])
    write_reference(str(root / "folder"), root / "written.npz", StandIn(), images=12)
    # In the order of the files, so that arr_0 are "the same images"
    written = {**np.load(root / "written.npz"), "arr_0": pictures}
    statistics = {name: written[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(root / "written.npz", **written)
    np.savez(root / "statistics.npz", **{name: array for name, array in written.items() if name != "arr_0"})
    np.savez(root / "adm.npz", arr_0=pictures, **statistics)
    np.savez(root / "others.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    return root


@pytest.mark.parametrize("form", FORMS)
def test_a_warning_is_given_whatever_form_the_reference_has(references, form):
    other = StandIn()
    other.weights_sha256 = "6726825d" + "1" * 56
    reference = str(references / form)
    apart = evaluate(str(references / "other.npz"), reference, other)
    same = evaluate(str(references / "images.npz"), reference, StandIn())
    text = "\n".join(apart.warnings + same.warnings)
    assert {name for name, warning in WARNINGS.items() if warning in text} == FORMS[form]
    counted = "uncounted" not in FORMS[form]
    assert apart.reference["count"] == (12 if counted else None)
    assert ("an unknown number of images" in apart.table()) == (not counted)


def test_the_size_is_known_without_a_look_at_the_images_beside_statistics(references):
    report = evaluate(str(references / "other.npz"), str(references / "adm.npz"), StandIn(), Options(metrics=("fid",)))
    assert any(WARNINGS["size"] in warning for warning in report.warnings)
