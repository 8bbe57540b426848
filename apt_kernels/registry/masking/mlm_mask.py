"""mlm_mask: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ... import reference
from ...ops.masking.mlm_mask import mlm_mask
from ..entry import Benchmark, Op, Rejected, Sample, seeded

BERT = {"mask_token_id": 103, "vocab_size": 30522, "special_token_ids": (0, 100, 101, 102)}
TINY = {"mask_token_id": 4, "vocab_size": 50, "special_token_ids": (0, 1, 2, 3), "seed": 11}


def _ids(*shape: int, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=seeded(seed))


def _words(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Words of many lengths, some of them below 0; one number may come back later."""
    generator = seeded(seed)
    begins = torch.rand(rows, length, generator=generator) < 0.3
    begins[:, length // 3 : 2 * length // 3] = False  # a long one
    return begins.cumsum(-1) % 7 - 1


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def call(name: str, ids: torch.Tensor, **options) -> Sample:
        return Sample(name, (ids.to(dtype),), TINY | options)

    ids = _ids(5, 83)
    yield call("plain", ids)
    yield call("no_special_ids", ids, special_token_ids=())
    yield Sample("bert", (_ids(3, 300, vocab=30522).to(dtype),), BERT | {"seed": 0})
    for length in (1, 2, 7, 8, 9, 15, 16, 17, 127, 129, 1025):
        yield call(f"length_{length}", _ids(3, length, seed=length), mask_prob=0.5, step=length)
    yield call("no_rows", ids[:0], at_least_one=True)
    yield call("no_slots", ids[:, :0], at_least_one=True, word_ids=_words(5, 0))

    yield call("large_step", ids, step=2**32 - 1, seed=2**64 - 1)
    yield call("negative_seed", ids, seed=-5)
    yield call("seed_of_65_bits", ids, seed=2**64 + 11)
    rows = torch.tensor([7, -1, 2**62 + 5, -(2**63), 2**32])
    yield call("sample_ids", ids, sample_ids=rows)
    yield call("sample_ids_int32", ids, sample_ids=torch.arange(5, dtype=torch.int32) * 1000)
    yield call("nothing_chosen", ids, mask_prob=0.0)
    yield call("everything_chosen", ids, mask_prob=1.0)
    yield call("all_masked", ids, mask_prob=0.5, mask_token_prob=1.0, random_token_prob=0.0)
    yield call("all_random", ids, mask_prob=0.5, mask_token_prob=0.0, random_token_prob=1.0)
    yield call("all_kept", ids, mask_prob=0.5, mask_token_prob=0.0, random_token_prob=0.0)
    yield call("mask_token_outside", ids, mask_token_id=1000, mask_prob=0.4)
    random = {"mask_prob": 0.7, "mask_token_prob": 0.1, "random_token_prob": 0.8}
    yield call("special_ids_outside", ids, special_token_ids=(49, 7, -3, 50, 2**40, 7), **random)
    yield call("many_runs", ids, special_token_ids=tuple(range(0, 50, 2)), **random)
    yield call("one_ordinary_id", ids, special_token_ids=tuple(range(49)), **random)
    only_special = {"special_token_ids": tuple(range(50)), "random_token_prob": 0.0}
    yield call("no_ordinary_id", ids, at_least_one=True, **only_special)

    padding = torch.arange(83) >= torch.tensor([[83], [60], [1], [0], [33]])
    wild = (
        ids.masked_fill(padding, -7) if dtype == torch.int32 else ids.masked_fill(padding, -(2**40))
    )
    yield call("attention_mask", wild, attention_mask=~padding, at_least_one=True)
    for mask_dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32):
        yield call(
            f"masks_{str(mask_dtype).removeprefix('torch.')}",
            wild,
            attention_mask=(~padding).to(mask_dtype) * 3,
            special_tokens_mask=(ids % 5 == 0).to(mask_dtype),
        )

    words = _words(5, 83)
    yield call("words", ids, word_ids=words, mask_prob=0.3)
    yield call("words_int32", ids, word_ids=words.int(), attention_mask=~padding, mask_prob=0.3)
    yield call("one_word", ids, word_ids=torch.zeros(5, 83, dtype=torch.long), at_least_one=True)
    yield call("no_word", ids, word_ids=torch.full((5, 83), -1), at_least_one=True, mask_prob=1.0)
    long = _ids(2, 2100)
    yield call("words_long", long, word_ids=_words(2, 2100), mask_prob=0.3)
    many, few = _ids(20, 19, seed=5), {"mask_prob": 0.02, "at_least_one": True}
    yield call("at_least_one", many, **few)
    yield call("at_least_one_word", many, word_ids=_words(20, 19), **few)
    half = torch.arange(20 * 19).view(20, 19) % 3 == 0
    yield call(
        "at_least_one_of_few", many, special_tokens_mask=~half, word_ids=_words(20, 19), **few
    )
    yield call("at_least_one_long", long, word_ids=_words(2, 2100), **(few | {"mask_prob": 0.0}))

    wide = _ids(6, 40)
    yield call("sliced", wide[1:, 3:-3:2], mask_prob=0.4)
    yield call("transposed", wide.t(), attention_mask=wide.t() > 9, mask_prob=0.4)
    yield call("expanded", wide[:1].expand(6, 40), attention_mask=(wide[:, :1] > 9).expand(6, 40))


def of_length(length: int) -> Sample:
    return Sample("", (_ids(3, length),), TINY | {"step": length})


