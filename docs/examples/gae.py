import torch

from apt_kernels import gae

rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3)
advantages, returns = gae(rewards, values, gamma=0.5, gae_lambda=1.0)
assert advantages.tolist() == [[0.25, 0.5, 1.0]]
