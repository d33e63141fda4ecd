"""One training step, before and after the line that changes: python examples/train.py"""

import torch
import torch.nn.functional as F

import kdkernels

T, ALPHA = 4.0, 0.9


def before(student_logits, teacher_logits, labels):
    soft = F.kl_div(
        F.log_softmax(student_logits / T, dim=-1), F.softmax(teacher_logits / T, dim=-1), reduction="batchmean"
    )
    return (1 - ALPHA) * F.cross_entropy(student_logits, labels) + ALPHA * T**2 * soft


def after(student_logits, teacher_logits, labels):
    return kdkernels.distillation_loss(student_logits, teacher_logits, labels, temperature=T, alpha=ALPHA)


def train(loss_function, steps=30):
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.ReLU(), torch.nn.Linear(256, 100))
    student = torch.nn.Linear(32, 100)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        inputs = torch.randn(64, 32)
        with torch.no_grad():
            teacher_logits = 10 * teacher(inputs)
        loss = loss_function(student(inputs), teacher_logits, teacher_logits.argmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    one, other = train(before), train(after)
    print(f"plain PyTorch: {one[0]:.6f} -> {one[-1]:.6f}")
    print(f"kdkernels:     {other[0]:.6f} -> {other[-1]:.6f}")
    print(f"largest difference: {max(abs(x - y) for x, y in zip(one, other, strict=True)):.1e}")
