"""Fields of a config.json, with sentences for those that are missing or wrong."""

from typing import Any


def required(fields: dict[str, Any], name: str, where: str) -> Any:
    """A field that config.json must have.

    Raises:
        ValueError: it has none. Names the file and the field, as the functions below do.
    """
    if fields.get(name) is None:
        raise ValueError(
            f"{where}: the field '{name}' is missing; a {fields.get('model_type', 'model')} config.json needs it."
        )
    return fields[name]


def positive_int(fields: dict[str, Any], name: str, where: str, default: int) -> int:
    """A positive integer; `default`, unless it is 0, replaces a field that is absent, null or 0.

    Raises:
        ValueError: it is missing or something else.
    """
    value = (fields.get(name) or default) if default else required(fields, name, where)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{where}: the field '{name}' is {value!r}; a positive integer was expected.")
    return value


def flag(fields: dict[str, Any], name: str, where: str, default: bool = False) -> bool:
    """True or false; `default` replaces a field that is absent or null.

    Raises:
        ValueError: it is something else, such as the text "false".
    """
    value = fields.get(name)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{where}: the field '{name}' is {value!r}; true or false was expected.")
    return default if value is None else value


def positive_number(value: Any, name: str, where: str) -> Any:
    """The value of a field, if it is a positive number.

    Raises:
        ValueError: it is not.
    """
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{where}: the field '{name}' is {value!r}; a positive number was expected.")
    return value
