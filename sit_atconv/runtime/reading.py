"""The reader of all JSON files: it returns a typed object, or raises an error of one paragraph that names the fault.

Types are dataclasses, typed dictionaries and plain containers, with ranges in their annotations (`msgspec.Meta`).
Nothing is converted: "3" is not a number. Numbers in environment variables are read here, too.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from sit_atconv.errors import InputError, nearest

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=2**53)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]  # neither NaN nor infinite
Text = Annotated[str, Meta(min_length=1, pattern=r"^[^\x00]*$")]  # for names of files and models
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


def read_json(path: str | Path, kind: type[T], advice: str = "") -> T:
    """Read the JSON file at `path` as a `kind`; `advice` is appended to error messages and says what to do.

    Raises `InputError`, which names the file and the key, when the file cannot be read, is not JSON, is nested too
    deeply, or does not match `kind`.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. {advice}".rstrip()) from error
    return parse_json(text, kind, str(path), advice)


def parse_json(text: str | bytes, kind: type[T], what: str, advice: str = "") -> T:
    """Parse JSON text as a `kind`, like `read_json`; `what` names the text in errors."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError(f"{what} is nested too deeply to be a file of this program. {advice}".rstrip()) from None
    except ValueError as error:
        raise InputError(f"{what} is not valid JSON ({error}). {advice}".rstrip()) from error
    return understand(value, kind, what, advice)


def understand(value: Any, kind: type[T], what: str, advice: str = "") -> T:
    """Convert plain values of JSON or YAML to a `kind`, like `read_json`. Keys that `kind` lacks are ignored."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        # "Expected `int`, got `str` - at `$.shards[0].count`"
        reason, _, place = str(error).partition(" - at ")
        key = re.sub(r"`(?:key` in `)?\$\.?|`", "", place)
        where = ": ".join(part for part in (what, key) if part)
        raise InputError(f"{where}: {reason}. {advice}".rstrip()) from error


def require_known_keys(values: Mapping[str, Any], kind: type, what: str) -> None:
    """Raise `InputError` for a key that the dataclass `kind` lacks, where ignoring it would change the meaning."""
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in known:
            raise InputError(f"{what}: unknown key '{key}': {nearest(str(key), known)}")


def positive_from_environment(variable: str, default: float, unit: str) -> float:
    """The number in an environment variable, or `default`. Raises `InputError` unless it is finite and above 0."""
    text = os.environ.get(variable, str(default))
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InputError(f"{variable}={text}: expected a number of {unit} above 0, such as {default}.")
    return number
