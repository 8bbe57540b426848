"""The options of the MLM trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..training.config import check_flag, check_number

PROBABILITIES = ("mask_prob", "mask_token_prob", "random_token_prob")
IDS = ("mask_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
MOST = 1 + 1e-9  # 0.7 + 0.2 + 0.1 need not be 1


@dataclass
class MLMConfig:
    """The options of `MLMPretrainer`; impossible values raise ValueError.

    Attributes:
        mask_prob: probability of a token (of a word, with `word_ids`) to be predicted.
        mask_token_prob: probability of such a token to become the mask token.
        random_token_prob: probability of such a token to become a random word.
        keep_token_prob: what these two leave; something else is an error.
        learning_rate: of the AdamW that is made without an optimizer.
        weight_decay: of that AdamW.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        warmup_steps: the learning rate rises linearly over so many steps; 0: it does not.
        vocab_size: how many ids there are.
        mask_token_id: id of [MASK].
        pad_token_id: id of padding; None: the tokenizer has none.
        cls_token_id: id of [CLS]; None: the tokenizer has none.
        sep_token_id: id of [SEP]; what follows the first one is the second segment. None: the
            tokenizer has none (ESM's), which next sentences need.
        use_nsp: also predict whether the second segment follows the first.
        mlm_loss_weight: of the masked tokens' loss in the total.
        nsp_loss_weight: of the next sentence's loss in the total.
        special_token_ids: more ids that are neither predicted nor drawn as random words.
        seed: of the masks, which depend on it, the step, the sample and the position alone.
        hidden_act: activation of the head that is made.
    """

    mask_prob: float = 0.15
    mask_token_prob: float = 0.8
    random_token_prob: float = 0.1
    keep_token_prob: float | None = 0.1
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    warmup_steps: int = 10000
    vocab_size: int = 50000
    mask_token_id: int = 4
    pad_token_id: int | None = 0
    cls_token_id: int | None = 2
    sep_token_id: int | None = 3
    use_nsp: bool = False
    mlm_loss_weight: float = 1.0
    nsp_loss_weight: float = 1.0
    special_token_ids: Sequence[int] = ()
    seed: int = 0
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ValueError where an option cannot be."""
        for name in PROBABILITIES:
            check_number(self, name, at_least=0, below=MOST)
        check_number(self, "keep_token_prob", at_least=0, below=MOST, optional=True)
        self._check_keep()
        for name in ("learning_rate", "weight_decay", "mlm_loss_weight", "nsp_loss_weight"):
            check_number(self, name, at_least=0)
        check_number(self, "max_grad_norm", above=0, optional=True)
        check_flag(self, "use_nsp")
        for name, least in (("warmup_steps", 0), ("vocab_size", 1), ("seed", None)):
            value = getattr(self, name)
            if type(value) is not int or (least is not None and value < least):
                bound = "" if least is None else f" >= {least}"
                raise ValueError(f"MLMConfig.{name} must be an int{bound}, got {value!r}")
        self._check_ids()

    def _check_keep(self) -> None:
        used = self.mask_token_prob + self.random_token_prob
        if used > MOST:
            raise ValueError(
                "MLMConfig.mask_token_prob and random_token_prob may add to at most 1, got "
                f"{self.mask_token_prob} + {self.random_token_prob}"
            )
        keep = self.keep_token_prob
        if keep is not None and not math.isclose(keep, 1 - used, abs_tol=1e-6):
            raise ValueError(
                "MLMConfig.keep_token_prob is what mask_token_prob and random_token_prob leave, "
                f"{1 - used:.4g} here (or None), got {keep}"
            )

    def _check_ids(self) -> None:
        more = [("special_token_ids", value) for value in self.special_token_ids]
        own = [(name, getattr(self, name)) for name in IDS]
        own = [(name, value) for name, value in own if name == "mask_token_id" or value is not None]
        if self.use_nsp and self.sep_token_id is None:
            raise ValueError("MLMConfig.sep_token_id must be an id: use_nsp needs it, got None")
        for name, value in [*own, *more]:
            if type(value) is not int or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"MLMConfig.{name} must be an id in [0, vocab_size = {self.vocab_size}), "
                    f"got {value!r}"
                )
        if self.random_token_prob and len(self.special_ids) >= self.vocab_size:
            raise ValueError(
                f"MLMConfig.vocab_size {self.vocab_size} leaves no word that is not special"
            )

    def check_embedding(self, rows: int | None) -> None:
        """Raises ValueError where a model's embedding has fewer rows than `vocab_size`."""
        if rows is not None and rows < self.vocab_size:
            raise ValueError(
                f"MLMConfig.vocab_size is {self.vocab_size}, the model's embedding has {rows} rows"
            )

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids that are never predicted."""
        own = {getattr(self, name) for name in IDS} - {None}
        return tuple(sorted({*own, *self.special_token_ids}))
