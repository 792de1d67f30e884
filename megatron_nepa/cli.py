"""Command line to :class:`RunConfig`: every field of the config is a flag, and its comment is the help text.

Ours rather than tyro or jsonargparse: which flags were *given* decides between a flag and a DeepSpeed config, a
mistake is one sentence, and the help is there without importing anything heavy.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NoReturn, Union

from megatron_nepa.config import (
    OBJECTIVES,
    SHORT_NAMES,
    ConfigError,
    ObjectiveConfig,
    Run,
    RunConfig,
    one_of,
    override,
    refuse_ignored,
)
from megatron_nepa.config.flags import RENAMED
from megatron_nepa.config.pretraining import NEIGHBOURS

# what a flag of several values means where none is given
BARE_VALUES: dict[str, Any] = {"parallel.activation_checkpointing": "full", "knn": NEIGHBOURS}


Recipes = Mapping[str, Callable[[], Run]]
# fields that follow from a recipe and the given fields, by name
Follow = Callable[[RunConfig, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class CommandLine(Generic[Run]):
    """What the user asked for.

    Attributes:
        run: the recipe with the given flags applied.
        ds_config: path of the DeepSpeed config, or None.
        given: fields that a flag set, as "field" or "section.field".
        followed: fields that differ from the recipe's because a checkpoint says so, by name.
    """

    run: Run
    ds_config: str | None
    given: frozenset[str]
    followed: Mapping[str, Any]


def parse_command_line(
    arguments: Sequence[str], description: str, recipes: Recipes[Run], follow: Follow | None = None
) -> CommandLine[Run]:
    """Read the flags of a training script.

    Args:
        arguments: as in ``sys.argv[1:]``; dashes and underscores in flag names are the same.
        description: what the script does, for ``--help``.
        recipes: those of the script's task; the first is the default.
        follow: finds what a checkpoint that the run names says of it; None follows none.

    Raises:
        ConfigError: for an unknown recipe, an unknown flag, a value that cannot work or a flag that would be ignored.
    """
    arguments = [_underscored(argument) for argument in arguments]
    recipe = _named_recipe(arguments, recipes)
    values = vars(_build_parser(description, recipes, recipe).parse_args(arguments))
    ds_config = values.pop("ds_config")
    values.pop("recipe")
    values.pop("local_rank")
    given = {name: value for name, value in values.items() if value is not _NOT_GIVEN}
    start = recipes[recipe]()
    followed = {} if follow is None else follow(start, given)
    run = override(start, {**followed, **given})
    refuse_ignored(run, given)
    named = start.fields_by_name()
    return CommandLine(
        run, ds_config, frozenset(given), {name: value for name, value in followed.items() if value != named[name]}
    )


def path_argument(text: str) -> Path:
    """A tool's argument that names a file or folder; an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty (an unset shell variable?)")
    return Path(text)


def sections_of(run: RunConfig) -> dict[str, type]:
    """The sections of a run's config by name: its fields that are dataclasses."""
    values = {entry.name: getattr(run, entry.name) for entry in fields(run)}
    return {name: type(value) for name, value in values.items() if is_dataclass(value)}


class _NotGiven:
    pass


_NOT_GIVEN = _NotGiven()


def _objective_flags(objective: type[ObjectiveConfig]) -> set[str]:
    return {f"--objective.{entry.name}" for entry in fields(objective) if entry.init}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--?[\w.]+)", message)
        if unknown:
            flag = unknown.group(1)
            if flag in RENAMED:
                raise ConfigError(f"{flag} is called {RENAMED[flag]} now.")
            options = [option for action in self._actions for option in action.option_strings]
            others = [each().name for each in OBJECTIVES if flag in _objective_flags(each)]
            if others:
                raise ConfigError(
                    f"{flag} is of the objective {one_of(others)}, which this recipe does not train: drop it, or give "
                    "a --recipe that does."
                )
            raise ConfigError(f"there is no flag {flag}{_closest(flag, options)}; --help lists them.")
        raise ConfigError(f"{message}.")


