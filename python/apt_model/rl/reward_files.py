"""Reward functions named on a command line: files and modules, imported as Python imports them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

_folders: set[str] = set()  # that were put on the path for a reward file
_names: set[str] = set()  # of the modules that reward files are
_LIBRARY = (__file__, importlib.__file__, "<frozen")


def import_functions(names: Sequence[str]) -> list[Callable[..., Any]]:
    """Returns the callables that `FILE.py:NAME` or `package.module:NAME` mean.

    A file runs once however often it is named. As with `python FILE.py` its folder is the first on
    the path, so that it can import its neighbours; as a part of a package (a folder that holds
    `__init__.py`) it can also import them relatively. It is a module of its name, so that its
    functions and classes can be pickled. A class is called without arguments, once.

    Raises:
        ValueError: one line with the name, the error and its place.
    """
    modules: dict[str, ModuleType] = {}  # a file runs once, whatever it is called
    return [_import_function(name, modules) for name in names]


def source_file(name: str) -> Path | None:
    """Returns the file that `FILE.py:NAME` or `package.module:NAME` is in, None if not a file."""
    where = name.rpartition(":")[0]
    path: Path | None
    if where.endswith(".py"):
        path = Path(where)
    else:
        origin = getattr(sys.modules.get(where), "__file__", None)
        path = Path(origin) if origin else None
    return path if path is not None and path.is_file() else None


def place_of(error: BaseException, near: str | None = None) -> str:
    """Returns `file:line` where an error arose, "" where that is unknown.

    Args:
        error: what was raised.
        near: a file: the last place in its folder is told, where there is one, rather than a place
            in a library that it has called.
    """
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_LIBRARY)
    ]
    folder = None if near is None else os.path.dirname(os.path.abspath(near)) + os.sep
    known = [f for f in frames if folder and os.path.abspath(f.filename).startswith(folder)]
    places = known or frames
    return f"{places[-1].filename}:{places[-1].lineno}" if places else ""


def one_line(error: BaseException) -> str:
    """Returns the kind and message of an error in one line."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(str(message).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _import_function(name: str, modules: dict[str, ModuleType]) -> Callable[..., Any]:
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ValueError(f"--reward must be FILE.py:NAME or package.module:NAME, got {name!r}")
    near = where if where.endswith(".py") else None
    try:
        key = os.path.realpath(where) if near else where
        if key not in modules:
            modules[key] = _import_file(Path(where)) if near else _import_module(where)
        found = reduce(getattr, attribute.split("."), modules[key])
        function = found() if isinstance(found, type) else found
    except (Exception, SystemExit) as error:
        place = place_of(error, near)
        # A missing file or name is told by its message: its place would be in this module
        raised = f" ({place})" if place else ""
        raise ValueError(f"--reward {name}: {one_line(error)}{raised}") from None
    if not callable(function):
        raise ValueError(
            f"--reward {name}: expected a function, got {type(function).__name__} {function!r:.80}"
        )
    return function


def _import_module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # as `python -m` does
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _import_file(file: Path) -> ModuleType:
    file = file.resolve()
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file")
    importlib.invalidate_caches()
    _forget_neighbours_of_others(file.parent)
    root, package = _package_of(file)
    if package is not None:
        _put_on_path(root, first=True)
        _put_on_path(file.parent, first=False)  # so that its modules hide none of Python's
        return importlib.import_module(f"{package}.{file.stem}")
    _put_on_path(file.parent, first=True)
    name = file.stem if _is_free(file) else f"apt_reward_{file.stem}".replace(".", "_")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # a file of Python has both
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    _names.add(name)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    return module


def _package_of(file: Path) -> tuple[Path, str | None]:
    """Returns the folder that holds the outermost package of a file, and the name of its own."""
    root = file.parent
    parts: list[str] = []
    while (root / "__init__.py").is_file() and root.name.isidentifier():
        parts.insert(0, root.name)
        root = root.parent
    if not parts or not file.stem.isidentifier():
        return file.parent, None
    known = sys.modules.get(parts[0])
    held = [os.path.realpath(path) for path in getattr(known, "__path__", ())]
    if known is not None and str(root / parts[0]) not in held:
        return file.parent, None  # another package has that name
    return root, ".".join(parts)


def _is_free(file: Path) -> bool:
    """Returns whether a module may have the file's name: it must not hide one that others use."""
    name = file.stem
    if "." in name or name in sys.stdlib_module_names or name == "__main__":
        return False
    return name not in sys.modules or name in _names


def _put_on_path(folder: Path, first: bool) -> None:
    if first and str(folder) in sys.path:
        sys.path.remove(str(folder))
    if str(folder) not in sys.path:
        sys.path.insert(0 if first else len(sys.path), str(folder))
    _folders.add(str(folder))


def _forget_neighbours_of_others(folder: Path) -> None:
    """Lets a file import its own `helper.py` where another reward file's folder had one too."""
    others = tuple(f"{other}{os.sep}" for other in _folders)
    packages = [f for f in (folder, *folder.parents) if (f / "__init__.py").is_file()]
    for entry in [*folder.iterdir(), *packages]:
        origin = getattr(sys.modules.get(entry.stem), "__file__", None)
        if origin is None or not origin.startswith(others):
            continue
        if not origin.startswith((f"{folder}{os.sep}", f"{entry}{os.sep}")):
            for name in list(sys.modules):
                if name == entry.stem or name.startswith(f"{entry.stem}."):
                    del sys.modules[name]
