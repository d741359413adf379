"""Settings: each is declared once, as a field of a pydantic model.

Its type, default, bounds and description (the docstring below it) stand there; the JSON schema, the
command line's options and the error lines follow. Nothing here imports torch.
"""

import argparse
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import core_schema

from m2d.errors import UserError
from m2d.methods import table
from m2d.options import LARGEST_SEED, MOST
from m2d.renamed import KEYS

SHOWN = 100  # characters of a user's value in an error line


class Section(BaseModel):
    """A group of settings. Unknown keys are errors; docstrings below fields describe them."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


def as_number(value: Any) -> Any:
    """Text that spells a number as that number, since YAML 1.1 reads 1e-4 as text; no booleans."""
    if isinstance(value, bool):
        raise ValueError("is not a number")
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
        try:
            return float(value)
        except ValueError:
            raise ValueError("is not a number") from None
    return value


@dataclass(frozen=True)
class MethodOf:
    """Marks a setting that names a method: Annotated[str, MethodOf("scoring")].

    By identifier or term; kept as the identifier.
    """

    kind: str

    def resolve(self, value: Any) -> Any:
        try:
            return table(self.kind).resolve(value) if isinstance(value, str) else value
        except UserError as error:
            raise ValueError(str(error)) from None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(self.resolve, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "enum": table(self.kind).words()}


Number = BeforeValidator(as_number)
Count = Annotated[int, Number, Field(ge=1, le=MOST)]
Whole = Annotated[int, Number, Field(ge=0, le=MOST)]
Seed = Annotated[int, Number, Field(ge=0, le=LARGEST_SEED)]
Positive = Annotated[float, Number, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Number, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Number, Field(ge=0, le=1, allow_inf_nan=False)]
# auto: the checkpoint's where the device is fast in it, else float32 (m2d/devices.py)
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


def checked(model: Any, values: Any, where: str = "") -> Any:
    """`values` as an instance of `model`, a section or any type.

    Raises UserError for the first mistake: the key, the value, and what is allowed.
    """
    try:
        return TypeAdapter(model).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{where}{explain(model, error)}") from None


def explain(model: Any, error: ValidationError) -> str:
    """One line for the first mistake."""
    first = error.errors(include_url=False)[0]
    kind, value = first["type"], first["input"]
    place, section, tag = _followed(model, first["loc"])
    of = f" of a {tag}" if tag else ""
    if kind == "extra_forbidden":
        parent = ".".join(place[:-1])
        text = unknown(place[-1], "key", section.model_fields, of)
        if place[-1] in KEYS:
            text = f"the key {place[-1]} is now called {KEYS[place[-1]]}"
        return f"{parent}: {text}" if parent else text
    if kind == "missing":
        parent = ".".join(place[:-1])
        meaning = section.model_fields[place[-1]].description or ""
        text = f"the key {place[-1]}{of} is missing" + (f" ({meaning})" if meaning else "")
        return f"{parent}: {text}" if parent else text
    key = ".".join(place) + ": " if place else ""
    shown = repr(value) if len(repr(value)) <= SHOWN else f"{repr(value)[:SHOWN]}..."
    if kind == "literal_error":
        choices = [part.strip().strip("'") for part in _choices(first["ctx"]["expected"])]
        return key + unknown(str(value)[:SHOWN], "value", choices)
    if kind == "string_pattern_mismatch":
        return f"{key}{shown}: lower-case letters, digits, '-', '_' and '.' are allowed"
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith("unknown "):
        return key + message
    message = message.replace("Input should be", "must be").replace("valid dictionary", "mapping")
    if not isinstance(value, str | int | float | NoneType):
        return f"{key}{message[:1].lower()}{message[1:]}"
    return f"{key}{shown} {message}" if message.startswith("is ") else f"{key}{shown}: {message}"


def unknown(name: str, kind: str, allowed: Iterable[str], of: str = "") -> str:
    """unknown KIND NAME; did you mean ...? allowed: ..."""
    allowed = list(allowed)
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown {kind} {name!r}{of}; {hint}allowed: {', '.join(allowed) or 'none'}"


def _choices(expected: str) -> list[str]:
    """["a", "b", "c"] of pydantic's "'a', 'b' or 'c'"."""
    return expected.replace(" or ", ", ").split(", ")


def _followed(model: Any, location: tuple[int | str, ...]) -> tuple[list[str], Any, str]:
    """A mistake's place as the keys that a user wrote, its section, and which kind of a union.

    pydantic names a union's member among the keys; a member's name is no key of the user's.
    """
    keys: list[str] = []
    here, section, tag = model, None, ""
    for item in location:
        here, tags = _inner(here)
        if isinstance(item, str) and item in tags:
            here, tag = tags[item], item
            continue
        if item == "[key]":
            continue
        keys.append(str(item))
        if isinstance(here, type) and issubclass(here, BaseModel):
            section = here
            field = here.model_fields.get(str(item))
            here = field.annotation if field is not None else None
        else:
            arguments = get_args(here)
            here, tag = (arguments[-1] if arguments else None), ""
    return keys, section, tag


def _inner(annotation: Any) -> tuple[Any, dict[str, Any]]:
    """An annotation without Annotated and None, and its members by tag where it is a union."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not NoneType]
        tags = {
            mark.tag: get_args(member)[0]
            for member in members
            for mark in getattr(member, "__metadata__", ())
            if hasattr(mark, "tag")
        }
        return (_inner(members[0])[0], {}) if len(members) == 1 else (annotation, tags)
    return annotation, {}


# ---- settings as options of a command


def option(name: str) -> str:
    """--learning-rate for learning_rate."""
    return f"--{name.replace('_', '-')}"


def add_option(parser: Any, model: type[BaseModel], name: str) -> None:
    """Add the option of one field to a parser or group of argparse."""
    field = model.model_fields[name]
    kind, _ = _inner(field.annotation)
    default = None if field.is_required() else field.default
    help_text = (field.description or "").replace("%", "%%")
    for mark in field.metadata:
        if isinstance(mark, MethodOf):
            help_text += f" One of {', '.join(table(mark.kind).names())}."
    if kind is bool:
        parser.add_argument(option(name), action="store_true", help=help_text)
        return
    if default is not None:
        help_text += f" ({default:g})" if isinstance(default, float) else f" ({default})"
    choices = get_args(kind) if get_origin(kind) is Literal else None
    whole = field.rebuild_annotation()
    parser.add_argument(
        option(name),
        type=str if choices else number_of(whole),
        choices=choices,
        default=default,
        help=help_text,
    )


def number_of(annotation: Any) -> Any:
    """An argparse type from a field's type, such as Count or NotNegative."""
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)

    def parse(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            message = message.replace("Input should be", "must be")
            raise argparse.ArgumentTypeError(f"{text[:SHOWN]!r}: {message}") from None

    return parse


def as_options(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The words of a command line that say these values; None and False say nothing."""
    words = []
    for name in names:
        value = values.get(name)
        if value is None or value is False:
            continue
        words += [option(name)] if value is True else [option(name), str(value)]
    return words
