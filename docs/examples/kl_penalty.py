import torch

from apt_kernels import kl_penalty

logps, ref_logps = torch.full((2, 4), -1.0), torch.full((2, 4), -1.5)
assert torch.allclose(kl_penalty(logps, ref_logps, "k1"), torch.tensor(0.5))
