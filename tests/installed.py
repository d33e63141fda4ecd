"""Whether an installed package works, where there may be no compiler: python tests/installed.py [--cuda].

For wheels. It takes nothing from the checkout it lies in, and compares losses and gradients of the compiled kernels with plain
PyTorch's.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

import kdkernels
from kdkernels import native


def results(backend: str) -> list[torch.Tensor]:
    """A loss and its gradient of several kernel families."""
    g = torch.Generator().manual_seed(0)
    found = []
    for loss, shape in (
        (kdkernels.kl_div, (7, 131)),
        (kdkernels.js_div, (7, 131)),
        (kdkernels.dist_loss, (7, 131)),
        (kdkernels.rkd_loss, (9, 5)),
        (kdkernels.similarity_preserving_loss, (9, 5)),
        (kdkernels.hint_loss, (2, 3, 5, 5)),
    ):
        student, teacher = torch.randn(shape, generator=g).requires_grad_(), torch.randn(shape, generator=g)
        value = loss(student, teacher, backend=backend)
        found += [value.detach(), *torch.autograd.grad(value, student)]
    return found


def main() -> None:
    package = Path(kdkernels.__file__).resolve().parent
    assert Path(sys.prefix).resolve() in package.parents, f"kdkernels comes from {package}, not from this environment"
    assert native.cpu_target(), native.build_info()
    if "--cuda" in sys.argv:
        assert native._C is not None and native._C.cuda, native.build_info()
    for ours, theirs in zip(results("cpu"), results("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    compilers = [c for c in ("c++", "g++", "clang++", "nvcc") if shutil.which(c)]
    print(f"{package}: {native.cpu_target()}, {native.build_info()}; compilers here: {', '.join(compilers) or 'none'}")


if __name__ == "__main__":
    main()
