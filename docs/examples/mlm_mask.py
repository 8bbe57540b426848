import torch

from apt_kernels import mlm_mask

ids = torch.randint(5, 1000, (4, 16))
masked, labels, positions = mlm_mask(ids, mask_token_id=4, vocab_size=1000, seed=0)
again, *_ = mlm_mask(
    ids[2:3], mask_token_id=4, vocab_size=1000, seed=0, sample_ids=torch.tensor([2])
)
assert torch.equal(masked[2:3], again)  # a sample's masks do not depend on its batch
