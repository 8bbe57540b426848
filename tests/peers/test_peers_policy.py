"""Policy losses, KL, values and advantages, value and gradient, against TRL, verl and torchrl."""

import pytest
import torch

from apt_kernels import reference
from apt_kernels.integrations import verl
from support.peers import SOURCES, assert_same, peer_results

pytestmark = pytest.mark.parametrize("source", SOURCES)

ROWS, ITEMS, MAX_LENGTH = 6, 30.0, 11
PER_SEQUENCE = dict(aggregation="sequence_mean", normalizer=ROWS)  # TRL counts empty rows too
PER_ITEM = dict(aggregation="token_mean", normalizer=ITEMS)
GRPO = {
    "grpo": PER_SEQUENCE,
    "grpo delta": dict(PER_SEQUENCE, dual_clip=1.5),
    "grpo kl": dict(PER_SEQUENCE, kl_coef=0.2),
    "grpo unbiased kl": dict(PER_SEQUENCE, kl_coef=0.2, kl_estimator="unbiased_k3"),
    "gspo": dict(PER_SEQUENCE, ratio_level="sequence"),
    "gspo kl": dict(PER_SEQUENCE, ratio_level="sequence", kl_coef=0.2),
    "bnpo": dict(),
    "bnpo entropy kl": dict(kl_coef=0.1, entropy_coef=0.3),
    "bnpo sequence": dict(ratio_level="sequence"),
    "dr_grpo": dict(aggregation="dr_grpo", normalizer=ROWS * MAX_LENGTH),
    "dapo": PER_ITEM,
    "dapo rollout": dict(PER_ITEM, rollout_weights="rollout_weights", kl_coef=0.1),
    "cispo": dict(PER_ITEM, loss_type="cispo", clip_low=1.0, clip_high=0.4),
    "cispo unbiased kl": dict(
        PER_ITEM,
        loss_type="cispo",
        clip_low=1.0,
        clip_high=0.4,
        kl_coef=0.1,
        kl_estimator="unbiased_k3",
    ),
    "sapo": dict(
        PER_SEQUENCE, loss_type="sapo", sapo_temperature_pos=1.25, sapo_temperature_neg=1.5
    ),
    "luspo": dict(aggregation="sequence_sum", normalizer=ROWS, ratio_level="sequence"),
    "vespo": dict(PER_ITEM, loss_type="reinforce", rollout_weights="phi"),
    "off-policy mask": dict(PER_ITEM, rollout_weights="keep", kl_coef=0.1),
}


@pytest.mark.parametrize("name", GRPO)
def test_trl_grpo(name, source):
    results = peer_results("trl", source)
    inputs, case = results["inputs"]["policy"], results["cases"][name]
    options = dict(dict(clip_low=0.2, clip_high=0.3), **GRPO[name])
    if options.get("loss_type") in ("sapo", "reinforce"):
        del options["clip_low"], options["clip_high"]
    if name in ("vespo", "off-policy mask"):
        weights = case[options["rollout_weights"]]
        options["rollout_weights"] = torch.tensor(weights, dtype=torch.float64)
        assert len(set(weights)) > 1
    elif "rollout_weights" in options:
        options["rollout_weights"] = inputs["rollout_weights"]
    with_kl = "kl_coef" in options

    def ours(logps, entropy):
        return reference.policy_loss(
            logps, inputs["old_logps"], inputs["advantages"], inputs["mask"], entropy=entropy,
            ref_logps=inputs["ref_logps"] if with_kl else None, **options,
        )  # fmt: skip

    metrics = {"entropy": "entropy"} | ({"ref_kl": "ref_kl"} if with_kl else {})
    # TRL's share of clipped sequences counts each once, ours by its tokens
    if options.get("loss_type") is None and "ratio_level" not in options:
        metrics["clip_fraction"] = "clip_fraction"
        assert case["metrics"]["clip_fraction"] > 0
    assert_same(
        case, ours, {"logps": inputs["logps"], "entropy": inputs["entropy"]}, metrics, rtol=1e-9
    )


def test_trl_rloo(source):
    """RLOO's ratio is of whole sequences' summed log-probabilities: rows of one token."""
    results = peer_results("trl", source)
    inputs = results["inputs"]["policy"]
    mask, every = inputs["mask"].bool(), torch.ones(ROWS, 1).bool()

    def ours(logps):
        total, old = (
            reference.sequence_logps(x, mask).unsqueeze(-1) for x in (logps, inputs["old_logps"])
        )
        return reference.policy_loss(
            total, old, inputs["advantages"], every, clip_low=0.2, clip_high=0.3
        )

    assert_same(results["cases"]["rloo"], ours, {"logps": inputs["logps"]}, rtol=1e-9)


