"""What a section of the settings is: a frozen dataclass whose fields pydantic checks; and their types."""

from typing import Annotated, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def section(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are checked, and which refuses others."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    return dataclass(frozen=True, kw_only=True, config=config)(cls)  # pyright: ignore[reportReturnType]


Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# The name of a file or folder. It cannot lead out of the folder that holds it.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]  # package.module:function
