"""TRL's trainers at TRL's defaults, which are mixed precision: every call of the head is ours."""

import importlib
import math

import pytest
import torch

from apt_kernels.integrations import trl as ours

pytest.importorskip("trl")
pytest.importorskip("datasets")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]


@pytest.fixture(autouse=True)
def _put_back():
    torch.use_deterministic_algorithms(False)  # TRL's own head has no deterministic scatter
    yield
    ours.remove_from_trl()


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def model(folder, kind):
    """A model that came from a folder: the trainers load their reference from there."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    made = (LlamaForSequenceClassification if kind == "Reward" else LlamaForCausalLM)(
        LlamaConfig(
            num_labels=1,
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    made.save_pretrained(folder)
    return type(made).from_pretrained(folder)


def rows(kind):
    for i in range(8):
        prompt, chosen = (
            f"w{i} w{i + 1}",
            " ".join(f"w{(i * 3 + j) % 40}" for j in range(3 + i % 3)),
        )
        rejected = " ".join(f"w{(i * 7 + j) % 40}" for j in range(2 + i % 4))
        yield {
            "DPO": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
            "Reward": {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": i / 8},
            "KTO": {"prompt": prompt, "completion": chosen, "label": i % 2 == 0},
            "SFT": {"text": f"{prompt} {chosen}"},
            "GRPO": {"prompt": prompt},
            "RLOO": {"prompt": prompt},
        }[kind]


def length_reward(completions, **_):
    return [float(len(c)) for c in completions]


def trained(kind, folder, **changes):
    """The logs of two steps of TRL's trainer, whose other options are TRL's defaults."""
    import trl
    from datasets import Dataset

    sampled = kind in ("GRPO", "RLOO")
    options = {"max_completion_length": 4, "num_generations": 2} if sampled else {}
    if kind == "Reward":
        options = {"center_rewards_coefficient": 0.01}
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=2, logging_steps=1,
        report_to=[], use_cpu=True, learning_rate=1e-2, seed=3, save_strategy="no",
        disable_tqdm=True, **options, **changes,
    )  # fmt: skip
    more = {"reward_funcs": length_reward} if sampled else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model(folder / "model", kind), args=arguments,
        train_dataset=Dataset.from_list(list(rows(kind))),
        processing_class=tokenizer(), **more,
    )  # fmt: skip
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("kind", ["DPO", "KTO", "SFT", "GRPO", "RLOO", "Reward"])
def test_every_call_is_fused_at_trls_defaults(kind, tmp_path):
    ours.apply_to_trl()
    logs = trained(kind, tmp_path)
    counted = ours.report()
    assert counted["refused"] == {}
    assert counted["taken"] >= 2, "each step calls the head"
    assert len(logs) == 2 and all(math.isfinite(log["loss"]) for log in logs)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["DPO", "KTO", "SFT", "Reward"])
def test_the_steps_are_those_of_trl(kind, bf16, tmp_path):
    plain = trained(kind, tmp_path / "plain", bf16=bf16)
    ours.apply_to_trl()
    logs = trained(kind, tmp_path / "patched", bf16=bf16)
    assert ours.report()["taken"] >= 2
    loose = {"rel": 3e-2, "abs": 3e-2} if bf16 else {"rel": 1e-4, "abs": 1e-5}
    for now, then in zip(logs, plain, strict=True):
        assert now.keys() == then.keys()
        for key, value in then.items():
            # ties of bfloat16 logits decide where the likeliest token is: ours are not rounded
            decided = "accurac" in key or "runtime" in key or "per_second" in key
            if isinstance(value, float) and not (decided and bf16):
                if "runtime" not in key and "per_second" not in key:
                    assert now[key] == pytest.approx(value, **loose), key


def test_a_head_that_cannot_be_served_warns_once_and_is_counted():
    ours.apply_to_trl()
    weight = torch.randn(7, 4)
    weight.ds_id = 0  # as DeepSpeed marks a sharded parameter
    arguments = (torch.randn(3, 4), weight, None, torch.tensor([0, 1, 2]), 1.0, 7)
    with pytest.warns(UserWarning, match="ZeRO-3"):
        ours.ChunkedLogProbFunction.apply(*arguments)
    ours.ChunkedLogProbFunction.apply(*arguments)
    assert ours.report() == {
        "taken": 0,
        "refused": {"the head is sharded by DeepSpeed ZeRO-3": 2},
    }


def test_a_function_with_other_arguments_stays(monkeypatch):
    """TRL had a head with five arguments: ours in its place would fail at the first step."""
    utils = importlib.import_module("trl.trainer.utils")

    class Older(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets, chunk_size, temperature):
            return None

    Older.__module__ = "trl.trainer.utils"
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Older)
    with pytest.warns(UserWarning, match="takes other arguments"):
        replaced = ours.apply_to_trl()
    assert utils._ChunkedLogProbFunction is Older
    assert "trl.trainer.utils._ChunkedLogProbFunction" not in replaced
    assert "trl.trainer.utils.selective_log_softmax" in replaced
