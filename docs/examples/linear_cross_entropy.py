import torch

from apt_kernels import linear_cross_entropy

hidden = torch.randn(6, 64, requires_grad=True)
head = torch.randn(1000, 64, requires_grad=True)
labels = torch.tensor([3, -100, -100, 7, -100, 9])  # -100: the row is ignored and costs nothing
loss = linear_cross_entropy(hidden, head, labels, label_smoothing=0.1)
loss.backward()
assert loss.dim() == 0 and not hidden.grad[1].any()
