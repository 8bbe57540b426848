"""Models as people bring them to the commands: adapters, classifiers, 16 bits."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from apt_model.commands.main import main
from apt_model.commands.reward_folder import load_text_reward
from apt_model.scoring.loading import load_model, load_tokenizer
from commands import test_cli, test_cli_pretraining, test_rl_commands
from commands.test_rl_commands import command, grpo, summary_of

model_folder, files = test_cli.model_folder, test_rl_commands.files
lines = test_cli_pretraining.lines


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    return test_cli_pretraining.model_folder.__wrapped__(tmp_path_factory)


def dpo(model, files, output, *more):
    options = [f"--eval={files['held_out']}", "--learning-rate=1e-2", "--epochs=2", *more]
    return command("train-dpo", model, files["pairs"], output, *options)


def weights_of(folder):
    (file,) = folder.glob("*.safetensors")
    return safetensors.torch.load_file(file)


def test_an_adapter_is_made_saved_trained_on_and_merged(model_folder, files, tmp_path):
    import peft
    import transformers

    first, second, merged = tmp_path / "first", tmp_path / "second", tmp_path / "merged"
    assert main(dpo(model_folder, files, first, "--lora-rank=2", "--lora-alpha=8")) == 0
    config = json.loads((first / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 8, "CAUSAL_LM")
    assert not (first / "model" / "model.safetensors").exists()
    assert (first / "model" / "tokenizer.json").exists()
    trained = weights_of(first / "model")
    assert any(value.abs().max() > 0 for name, value in trained.items() if "lora_B" in name)

    assert main(dpo(first / "model", files, second, "--max-steps=1")) == 0
    before, after = summary_of(second)["before"], summary_of(first)["after"]
    assert before["loss"] == pytest.approx(after["loss"], abs=1e-5)  # against the base, as before
    changed = weights_of(second / "model")
    assert changed.keys() == trained.keys()
    assert any(not torch.equal(changed[name], value) for name, value in trained.items())

    start = tmp_path / "start"
    assert (
        main(dpo(first / "model", files, start, "--adapter-reference=start", "--max-steps=1")) == 0
    )
    assert summary_of(start)["before"]["loss"] == pytest.approx(0.6931, abs=1e-4)

    assert main(dpo(first / "model", files, merged, "--merge-adapter", "--learning-rate=0")) == 0
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged / "model")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(first / "model")
    ids = torch.arange(5)[None]
    torch.testing.assert_close(whole(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)


def test_policies_and_rewards_train_adapters_too(model_folder, files, tmp_path):
    import transformers

    policy, judge, again = tmp_path / "policy", tmp_path / "judge", tmp_path / "again"
    assert main(grpo(model_folder, files, policy, "--lora-rank=2", "--max-steps=2")) == 0
    assert (policy / "model" / "adapter_config.json").exists()
    options = ["--lora-rank=2", "--learning-rate=1e-2", "--epochs=4", f"--eval={files['held_out']}"]
    assert main(command("train-reward-model", model_folder, files["pairs"], judge, *options)) == 0
    assert summary_of(judge)["after"]["loss"] < 0.9 * summary_of(judge)["before"]["loss"]
    names = weights_of(judge / "model")
    assert any("lora_A" in n for n in names) and any("score" in n for n in names)
    reward = load_text_reward(judge / "model", "cpu")
    assert len(reward(["a film"], ["was w1"])) == 1
    # an adapter of a language model goes on as one of a reward model, and is trained itself
    assert main(
        command("train-reward-model", policy / "model", files["pairs"], again, *options[1:])
    ) == 0  # fmt: skip
    before, after = weights_of(policy / "model"), weights_of(again / "model")
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    merged = tmp_path / "merged"
    assert main(
        command("train-reward-model", judge / "model", files["pairs"], merged, "--merge-adapter",
                "--learning-rate=0")
    ) == 0  # fmt: skip
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(merged / "model")
    assert whole.config.num_labels == 1
    theirs = load_text_reward(merged / "model", "cpu")(["a film"], ["was w1"])
    assert theirs == pytest.approx(reward(["a film"], ["was w1"]), abs=1e-4)


def sampling(name, model, files, output, *more):
    return command(
        name, model, files["prompts"], output, f"--reward={files['reward']}:happy",
        f"--eval={files['held_out_prompts']}", "--max-new-tokens=4", "--learning-rate=3e-2",
        *more,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["train-rlhf", "train-grpo"])
def test_a_policy_is_an_adapter_compared_with_its_base_or_its_start(
    name, model_folder, files, tmp_path
):
    first, second, start = tmp_path / "first", tmp_path / "second", tmp_path / "start"
    assert main(sampling(name, model_folder, files, first, "--lora-rank=2")) == 0
    assert all("lora_" in key for key in weights_of(first / "model"))  # no value head, no base
    before, after = summary_of(first)["before"], summary_of(first)["after"]
    assert before["sequence_kl"] == pytest.approx(0, abs=1e-6) and after["sequence_kl"] != 0
    one_step = ["--max-steps=1", "--learning-rate=1e-3"]
    adapter = first / "model"
    assert main(sampling(name, adapter, files, second, *one_step)) == 0
    again = summary_of(second)["before"]
    assert again == pytest.approx({k: after[k] for k in again}, abs=1e-5)
    options = [*one_step, "--adapter-reference=start"]
    assert main(sampling(name, adapter, files, start, *options)) == 0
    assert summary_of(start)["before"]["sequence_kl"] == pytest.approx(0, abs=1e-6)
    trained = weights_of(adapter)
    for output in (second, start):
        moved = weights_of(output / "model")
        assert any(not torch.equal(moved[key], trained[key]) for key in trained)


@pytest.mark.parametrize("options", [[], ["--pooling=mean"]])
def test_the_adapter_of_a_reward_model_is_merged(model_folder, files, tmp_path, options):
    given = ["--lora-rank=2", "--learning-rate=1e-2", "--max-steps=3", *options]
    judge, merged = tmp_path / "judge", tmp_path / "merged"
    assert main(command("train-reward-model", model_folder, files["pairs"], judge, *given)) == 0
    assert main(["merge", f"--model={judge}", f"--output={merged}"]) == 0
    assert not (merged / "adapter_config.json").exists()
    texts = ["a film"] * 3, ["was w1", "was w1 w2 w3", "w9"]
    ours, theirs = (load_text_reward(folder, "cpu")(*texts) for folder in (merged, judge / "model"))
    assert ours == pytest.approx(theirs, abs=1e-5)
    if not options:
        import transformers

        model = transformers.AutoModelForSequenceClassification.from_pretrained(merged)
        assert model.config.num_labels == 1
        assert model(torch.ones(2, 3, dtype=torch.long)).logits.shape == (2, 1)  # it knows padding


def test_the_adapter_of_an_encoder_is_merged_with_its_head(encoder_folder, lines, tmp_path):
    import peft
    import transformers

    output, merged = tmp_path / "out", tmp_path / "merged"
    given = ["--lora-rank=2", "--max-steps=2", "--learning-rate=1e-2"]
    assert main(command("pretrain-mlm", encoder_folder, lines, output, *given)) == 0
    assert main(["merge", f"--model={output}", f"--output={merged}"]) == 0
    whole = transformers.AutoModelForMaskedLM.from_pretrained(merged).eval()
    adapted = load_model(output / "model", type(whole).__name__, trainable=False).eval()
    assert isinstance(adapted, peft.PeftModel)
    ids = torch.arange(5, 10)[None]
    torch.testing.assert_close(whole(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert (merged / "tokenizer.json").exists()


def test_encoders_train_adapters_too(encoder_folder, lines, tmp_path):
    import transformers

    for name in ("pretrain-mlm", "pretrain-contrastive"):
        output, again = tmp_path / name, tmp_path / f"{name}-again"
        options = ["--max-steps=2", "--learning-rate=1e-2"]
        options += ["--hidden-dim=8"] if name == "pretrain-contrastive" else []
        assert main(
            command(name, encoder_folder, lines, output, "--lora-rank=2", *options)
        ) == 0  # fmt: skip
        if name == "pretrain-contrastive":
            transformers.AutoModel.from_pretrained(output / "model")  # merged
            assert (output / "model" / "modules.json").exists()
            continue
        first = weights_of(output / "model")
        assert main(command(name, output / "model", lines, again, *options)) == 0
        second = weights_of(again / "model")
        assert first.keys() == second.keys() and any("lora_B" in key for key in first)
        assert any("transform" in key for key in first)  # fresh parts of the head
        assert any(not torch.equal(second[k], first[k]) for k in first if "lora_B" in k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora-alpha=8"], "--lora-alpha belongs to an adapter"),
        (["--lora-targets", "q_proj"], "--lora-targets belongs to an adapter"),
        (["--lora-rank=0"], "--lora-rank must be at least 1"),
        (["--lora-rank=2", "--train-last-layers=1"], "--train-last-layers and an adapter"),
        (["--merge-adapter"], "--merge-adapter needs an adapter"),
        (["--adapter-reference=start"], "--adapter-reference start needs an adapter"),
        (["--lora-rank=2", "--lora-targets", "nothing"], "--lora-targets: "),
        (["--router-aux-loss-coef=0.1"], "expected a mixture of experts, got Llama"),
        (["--dtype=bfloat16", "--autocast=fp16"], "--dtype bfloat16 and --autocast fp16"),
        (["--dtype=float16", "--autocast=bf16"], "--dtype float16 and --autocast bf16"),
    ],
)
def test_options_that_cannot_be_are_named(model_folder, files, tmp_path, capsys, options, message):
    assert main(dpo(model_folder, files, tmp_path / "out", *options)) == 1
    assert message in capsys.readouterr().err


def test_options_that_a_command_would_ignore_are_not_its_options(encoder_folder, lines, capsys):
    for name in ("pretrain-mlm", "pretrain-contrastive"):
        for option in ("--adapter-reference=start", "--router-aux-loss-coef=0.1"):
            with pytest.raises(SystemExit):
                main([name, f"--model={encoder_folder}", f"--data={lines}", option])
            assert "unrecognized arguments" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train-reward-model", "--adapter-reference=start"])
    assert main(["pretrain-contrastive", "--data=digits.npy", "--lora-rank=2"]) == 1


def test_an_adapter_without_its_base_is_named(model_folder, files, tmp_path, capsys):
    assert main(dpo(model_folder, files, tmp_path / "out", "--lora-rank=2", "--max-steps=1")) == 0
    adapter = tmp_path / "out" / "model"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "nowhere"})
    )
    assert main(dpo(adapter, files, tmp_path / "next")) == 1
    assert "base_model_name_or_path: expected the folder" in capsys.readouterr().err
    shutil.copytree(model_folder, adapter / "nowhere")  # beside the adapter: found there
    assert main(dpo(adapter, files, tmp_path / "next", "--max-steps=1")) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("autocast", ["none", "own"])
def test_runs_of_16_bits_move_the_weights(model_folder, files, tmp_path, dtype, autocast):
    own = {"bfloat16": "bf16", "float16": "fp16"}[dtype] if autocast == "own" else "none"
    options = [f"--dtype={dtype}", f"--autocast={own}", "--learning-rate=1e-3", "--epochs=8"]
    losses = []
    for more, folder in ((options, "narrow"), (options[2:], "wide")):
        assert main(dpo(model_folder, files, tmp_path / folder, *more)) == 0
        losses.append(summary_of(tmp_path / folder)["after"]["loss"])
    assert losses[1] < 0.68 and losses[0] == pytest.approx(losses[1], abs=0.01)
    assert load_model(tmp_path / "narrow" / "model", "AutoModelForCausalLM",
                      getattr(torch, dtype)).dtype == getattr(torch, dtype)  # fmt: skip


def test_a_reward_model_loads_as_a_classifier_with_one_label(model_folder, files, tmp_path):
    from transformers import AutoModelForSequenceClassification

    output = tmp_path / "out"
    options = [f"--eval={files['held_out']}", "--learning-rate=3e-3", "--epochs=4"]
    assert main(command("train-reward-model", model_folder, files["pairs"], output, *options)) == 0
    model = AutoModelForSequenceClassification.from_pretrained(output / "model")
    assert model.config.num_labels == 1 and model.config.pad_token_id is not None
    tokenizer = load_tokenizer(output / "model")
    ours = load_text_reward(output / "model", "cpu", batch_size=2)
    prompts, answers = ["a film", "a film w3", "a"], ["was w1", "was w1 w2 w3 w4", "w9"]
    settings = json.loads((output / "model" / "reward_model.json").read_text())
    from apt_model.data.preferences import PairTokenizer

    tokenize = PairTokenizer(tokenizer, **settings)
    with torch.no_grad():
        theirs = [
            model(torch.tensor([tokenize.sequence(*pair)])).logits.item()
            for pair in zip(prompts, answers, strict=True)
        ]
    assert ours(prompts, answers) == pytest.approx(theirs, abs=1e-5)
    # a second stage goes on where the first ended, and a policy is rewarded by it
    again = tmp_path / "again"
    assert (
        main(command("train-reward-model", output / "model", files["pairs"], again, *options)) == 0
    )
    before, after = summary_of(again)["before"], summary_of(output)["after"]
    assert before["loss"] == pytest.approx(after["loss"], abs=1e-5)


def test_classifiers_that_are_no_reward_model_are_named(model_folder, files, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "two"
    AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2).save_pretrained(
        folder
    )
    with pytest.raises(ValueError, match="num_labels: expected 1"):
        load_text_reward(folder, "cpu")
    with pytest.raises(ValueError, match=r"holds no reward model.*ForCausalLM"):
        load_text_reward(model_folder, "cpu")
