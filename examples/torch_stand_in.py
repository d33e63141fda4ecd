"""Code that calls torch's KLDivLoss changes one import: python examples/torch_stand_in.py"""

import torch

from kdkernels.integrations.torch import KLDivLoss  # was: from torch.nn import KLDivLoss

criterion = KLDivLoss(reduction="batchmean")
log_probs = torch.log_softmax(torch.randn(64, 1000), dim=-1).requires_grad_()
target = torch.softmax(torch.randn(64, 1000), dim=-1)

loss = criterion(log_probs, target)
loss.backward()
expected = torch.nn.KLDivLoss(reduction="batchmean")(log_probs.detach(), target)
print(f"loss {loss.item():.6f}, torch's {expected.item():.6f}, gradient {tuple(log_probs.grad.shape)}")
