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


LOSSES = torch.tensor([[1.0, 2.0, torch.nan], [torch.nan] * 3, [6.0, torch.nan, torch.nan]])
COUNTS = {"dp_size": 2, "batch_num_tokens": 10, "global_batch_size": 8}


@pytest.mark.parametrize(
    ("mode", "local", "all_processes"),
    [
        ("token-mean", 9 / 3, 2 * 9 / 10),
        ("token-sum", 9, 2 * 9),
        ("seq-mean-token-sum", 9 / 2, 2 * 9 / 8),
        ("seq-mean-token-mean", 7.5 / 2, 2 * 7.5 / 8),
        ("seq-mean-token-sum-norm", 9 / 2 / 3, 2 * 9 / 8 / 3),
    ],
)
def test_verl_aggregates(mode, local, all_processes):
    mask = LOSSES.isfinite().long()
    assert verl.agg_loss(LOSSES, mask, mode).item() == pytest.approx(local)
    assert verl.agg_loss(LOSSES, mask, mode, **COUNTS).item() == pytest.approx(all_processes)
    values = (2 * LOSSES).sqrt().requires_grad_()  # of half of the square
    arguments = (values, torch.zeros(3, 3), values.detach(), mask, 1.0, mode)
    assert verl.compute_value_loss(*arguments)[0].item() == pytest.approx(local)
    loss, share = verl.compute_value_loss(*arguments, **COUNTS)
    assert loss.item() == pytest.approx(all_processes) and share.item() == 0.0
    policy = {"log_prob": values, "old_log_prob": values.detach(), "advantages": -LOSSES}
    policy |= {"response_mask": mask, "loss_agg_mode": mode}
    loss, _ = verl.compute_policy_loss_vanilla(**policy, config={"global_batch_info": COUNTS})
    assert loss.item() == pytest.approx(all_processes)
    loss.backward()
    assert values.grad[mask == 0].eq(0).all() and values.grad[0, 0] != 0
    if mode == "seq-mean-token-sum-norm":
        counts = COUNTS | {"loss_scale_factor": 5}
        assert verl.agg_loss(LOSSES, mask, mode, **counts).item() == pytest.approx(2 * 9 / 8 / 5)
    if mode != "token-sum":
        with pytest.raises(ValueError, match="expected the count of all 2 processes"):
            verl.agg_loss(LOSSES, mask, mode, dp_size=2)


@pytest.mark.parametrize("name", ["kl", "abs", "mse", "low_var_kl", "k1+", "abs+", "k3+"])
def test_verl_kl_penalty(name):
    d = torch.tensor([0.5, -1.0, 2.0, -9.0], dtype=torch.float64, requires_grad=True)
    wanted = {"kl": d, "abs": d.abs(), "mse": d**2 / 2, "k1+": d, "abs+": d.abs()}
    k3 = ((-d).exp() - 1 + d).clamp(max=10)
    got = verl.kl_penalty(d, torch.zeros_like(d), name)
    torch.testing.assert_close(got, wanted.get(name, k3))
    behind = d**2 / 2 if name.endswith("+") else wanted.get(name, k3)
    torch.testing.assert_close(gradient(got, d), gradient(behind, d))
    with pytest.raises(ValueError, match="kl_penalty: expected"):
        verl.kl_penalty(d, d.detach(), "full")


def test_verl_advantages_by_group():
    rewards = torch.tensor([[1.0, 1.0], [4.0, 1.0], [0.0, 4.0], [0.0, 7.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])
    index = ["a", "b", "a", "a"]  # rewards 2, 4, 7 and 5 alone
    advantages, returns = verl.compute_grpo_outcome_advantage(rewards, mask, index, 0.0)
    deviation = torch.tensor([2.0, 4.0, 7.0]).std()
    row = (torch.tensor([2.0, 4.0, 7.0]) - 13 / 3) / deviation
    wanted = torch.stack([row[0], torch.tensor(5.0), row[1], row[2]]).unsqueeze(1) * mask
    torch.testing.assert_close(advantages, wanted)
    assert torch.equal(advantages, returns)
    centered, _ = verl.compute_grpo_outcome_advantage(rewards, mask, index, 0.0, False)
    torch.testing.assert_close(centered[0], torch.full((2,), 2 - 13 / 3))
    others, _ = verl.compute_rloo_outcome_advantage(rewards, mask, index)
    torch.testing.assert_close(others[:, 0], torch.tensor([2 - 5.5, 5, 4 - 4.5, 7 - 3]))
    with pytest.raises(ValueError, match="index: expected 4 names"):
        verl.compute_rloo_outcome_advantage(rewards, mask, ["a"])


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
