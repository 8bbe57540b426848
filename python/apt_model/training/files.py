"""The files that a command reads and writes: hashes of contents, whole files, a lock."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

BLOCK, LARGE = 2**20, 2**26


def sha256_of(path: Path, whole: bool = True) -> str:
    """Returns the hash of the contents of a file, or of all files in a folder and their names.

    Args:
        path: where it lies does not count.
        whole: False: of files above 64 MiB only the size and the first and last MiB count, as a
            model's parameters are many.
    """
    digest = hashlib.sha256()
    for file in _files_below(path) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as opened:
            size = file.stat().st_size
            if whole or size <= LARGE:
                while block := opened.read(BLOCK):
                    digest.update(block)
            else:
                digest.update(opened.read(BLOCK))
                opened.seek(size - BLOCK)
                digest.update(opened.read(BLOCK))
    return digest.hexdigest()


def _files_below(folder: Path) -> list[Path]:
    """Returns the files below a folder and below the folders that links lead to, each once."""
    found, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort(key=lambda name: (Path(parent, name).is_symlink(), name))  # links come last
        kept = []
        for name in folders:
            real = os.path.realpath(Path(parent, name))
            if real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        found += [Path(parent, name) for name in names if Path(parent, name).is_file()]
    return sorted(found)


def sha256_of_all(paths: Sequence[Path]) -> str:
    """Returns the hash of the contents of several files or folders, of one as `sha256_of`."""
    hashes = [sha256_of(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def write_whole(path: Path, write: Callable[[Path], Any], keep: Path | None = None) -> None:
    """Calls `write` with a name beside `path` and renames the file or folder it made there.

    What was at `path` stays until the new one is complete and on the disk.

    Args:
        path: file or folder.
        write: makes it under the name it is called with.
        keep: the name under which a file that was at `path` stays; None: it does not.

    Raises:
        OSError: the system refused; the message names `path`.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    _remove(unfinished)  # of a process of the same number that was killed
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            _to_disk(unfinished)
            if keep is not None and path.exists():
                _keep(path, keep)
            _replace(path, unfinished)
    finally:
        _remove(unfinished)


def _keep(path: Path, name: Path) -> None:
    """Gives a file a second name, so that there always is one at `path`."""
    link = name.with_name(f".{name.name}.{os.getpid()}")
    _remove(link)
    with suppress(OSError):  # a file system without links keeps one file
        os.link(path, link)
        os.replace(link, name)


def save_tensors(path: Path, state: Any, keep: Path | None = None) -> None:
    """Writes what `load_tensors` reads, as `write_whole`; PyTorch adds the checksums."""

    def write(unfinished: Path) -> None:
        with open(unfinished, "wb") as file:  # given a name, torch.save does not say why it failed
            torch.save(state, file)

    write_whole(path, write, keep)


def load_tensors(path: Path) -> Any:
    """Returns what `save_tensors` wrote.

    Raises:
        DamagedFile: the file is none of `save_tensors`, or not the bytes that were written: every
            part of it has a checksum.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
        if damaged is not None:
            raise DamagedFile(f"{path} is damaged: the checksum of its part {damaged} differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (DamagedFile, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # of a zip file, of pickle, of PyTorch's reader
        reason = " ".join(str(error).split())[:200]
        raise DamagedFile(f"{path} is damaged, or no file of this program: {reason}") from None


class DamagedFile(ValueError):
    """A file that is not what was written; the message names it."""


class FolderLock:
    """The right of one run to write a folder: a lock of the system on a file in it.

    The system lets go of it when the process ends, however it ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / ".lock"
        self._file: Any = None

    def __enter__(self) -> FolderLock:
        """Takes the lock."""
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        """Lets go of the lock."""
        self.free()

    def take(self) -> None:
        """Takes the lock, and removes what killed processes left unfinished.

        Raises:
            OSError: another run has the folder, or it cannot be written.
        """
        made = not self._folder.exists()
        with naming(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._made = made
        while True:
            with naming(self._path):
                file = open(self._path, "a+")  # noqa: SIM115  # it stays open while the lock is held
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                who = file.read().strip() or "unknown"
                file.close()
                raise BlockingIOError(
                    f"{self._folder} is written by another run (process {who}): wait for its end, "
                    "or choose another folder (--output)"
                ) from None
            if self._path.exists() and os.path.samestat(
                os.fstat(file.fileno()), os.stat(self._path)
            ):
                break
            file.close()  # removed by the run that had it
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file
        clean(self._folder)

    def free(self) -> None:
        """Lets go of the lock; a folder that it made and that is empty goes too."""
        self._path.unlink(missing_ok=True)
        self._file.close()
        if self._made:
            with suppress(OSError):
                self._folder.rmdir()


def clean(folder: Path) -> None:
    """Removes what `write_whole` of killed processes left, and puts back what they had replaced."""
    for path in list(folder.iterdir()):
        old = re.fullmatch(r"\.(.+)\.old", path.name)
        if old and not (folder / old[1]).exists():
            os.replace(path, folder / old[1])
        elif old or re.fullmatch(r"\..+\.\d+", path.name):
            _remove(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within this context what the system refuses is an `OSError` that names `path`."""
    try:
        yield
    except Exception as error:
        if (reason := _refusal(error)) is None:
            raise
        raise OSError(f"{path} cannot be written: {reason}") from error


def _refusal(error: BaseException | None) -> str | None:
    """Returns what the system said, also where PyTorch or safetensors raised something else."""
    while error is not None:
        if isinstance(error, OSError) or "(os error " in str(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _to_disk(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


def _replace(path: Path, unfinished: Path) -> None:
    old = path.with_name(f".{path.name}.old")
    if path.is_dir():  # unlike a file it cannot be replaced in one step
        _remove(old)
        os.replace(path, old)
    os.replace(unfinished, path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
