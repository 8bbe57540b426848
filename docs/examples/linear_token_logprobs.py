import torch

from apt_kernels import linear_token_logprobs

hidden = torch.randn(2, 5, 64, requires_grad=True)  # last hidden states
head = torch.randn(1000, 64)  # the output embedding (V, D), frozen here
ids = torch.randint(0, 1000, (2, 5))
mask = torch.arange(5).expand(2, 5) >= 2  # the first two positions do not count
logps = linear_token_logprobs(hidden, head, ids, mask=mask)
logps.sum().backward()
assert not hidden.grad[:, :2].any()
