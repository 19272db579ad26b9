"""Hides torch from the processes that tests start: no run needs it, and transformers takes seconds to import it."""

from importlib.machinery import PathFinder

_find_spec = PathFinder.find_spec


def _without_torch(name, path=None, target=None):
    return None if name.split(".")[0] == "torch" else _find_spec(name, path, target)


PathFinder.find_spec = staticmethod(_without_torch)
