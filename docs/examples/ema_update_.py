import torch

from apt_kernels import ema_update_

student, teacher = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
before = teacher.weight.clone()
ema_update_(teacher.parameters(), student.parameters(), momentum=0.99)
assert torch.allclose(teacher.weight, before + 0.01 * (student.weight - before))