def rejected() -> Iterator[Rejected]:
    ids, ok = torch.zeros(2, 3, dtype=torch.long), TINY

    def bad(name, error, message, tensor=ids, **options) -> Rejected:
        return Rejected(name, (tensor,), ok | options, error, message)

    yield bad("list", TypeError, "input_ids: expected a tensor", tensor=[[1]])
    yield bad("float_ids", TypeError, "input_ids: expected dtype int64, int32", tensor=ids.float())
    yield bad("one_dimension", ValueError, "input_ids: expected 2 dimensions", tensor=ids[0])
    yield bad(
        "row_too_long", ValueError, r"input_ids: .*2\^31", tensor=ids[:1, :1].expand(1, 2**31)
    )
    for name in ("attention_mask", "special_tokens_mask", "word_ids"):
        yield bad(f"{name}_shape", ValueError, rf"{name}: .*\(2, 3\)", **{name: ids[:1]})
        yield bad(f"{name}_type", TypeError, f"{name}: expected a tensor", **{name: [1]})
    yield bad("float_words", TypeError, "word_ids: expected dtype", word_ids=ids.float())
    yield bad("sample_ids_shape", ValueError, r"sample_ids: .*\(2,\)", sample_ids=ids[0])
    yield bad("sample_ids_type", TypeError, "sample_ids: expected dtype", sample_ids=ids[:, 0] / 2)
    yield bad("mask_token_id", ValueError, "mask_token_id: .*got -1", mask_token_id=-1)
    yield bad(
        "mask_token_type", TypeError, "mask_token_id: expected an integer", mask_token_id=None
    )
    yield bad("vocab_size", ValueError, "vocab_size: .*got 0", vocab_size=0)
    yield bad("vocab_size_large", ValueError, "vocab_size: ", vocab_size=2**31)
    yield bad("special_type", TypeError, "special_token_ids: ", special_token_ids=(1, 2.0))
    for name in ("mask_prob", "mask_token_prob", "random_token_prob"):
        for value in (-0.1, 1.1, float("nan")):
            yield bad(f"{name}_{value}", ValueError, rf"{name}: .*got {value}", **{name: value})
        yield bad(f"{name}_type", TypeError, f"{name}: expected a number", **{name: "1"})
    yield bad("probabilities", ValueError, "random_token_prob: .*at most 1", random_token_prob=0.3)
    all_special = {"vocab_size": 5, "special_token_ids": (0, 1, 2, 3)}
    yield bad("no_words", ValueError, "random_token_prob: .*are special", **all_special)
    yield bad("seed", TypeError, "seed: expected an integer", seed=1.0)
    for step in (-1, 2**32):
        yield bad(f"step_{step}", ValueError, f"step: .*got {step}", step=step)
    yield bad("backend", ValueError, "backend: .*'fastest'", backend="fastest")


def eager(input_ids: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks as Hugging Face's collator does, but leaves the input unchanged."""
    special = input_ids.new_tensor([*options["special_token_ids"], options["mask_token_id"]])

    def drawn(probability: float) -> torch.Tensor:
        chances = torch.full(input_ids.shape, probability, device=input_ids.device)
        return torch.bernoulli(chances).bool()

    chosen = drawn(0.15)
    chosen &= ~torch.isin(input_ids, special)
    labels = input_ids.masked_fill(~chosen, -100)
    masked = chosen & drawn(0.8)
    random = chosen & drawn(0.5) & ~masked
    words = torch.randint_like(input_ids, options["vocab_size"])
    masked_ids = input_ids.masked_fill(masked, options["mask_token_id"])
    return torch.where(random, words, masked_ids), labels


def _collators() -> dict[str, Callable]:
    """Hugging Face's collator, given the mask of special tokens or finding them by itself."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    special = dict(zip(("pad", "unk", "cls", "sep", "mask"), (0, 100, 101, 102, 103), strict=True))
    words = {f"[{name.upper()}]": i for name, i in special.items()}
    others = (i for i in range(30522) if i not in special.values())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words | {str(i): i for i in others}, "[UNK]")),
        **{f"{name}_token": f"[{name.upper()}]" for name in special},
    )
    collator = DataCollatorForLanguageModeling(tokenizer)
    ids = torch.tensor([*special.values()])
    known: dict[torch.Size, torch.Tensor] = {}  # found once, as a data loader would

    # A copy of the ids, as the collator writes into what it is given.
    def given(input_ids: torch.Tensor, **_) -> tuple[torch.Tensor, torch.Tensor]:
        if input_ids.shape not in known:
            known[input_ids.shape] = torch.isin(input_ids, ids)
        return collator.torch_mask_tokens(input_ids.clone(), known[input_ids.shape])

    def found(input_ids: torch.Tensor, **_) -> tuple[torch.Tensor, torch.Tensor]:
        return collator.torch_mask_tokens(input_ids.clone(), None)

    return {"Hugging Face, mask given": given, "Hugging Face": found}


def _benchmark(rows: int, length: int, devices: tuple[str, ...] = ("cpu", "cuda")) -> Benchmark:
    return Benchmark(
        name=f"{rows} x {length}",
        make=lambda dtype: Sample(
            "", (_ids(rows, length, vocab=30522).to(dtype),), BERT | {"seed": 0}
        ),
        eager=eager,
        dtypes=(torch.int64,),
        backward=False,
        # reads the ids, writes ids, labels and positions
        bytes_moved=lambda s: s.args[0].numel() * (3 * s.args[0].element_size() + 1),
        peers=(_collators,),
        comparable=False,  # other random numbers
        devices=devices,
    )


OP = Op(
    name="mlm_mask",
    function=mlm_mask,
    reference=reference.mlm_mask,
    kernels=("mlm_mask_fwd",),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="Devlin 2018, Salmon 2011",
    summary="80/10/10 masking that depends on seed, step, sample and position alone",
    benchmarks=(
        _benchmark(256, 512),
        _benchmark(32, 128),
        _benchmark(8192, 512, devices=("cuda",)),
    ),
    dtypes=(torch.int64, torch.int32),
)
