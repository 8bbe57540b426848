"""The fused loss in a training loop of your own: DPO without the logits."""

import torch

from apt_kernels import dpo_loss, linear_token_logprobs, sequence_logps


class TinyModel(torch.nn.Module):
    """Stands for your model: token ids to last hidden states, and an output embedding."""

    def __init__(self, vocabulary=200, width=32):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.mix = torch.nn.GRU(width, width, batch_first=True)

    def forward(self, ids):
        return self.mix(self.embedding(ids))[0]


torch.manual_seed(0)
model = TinyModel()
reference = TinyModel()
reference.load_state_dict(model.state_dict())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

ids = torch.randint(0, 200, (8, 12))  # 4 chosen answers, then 4 rejected ones
response = torch.arange(12).expand(8, 12) >= 4  # True counts: the prompt does not


def logps_of(model):
    hidden = model(ids)[:, :-1]
    head = model.embedding.weight  # the output embedding is tied here
    logps = linear_token_logprobs(hidden, head, ids[:, 1:], mask=response[:, 1:])
    return sequence_logps(logps, response[:, 1:]).chunk(2)


with torch.no_grad():
    ref_chosen, ref_rejected = logps_of(reference)
losses = []
for _ in range(10):
    loss, chosen_rewards, rejected_rewards = dpo_loss(*logps_of(model), ref_chosen, ref_rejected)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0]
