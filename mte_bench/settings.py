"""Recipes and protocols: named YAML files, validated into frozen settings, overridable and hashed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mte_bench.errors import UserError, did_you_mean
from mte_bench.files import hash_of


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys, and numbers that are none."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @property
    def hash(self) -> str:
        """Twelve hex digits that change when, and only when, a setting changes."""
        return hash_of(self.model_dump(mode="json"))

    @classmethod
    def check(cls, values: Any, where: str) -> Self:
        """Validate ``values``; each mistake becomes part of one ``UserError`` line that names ``where`` and the key."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{where}: {_mistakes(cls, values, error)}") from error


def _mistakes(model: type[BaseModel], values: Any, error: ValidationError) -> str:
    """What is wrong in ``values``, each key once: all alternatives of a union together, the items of a list before its length."""
    found: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    for item in error.errors():
        path = _stated(values, [part for part in item["loc"] if not _is_alternative(part)])
        key = ".".join(str(part) for part in path)
        if item["type"] == "extra_forbidden":
            known = _fields(model, [str(part) for part in path[:-1]])
            found[f"unknown setting '{key}'{did_you_mean(str(path[-1]), known)}"] = []
        elif not (item["type"] == "too_short" and any(f"{other}.".startswith(f"{key}.") for other in found)):
            found.setdefault(key, []).append(_message(dict(item)))
            given[key] = f", got {item['input']!r}"
            if item["type"] == "missing" or isinstance(item["input"], Mapping | BaseModel):
                del given[key]  # a whole group of settings says nothing
    return "; ".join(": ".join(filter(None, (key, " or ".join(words)))) + given.get(key, "") for key, words in found.items())


def _stated(values: Any, path: list[int | str]) -> list[int | str]:
    """``path`` without the place in a list where one value was given for the list."""
    for depth, part in enumerate(path):
        if isinstance(part, int) and not isinstance(values, list | tuple):
            return path[:depth]
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            break
    return path


def _is_alternative(part: int | str) -> bool:
    """Whether this part of a place names no setting but a validator, or a type of a union."""
    return isinstance(part, str) and (part.startswith("function-") or "[" in part or part in ("int", "float", "str", "bool"))


_PLAIN = {
    "tuple_type": "input should be a list, such as [1, 2]",
    "model_type": "input should be a group of settings",
    "dict_type": "input should be a group of settings",
    "string_type": "input should be text",
}


def _message(item: dict[str, Any]) -> str:
    """One mistake in the words of YAML, not of Python."""
    if item["type"] == "too_short":
        return f"the list needs {item['ctx']['min_length']} or more items"
    message: str = _PLAIN.get(item["type"], item["msg"].removeprefix("Value error, "))
    return message[0].lower() + message[1:]


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that are known at ``path`` inside ``model``."""
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            continue  # an alternative of a union: its tag is not a field
        inner = [t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        if not inner:
            return []
        if len(inner) > 1:
            return sorted({name for t in inner for name in t.model_fields})
        model = inner[0]
    return list(model.model_fields)


def _types(annotation: Any) -> list[Any]:
    return [annotation, *(t for arg in getattr(annotation, "__args__", ()) for t in _types(arg))]


def names_in(folder: Path) -> list[str]:
    """The names of the YAML files in ``folder``, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_yaml(name: str, folder: Path, kind: str) -> dict[str, Any]:
    """Read ``name`` (a name in ``folder``, or a path ending in .yaml); ``kind`` ("recipe", "protocol") is for errors."""
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else folder / f"{name}.yaml"
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        if is_path:
            raise UserError(f"{path}: no such file") from None
        raise UserError(f"no {kind} named '{name}'{did_you_mean(name, names_in(folder))}; mte-bench list {kind}s") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise UserError(f"{path}: not valid YAML ({error.problem}{where})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(values, dict):
        found = "the file is empty" if values is None else "this is a list" if isinstance(values, list) else "this is one value"
        raise UserError(f"{path}: a {kind} is a mapping of settings, {found}")
    return values


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"'{key.value}' is stated twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply ``key.sub=value`` strings (values are YAML) to nested settings; returns a new mapping.

    ``null`` sets None; a mapping value replaces the whole mapping at that key. A key below a group that is switched off,
    or on with its defaults (``mte=true``), switches it on.
    """
    result = _copy(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set {assignment}: write it as key=value")
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            if place.get(parent) is None or isinstance(place[parent], bool):
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise UserError(f"--set {assignment}: '{parent}' is not a group of settings")
        try:
            place[last] = _number(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise UserError(f"--set {assignment}: the value is not valid YAML") from error
    return result


def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes`` laid over them, group by group; returns a new mapping."""
    result = _copy(values)
    for key, change in changes.items():
        both = isinstance(change, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], change) if both else _copy(change)
    return result


def _number(value: Any) -> Any:
    """YAML 1.1 reads 5e-4 as text; people mean a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return [_number(item) for item in value] if isinstance(value, list) else value


def _copy(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _copy(value) for key, value in values.items()}
    return _number(values)
