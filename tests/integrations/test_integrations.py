"""The adapters: TRL, verl and transformers, and real DPO steps with and without the patch."""

import importlib
import sys
import types

import pytest
import torch

import apt_kernels
from apt_kernels.integrations import trl as ours
from apt_kernels.integrations import verl


def naive(logits, index, temperature=1.0):
    logps = (logits / temperature).log_softmax(-1)
    chosen = logps.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return chosen, -(logps.exp() * logps).sum(-1)


@pytest.fixture
def logits():
    return (2 * torch.randn(3, 5, 11, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def index():
    return torch.randint(0, 11, (3, 5))


def gradient(value, leaf):
    weighted = value * torch.arange(1, value.numel() + 1).view_as(value)
    return torch.autograd.grad(weighted.sum(), leaf, retain_graph=True)[0]


def test_trl_functions(logits, index):
    mask = torch.tensor([[1, 1, 0, 1, 0]]).expand(3, 5)
    logps, entropy = naive(logits, index, 0.7)
    both = ours.selective_log_softmax_and_entropy(logits, index, temperature=0.7, row_mask=mask)
    pairs = [
        (ours.selective_log_softmax(logits, index, 0.7), logps),
        (ours.selective_log_softmax(logits, index, 0.7, mask), logps * mask),
        (both[0], logps * mask),
        (both[1], entropy * mask),
        (ours.entropy_from_logits(logits), naive(logits, index)[1]),
    ]
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(gradient(got, logits), gradient(wanted, logits))
    assert not ours.selective_log_softmax_and_entropy(logits, index, False)[1].requires_grad


def test_trl_several_ids_with_a_mask(logits):
    index = torch.randint(0, 11, (3, 5, 4))
    mask = torch.randint(0, 2, (3, 5, 4))
    wanted = logits.log_softmax(-1).gather(-1, index) * mask
    got = ours.selective_log_softmax(logits, index, row_mask=mask)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradient(got, logits), gradient(wanted, logits))


def test_verl_functions(logits, index):
    before = logits.detach().clone()
    got = verl.logprobs_from_logits(logits, index, inplace_backward=True)
    torch.testing.assert_close(got, naive(logits, index)[0])
    gradient(got, logits)
    assert torch.equal(logits, before)

    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    logps, entropy = naive((hidden @ weight.T).flatten(0, 1), index.flatten(), 0.7)
    for reduction, wanted in (("none", logps), ("sum", logps.sum()), ("mean", logps.mean())):
        got = verl.linear_cross_entropy(hidden, weight, index, 0.7, reduction)
        torch.testing.assert_close(got[0], wanted)
        torch.testing.assert_close(got[1], entropy)
        for leaf in (hidden, weight):
            for a, b in zip(got, (wanted, entropy), strict=True):
                torch.testing.assert_close(gradient(a, leaf), gradient(b, leaf))
    with pytest.raises(ValueError, match="dist_process_group"):
        verl.linear_cross_entropy(hidden, weight, index, 1.0, "none", object())
    with pytest.raises(ValueError, match="reduction"):
        verl.linear_cross_entropy(hidden, weight, index, 1.0, "avg")


# -- the patch ------------------------------------------------------------------------------------


@pytest.fixture
def trl_utils():
    pytest.importorskip("trl")
    utils = importlib.import_module("trl.trainer.utils")
    yield utils
    ours.remove_from_trl()


def test_patch_is_idempotent_reversible_and_reports(trl_utils):
    before = {n: vars(trl_utils)[n] for n in ours._REPLACEMENTS if n in vars(trl_utils)}
    assert before, "this TRL has none of the functions"
    importer = types.ModuleType("trl.experimental.imports_it")
    importer.selective_log_softmax = trl_utils.selective_log_softmax
    sys.modules[importer.__name__] = importer
    try:
        report = ours.apply_to_trl()
        assert {f"trl.trainer.utils.{n}" for n in before} <= set(report)
        name = "apt_kernels.integrations.trl.selective_log_softmax"
        assert report["trl.experimental.imports_it.selective_log_softmax"] == name
        assert importer.selective_log_softmax is ours.selective_log_softmax
        assert ours.apply_to_trl() == report
        for n in before:
            assert vars(trl_utils)[n] is ours._REPLACEMENTS[n]
        assert set(ours.remove_from_trl()) == set(report)
        assert all(vars(trl_utils)[n] is f for n, f in before.items())
        assert importer.selective_log_softmax is before["selective_log_softmax"]
        assert ours.remove_from_trl() == {}
    finally:
        del sys.modules[importer.__name__]


def test_patch_refuses_to_stack(trl_utils, monkeypatch):
    def another_patch(logits, index):
        raise AssertionError

    own = trl_utils.entropy_from_logits
    with monkeypatch.context() as patch:
        patch.setattr(trl_utils, "selective_log_softmax", another_patch)
        with pytest.raises(RuntimeError, match=r"selective_log_softmax is already .*another_patch"):
            ours.apply_to_trl()
        assert trl_utils.entropy_from_logits is own, "nothing may be replaced"
    ours.apply_to_trl()
    with monkeypatch.context() as patch:
        patch.setattr(trl_utils, "selective_log_softmax", another_patch)
        with pytest.raises(RuntimeError, match="was replaced once more"):
            ours.remove_from_trl()


def test_patched_head_gives_trls_results(trl_utils):
    theirs = trl_utils._ChunkedLogProbFunction
    torch.manual_seed(1)
    hidden, weight, bias = (torch.randn(s, requires_grad=True) for s in ((9, 6), (13, 6), (13,)))
    targets = torch.randint(0, 13, (9,))
    calls = [
        (0.7, 5, None, 1.0, ("log_probs", "entropy")),
        (1.0, 13, 3.0, 0.5, ("log_probs",)),
        (1.0, 5, None, 1.0, ("log_probs", "entropy", "mean_logits", "is_top1")),  # TRL's own
    ]
    for rest in calls:
        results = []
        for function in (theirs, ours.ChunkedLogProbFunction):
            out = function.apply(hidden, weight, bias, targets, *rest)
            ends = [x for x in out if x is not None and x.requires_grad]
            grads = torch.autograd.grad(
                sum((x * torch.arange(9)).sum() for x in ends), (hidden, weight, bias)
            )
            results.append((out, grads))
        (their_out, their_grads), (our_out, our_grads) = results
        assert [x is None for x in their_out] == [x is None for x in our_out]
        kept = [(a, b) for a, b in zip(their_out, our_out, strict=True) if a is not None]
        for a, b in (*kept, *zip(their_grads, our_grads, strict=True)):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def dpo_step(folder):
    """Two optimizer steps of TRL's trainer on a tiny Llama; its losses, metrics and weights."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )

    def model(seed):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
                pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip

    rows = [
        {
            "prompt": f"w{i} w{i + 1}",
            "chosen": " ".join(f" w{(i * 3 + j) % 40}" for j in range(3 + i % 3)),
            "rejected": " ".join(f" w{(i * 7 + j) % 40}" for j in range(2 + i % 4)),
        }
        for i in range(8)
    ]
    trainer = DPOTrainer(
        model=model(0),
        ref_model=model(1),  # another: margins of 0 would make the accuracy a matter of rounding
        args=DPOConfig(
            output_dir=str(folder), per_device_train_batch_size=4, max_steps=2, logging_steps=1,
            report_to=[], use_cpu=True, bf16=False, learning_rate=1e-2, seed=3, save_strategy="no",
            disable_tqdm=True, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    logs = [{k: v for k, v in log.items() if "/" in k or k in ("loss", "entropy", "grad_norm")}
            for log in trainer.state.log_history if "loss" in log]  # fmt: skip
    return logs, [p.detach().clone() for p in trainer.model.parameters()]


def test_a_dpo_step_of_trl_with_and_without_the_patch(trl_utils, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    torch.use_deterministic_algorithms(False)  # TRL's own head has no deterministic scatter
    plain_logs, plain_weights = dpo_step(tmp_path / "plain")
    calls = []
    kernel = apt_kernels.linear_token_logprobs

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(ours, "linear_token_logprobs", counted)
    ours.apply_to_trl()
    logs, weights = dpo_step(tmp_path / "patched")
    assert len(calls) >= 2, "the patched trainer must have used the kernel in both steps"
    assert len(logs) == len(plain_logs) == 2
    for ours_now, plain in zip(logs, plain_logs, strict=True):
        assert ours_now.keys() == plain.keys() and "loss" in plain
        for key, value in plain.items():
            assert ours_now[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for a, b in zip(weights, plain_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
