"""Reward functions of rows of the data and of the responses to them, added as a reward model."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from threading import Thread
from typing import Any

from torch import Tensor

from .reward_files import import_functions, one_line, place_of
from .reward_source import RewardError, check_special_tokens

SHOWN_ROWS = 3
RESPONSES = ("responses", "completions")  # a function that takes one of them is of a whole batch


@dataclass(frozen=True)
class Sampled:
    """A response and what is known of it.

    Attributes:
        row: the row of the data that it answers.
        place: of that row, `file:line`.
        prompt: the text of the prompt.
        response: its text, without the token that ended it.
        token_ids: its tokens, the one that ended it included.
        finished: whether it ended by itself; False: it was cut.
    """

    row: Mapping[str, Any]
    place: str
    prompt: str
    response: str
    token_ids: list[int]
    finished: bool


class RewardFunction:
    """One reward function, called with what its signature asks for.

    A function `f(row, response)` is called once a response, with a row of the data (a dictionary)
    and a text; it may also take `prompt`, `token_ids` and `finished` by these names. A function
    that takes `responses` (or `completions`, as TRL's do) is called once a batch, with lists:
    `rows`, `prompts`, `responses`, `token_ids` (or `completion_ids`), `finished` and the columns of
    the rows by their names. Either may be a coroutine function; those of one batch run side by
    side. A reward is a number, or None where the function has nothing to say of a response.

    Args:
        function: the callable.
        name: of its metric.
        origin: for errors; None: the name.
    """

    def __init__(
        self, function: Callable[..., Any], name: str | None = None, origin: str | None = None
    ) -> None:
        if not callable(function):
            raise TypeError(f"a reward must be callable, got {type(function).__name__}")
        self._function = function
        called = function if hasattr(function, "__name__") else type(function)
        self.name = called.__name__ if name is None else name
        self.origin = self.name if origin is None else origin
        try:
            self._parameters: Mapping[str, Any] = inspect.signature(function).parameters
            is_known = True
        except (TypeError, ValueError):  # of some built-in callables
            self._parameters, is_known = {}, False
        self.is_of_batches = any(name in self._parameters for name in RESPONSES)
        if is_known and not self.is_of_batches:
            self._check_signature()
        self._file = _file_of(function)

    def _check_signature(self) -> None:
        known = self._extras(Sampled({}, "", "", "", [], False))
        try:
            inspect.signature(self._function).bind({}, "", **known)
        except TypeError as error:
            raise ValueError(
                f"reward {self.origin}: it is called with a row and a response (and prompt, "
                f"token_ids and finished where it has these parameters): {error}"
            ) from None

    def __call__(self, sampled: Sequence[Sampled]) -> list[float | None]:
        """Returns the rewards of responses.

        Raises:
            RewardError: one line that names the function, the row and the place in the code.
        """
        rewards = self._of_batch(sampled) if self.is_of_batches else self._of_each(sampled)
        return [self._number(r, one) for r, one in zip(rewards, sampled, strict=True)]

    def _of_each(self, sampled: Sequence[Sampled]) -> list[Any]:
        results = []
        for one in sampled:
            try:
                results.append(self._function(dict(one.row), one.response, **self._extras(one)))
            except (Exception, SystemExit) as error:
                _close(results)
                raise self._failed(one.place, error) from error
        waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
        if waiting:
            for i, result in zip(waiting, _wait_for([results[i] for i in waiting]), strict=True):
                if isinstance(result, BaseException):
                    raise self._failed(sampled[i].place, result) from result
                results[i] = result
        return results

    def _extras(self, one: Sampled) -> dict[str, Any]:
        known = {"prompt": one.prompt, "token_ids": list(one.token_ids), "finished": one.finished}
        return self._accepted(known, skip=2)

    def _of_batch(self, sampled: Sequence[Sampled]) -> list[Any]:
        columns = dict.fromkeys(name for one in sampled for name in one.row)
        known: dict[str, list[Any]] = {
            name: [one.row.get(name) for one in sampled] for name in columns
        }
        ids = [list(one.token_ids) for one in sampled]
        known |= {
            "rows": [dict(one.row) for one in sampled],
            "prompts": [one.prompt for one in sampled],
            "token_ids": ids,
            "completion_ids": ids,
            "finished": [one.finished for one in sampled],
            **{name: [one.response for one in sampled] for name in RESPONSES},
        }
        try:
            result = self._function(**self._accepted(known))
            if inspect.isawaitable(result):
                (result,) = _wait_for([result])
                if isinstance(result, BaseException):
                    raise result
        except (Exception, SystemExit) as error:
            raise self._failed(_places(sampled), error) from error
        rewards = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(rewards, Sequence) or isinstance(rewards, (str, bytes)):
            raise RewardError(
                f"reward {self.origin} must return a list of {len(sampled)} numbers, one a "
                f"response, got {type(result).__name__}"
            )
        if len(rewards) != len(sampled):
            raise RewardError(
                f"reward {self.origin} returned {len(rewards)} rewards for {len(sampled)} responses"
            )
        return list(rewards)

    def _accepted(self, known: Mapping[str, Any], skip: int = 0) -> dict[str, Any]:
        """Returns what of `known` the signature has, but for its first `skip` parameters."""
        kinds = list(self._parameters.values())
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in kinds):
            taken = [parameter.name for parameter in kinds[:skip]]
            return {name: value for name, value in known.items() if name not in taken}
        named = {parameter.name for parameter in kinds[skip:]}
        return {name: value for name, value in known.items() if name in named}

    def _number(self, reward: Any, one: Sampled) -> float | None:
        if reward is None:
            return None
        try:
            if isinstance(reward, (str, bytes)) or (
                isinstance(reward, numbers.Complex) and not isinstance(reward, numbers.Real)
            ):
                raise TypeError
            number = float(reward.detach() if hasattr(reward, "detach") else reward)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise RewardError(
                f"reward {self.origin} must return a number, or None where it abstains; of "
                f"{one.place} it returned {type(reward).__name__} {reward!r:.80}"
            ) from None
        if not math.isfinite(number):
            raise RewardError(
                f"reward {self.origin} must be finite, or None where it abstains; of {one.place} "
                f"it is {number}"
            )
        return number

    def _failed(self, place: str, error: BaseException) -> RewardError:
        at = place_of(error, self._file)
        return RewardError(
            f"reward {self.origin} failed on {place}: {one_line(error)}"
            + (f" ({at})" if at else "")
        )


class RowReward:
    """Reward functions of the rows of the data, as a reward model: their weighted sum.

    A response of which all functions are None abstains; of the others those that are None add
    nothing.

    Args:
        functions: the functions; plain callables are taken as `RewardFunction` takes them.
        tokenizer: decodes prompts and responses, has `batch_decode` as those of Hugging Face.
        rows: of the data; a batch tells by their positions here whose responses it holds.
        places: of the rows, for errors; None: their numbers.
        weights: of the functions; None: 1 each.
        special_tokens: "strip" leaves special tokens out of the texts, "keep" keeps them, but for
            padding and the token that ended the response.
        end_token_ids: what may end a response.

    Attributes:
        description: the names of the functions, for errors.
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        tokenizer: Any,
        rows: Sequence[Mapping[str, Any]],
        places: Sequence[str] | None = None,
        *,
        weights: Sequence[float] | None = None,
        special_tokens: str = "strip",
        end_token_ids: Sequence[int] = (),
    ) -> None:
        check_special_tokens(special_tokens)
        self._functions = [
            f if isinstance(f, RewardFunction) else RewardFunction(f) for f in functions
        ]
        origins = ", ".join(function.origin for function in self._functions)
        self.description = f"reward {origins}"
        self._names = _distinct([function.name for function in self._functions])
        self._weights = [1.0] * len(self._functions) if weights is None else list(weights)
        if not self._functions or len(self._weights) != len(self._functions):
            raise ValueError(
                f"weights: expected one for each of {len(self._functions)} reward functions, "
                f"got {len(self._weights)}"
            )
        if places is not None and len(places) != len(rows):
            raise ValueError(f"places: expected one for each of {len(rows)}, got {len(places)}")
        self._tokenizer = tokenizer
        self._rows, self._places = rows, places
        self._strips = special_tokens == "strip"
        self._ends = frozenset(end_token_ids)

    def __call__(
        self,
        ids: Tensor,
        masks: Tensor,
        response_token_mask: Tensor,
        rows: Tensor | None = None,
        finished: Tensor | None = None,
    ) -> dict[str, Any]:
        """Returns `rewards`, one a sequence or None, and `parts`, the rewards of each function."""
        sampled = self._sampled(ids, masks, response_token_mask, rows, finished)
        parts = [function(sampled) for function in self._functions]
        rewards: list[float | None] = []
        for of_one in zip(*parts, strict=True):
            weighted = [w * r for w, r in zip(self._weights, of_one, strict=True) if r is not None]
            rewards.append(math.fsum(weighted) if weighted else None)
        if len(parts) == 1:
            return {"rewards": rewards}
        return {"rewards": rewards, "parts": dict(zip(self._names, parts, strict=True))}

    def _sampled(
        self, ids: Tensor, masks: Tensor, tokens: Tensor, rows: Tensor | None,
        finished: Tensor | None,
    ) -> list[Sampled]:  # fmt: skip
        if rows is None:
            raise ValueError("rows: expected the positions of the prompts' rows, got None")
        real, response, ids = (masks != 0).cpu(), (tokens != 0).cpu(), ids.cpu()
        asked = [row[keep].tolist() for row, keep in zip(ids, real & ~response, strict=True)]
        given = [row[keep].tolist() for row, keep in zip(ids, real & response, strict=True)]
        ended = [True] * len(given) if finished is None else finished.tolist()
        written = [
            answer[:-1] if end and answer and answer[-1] in self._ends else answer
            for answer, end in zip(given, ended, strict=True)
        ]
        prompts, texts = self._texts(asked), self._texts(written)
        found = []
        for i, position in enumerate(rows.tolist()):
            place = f"row {position}" if self._places is None else self._places[position]
            found.append(
                Sampled(self._rows[position], place, prompts[i], texts[i], given[i], bool(ended[i]))
            )
        return found

    def _texts(self, rows: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(rows, skip_special_tokens=self._strips)


def read_functions(names: Sequence[str]) -> list[RewardFunction]:
    """Returns the reward functions that `FILE.py:NAME` or `package.module:NAME` mean.

    Raises:
        ValueError: one line, as `import_functions`.
    """
    imported = import_functions(names)
    return [
        RewardFunction(function, name.rpartition(":")[2], name)
        for function, name in zip(imported, names, strict=True)
    ]


def _file_of(function: Callable[..., Any]) -> str | None:
    """Returns the file of the code of a function, or of an object that is called."""
    try:
        return inspect.getsourcefile(function if hasattr(function, "__name__") else type(function))
    except TypeError:  # of what is built in
        return None


def _wait_for(awaitables: Sequence[Any]) -> list[Any]:
    """Returns the results of awaitables that run side by side, or what they raised."""

    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    return asyncio.run_coroutine_threadsafe(gather(), _event_loop()).result()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Returns one loop for all batches, in a thread: a client of a server belongs to its loop."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop


def _close(results: Sequence[Any]) -> None:
    for result in results:
        if inspect.iscoroutine(result):
            result.close()


def _places(sampled: Sequence[Sampled]) -> str:
    places = list(dict.fromkeys(one.place for one in sampled))
    more = f" and {len(places) - SHOWN_ROWS} more" if len(places) > SHOWN_ROWS else ""
    return ", ".join(places[:SHOWN_ROWS]) + more


def _distinct(names: Sequence[str]) -> list[str]:
    """Returns the names, numbered where one comes again."""
    found: list[str] = []
    for name in names:
        count = 2
        distinct = name
        while distinct in found:
            distinct, count = f"{name}_{count}", count + 1
        found.append(distinct)
    return found