SAPO = dict(loss_type="sapo", sapo_temperature_pos=1.25, sapo_temperature_neg=1.5)
CLIP = dict(clip_low=0.2, clip_high=0.3, dual_clip=1.5)
VERL = {
    "vanilla": CLIP,
    "vanilla sequences": dict(CLIP, aggregation="sequence_sum"),
    "vanilla norm": dict(CLIP, aggregation="dr_grpo"),
    "vanilla means": dict(CLIP, aggregation="sequence_mean"),
    "vanilla sum": dict(CLIP, aggregation="token_sum"),
    "vanilla global": dict(CLIP, normalizer=37 / 2),
    "vanilla rollout": dict(CLIP, rollout_weights="rollout_weights"),
    "gspo": dict(
        clip_low=0.2, clip_high=0.3, ratio_level="sequence", aggregation="sequence_mean"
    ),
    "gspo tokens": dict(
        clip_low=0.2, clip_high=0.3, ratio_level="sequence", advantages="token_advantages",
        rollout_weights="rollout_weights",
    ),
    "sapo": dict(SAPO, aggregation="sequence_mean"),
    "cispo": dict(loss_type="cispo", clip_low=0.2, clip_high=0.3),
    "gpg": dict(loss_type="reinforce"),
    "reinforce": dict(
        loss_type="reinforce", aggregation="sequence_sum", rollout_weights="rollout_weights"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VERL)
def test_verl_policy_losses(name, source):
    results = peer_results("verl", source)
    inputs, case = results["inputs"], results["cases"][name]
    options = {k: inputs.get(v, v) if isinstance(v, str) else v for k, v in VERL[name].items()}
    advantages = options.pop("advantages", inputs["advantages"])

    def ours(logps):
        return reference.policy_loss(
            logps, inputs["old_logps"], advantages, inputs["mask"], **options
        )

    metrics = {metric: metric for metric in case["metrics"]}
    if name.startswith("vanilla"):
        assert case["metrics"]["clip_fraction"] > case["metrics"]["dual_clip_fraction"] > 0
    assert_same(case, ours, {"logps": inputs["logps"]}, metrics)


@pytest.mark.parametrize("name", [name for name in VERL if name.startswith("vanilla")])
def test_the_adapter_of_verl_s_policy_loss(name, source):
    results = peer_results("verl", source)
    inputs, case = results["inputs"], results["cases"][name]
    mode = {
        "vanilla sequences": "seq-mean-token-sum", "vanilla norm": "seq-mean-token-sum-norm",
        "vanilla means": "seq-mean-token-mean", "vanilla sum": "token-sum",
    }.get(name, "token-mean")  # fmt: skip
    config = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5}
    if name == "vanilla global":
        config["global_batch_info"] = {"dp_size": 2, "batch_num_tokens": 37}
    weights = inputs["rollout_weights"] if name == "vanilla rollout" else None
    rows = inputs["advantages"].unsqueeze(-1).expand_as(inputs["logps"])

    def ours(logps):
        loss, metrics = verl.compute_policy_loss_vanilla(
            inputs["old_logps"], logps, rows, inputs["mask"].double(), mode, config, weights
        )
        return loss, {k: torch.tensor(v) for k, v in metrics.items()}

    metrics = {"actor/pg_clipfrac": "clip_fraction", "actor/ppo_kl": "ppo_kl"}
    metrics["actor/pg_clipfrac_lower"] = "dual_clip_fraction"
    assert_same(case, ours, {"logps": inputs["logps"]}, metrics)


def test_the_adapter_of_verl_s_advantages(source):
    results = peer_results("verl", source)
    inputs, case = results["inputs"], results["cases"]["gae"]
    mask = torch.tensor(case["mask"], dtype=torch.float64)
    got = verl.compute_gae_advantage_return(
        inputs["rewards"], inputs["values"], mask, torch.tensor(0.97), torch.tensor(0.9)
    )
    for ours, theirs in zip(got, (case["advantages"], case["returns"]), strict=True):
        theirs = torch.tensor(theirs, dtype=torch.float64) * mask
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_verl_kl_penalty(estimator, source):
    results = peer_results("verl", source)
    inputs = results["inputs"]
    mask = inputs["mask"].bool()

    def ours(logps):
        kl = reference.kl_penalty(logps, inputs["ref_logps"], estimator, mask=mask)
        return kl.sum() / mask.sum()

    assert_same(results["cases"][f"kl {estimator}"], ours, {"logps": inputs["logps"]})


@pytest.mark.parametrize(
    "name, aggregation", [("value", "token_mean"), ("value means", "sequence_mean")]
)
def test_verl_value_loss(name, aggregation, source):
    results = peer_results("verl", source)
    inputs = results["inputs"]

    def ours(values):
        return reference.value_loss(
            values, inputs["returns"], inputs["mask"], old_values=inputs["old_values"],
            clip_range=0.4, aggregation=aggregation,
        )  # fmt: skip

    assert_same(
        results["cases"][name], ours, {"values": inputs["values"]},
        {"clip_fraction": "clip_fraction"},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["normalized", "relative", "leave_one_out"])
def test_verl_group_advantages(kind, source):
    results = peer_results("verl", source)
    got = reference.group_advantages(results["inputs"]["group_rewards"], 3, kind, eps=1e-6)
    assert got.tolist() == pytest.approx(results["cases"]["group_advantages"][kind], rel=1e-9)


def test_verl_gae_skips_what_does_not_count(source):
    results = peer_results("verl", source)
    inputs, case = results["inputs"], results["cases"]["gae"]
    mask = torch.tensor(case["mask"]).bool()
    advantages, returns = reference.gae(
        inputs["rewards"], inputs["values"], mask=mask, gamma=0.97, gae_lambda=0.9, whiten=True
    )
    for got, expected in ((advantages, case["advantages"]), (returns, case["returns"])):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(got[mask], expected[mask], rtol=1e-7, atol=1e-7)


def test_torchrl_gae_of_episodes(source):
    results = peer_results("torchrl", source)
    inputs, case = results["inputs"], results["cases"]["gae"]
    advantages, returns = reference.gae(
        inputs["rewards"], inputs["values"], gamma=0.96, gae_lambda=0.93,
        terminated=inputs["terminated"], truncated=inputs["done"], bootstrap=inputs["next_values"],
    )  # fmt: skip
    assert (inputs["done"] & ~inputs["terminated"])[:, :-1].any()
    for got, expected in ((advantages, case["advantages"]), (returns, case["returns"])):
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