def _named_recipe(arguments: Sequence[str], recipes: Recipes[Run]) -> str:
    """The recipe whose defaults, and whose objective's flags, the command line is about."""
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default=next(iter(recipes)))
    recipe: str = first.parse_known_args(arguments)[0].recipe
    if recipe not in recipes:
        raise ConfigError(f"there is no recipe {recipe!r}{_closest(recipe, recipes)}; recipes: {', '.join(recipes)}.")
    return recipe


def _build_parser(description: str, recipes: Recipes[Run], recipe: str) -> argparse.ArgumentParser:
    parser = _Parser(
        description=description,
        usage="%(prog)s [--recipe NAME] [--ds_config FILE] [--flag VALUE ...]",
        epilog=_recipe_list(recipes),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    start = parser.add_argument_group(
        "where to start", f"Defaults are those of --recipe {recipe}; other recipes differ."
    )
    start.add_argument(
        "--recipe",
        help=f"the defaults of every other flag; listed at the end {_default(next(iter(recipes)))}",
    )
    start.add_argument(
        "--ds_config",
        metavar="FILE",
        help=f'DeepSpeed config; its "auto" values take the flags\' values {_default(None)}',
    )
    start.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    run = recipes[recipe]()
    sections = sections_of(run)
    group = parser.add_argument_group("run")
    for name, short in SHORT_NAMES.items():
        section = name.partition(".")[0]
        if section in sections:
            _add_field(group, getattr(run, section), name, short)
    for entry in fields(run):
        if entry.name not in sections and entry.name != "recipe":
            _add_field(group, run, entry.name, None)
    for section, cls in sections.items():
        summary = (inspect.getdoc(cls) or "").splitlines()[0]
        group = parser.add_argument_group(f"{section}: {summary}".rstrip("."))
        for entry in fields(cls):
            if entry.init and f"{section}.{entry.name}" not in SHORT_NAMES:
                _add_field(group, getattr(run, section), f"{section}.{entry.name}", None)
    return parser


def _add_field(group: argparse._ArgumentGroup, config: Any, name: str, short: str | None) -> None:
    """Add the flag of a field; ``config`` is the default recipe's section (or run) that has the field."""
    cls: type = type(config)
    key = name.rpartition(".")[2]
    annotation = typing.get_type_hints(cls)[key]
    flags = [f"--{short}", f"--{name}"] if short else [f"--{name}"]
    options: dict[str, Any] = {"dest": name, "default": _NOT_GIVEN, "type": _reader(annotation)}
    options["help"] = f"{_comments(cls)[key]} {_default(getattr(config, key))}".replace("%", "%%")
    if annotation is bool:
        options.update(nargs="?", const=True, metavar="true|false")
    else:
        options["metavar"] = _metavar(annotation, key)
    if name in BARE_VALUES:
        options.update(nargs="?", const=BARE_VALUES[name])
    group.add_argument(*flags, **options)


def _default(value: Any) -> str:
    """What a flag's help says of its default, written as the flag takes it."""
    return f"(default: {str(value).lower() if value is None or isinstance(value, bool) else value})"


@functools.cache  # reading a source takes long
def _comments(cls: type) -> dict[str, str]:
    """The comment lines right above each field of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    lines: list[str] = []
    extended = [base for base in cls.__mro__[::-1] if is_dataclass(base)]
    for line in (line for base in extended for line in inspect.getsource(base).splitlines()):
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


def _recipe_list(recipes: Recipes[Run]) -> str:
    width = max(map(len, recipes)) + 2
    lines = [f"  {name:{width}}{(inspect.getdoc(recipe) or '').splitlines()[0]}" for name, recipe in recipes.items()]
    return "recipes:\n" + "\n".join(lines)


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _closest(name: str, known: typing.Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
