"""Overrides (``key=value``) as people type them, translated into Hydra's grammar.

Choice: the schema decides the type. Hydra's grammar guesses the type from the text: ``name=1e5`` becomes a number, and
a path with ``=`` or
``#`` a syntax error. So the value of a key that is declared ``str`` is quoted. A key inside an open dictionary gets
Hydra's ``++``. An entry of
a list is addressed by its number or its name. Every other override goes to Hydra unchanged. Cost: each key is looked up
in the schema first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lr2train.config import Config, UserError, typed_key

_TYPABLE = re.compile(r"[A-Za-z_$][\w$-]*(\.([A-Za-z_$][\w$-]*|0|[1-9]\d*))*", re.ASCII)  # Hydra's keys
_NAME = re.compile(r"[\w$/%*@?|.+-]+", re.ASCII)  # Hydra's keys inside braces
_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag|extend_list)\(.*\)", re.DOTALL)
_CLOSERS = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Place:
    """The place of a key in the schema."""

    hint: Any  # the declared type; Any inside an open dictionary
    known: bool = True  # the schema declares the key, or an open dictionary accepts the key
    inside_open: bool = False  # inside a dictionary whose keys are free
    entry: tuple[str, str] | None = (
        None  # (key of a list of named things, name of the entry), where an entry is addressed by its name
    )


@dataclass(frozen=True)
class Override:
    """One ``key=value``; the prefix is Hydra's ``+``, ``++`` or ``~``."""

    prefix: str
    key: str
    value: str | None

    @staticmethod
    def parse(text: str) -> Override:
        """Split an argument of the command line.

        Raises:
            UserError: the argument is no ``key=value``.
        """
        prefix = re.match(r"\+{0,2}~?", text)
        assert prefix is not None
        key, equals, value = text[prefix.end() :].partition("=")
        if not (key[:1].isalpha() or key[:1] in ("_", "$")) or not (equals or prefix[0] == "~"):
            raise UserError(
                f"{text!r} is no key=value; write it like optim.lr=1e-5, in quotes where the shell would split it"
            )
        return Override(prefix[0], typed_key(key.strip()), value if equals else None)

    @property
    def place(self) -> Place:
        """The key's place in the schema."""
        return place_of(self.key)

    @property
    def is_group(self) -> bool:
        """Whether this chooses a preset of a config group (``model=tiny_llama``, ``experiment=…``), or sets a key of
        Hydra's own.
        """
        if (
            "/" in self.key
            or "@" in self.key
            or self.key.partition(".")[0] in ("hydra", "experiment", "debug", "local")
        ):
            return True
        return is_dataclass(self.place.hint) and "." not in self.key and not (self.value or "").startswith(("{", "${"))

    def alternatives(self) -> list[str]:
        """The overrides of a sweep: a comma at the top level separates values; a function such as ``range`` lists
        values.
        """
        if self.value is None or _is_quoted(self.value):
            return [self.typed(self.value)]
        if _FUNCTION.fullmatch(self.value):
            return [self.typed(value) for value in _values_of_function(self)]
        return [self.typed(value) for value in _parts(self.value)]

    def typed(self, value: str | None) -> str:
        """This override as text, with another value."""
        return f"{self.prefix}{self.key}" + ("" if value is None else f"={value}")

    def for_hydra(self, number_of: Callable[[str, str], int]) -> str:
        """This override in Hydra's grammar.

        Args:
            number_of: (key of a list, name of an entry) -> the entry's number.

        Raises:
            UserError: the key has characters that Hydra's grammar does not take, or a bracket of the value is never
                closed.
        """
        if self.value is None or self.key.startswith("hydra."):
            return self.typed(self.value)
        if self.is_group:
            return self.typed(self.value if re.search(r"[\[,]|^null$", self.value) else _of_text(self.value, False))
        place, key = self.place, self.key
        if place.entry is not None:
            at, name = place.entry
            key = f"{at}.{number_of(at, name)}{key.removeprefix(f'{at}.{name}')}"
        text = _without_interpolation(self.value) if _is_literal(self.key) else self.value
        value = _Value(text, self.key).rewritten(place.hint)
        if place.inside_open and not _TYPABLE.fullmatch(key):  # a name that begins with a digit, for example
            key, _, name = key.rpartition(".")
            value = f"{{{_typable(name, _NAME)}: {value}}}"
        _typable(key, _TYPABLE)
        opens = place.inside_open or get_origin(core_of(place.hint)) is dict
        if opens and value == "{}":
            raise UserError(
                f"{self.key}={{}} would empty nothing, because dictionaries are merged; set its entries, such as "
                f"{self.key}.NAME=null"
            )
        return f"{'++' if opens and not self.prefix else self.prefix}{key}={value}"


@cache
def _hints(schema: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(schema).items() if name in {one.name for one in fields(schema)}}


def place_of(key: str) -> Place:
    """The place of a dotted key in the schema."""
    hint, opened, entry, before = Config, False, None, ""
    for part in key.split("."):
        core = core_of(hint)
        inside = below(hint, part)
        if inside is UNKNOWN or (core is Any and not opened):
            return Place(Any, known=False, entry=entry)
        opened = opened or get_origin(core) is dict
        entry = (before, part) if get_origin(core) is list and not part.isdecimal() else entry
        hint, before = inside, f"{before}.{part}".lstrip(".")
    return Place(hint, True, opened, entry)


