import torch

from apt_kernels import info_nce

images = torch.randn(8, 32, requires_grad=True)
texts = torch.randn(8, 32, requires_grad=True)
loss = info_nce(images, texts, temperature=0.07, symmetric=True)  # CLIP's loss
loss.backward()
