"""Mixers from outside the package: modules that the user names, and what installed packages offer.

A package offers a mixer by an entry point of the group "sit_atconv.mixers": ``pool = "my_package.mixers:Pool"``. A
model's config.json never makes anything be imported: whoever trains or opens the model says so.
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
    """Import what registers mixers: modules, or mixers that installed packages offer, by their names.

    Raises `InputError` for a plugin that does not exist, or fails while it is imported.
    """
    for plugin in plugins:
        offer = _offer(plugin)
        try:
            found = offer.load() if offer else importlib.import_module(plugin)
        except Exception as error:  # a plugin is anybody's code
            raise InputError(
                f"The plugin {plugin} cannot be imported ({type(error).__name__}: {error}). Is it a module, or a mixer "
                "that an installed package offers? The folder of a module of your own belongs into PYTHONPATH."
            ) from error
        if offer and plugin not in list_mixers():
            register_mixer(plugin)(found)


def find_plugins(names: Iterable[str]) -> None:
    """Import the plugins that SITATCONV_PLUGINS lists, separated by commas, if one of `names` is not registered."""
    if not set(names) <= set(list_mixers()):
        import_plugins(filter(None, (word.strip() for word in os.environ.get(VARIABLE, "").split(","))))


def import_offered(names: Iterable[str]) -> None:
    """Import those of the mixers called `names` that are not registered, but offered by an installed package."""
    import_plugins(name for name in sorted(set(names) - set(list_mixers())) if _offer(name))


def origins(names: Iterable[str]) -> dict[str, str]:
    """Where mixers from outside this package come from: name -> "my-package 1.2", or the module."""
    found = {}
    for name in names:
        module = find_mixer(name).__module__
        packages = packages_distributions().get(module.split(".")[0], [])
        if not module.startswith("sit_atconv."):
            found[name] = f"{packages[0]} {version(packages[0])}" if packages else f"the module {module}"
    return found


def _offer(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=_GROUP, name=name)), None)
