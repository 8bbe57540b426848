import torch

from apt_kernels import sequence_logps

logps = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, float("nan")]])
mask = torch.tensor([[1, 1, 1], [1, 1, 0]])  # masked tokens may hold anything
assert sequence_logps(logps, mask).tolist() == [-6.0, -9.0]
assert sequence_logps(logps, mask, average=True).tolist() == [-2.0, -4.5]
