"""Lets timm's own tests see our networks, as a plugin of pytest. The tests are in timm's source distribution:

    pip download timm==1.0.31 --no-deps --no-binary timm && tar xf timm-1.0.31.tar.gz
    python -m pytest -p benchmarks.timm_suite -c /dev/null timm-1.0.31/tests/test_models.py -k attnet

Without -k all networks are tested, which takes about 20 minutes of one core.
"""

import pytest
from timm.models import _registry

import sit_atconv.zoo  # noqa: F401 (registers the networks)

_OURS = {name for name, make in _registry._model_entrypoints.items() if make.__module__.startswith("sit_atconv.")}
_registry._module_to_models["convnext"] |= _OURS  # the tests ask for the networks of timm's modules


def pytest_configure(config: pytest.Config) -> None:
    """Make known the markers of timm's tests, whose configuration is left out."""
    for name in ("base", "cfg", "torchscript", "features", "fxforward", "fxbackward"):
        config.addinivalue_line("markers", name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of our networks."""
    names = {item: item.callspec.params.get("model_name", "") for item in items if hasattr(item, "callspec")}
    items[:] = [item for item, name in names.items() if name.partition(".")[0] in _OURS]
