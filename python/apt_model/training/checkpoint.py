"""The file that a run continues from, and the one before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import processes
from .files import DamagedFile, load_tensors, save_tensors
from .loop import TrainingLoop
from .state import set_random_state, whole

PREVIOUS = "previous"
PARTS = {"settings", "trainer", "parts", "random_states"}


class Checkpoint:
    """The file a run continues from.

    Args:
        path: of the file; the checkpoint before it is kept beside it, `NAME.previous.pt`.
        settings: what decides the result of the run, in JSON's types; a checkpoint of a run with
            other settings is refused.
        parts: more that it holds, by name: objects with `state_dict` and `load_state_dict`. A part
            that only one of file and run has is left out.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], parts: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self.previous = path.with_suffix(f".{PREVIOUS}{path.suffix}")
        self.settings = dict(settings)
        self.parts = dict(parts or {})
        self.steps = 0  # of the state that the file holds
        self.is_written = False

    def save(self, trainer: TrainingLoop) -> None:
        """Writes all but the frozen parameters; the file is either the old or the new one.

        The main process writes it, with the parameters put together and the random states of all.
        """
        own = trainer.state_dict(include_frozen=False)
        state = {
            "settings": self.settings,
            "trainer": whole(own),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random_states": processes.of_all(own.get("random_state")),
        }
        processes.on_main(lambda: save_tensors(self.path, state, keep=self.previous))
        self.steps, self.is_written = trainer.total_steps, True

    def load(self, trainer: TrainingLoop, previous: bool = False) -> bool:
        """Continues from the file and returns True; returns False where there is none.

        Args:
            trainer: gets the state.
            previous: True: from the checkpoint before the last one.

        Raises:
            ValueError: the file is of a run with other settings, or damaged.
        """
        path = self.previous if previous else self.path
        state: dict[str, Any] = {}

        def read() -> bool:
            if not path.exists():
                return False
            state.update(self._read(path))
            self._compare(path, state["settings"])
            return True

        if not processes.on_main(read):
            return False
        if not state:  # in another process than the main one
            state = self._read(path)
        trainer.load_state_dict(state["trainer"])
        if processes.rank() < len(state["random_states"]):
            set_random_state(state["random_states"][processes.rank()], trainer.device)
        for name, part in self.parts.items():
            if name in state["parts"]:
                part.load_state_dict(state["parts"][name])
        self.steps, self.is_written = trainer.total_steps, True
        return True

    def remove(self) -> None:
        """Removes the file and the one before it."""
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state = load_tensors(path)
            if not isinstance(state, dict) or state.keys() != PARTS:
                raise DamagedFile(f"{path} is no checkpoint of apt-model")
        except DamagedFile as error:
            other = self.previous if path == self.path else self.path
            way = "--resume previous" if path == self.path else "--resume last"
            kept = f"continue from the one beside it ({way}), or " if other.exists() else ""
            raise DamagedFile(f"{error}; {kept}begin anew (--restart)") from None
        return state

    def _compare(self, path: Path, theirs: Mapping[str, Any]) -> None:
        names = sorted(theirs.keys() | self.settings.keys())
        changed = [n for n in names if theirs.get(n) != self.settings.get(n)]
        if changed:
            raise ValueError(
                f"{path} is of a run with other settings ("
                + ", ".join(
                    f"{n}: {theirs.get(n)!r} there, {self.settings.get(n)!r} here" for n in changed
                )
                + "); begin anew (--restart) or choose another folder (--output)"
            )
