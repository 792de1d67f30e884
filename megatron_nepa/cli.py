"""Command line to :class:`RunConfig`: every field of the config is a flag, and its comment is the help text."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn, Union

from megatron_nepa.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    override,
)
from megatron_nepa.recipes import RECIPES

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
}
# the fields that people set most are flags of one word, spelled as in DeepSpeed and Megatron
SHORT_NAMES = {
    "data.path": "data",
    "data.on_bad_image": "on_bad_image",
    "optimizer.base_lr": "base_lr",
    "parallel.tensor_parallel_size": "tensor_parallel_size",
    "parallel.sequence_parallel": "sequence_parallel",
    "parallel.activation_checkpointing": "activation_checkpointing",
}


@dataclass(frozen=True)
class CommandLine:
    """What the user asked for.

    Attributes:
        run: the recipe with the given flags applied.
        ds_config: path of the DeepSpeed config, or None.
        given: fields that a flag set, as "field" or "section.field".
    """

    run: RunConfig
    ds_config: str | None
    given: frozenset[str]


def parse_command_line(arguments: Sequence[str], description: str) -> CommandLine:
    """Read the flags of a training script.

    Args:
        arguments: as in ``sys.argv[1:]``; dashes and underscores in flag names are the same.
        description: what the script does, for ``--help``.

    Raises:
        ConfigError: for an unknown recipe, an unknown flag or a value that cannot work.
    """
    parser = _build_parser(description)
    values = vars(parser.parse_args([_underscored(argument) for argument in arguments]))
    recipe, ds_config = values.pop("recipe"), values.pop("ds_config")
    values.pop("local_rank")
    if recipe not in RECIPES:
        raise ConfigError(f"there is no recipe {recipe!r}{_closest(recipe, RECIPES)}; recipes: {', '.join(RECIPES)}.")
    given = {name: value for name, value in values.items() if value is not _NOT_GIVEN}
    return CommandLine(override(RECIPES[recipe](), given), ds_config, frozenset(given))


class _NotGiven:
    pass


_NOT_GIVEN = _NotGiven()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--?[\w.]+)", message)
        if unknown:
            flag = unknown.group(1)
            options = [option for action in self._actions for option in action.option_strings]
            raise ConfigError(f"there is no flag {flag}{_closest(flag, options)}; --help lists them.")
        raise ConfigError(f"{message}.")


def _build_parser(description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        description=description,
        usage="%(prog)s [--recipe NAME] [--ds_config FILE] [--flag VALUE ...]",
        epilog=_recipe_list(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    start = parser.add_argument_group("where to start")
    start.add_argument("--recipe", default="quickstart", help="the defaults of every other flag; listed at the end")
    start.add_argument(
        "--ds_config", metavar="FILE", help='DeepSpeed config; its "auto" values take the flags\' values'
    )
    start.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    short = SHORT_NAMES
    group = parser.add_argument_group("run")
    for section, cls in SECTIONS.items():
        for name in (name for name in fields(cls) if f"{section}.{name.name}" in short):
            _add_field(group, cls, f"{section}.{name.name}", short[f"{section}.{name.name}"])
    for entry in fields(RunConfig):
        if entry.name not in SECTIONS and entry.name != "recipe":
            _add_field(group, RunConfig, entry.name, None)
    for section, cls in SECTIONS.items():
        summary = (inspect.getdoc(cls) or "").splitlines()[0]
        group = parser.add_argument_group(f"{section}: {summary}".rstrip("."))
        for entry in fields(cls):
            if f"{section}.{entry.name}" not in short:
                _add_field(group, cls, f"{section}.{entry.name}", None)
    return parser


def _add_field(group: argparse._ArgumentGroup, cls: type, name: str, short: str | None) -> None:
    key = name.rpartition(".")[2]
    annotation = typing.get_type_hints(cls)[key]
    flags = [f"--{short}", f"--{name}"] if short else [f"--{name}"]
    options: dict[str, Any] = {"dest": name, "default": _NOT_GIVEN, "type": _reader(annotation)}
    options["help"] = _comments(cls)[key].replace("%", "%%")
    if annotation is bool:
        options.update(nargs="?", const=True, metavar="true|false")
    else:
        options["metavar"] = _metavar(annotation, key)
    group.add_argument(*flags, **options)


def _comments(cls: type) -> dict[str, str]:
    """The comment lines right above each field of a dataclass."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        text = line.strip()
        entry = re.match(r"(\w+): ", text)
        if text.startswith("#"):
            lines.append(text.lstrip("# "))
        elif entry:
            found[entry.group(1)] = " ".join(lines)
            lines = []
        else:
            lines = []
    return found


def _reader(annotation: Any) -> Callable[[str], Any]:
    """A function from a flag's text to a value of the annotated type."""
    choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
    optional = typing.get_origin(annotation) in (Union, types.UnionType)
    kind = next(t for t in typing.get_args(annotation) if t is not type(None)) if optional else annotation

    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        if choices:
            if text not in choices:
                raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}")
            return text
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
            return text.lower() == "true"
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}") from None

    return read


def _metavar(annotation: Any, key: str) -> str:
    if typing.get_origin(annotation) is Literal:
        return "|".join(typing.get_args(annotation))
    return key.upper()


def _recipe_list() -> str:
    lines = [f"  {name:16}{(inspect.getdoc(recipe) or '').splitlines()[0]}" for name, recipe in RECIPES.items()]
    return "recipes:\n" + "\n".join(lines)


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _closest(name: str, known: typing.Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
