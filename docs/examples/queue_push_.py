import torch

from apt_kernels import queue_push_

queue, pointer = torch.zeros(2, 4), torch.tensor([3])
queue_push_(queue, pointer, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # columns 3 and 0
assert queue.tolist() == [[3.0, 0.0, 0.0, 1.0], [4.0, 0.0, 0.0, 2.0]] and pointer.item() == 1
