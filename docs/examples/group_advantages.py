import torch

from apt_kernels import group_advantages

rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])  # two prompts, three responses each
advantages = group_advantages(rewards, 3)
assert advantages[0] > 0 > advantages[1] and not advantages[3:].any()
