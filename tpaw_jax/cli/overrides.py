"""Options that are no option of a command: overrides of the configuration."""


def read(rest: list[str]) -> list[str]:
    """--key value and --key=value as 'key=value'.

    Raises:
        ValueError: a word is neither an override nor its value, or the last override has no value.
    """
    found, waiting = [], None
    for word in rest:
        if waiting is not None:
            found.append(f"{waiting}={word}")
            waiting = None
        elif word.startswith("--") and "=" in word:
            found.append(word[2:])
        elif word.startswith("--"):
            waiting = word[2:]
        else:
            raise ValueError(f"Unexpected argument '{word}'. Write overrides as --key value.")
    if waiting is not None:
        raise ValueError(f"The override '--{waiting}' has no value.")
    return found


def refuse(overrides: list[str]) -> None:
    """Raise ValueError if there are overrides: the command reads no configuration."""
    if overrides:
        raise ValueError(f"'--{overrides[0].partition('=')[0]}' is not an option of this command.")
