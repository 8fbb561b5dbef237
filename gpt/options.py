"""A command's options from a dataclass: flags, a YAML file, and one clear line for what is wrong with them.

    config = parse_config(RunConfig, argv, prog="twingrad train")

A field is the flag of its name. One in a nested dataclass has a full name, ``--optimizer.lr``, and a short one where no
other group uses it, ``--lr``. The string below a field is its help. ``--config run.yaml`` is read first, wherever it
stands, and the other flags over it; ``--print_config`` prints all options as YAML that ``--config`` reads back. The
words of a flag may be joined by dashes as well, ``--print-config``.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import numbers
import sys
import textwrap
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from gpt import world
from gpt.errors import UserError

__all__ = [
    "Parser",
    "did_you_mean",
    "from_dict",
    "given",
    "parse_config",
    "read_json",
    "read_json_object",
    "read_yaml",
    "run_command",
    "to_dict",
    "to_yaml",
]

Config = TypeVar("Config")

_NUMBERS = {int: numbers.Integral, float: numbers.Real}


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of an error message: "; did you mean X?", or nothing where no choice is close."""
    close = get_close_matches(name, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class Parser(argparse.ArgumentParser):
    """argparse where a wrong argument is a UserError of one line, no option may be abbreviated, and dashes between an
    option's words are as good as underscores."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(_underscored(sys.argv[1:] if args is None else args), namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            kind = "option" if name.startswith("-") else "argument"
            flags = self._option_string_actions if kind == "option" else ()
            raise UserError(f"{self.prog} has no {kind} {name}{did_you_mean(name, flags)}")
        return known


def _underscored(argv: Sequence[str]) -> list[str]:
    """The arguments with every option's name spelled as it is declared; values, and what follows "--", as they are.

    What has a space in it is a value, to argparse too.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    words = []
    for word in argv[:end]:
        name, equals, value = word.partition("=")
        spelled = f"--{name[2:].replace('-', '_')}{equals}{value}"
        words.append(spelled if name.startswith("--") and " " not in name else word)
    return words + list(argv[end:])


def run_command(prog: str, commands: Mapping[str, Callable[[list[str]], int | None]], argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with on the rest of it, and return its exit status (None counts as 0).

    The first line of a command's docstring is its help.
    """
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        rows = (f"  {name:<{width}}  {(function.__doc__ or '').splitlines()[0]}" for name, function in commands.items())
        print(f"usage: {prog} COMMAND [--help] [OPTIONS]", "", *rows, sep="\n")
        return 0 if argv else 2
    if name not in commands:
        raise UserError(f"{prog} has no command {name}{did_you_mean(name, commands)} (see {prog} --help)")
    return commands[name](rest) or 0


def parse_config(config_class: type[Config], argv: Sequence[str], prog: str) -> Config:
    """An instance of the dataclass `config_class` from a command's arguments; UserError where they make none."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--OPTION VALUE ...]",
        description=inspect.getdoc(config_class),
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file of these options, which flags override")
    parser.add_argument("--print_config", action="store_true", help="print all options as YAML, and stop")
    argv = _underscored(argv)
    _add_flags(parser, config_class, argv)
    flags = vars(parser.parse_args(argv))
    file, print_config = flags.pop("config", None), flags.pop("print_config", False)
    settings = read_yaml(file) if file else {}
    for name, value in flags.items():
        _set(settings, name.split("."), value)
    try:
        config = from_dict(config_class, settings)
    except UserError as error:
        raise UserError(f"{error} (with --config {file})" if file else str(error)) from None
    if print_config:
        if world.is_first():
            print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def given(config: Any) -> list[str]:
    """The fields of a dataclass that are not as their defaults."""
    return [field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]


def from_dict(cls: type[Config], settings: Mapping[str, Any], prefix: str = "") -> Config:
    """An instance of the dataclass `cls`, text converted to the fields' types. Raises UserError naming the field."""
    hints = get_type_hints(cls)
    for name in settings:
        if name not in hints:
            raise UserError(f"{prefix}{name}: no such option{did_you_mean(str(name), hints)}")
    values = {name: _convert(f"{prefix}{name}", value, hints[name]) for name, value in settings.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a dataclass, nested, as YAML and JSON can hold them; `from_dict` is the inverse."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The fields of a dataclass as YAML text, in their order."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises UserError naming the file and what is wrong with it."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict | None):
        raise UserError(f"{path}: expected a YAML mapping of options, got a {type(settings).__name__}")
    return settings or {}


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises UserError naming the file and what is wrong with it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows marks the order of bytes
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # also what is not UTF-8, or lists within lists without end
        raise UserError(f"{path}: not JSON: {' '.join(str(error).split())}") from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds, names and values. Raises UserError as `read_json` does, also for no object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


class _Option(NamedTuple):
    name: str  # with its groups: "optimizer.lr"
    hint: Any
    default: Any
    help: str


def _options(cls: Any, prefix: str = "") -> Iterator[_Option]:
    """The options of a dataclass, those of a nested one in its place."""
    hints, helps = get_type_hints(cls), _field_docs(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from _options(hint, f"{name}.")
        else:
            yield _Option(name, hint, field.default, helps.get(field.name, ""))


def _field_docs(cls: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source, or in that of a class it is derived from."""
    docs = {}
    for part in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        definition: Any = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        for pair in itertools.pairwise(definition.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def _add_flags(parser: Parser, config_class: type, argv: Sequence[str]) -> None:
    """A flag for each option: its field's name where no other group has one, and its full name."""
    options = list(_options(config_class))
    uses = Counter(option.name.rpartition(".")[2] for option in options)
    groups: dict[str, Any] = {}
    for option in options:
        title, _, field = option.name.rpartition(".")
        if title not in groups:
            groups[title] = parser.add_argument_group(title or config_class.__name__)
        if get_origin(option.hint) is dict:
            groups[title].add_argument(f"--{option.name}.FIELD", metavar="VALUE", help=option.help)
            for flag in sorted({word.partition("=")[0] for word in argv if word.startswith(f"--{option.name}.")}):
                parser.add_argument(flag, dest=flag[2:], type=_scalar, help=argparse.SUPPRESS)
            continue
        short = field if uses[field] == 1 else option.name
        _add_flag(groups[title], short, option, option.help)
        if short != option.name:
            _add_flag(groups[title], option.name, option, argparse.SUPPRESS)


def _add_flag(group: Any, flag: str, option: _Option, text: str) -> None:
    default = (
        "" if option.default in (None, dataclasses.MISSING) or text == argparse.SUPPRESS else f" [{option.default}]"
    )
    bare: dict[str, Any] = {"nargs": "?", "const": True} if option.hint is bool else {}
    if _is_list(option.hint):
        bare, default = {"action": "append"}, ""
    group.add_argument(
        f"--{flag}", dest=option.name, metavar=_expected(option.hint), help=text.replace("%", "%%") + default, **bare
    )


def _set(settings: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Put `value` at a path of nested mappings."""
    for depth, name in enumerate(path[:-1]):
        settings = settings.setdefault(name, {})
        if not isinstance(settings, dict):
            raise UserError(f"{'.'.join(path[: depth + 1])}: expected a group of options, got {settings!r}")
    settings[path[-1]] = value


def _convert(name: str, value: Any, hint: Any, expected: str = "") -> Any:
    """`value` as the type `hint`; text is converted, because flags are text and YAML reads 4e-4 as text."""
    origin, choices = get_origin(hint), get_args(hint)
    expected = expected or _expected(hint)
    if origin in (Union, types.UnionType):
        if value is None or value in ("none", "null"):
            return None
        return _convert(name, value, next(choice for choice in choices if choice is not types.NoneType), expected)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(hint, value, f"{name}.")
    if origin is Literal and value in choices:
        return value
    if _is_list(hint):
        if isinstance(value, list | tuple):
            return tuple(_convert(name, part, choices[0]) for part in value)
        return (_convert(name, value, choices[0], expected),)
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list | tuple) and len(parts) == len(choices):
            return tuple(_convert(name, part, choice) for part, choice in zip(parts, choices, strict=True))
    if origin is dict or hint in (bool, int, float, str):
        given = _scalar(value) if isinstance(value, str) and hint is not str else value
        if type(given) is (origin or hint):
            return given
        if hint in (int, float) and isinstance(given, _NUMBERS[hint]) and not isinstance(given, bool):
            return hint(given)  # NumPy's are numbers too
    close = did_you_mean(str(value), choices) if origin is Literal else ""
    raise UserError(f"{name}: expected {expected}, got {value!r}{close}")


def _scalar(text: str) -> Any:
    """What a flag's text stands for: a truth value, a whole number, a number, or itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _is_list(hint: Any) -> bool:
    """Whether a type is tuple[X, ...]: a flag that may be given several times, a list in YAML."""
    return get_origin(hint) is tuple and get_args(hint)[1:] == (...,)


def _expected(hint: Any) -> str:
    """A type in words, for help and error messages."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(map(str, choices))
    if origin in (Union, types.UnionType):
        return "|".join("none" if choice is types.NoneType else _expected(choice) for choice in choices)
    if _is_list(hint):
        return _expected(choices[0])
    if origin is tuple:
        return ",".join(map(_expected, choices))
    if dataclasses.is_dataclass(hint) or origin is dict:
        return "a group of options"
    return {bool: "true|false", int: "integer", float: "number", str: "text"}[hint]


def _plain(value: Any) -> Any:
    """Tuples as lists, which is how YAML and JSON give them back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
