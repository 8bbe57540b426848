import torch

from apt_kernels import linear_policy_loss, linear_token_logprobs

hidden = torch.randn(2, 4, 64, requires_grad=True)
head = torch.randn(1000, 64, requires_grad=True)
ids, mask = torch.randint(0, 1000, (2, 4)), torch.ones(2, 4)
old = linear_token_logprobs(hidden, head, ids).detach()
advantages = torch.tensor([1.0, -1.0])
loss, metrics = linear_policy_loss(hidden, head, ids, old, advantages, mask, entropy_coef=0.01)
loss.backward()
assert metrics["entropy"] > 0
