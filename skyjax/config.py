"""One way to load an experiment: a Python file with `get_config()`, then `--config.key=value` overrides.

A parameter of `get_config` is set like any key, before the rest, and stands in the config, so that a run records it. A
key that does not exist or a value of another type is the user's error, named with its nearest key.
"""

import ast
import importlib.util
import inspect
import json
import pathlib
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections

from skyjax.errors import UserError, nearest


def load_config(
    path: str | pathlib.Path, overrides: Sequence[str] = (), topology: str | None = None
) -> ml_collections.ConfigDict:
    """The config of a file, with overrides written as "key=value" or "a.b.c=value".

    Args:
      path: of the file.
      overrides: in their order.
      topology: name of the devices that it is for (parallel/topology.py, `name_of`). The first of the config's
        `mesh_rules`, pairs of a regular expression over such names and {key: value}, that fits it is applied before the
        overrides.

    Raises:
      UserError: the file is missing or has no get_config(); a key is unknown; a value does not fit its key; or what
        get_config itself refuses.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f'config: there is no file "{path}"')
    module = run_file(path, "config")
    if not hasattr(module, "get_config"):
        raise UserError(f'config: "{path}" has no function get_config()')
    pairs = []
    for override in overrides:
        key, found, text = override.partition("=")
        if not found:
            raise UserError(f'config: "--config.{key}" needs a value: --config.{key}=VALUE')
        pairs.append((key, text))
    arguments = _arguments(module.get_config, pairs)
    config = module.get_config(**arguments)
    config.update(arguments)
    _apply_mesh_rules(config, topology)
    for key, text in pairs:
        if key not in arguments:
            _override(config, key, text)
    return config.lock()


def run_file(path: pathlib.Path, kind: str) -> types.ModuleType:
    """A user's Python file as a module of the file's name; `kind` says in messages what it was to be.

    Raises:
      UserError: it is not Python.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise UserError(f'{kind}: "{path}" is not a Python file')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f'{kind}: "{path}" line {error.lineno} is not Python: {error.msg}') from error
    return module


def read_config(path: str | pathlib.Path) -> ml_collections.ConfigDict:
    """The config that a run saved as JSON."""
    try:
        return ml_collections.ConfigDict(json.loads(pathlib.Path(path).read_text())).lock()
    except (OSError, ValueError) as error:
        raise UserError(f'config: "{path}" cannot be read: {error}') from error


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as indented JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def keys(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
    """Every key with its parents, as it is written on the command line."""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ml_collections.ConfigDict):
            yield from keys(value, f"{prefix}{key}.")


def _arguments(get_config: Callable[..., Any], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What `get_config` is called with: its defaults, or what overrides say."""
    arguments = {name: parameter.default for name, parameter in inspect.signature(get_config).parameters.items()}
    for name, default in arguments.items():
        if default is inspect.Parameter.empty:
            raise UserError(f'config: parameter "{name}" of get_config() has no default; give it one')
    return arguments | {key: _parse(key, text, arguments[key]) for key, text in pairs if key in arguments}


def _apply_mesh_rules(config: ml_collections.ConfigDict, topology: str | None) -> None:
    fitting = (rule for pattern, rule in config.get("mesh_rules", ()) if re.fullmatch(pattern, topology or ""))
    for key, value in next(fitting, {}).items():
        node, last = _node(config, key)
        with node.unlocked():
            node[last] = value


def _override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    node, last = _node(config, key)
    old = node[last]
    if isinstance(old, ml_collections.ConfigDict):
        raise UserError(f'config: "{key}" is a group; set one of {", ".join(f"{key}.{k}" for k in old)}')
    with node.unlocked():
        node[last] = _parse(key, text, old)


def _node(config: ml_collections.ConfigDict, key: str) -> tuple[ml_collections.ConfigDict, str]:
    """The group that holds a key, and the key's last word."""
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent] if isinstance(node, ml_collections.ConfigDict) and parent in node else None
    if not isinstance(node, ml_collections.ConfigDict) or last not in node:
        raise UserError(f'config: "{key}" does not exist{_nearest_key(key, config)}')
    return node, last


def _nearest_key(key: str, config: ml_collections.ConfigDict) -> str:
    return nearest(key, keys(config)).replace("; did you mean", "; nearest:").rstrip("?")


def _parse(key: str, text: str, old: Any) -> Any:
    """`text` as a value of the type that stands there now; None may become anything."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two: brackets without end
        value = text
    if isinstance(old, tuple | list):
        value = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not _fits(value, old):
        raise UserError(f'config: "{key}" is a {type(old).__name__} ({_short(old)}); "{_short(text)}" is not')
    return float(value) if isinstance(old, float) else value


def _fits(value: Any, old: Any) -> bool:
    """Whether a value may stand where `old` stands; a list's elements are like those at their places, or like any."""
    if old is None:
        return True
    if isinstance(old, float):
        # Whole numbers are as good, but for those that no float holds.
        return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)
    if not isinstance(old, tuple | list):
        return type(value) is type(old) and (not isinstance(value, int) or abs(value) < 2**63)
    if not isinstance(value, tuple | list):
        return False
    if len(value) == len(old) and all(map(_fits, value, old)):
        return True
    return not old or all(any(_fits(each, one) for one in old) for each in value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
