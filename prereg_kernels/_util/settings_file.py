# SPDX-License-Identifier: Apache-2.0
"""Settings as dataclasses, and their YAML form.

`from_dict` checks names and types against the dataclasses, so that a typo in a file is an error
that names it and never a silently used default.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from prereg_kernels._util.files import printable
from prereg_kernels._util.flags import is_value
from prereg_kernels._util.settings import shown

T = TypeVar("T")

_LARGEST_FILE, _MOST_VALUES = 2**20, 100_000


class _Loader(yaml.SafeLoader):
    """PyYAML's, but for 1e-3: a number in YAML 1.2, and text to PyYAML."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse(text: str) -> Any:
    """The plain values of YAML. Raises yaml.YAMLError where it is none."""
    return yaml.load(text, Loader=_Loader)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and scalars: what `from_dict`, YAML and JSON take."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def from_dict(kind: type[T], values: Any, at: str = "") -> T:
    """Build the dataclass `kind` from plain values.

    Raises:
        ValueError: an unknown key, a missing one, a wrong type or a value out of range, named by
            its path, as in "stages[1].lr: expected a number, got 'fast'".
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{at or 'config'}: expected a mapping, got {shown(values)}")
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    prefix = f"{at}." if at else ""
    for key in values:
        if key not in fields:
            raise ValueError(f"{prefix}{key}: unknown key; expected one of {sorted(fields)}")
    hints = typing.get_type_hints(kind)
    given = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()}
    for name, item in fields.items():
        if item.default is item.default_factory is dataclasses.MISSING and name not in given:
            raise ValueError(f"{prefix}{name}: required, but missing")
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _convert(hint: Any, value: Any, at: str) -> Any:
    """`value` as the type `hint`, or a ValueError that names `at`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, at)
    if hint is Any:
        return value
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _one_of([kind for kind in args if kind is not type(None)], value, at)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{at}: expected a list, got {shown(value)}")
        return tuple(_convert(args[0], item, f"{at}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{at}: expected a mapping, got {shown(value)}")
        return {str(key): _convert(args[1], item, f"{at}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{at}: expected a finite number, got {shown(value)}") from None
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    if type(value) is not hint:
        raise ValueError(f"{at}: expected {names[hint]}, got {shown(value)}")
    return value


def _one_of(hints: Sequence[Any], value: Any, at: str) -> Any:
    """As the first type that it is of; else the error of the first."""
    errors = []
    for hint in hints:
        try:
            return _convert(hint, value, at)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def load_config(path: str | Path, kind: type[T]) -> T:
    """Read a YAML file as the dataclass `kind`.

    Raises:
        ValueError: not YAML, or as in `from_dict`; the message names the file.
        OSError: the file cannot be read.
    """
    values = read_yaml(path)
    try:
        return from_dict(kind, values if values is not None else {})
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {error}") from None


def read_yaml(path: str | Path) -> Any:
    """The plain values of a YAML file.

    Raises:
        ValueError: not YAML, or more values than settings have, aliases followed; the message names
            the file.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(_LARGEST_FILE + 1)
    try:
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"expected at most {_LARGEST_FILE} bytes")
        values = parse(content.decode())
        _check_size(values)
    except RecursionError:
        raise ValueError(f"{printable(path)}: not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{printable(path)}: not valid YAML: {error}") from None
    return values


def _check_size(values: Any) -> None:
    """Raise ValueError if there are too many values, as a few aliases of aliases can make."""
    todo, count = [values], 0
    while todo:
        value = todo.pop()
        count += 1
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (list, set)):
            todo += value
        if count + len(todo) > _MOST_VALUES:
            raise ValueError(f"expected at most {_MOST_VALUES} values, aliases followed")


def take_flags(arguments: Sequence[str], prefix: str = "") -> tuple[list[str], dict[str, Any]]:
    """(the other arguments, {path: value}) of the flags that begin with `--` and the prefix:
    --pre.weight 0.3, or with a = between. A value is read as YAML is.

    Raises:
        ValueError: a flag without a value, where another flag is behind it too, or a value that is
            no YAML.
    """
    others: list[str] = []
    found: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if not flag.startswith(f"--{prefix}") or flag == "--":
            others.append(argument)
            continue
        text = value if equals else next(rest, None)
        if text is None:
            raise ValueError(f"{flag}: expected a value after it")
        if not (equals or is_value(text)):
            raise ValueError(f"{flag}: expected a value after it, got {printable(text)}")
        try:
            found[flag.removeprefix(f"--{prefix}")] = parse(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{flag}: {' '.join(str(error).split())}") from None
    return others, found


def override(values: Any, flags: Sequence[str]) -> Any:
    """Plain values with those that flags name: `--trainer.max_steps 9`, `--data.0.path x.json`.

    A list counts from 0. What is not there yet is added.

    Raises:
        ValueError: no flag, one without a value, or one that leads into a value without others.
    """
    others, found = take_flags(flags)
    if others:
        raise ValueError(f"{printable(others[0])}: expected a flag such as --section.field VALUE")
    for path, value in found.items():
        values = _put(values, path.split("."), value, f"--{path}")
    return values


def _put(values: Any, path: Sequence[str], value: Any, flag: str) -> Any:
    if not path:
        return value
    first, *rest = path
    if isinstance(values, list):
        if not first.isdecimal() or int(first) >= len(values):
            raise ValueError(f"{flag}: expected a number from 0 to {len(values) - 1}, got {first}")
        place = int(first)
        return [
            _put(item, rest, value, flag) if i == place else item for i, item in enumerate(values)
        ]
    if values is None or isinstance(values, Mapping):
        inside = dict(values or {})
        return {**inside, first: _put(inside.get(first), rest, value, flag)}
    raise ValueError(f"{flag}: there is no {first} in {shown(values)}")
