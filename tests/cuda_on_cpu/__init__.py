"""Runs csrc/*/cuda.cu on the CPU, under sanitizers and in many orders of threads. See README.md."""

from .harness import KernelTimeout, Library, NotDeterministic, SanitizerError, StrayWrite, unavailable

__all__ = ["KernelTimeout", "Library", "NotDeterministic", "SanitizerError", "StrayWrite", "unavailable"]
