"""The lower bounds in pyproject.toml are versions that were tested: those that `make test-lowest` installs."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TESTED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["eval"], *PROJECT["optional-dependencies"]["dev"]]


def locked(name: str) -> dict[str, list[Version]]:
    """The versions of each package in a lock file: several where they depend on Python's."""
    found: dict[str, list[Version]] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        found.setdefault(canonicalize_name(requirement.name), []).append(Version(specifier.version))
    return found


@pytest.mark.parametrize("line", TESTED)
def test_each_lower_bound_is_the_version_that_is_tested(line: str) -> None:
    requirement = Requirement(line)
    (bound,) = requirement.specifier
    assert bound.operator == ">="
    assert locked("requirements-lowest.lock")[canonicalize_name(requirement.name)] == [Version(bound.version)]


@pytest.mark.parametrize("line", TESTED)
def test_the_locked_versions_satisfy_the_bounds(line: str) -> None:
    requirement = Requirement(line)
    assert all(
        version in requirement.specifier for version in locked("requirements.lock")[canonicalize_name(requirement.name)]
    )
