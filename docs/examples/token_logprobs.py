import torch

from apt_kernels import token_logprobs

logits = torch.randn(2, 5, 1000, requires_grad=True)  # a batch of 2, 5 positions, V = 1000
ids = torch.randint(0, 1000, (2, 5))
logps, entropy = token_logprobs(logits, ids, return_entropy=True)
logps.sum().backward()
assert logps.shape == entropy.shape == (2, 5)
