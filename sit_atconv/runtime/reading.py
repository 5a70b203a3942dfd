"""The one reader of JSON: text or plain values become a typed object, or one paragraph that names what is wrong.

Types are dataclasses, typed dictionaries and plain containers, with ranges in their annotations: `msgspec.Meta`.
Nothing is converted: "3" is no number.
"""

import json
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
Text = Annotated[str, Meta(min_length=1, pattern=r"^[^\x00]*$")]  # as names of files and models are
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


def read_json(path: str | Path, kind: type[T], advice: str = "") -> T:
    """The JSON file at `path` as a `kind`; `advice` ends the text of an error and says what to do.

    Raises `InputError` that names the file, and the key where there is one, when it cannot be read, is not JSON, nested
    too deeply, or holds something else than `kind` says.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. {advice}".rstrip()) from error
    return parse_json(text, kind, str(path), advice)


def parse_json(text: str | bytes, kind: type[T], what: str, advice: str = "") -> T:
    """JSON text as a `kind`, as `read_json` does; `what` is what the text is called."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError(f"{what} is nested too deeply to be one of ours. {advice}".rstrip()) from None
    except ValueError as error:
        raise InputError(f"{what} is not valid JSON ({error}). {advice}".rstrip()) from error
    return understand(value, kind, what, advice)


def understand(value: Any, kind: type[T], what: str, advice: str = "") -> T:
    """Plain values (what JSON or YAML hold) as a `kind`, as `read_json` does. Keys that `kind` lacks are ignored."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        # "Expected `int`, got `str` - at `$.shards[0].count`"
        reason, _, place = str(error).partition(" - at ")
        key = re.sub(r"`(?:key` in `)?\$\.?|`", "", place)
        where = ": ".join(part for part in (what, key) if part)
        raise InputError(f"{where}: {reason}. {advice}".rstrip()) from error


def require_known_keys(values: Mapping[str, Any], kind: type, what: str) -> None:
    """Raise `InputError` for a key that the dataclass `kind` lacks: ignored, it would change what the others mean."""
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in known:
            raise InputError(f"{what}: unknown key '{key}': {nearest(str(key), known)}")
