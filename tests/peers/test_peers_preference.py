"""Preference losses and token log-probabilities, value and gradient, against TRL's own code."""

import pytest

from apt_kernels import reference
from support.peers import SOURCES, assert_same, peer_results

pytestmark = pytest.mark.parametrize("source", SOURCES)

DPO = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": dict(label_smoothing=0.1),
    "nca_pair": {},
    "robust": dict(label_smoothing=0.2),
    "bco_pair": {},
    "sppo_hard": {},
    "aot": dict(label_smoothing=0.1),
    "aot_unpaired": dict(label_smoothing=0.1),
    "apo_zero": {},
    "apo_down": {},
    "discopop": dict(discopop_tau=0.4),
    "sigmoid_norm": {},
}


def _trl(source):
    results = peer_results("trl", source)
    return results["inputs"]["preference"], results["cases"]


def _dpo(logps, inputs, **options):
    mask = inputs["completion_mask"][:, 1:].bool()
    chosen, rejected = reference.sequence_logps(logps, mask).chunk(2)
    return reference.dpo_loss(
        chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], beta=0.3,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", DPO)
def test_dpo_loss(loss_type, source):
    inputs, cases = _trl(source)
    options = dict(DPO[loss_type], loss_type=loss_type)
    if loss_type in ("ipo", "sigmoid_norm"):  # TRL's are per token
        chosen, rejected = inputs["completion_mask"].sum(-1).chunk(2)
        options |= dict(chosen_lengths=chosen, rejected_lengths=rejected)

    def ours(logps):
        loss, chosen_rewards, rejected_rewards = _dpo(logps, inputs, **options)
        return loss, {"chosen": chosen_rewards.mean(), "rejected": rejected_rewards.mean()}

    # TRL rounds exo_pair's smoothing to float32
    assert_same(
        cases[f"dpo {loss_type}"],
        ours,
        {"logps": inputs["logps"]},
        {"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
        rtol=1e-6 if loss_type == "exo_pair" else 1e-9,
    )


@pytest.mark.parametrize(
    "case, options",
    [
        ("cpo sigmoid", dict(loss_type="sigmoid", beta=0.7, label_smoothing=0.2)),
        ("cpo hinge", dict(loss_type="hinge", beta=0.7)),
        ("cpo ipo", dict(loss_type="ipo", beta=0.7)),
        ("cpo simpo", dict(loss_type="simpo", beta=0.7, label_smoothing=0.1, simpo_gamma=0.9)),
        ("orpo", dict(loss_type="orpo", beta=0.2)),
    ],
)
def test_reference_free_losses(case, options, source):
    inputs, cases = _trl(source)
    chosen, rejected = inputs["logps"].sum(-1).chunk(2)

    def ours(chosen, rejected):
        loss, chosen_rewards, rejected_rewards = reference.dpo_loss(chosen, rejected, **options)
        return loss, {"chosen": chosen_rewards.mean(), "rejected": rejected_rewards.mean()}

    assert_same(
        cases[case],
        ours,
        {"chosen": chosen, "rejected": rejected},
        {"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
        rtol=1e-5 if case == "orpo" else 1e-9,  # TRL computes ORPO in float32
    )


def test_kto_pair(source):
    inputs, cases = _trl(source)
    assert_same(
        cases["kto"],
        lambda logps: _dpo(logps, inputs, loss_type="kto_pair")[0],
        {"logps": inputs["logps"]},
        rtol=1e-9,
    )


@pytest.mark.parametrize(
    "case, options",
    [
        ("reward", dict()),
        ("reward margin", dict(margin="margin")),
        ("reward centred", dict(center_coef=0.05)),
    ],
)
def test_bradley_terry_loss(case, options, source):
    inputs, cases = _trl(source)
    options = {k: inputs[v] if isinstance(v, str) else v for k, v in options.items()}
    assert_same(
        cases[case],
        lambda chosen, rejected: reference.bradley_terry_loss(chosen, rejected, **options),
        {"chosen": inputs["chosen_rewards"], "rejected": inputs["rejected_rewards"]},
        rtol=1e-9,
    )


def test_token_logprobs(source):
    inputs, cases = _trl(source)

    def both(logits):
        return reference.token_logprobs(logits, inputs["token_ids"], return_entropy=True)

    leaves = {"logits": inputs["logits"]}
    assert_same(
        cases["selective_log_softmax"], lambda logits: both(logits)[0].square().sum(), leaves
    )
    assert_same(cases["entropy_from_logits"], lambda logits: both(logits)[1].square().sum(), leaves)
