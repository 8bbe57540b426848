import torch

from apt_kernels import linear_dpo_loss

hidden = torch.randn(4, 6, 64, requires_grad=True)  # 2 chosen answers, then 2 rejected ones
head = torch.randn(1000, 64, requires_grad=True)
ids, mask = torch.randint(0, 1000, (4, 6)), torch.ones(4, 6)
reference = torch.full((2,), -40.0)
loss, *rewards = linear_dpo_loss(hidden, head, ids, mask, reference, reference, beta=0.1)
loss.backward()
assert head.grad.shape == head.shape
