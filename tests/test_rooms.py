"""The house: who may import whom (../shared/DESIGN.md), how many modules a folder holds, how long a file is.

A room is a folder or a file of `sit_atconv`; it stands for everything in it, but for what has a place of its own.
"""

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sit_atconv"

# A module imports from its own floor and from those before it.
FLOORS = [
    "ops config runtime errors randomness images classes figures",
    "models",
    "flow",
    "data alignment autoencoder",
    "training sampling evaluation convert zoo analysis",
    "study graft",
    "train sample evaluate_fid benchmarks examples",
]

# Within a floor or a room, in the same way, with "|" between the rows. A room's own name stands for the files beside
# its folders; what its __init__ offers of them all is no step upwards.
ORDERS = {
    "data": "alignment autoencoder | data.pictures data.remote | data.latents data.digits | data.foreign_latents |"
    " data.repa | data.shards | data.sources | data.foreign | data.dataset | data.prepare data.sampler",
    "programs": "sampling evaluation convert zoo analysis | training | zoo.train",
    "training": "training.run | training.averages | training.session | training.watch | training",
    "evaluation": "evaluation.features | evaluation.metrics | evaluation.reading | evaluation.scoring | evaluation",
    "sampling": "sampling | sampling.writing | sampling.run sampling.pipeline sampling.inversion",
}

# Rooms that know nothing of one another, though their floors would allow it: (who, of whom).
STRANGERS = [("flow", "models"), ("evaluation", "sampling")]
ANNOUNCED = {"zoo", "analysis", "study", "graft"}  # rooms of the design that need not be there yet

MODULES_SIDE_BY_SIDE, LINES = 12, 400


@cache
def modules() -> dict[str, Path]:
    """Every module by its name, without "sit_atconv."; the package itself is ""."""
    folders = (PACKAGE, ROOT / "benchmarks", ROOT / "examples")
    files = [*(path for folder in folders for path in folder.rglob("*.py")), *ROOT.glob("*.py")]
    found = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name.removeprefix("sit_atconv").removeprefix(".")] = path
    return found


@cache
def imports(module: str) -> tuple[str, ...]:
    """The modules of ours that a module imports, also within functions."""
    return tuple(sorted(set(_imports(module)) - {module}))


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import does not say from where"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if _ours(name) in modules() else node.module for name in inner]
            if node.module == "sit_atconv":  # the package's front door: what it shows, and its version
                names = [name for name in names if inner != ["sit_atconv.__version__"]]
        yield from (_ours(name) for name in names if _ours(name) in modules())


def _ours(name: str) -> str:
    """The name of a module of the package without the package, that of others as it is."""
    return "" if name == "sit_atconv" else name.removeprefix("sit_atconv.")


def place(module: str, table: list[str]) -> int | None:
    """The number of the row that names the module or the nearest room around it."""
    room = module
    while room:
        for number, row in enumerate(table):
            if room in row.split():
                return number
        room = room.rpartition(".")[0]
    return None


def upwards(table: list[str], members: Iterable[str]) -> list[str]:
    """Imports of `members` that run from a row of the table into a later one."""
    found = []
    for module in members:
        here = place(module, table)
        for imported in imports(module):
            there = place(imported, table)
            if here is not None and there is not None and here < there:
                found.append(f"{module} imports {imported}")
    return found


def test_every_module_has_a_floor() -> None:
    assert [module for module in modules() if module and place(module, FLOORS) is None] == []


def test_no_import_runs_to_a_higher_floor() -> None:
    assert upwards(FLOORS, modules()) == []


@pytest.mark.parametrize("room", ORDERS)
def test_no_import_runs_upwards_within_a_room(room: str) -> None:
    members = [module for module, path in modules().items() if path.name != "__init__.py"]
    assert upwards(ORDERS[room].split("|"), members) == []


@pytest.mark.parametrize(("who", "of_whom"), STRANGERS)
def test_rooms_that_know_nothing_of_one_another(who: str, of_whom: str) -> None:
    found = [f"{m} imports {i}" for m in modules() if inside(m, who) for i in imports(m) if inside(i, of_whom)]
    assert found == []


def inside(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{room}.")


def test_only_commands_and_benchmarks_go_through_the_front_door() -> None:
    assert [m for m in modules() if "" in imports(m) and not m.startswith("benchmarks")] == []


def test_no_modules_form_a_circle() -> None:
    TopologicalSorter({module: imports(module) for module in modules()}).prepare()  # its error names the circle


def test_the_tables_name_rooms_that_there_are() -> None:
    named = set(" ".join([*FLOORS, *ORDERS.values()]).replace("|", " ").split())
    assert {room for room in named if not any(inside(module, room) for module in modules())} <= ANNOUNCED


def test_a_folder_holds_a_dozen_modules_at_most() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    counts = {folder: sum(path.name != "__init__.py" for path in folder.glob("*.py")) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MODULES_SIDE_BY_SIDE} == {}


def test_no_file_is_longer_than_400_lines() -> None:
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LINES} == {}