UNKNOWN = NoneType
"""The type of a key that the schema does not have."""


def below(hint: Any, part: str) -> Any:
    """The type of one key, number or name below a type."""
    core = core_of(hint)
    if is_dataclass(core):
        return _hints(core).get(part, UNKNOWN)  # type: ignore[arg-type]
    if get_origin(core) is dict:
        return get_args(core)[1]
    if get_origin(core) is list:
        named = is_dataclass(get_args(core)[0]) and "name" in _hints(get_args(core)[0])
        return get_args(core)[0] if part.isdecimal() or named else UNKNOWN
    return Any if core is Any else UNKNOWN


def core_of(hint: Any) -> Any:
    """A type without its None."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return next(one for one in get_args(hint) if one is not NoneType)


class _Value:
    """A typed value, translated along the declared types."""

    def __init__(self, text: str, key: str):
        self._text, self._key = text, key

    def rewritten(self, hint: Any) -> str:
        """The value in Hydra's grammar: text is quoted; brackets, braces and numbers stay."""
        return self._rewritten(self._text, hint)

    def _rewritten(self, text: str, hint: Any) -> str:
        core, inner = core_of(hint), text.strip()
        if core is str:
            return _of_text(text, NoneType in get_args(hint))
        if inner.startswith("[") and (core is Any or get_origin(core) is list):
            item = Any if core is Any else get_args(core)[0]
            return f"[{','.join(self._rewritten(part, item) for part in self._inside(inner))}]"
        if inner.startswith("{") and (core is Any or get_origin(core) is dict or is_dataclass(core)):
            return f"{{{','.join(self._pair(part, core) for part in self._inside(inner))}}}"
        if get_origin(core) is list and not inner.startswith(("${", "'", '"')) and not _FUNCTION.fullmatch(inner):
            raise UserError(f"{self._key}={self._text} is no list; write {self._key}=[{self._text}]")
        return text if _is_quoted(text) or _is_hydras(text) else quoted(text)

    def _pair(self, part: str, core: Any) -> str:
        key, colon, value = part.partition(":")
        if not colon:
            raise UserError(
                f"{self._key}={self._text} has {part.strip()!r} in the place of `key: value`; put a value with a "
                "comma in quotes"
            )
        return f"{_typable(key.strip(), _NAME)}: {self._rewritten(value.strip(), below(core, key.strip()))}"

    def _inside(self, text: str) -> list[str]:
        """The parts between an opening bracket and its closing bracket.

        Raises:
            UserError: the bracket is never closed, or text follows the closing bracket.
        """
        closer = _CLOSERS[text[0]]
        if not text.endswith(closer) or len(list(_parts(text))) != 1:
            raise UserError(
                f"{self._key}={self._text} opens a {text[0]} that no {closer} closes; close it, or put the text in "
                "quotes"
            )
        return [part.strip() for part in _parts(text[1:-1])] if text[1:-1].strip() else []


def _is_literal(key: str) -> bool:
    """Whether a key is declared as text without interpolation."""
    group, _, name = key.rpartition(".")
    owner = place_of(group).hint if group else Config
    return is_dataclass(owner) and any(one.name == name and one.metadata.get("literal") for one in fields(owner))


def _without_interpolation(text: str) -> str:
    """A text in which OmegaConf reads ``${`` as two characters, and backslashes before it as backslashes."""
    return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", text)


def _typable(key: str, grammar: re.Pattern[str]) -> str:
    if not grammar.fullmatch(key):
        raise UserError(
            f"{key} cannot be typed as a key; write it into a YAML file and name its folder with --config-dir"
        )
    return key


def _parts(text: str) -> Iterator[str]:
    """Split at commas outside quotes and brackets. A quote counts only where a value begins, so an apostrophe is a
    letter.
    """
    start, depth, quote, begins = 0, 0, "", True
    for at, sign in enumerate(text):
        if quote:
            if sign == quote and not _escaped(text, at):
                quote = ""
        elif sign in "'\"" and begins:
            quote = sign
        elif sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
        elif sign == "," and depth == 0:
            yield text[start:at]
            start = at + 1
        begins = sign in "[{,:" or (begins and sign == " ")
    yield text[start:]


def _escaped(text: str, at: int) -> bool:
    before = text[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _is_quoted(text: str) -> bool:
    """Whether quotes stand around the whole text."""
    return bool(re.fullmatch(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", text, re.DOTALL))


def _of_text(text: str, none: bool) -> str:
    return text if _is_quoted(text) or (none and text == "null") else quoted(text)


def quoted(text: str) -> str:
    """A text in Hydra's quotes. Hydra reads a backslash as an escape only before a quote."""
    escaped = re.sub(r"(\\*)'", lambda found: 2 * found[1] + "\\'", text)
    return "'" + escaped + "\\" * (len(escaped) - len(escaped.rstrip("\\"))) + "'"


def _is_hydras(text: str) -> bool:
    """Whether a text is a value in Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return False
    return True


def _values_of_function(override: Override) -> list[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(override.typed(override.value))
        return list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [str(override.value)]
    except (HydraException, AssertionError, ValueError) as error:
        raise UserError(
            f"{override.typed(override.value)} makes no list of values ({error}); write the values with commas "
            "between them"
        ) from error
