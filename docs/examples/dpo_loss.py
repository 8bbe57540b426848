import torch

from apt_kernels import dpo_loss

chosen = torch.tensor([-10.0, -12.0], requires_grad=True)  # log-probabilities of whole answers
rejected = torch.tensor([-11.0, -11.5], requires_grad=True)
ref_chosen, ref_rejected = torch.tensor([-10.5, -12.0]), torch.tensor([-10.5, -11.0])
loss, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
loss.backward()
assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
