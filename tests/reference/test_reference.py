"""The reference against formulas written a second way, in plain Python and in float64.

Here: log-probabilities, gradients by finite differences, and calls without any token; the other
families are in test_reference_*.py. Peers (TRL, verl, ...) are compared in test_peers_*.py, the
backends with the reference in test_ops.py.
"""

import ast
import inspect
import itertools
import math
import pathlib

import pytest
import torch
import torch.nn.functional as F

from apt_kernels import reference
from support.oracles import DPO_TYPES, gradients, leaf, randn, spoil


def test_imports_only_torch_and_every_function_is_documented():
    folder = pathlib.Path(reference.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                allowed = {"torch", "__future__", "collections", "typing"}
                assert node.level == 1 or node.module.split(".")[0] in allowed, (file, node.module)
            elif isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
                assert names <= {"torch", "math"}, (file, names)
    for name in reference.__all__:
        function = getattr(reference, name)
        documented = inspect.getdoc(function)
        told = (
            f"Arguments as `apt_kernels.{name}`",
            f"Arguments and results as `apt_kernels.{name}`",
        )
        if not any(words in documented for words in told):
            for parameter in inspect.signature(function).parameters:
                assert f"{parameter}:" in documented, (name, parameter)
        assert "backend" not in inspect.signature(function).parameters


def _policy_call(**options):
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    old, ref = randn(4, 4, grad=False), randn(4, 4, grad=False)
    entropy = randn(4, 4)
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.5], dtype=torch.float64)
    logps = (old + 0.6 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()

    def call(logps, entropy):
        return reference.policy_loss(
            logps, old, advantages, mask, ref_logps=ref, entropy=entropy, **options
        )[0]

    return call, (logps, entropy)


def _gradcheck_cases():
    ids = torch.tensor([[1, 0, 4], [2, 3, 3]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rows = torch.rand(2, 3, dtype=torch.float64) + 0.5
    cases = {
        "token_logprobs": (
            lambda x: reference.token_logprobs(
                x, ids, mask=mask, temperature=rows, softcap=2.0, return_entropy=True
            ),
            (randn(2, 3, 5),),
        ),
        "token_logprobs, K ids": (
            lambda x: reference.token_logprobs(x, ids.unsqueeze(-1).expand(2, 3, 2), mask=mask),
            (randn(2, 3, 5),),
        ),
        "linear_token_logprobs": (
            lambda h, w, b: reference.linear_token_logprobs(
                h, w, ids, bias=b, mask=mask, temperature=rows, softcap=3.0, logit_scale=0.5,
                return_entropy=True,
            ),
            (randn(2, 3, 4), randn(5, 4), randn(5)),
        ),
        "linear_cross_entropy": (
            lambda h, w, b: reference.linear_cross_entropy(
                h, w, torch.where(mask, ids, -100), bias=b, label_smoothing=0.1, softcap=3.0,
                logit_scale=2.0,
            ),
            (randn(2, 3, 4), randn(5, 4), randn(5)),
        ),
        "sequence_logps": (
            lambda x: reference.sequence_logps(x, mask, average=True),
            (randn(2, 3),),
        ),
        "bradley_terry_loss": (
            lambda c, r: reference.bradley_terry_loss(
                c, r, margin=rows[0, :1], center_coef=0.3, reduction="none"
            ),
            (randn(4), randn(4)),
        ),
        "value_loss": (
            lambda v: reference.value_loss(
                v, torch.zeros(2, 3).double(), mask, old_values=torch.ones(2, 3).double(),
                clip_range=0.2, aggregation="sequence_mean",
            )[0],
            (randn(2, 3),),
        ),
        "info_nce": (
            lambda q, k, t: reference.info_nce(q, k, temperature=t, symmetric=True),
            (randn(4, 3), randn(4, 3), leaf(0.5)),
        ),
        "info_nce, negatives": (
            lambda q, k, n, t: reference.info_nce(
                q, k, negatives=n, temperature=t, reduction="none"
            ),
            (randn(4, 3), randn(4, 3), randn(6, 3), leaf(0.5)),
        ),
        "info_nce, offset": (
            lambda q, k: reference.info_nce(q, k, label_offset=2, normalize=False),
            (randn(3, 4), randn(6, 4)),
        ),
        "nt_xent": (
            lambda a, b, t: reference.nt_xent(a, b, temperature=t, reduction="none"),
            (randn(4, 3), randn(4, 3), leaf(0.3)),
        ),
        "siglip_loss": (
            lambda q, k, t, b: reference.siglip_loss(q, k, temperature=t, logit_bias=b),
            (randn(4, 3), randn(4, 3), leaf(0.5), leaf(-1.0)),
        ),
        "sup_con_loss": (
            lambda f, t: reference.sup_con_loss(f, torch.tensor([0, 1, 0, 2, 1]), temperature=t),
            (randn(5, 3), leaf(0.5)),
        ),
    }  # fmt: skip
    for estimator in ("k1", "k2", "k3"):
        cases[f"kl_penalty {estimator}"] = (
            lambda x, e=estimator: reference.kl_penalty(x, torch.ones(2, 3).double(), e, mask=mask),
            (randn(2, 3),),
        )
    for loss_type in DPO_TYPES:
        smoothing = 0.0 if loss_type in ("hinge", "ipo") else 0.2
        lengths = {}
        if loss_type in ("ipo", "sigmoid_norm"):
            lengths = dict(
                chosen_lengths=torch.tensor([3, 1, 2, 5]),
                rejected_lengths=torch.tensor([2, 2, 7, 1]),
            )
        refs = [-torch.rand(4, dtype=torch.float64) for _ in range(2)]
        if loss_type in ("simpo", "orpo"):
            refs = []
        # detached batch means (kto_pair) are constants of the derivative: not by differences
        if loss_type != "kto_pair":
            cases[f"dpo_loss {loss_type}"] = (
                lambda c, r, t=loss_type, f=refs, n=lengths, s=smoothing: reference.dpo_loss(
                    c, r, *f, loss_type=t, beta=0.7, label_smoothing=s, reduction="none", **n
                )[0],
                tuple((-3 * torch.rand(4).double() - 0.01).requires_grad_() for _ in range(2)),
            )
    for aggregation in ("token_mean", "token_sum", "sequence_mean", "sequence_sum", "dr_grpo"):
        cases[f"policy_loss {aggregation}"] = _policy_call(
            aggregation=aggregation, dual_clip=1.5, kl_coef=0.3, entropy_coef=0.1
        )
    cases["policy_loss sapo"] = _policy_call(loss_type="sapo", kl_coef=0.3, kl_estimator="k2")
    cases["policy_loss reinforce"] = _policy_call(loss_type="reinforce", normalizer=3.0)
    return cases


@pytest.mark.parametrize("name", list(_gradcheck_cases()))
def test_gradcheck(name):
    torch.manual_seed(1)
    call, inputs = _gradcheck_cases()[name]
    assert torch.autograd.gradcheck(call, inputs, atol=1e-7, rtol=1e-5)


def _row_by_hand(row, token, temperature=1.0, softcap=None):
    """log-probability and entropy of one row, in plain Python; None marks an excluded column."""
    z = []
    for x in row:
        if x == -math.inf:
            z.append(None)
        else:
            z.append((softcap * math.tanh(x / softcap) if softcap else x) / temperature)
    top = max(v for v in z if v is not None)
    total = sum(math.exp(v - top) for v in z if v is not None)
    lse = top + math.log(total)
    entropy = -sum(math.exp(v - lse) * (v - lse) for v in z if v is not None)
    logp = -math.inf if z[token] is None else z[token] - lse
    return logp, entropy


@pytest.mark.parametrize("softcap", [None, 1.7])
def test_token_logprobs_by_hand(softcap):
    logits = 3 * randn(2, 4, 6)
    with torch.no_grad():
        logits[0, 1, 2] = logits[1, 3, 5] = -math.inf
    ids = torch.randint(0, 6, (2, 4))
    ids[0, 1] = 2
    temperature = torch.rand(2, 4) + 0.5
    logps, entropy = reference.token_logprobs(
        logits, ids, temperature=temperature, softcap=softcap, return_entropy=True
    )
    for b, t in itertools.product(range(2), range(4)):
        expected = _row_by_hand(
            logits[b, t].tolist(), int(ids[b, t]), float(temperature[b, t]), softcap
        )
        assert logps[b, t].item() == pytest.approx(expected[0], rel=1e-12)
        assert entropy[b, t].item() == pytest.approx(expected[1], rel=1e-12)
    several = torch.stack([ids, (ids + 1) % 6], dim=-1)
    both = reference.token_logprobs(logits, several, temperature=temperature, softcap=softcap)
    assert torch.equal(both[..., 0], logps) and both.shape == (2, 4, 2)


def test_token_logprobs_gradient_by_formula():
    """dz_v = g (1[v = id] - p_v) - h p_v (log p_v + H); an excluded column gets only g."""
    logits = randn(3, 5)
    with torch.no_grad():
        logits[0, 1] = logits[1, 4] = -math.inf
    ids = torch.tensor([1, 2, 0])
    logps, entropy = reference.token_logprobs(logits, ids, temperature=0.7, return_entropy=True)
    g, h = randn(3, grad=False), randn(3, grad=False)
    (grad,) = gradients((torch.where(logps.isinf(), 0 * g, logps) * g + entropy * h).sum(), logits)
    p = torch.softmax(logits.detach() / 0.7, -1)
    log_p = torch.log_softmax(logits.detach() / 0.7, -1)
    g = torch.where(logps.isinf(), torch.zeros_like(g), g)[:, None]
    safe = torch.where(p > 0, log_p + entropy.detach()[:, None], 0)
    expected = g * (F.one_hot(ids, 5) - p) - h[:, None] * p * safe
    torch.testing.assert_close(grad, expected / 0.7)
    assert grad[1, 4] == 0 and grad.isfinite().all()
    excluded = leaf([[0.5, -math.inf]])
    (grad,) = gradients(reference.token_logprobs(excluded, torch.tensor([1]))[0], excluded)
    p0 = 1.0  # the only column left
    torch.testing.assert_close(grad, torch.tensor([[-p0, 1.0]], dtype=torch.float64))


def test_masked_rows_of_logits_are_never_used():
    logits, mask = torch.randn(3, 4, 7), torch.rand(3, 4) > 0.4
    mask[0] = False
    ids = torch.randint(0, 7, (3, 4))
    spoiled = spoil(logits, mask.unsqueeze(-1).expand(3, 4, 7))
    wild = torch.where(mask, ids, torch.tensor(-(10**12)))
    temperature = torch.where(mask, 0.9, math.nan)
    got = reference.token_logprobs(
        spoiled, wild, mask=mask, temperature=temperature, return_entropy=True
    )
    clean = logits.clone().requires_grad_()
    expected = reference.token_logprobs(clean, ids, temperature=0.9, return_entropy=True)
    for a, b in zip(got, expected, strict=True):
        assert (a[~mask] == 0).all()
        torch.testing.assert_close(a[mask], b[mask])
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        (grad,) = gradients(got[0].sum() + got[1].sum(), spoiled)
    (grad_clean,) = gradients(expected[0].sum() + expected[1].sum(), clean)
    assert (grad[~mask] == 0).all()
    torch.testing.assert_close(grad[mask], grad_clean[mask])


def test_masked_rows_of_hidden_add_nothing_to_any_gradient():
    hidden, weight, bias = torch.randn(6, 4), torch.randn(9, 4), torch.randn(9)
    mask = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    ids = torch.randint(0, 9, (6,))
    spoiled = spoil(hidden, mask.unsqueeze(-1).expand(6, 4))
    wild = torch.where(mask, ids, -100)
    w, b = weight.requires_grad_(), bias.requires_grad_()
    logps, entropy = reference.linear_token_logprobs(
        spoiled, w, wild, bias=b, mask=mask, return_entropy=True
    )
    loss, correct = reference.linear_cross_entropy(spoiled, w, wild, bias=b, return_correct=True)
    kept = hidden[mask].requires_grad_()
    dense = F.linear(kept, w, b)
    log_p = dense.log_softmax(-1)
    nll = -log_p.gather(-1, ids[mask, None]).squeeze(-1)
    torch.testing.assert_close(logps[mask], -nll)
    torch.testing.assert_close(loss, nll.mean())
    assert correct == (dense.argmax(-1) == ids[mask]).sum() and correct.dtype == torch.int64
    assert (logps[~mask] == 0).all() and (entropy[~mask] == 0).all()
    expected_entropy = -(log_p.exp() * log_p).sum(-1)
    for got, expected in (
        (logps.sum() + entropy.sum(), -nll.sum() + expected_entropy.sum()),
        (loss, nll.mean()),
    ):
        grad, *shared = torch.autograd.grad(got, (spoiled, w, b))
        grad_kept, *shared_kept = torch.autograd.grad(expected, (kept, w, b), retain_graph=True)
        assert (grad[~mask] == 0).all()
        torch.testing.assert_close(grad[mask], grad_kept)
        torch.testing.assert_close(shared, shared_kept)


def test_linear_cross_entropy_is_pytorchs():
    hidden, weight, bias = randn(2, 5, 4), randn(7, 4), randn(7)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, :2] = -1
    logits = (hidden @ weight.T + bias) * 0.5
    capped = 2.0 * torch.tanh(logits / 2.0)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(
            capped.flatten(0, 1), labels.flatten(), ignore_index=-1, label_smoothing=0.2,
            reduction=reduction,
        )  # fmt: skip
        loss = reference.linear_cross_entropy(
            hidden, weight, labels, bias=bias, ignore_index=-1, label_smoothing=0.2,
            reduction=reduction, softcap=2.0, logit_scale=0.5,
        )  # fmt: skip
        torch.testing.assert_close(loss.flatten(), expected.flatten())
    total = reference.linear_cross_entropy(hidden, weight, labels, ignore_index=-1, reduction="sum")
    by_13 = reference.linear_cross_entropy(
        hidden, weight, labels, ignore_index=-1, normalizer=torch.tensor(13.0)
    )
    torch.testing.assert_close(by_13, total / 13)


def test_the_first_of_equal_logits_is_the_prediction():
    hidden, weight = torch.ones(2, 1), torch.ones(3, 1)
    labels = torch.tensor([0, 1])
    _, correct = reference.linear_cross_entropy(hidden, weight, labels, return_correct=True)
    assert correct == 1


def test_one_word_vocabulary():
    logits = torch.randn(3, 1, requires_grad=True)
    logps, entropy = reference.token_logprobs(logits, torch.zeros(3).long(), return_entropy=True)
    assert (logps == 0).all() and (entropy == 0).all()
    (grad,) = gradients(logps.sum() + entropy.sum(), logits)
    assert (grad == 0).all()


def test_out_of_range_id_is_an_error_on_the_cpu():
    for wild in (-1, 5):
        with pytest.raises((IndexError, RuntimeError)):
            reference.token_logprobs(torch.randn(2, 5), torch.tensor([0, wild]))


def test_autocast_does_not_round_the_products():
    hidden, weight = torch.randn(4, 64), torch.randn(50, 64)
    ids = torch.randint(0, 50, (4,))
    outside = reference.linear_token_logprobs(hidden, weight, ids)
    with torch.autocast("cpu", torch.bfloat16):
        inside = reference.linear_token_logprobs(hidden, weight, ids)
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_output_dtypes(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    x, ids = torch.randn(4, 6).to(dtype), torch.randint(0, 6, (4,))
    mask = torch.ones(4, 6).bool()
    outputs = [
        reference.token_logprobs(x, ids),
        reference.linear_token_logprobs(x, x, ids % 4),
        reference.linear_cross_entropy(x, x, ids % 4),
        reference.sequence_logps(x, mask),
        *reference.dpo_loss(x[:, 0], x[:, 1], x[:, 2], x[:, 3]),
        reference.bradley_terry_loss(x[:, 0], x[:, 1]),
        reference.policy_loss(x, x, x, mask)[0],
        reference.value_loss(x, x, mask)[0],
        reference.kl_penalty(x, x),
        reference.group_advantages(x[:, 0], 2),
        *reference.gae(x, x, mask=mask),
        reference.info_nce(x, x),
        reference.nt_xent(x, x),
        reference.siglip_loss(x, x),
        reference.sup_con_loss(x, ids),
    ]
    assert {output.dtype for output in outputs} == {expected}


def _empty_losses():
    none = torch.zeros(2, 3).bool()
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    wild = torch.full((2, 3), -100)
    x, a = torch.randn(2, 3, requires_grad=True), torch.randn(2)
    rows = torch.randn(0, 4, requires_grad=True)
    zero = torch.randn(0, requires_grad=True)
    yield "logps", reference.token_logprobs(hidden, wild, mask=none).sum(), hidden
    yield "linear", reference.linear_token_logprobs(hidden, weight, wild, mask=none).sum(), weight
    yield "linear_ce", reference.linear_cross_entropy(hidden, weight, wild), weight
    yield "linear_ce, 0 rows", reference.linear_cross_entropy(rows, weight, wild[:0, 0]), weight
    yield "sequence_logps", reference.sequence_logps(x, none, average=True).sum(), x
    yield "bradley_terry", reference.bradley_terry_loss(zero, zero), zero
    for kind in DPO_TYPES:
        yield kind, reference.dpo_loss(zero, zero, loss_type=kind, label_smoothing=0.1)[0], zero
    for aggregation in ("token_mean", "token_sum", "sequence_mean", "sequence_sum", "dr_grpo"):
        yield aggregation, reference.policy_loss(x, x, a, none, aggregation=aggregation)[0], x
        empty = x[:0]
        yield aggregation, reference.policy_loss(empty, empty, a[:0], none[:0])[0], x
    yield "sequence ratio", reference.policy_loss(x, x, a, none, ratio_level="sequence")[0], x
    yield "value_loss", reference.value_loss(x, x, none)[0], x
    yield "linear_policy", reference.linear_policy_loss(hidden, weight, wild, x, a, none)[0], weight
    yield "info_nce", reference.info_nce(rows, rows), rows
    yield "nt_xent", reference.nt_xent(rows, rows), rows
    yield "siglip", reference.siglip_loss(rows, rows), rows
    yield "sup_con", reference.sup_con_loss(rows, torch.zeros(0).long()), rows
    yield "sup_con, no pair", reference.sup_con_loss(weight, torch.arange(5)), weight
    one = torch.randn(1, 4, requires_grad=True)
    yield "nt_xent, one", reference.nt_xent(one, one), one
    yield "sup_con, one", reference.sup_con_loss(one, torch.zeros(1).long()), one


@pytest.mark.parametrize("index", range(len(list(_empty_losses()))))
def test_no_token_or_no_row_gives_a_zero_loss_with_a_graph(index):
    name, loss, source = list(_empty_losses())[index]
    assert loss == 0 and loss.requires_grad, name
    (grad,) = gradients(loss, source)
    assert grad is not None and (grad == 0).all(), name
