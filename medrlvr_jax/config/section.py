"""Sections of the settings: frozen dataclasses whose fields pydantic checks, and types for their fields."""

from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from medrlvr_jax.host.errors import ConfigError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def section(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that checks its fields and refuses unknown ones."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    return dataclass(frozen=True, kw_only=True, config=config)(cls)  # pyright: ignore[reportReturnType]


def validate(cls: type[T], values: dict[str, Any], source: str = "") -> T:
    """Build a section from values. Raise `ConfigError` with a line for each invalid one, after `source`."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as e:
        lines = [f"{'.'.join(map(str, x['loc']))}: {x['input']!r:.80}: {x['msg']}" for x in e.errors()]
        raise ConfigError("\n".join(source + line for line in lines)) from None


Fraction = Annotated[float, Field(ge=0, le=1)]
# The name of a file or folder. It cannot lead out of the folder that holds it.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]  # package.module:function
