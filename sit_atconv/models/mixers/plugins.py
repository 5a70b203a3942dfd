"""Mixers from outside the package: modules that the user names, and mixers that installed packages offer.

A package offers a mixer through an entry point of the group "sit_atconv.mixers": ``pool = "my_package.mixers:Pool"``. A
model's config.json never causes an import: only the user who trains or opens the model decides what is imported.
"""

import importlib
import os
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points, packages_distributions, version

from sit_atconv.errors import InputError
from sit_atconv.models.mixers.registry import find_mixer, list_mixers, register_mixer

VARIABLE = "SITATCONV_PLUGINS"
_GROUP = "sit_atconv.mixers"


def import_plugins(plugins: Iterable[str]) -> None:
    """Import and register plugins: names of modules that register mixers, or of mixers that installed packages offer.

    Raises `InputError` for a plugin that does not exist or fails during import.
    """
    for plugin in plugins:
        offer = _offer(plugin)
        try:
            found = offer.load() if offer else importlib.import_module(plugin)
        except Exception as error:  # a plugin is anybody's code
            raise InputError(
                f"The plugin {plugin} cannot be imported ({type(error).__name__}: {error}). Is it a module, or a mixer "
                "that an installed package offers? If it is a module of your own, add its folder to PYTHONPATH."
            ) from error
        if offer and plugin not in list_mixers():
            register_mixer(plugin)(found)


def find_plugins(names: Iterable[str]) -> None:
    """Import the plugins that SITATCONV_PLUGINS lists, separated by commas, if one of `names` is not registered."""
    if not set(names) <= set(list_mixers()):
        import_plugins(filter(None, (word.strip() for word in os.environ.get(VARIABLE, "").split(","))))


def import_offered(names: Iterable[str]) -> None:
    """Import the mixers among `names` that are not registered yet and that an installed package offers."""
    import_plugins(name for name in sorted(set(names) - set(list_mixers())) if _offer(name))


def origins(names: Iterable[str]) -> dict[str, str]:
    """The origins of mixers from outside this package: name -> "my-package 1.2", or the module."""
    found = {}
    for name in names:
        module = find_mixer(name).__module__
        if not module.startswith("sit_atconv."):
            packages = packages_distributions().get(module.split(".")[0], [])  # reads all packages: a second
            found[name] = f"{packages[0]} {version(packages[0])}" if packages else f"the module {module}"
    return found


def _offer(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=_GROUP, name=name)), None)
