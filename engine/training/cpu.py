"""What a CPU wants in training. Generation has engine.generation.cpu."""

import torch

KEPT_BLOCK = 31 * 2 ** 20       # bytes; glibc's threshold follows blocks of up to 32 MiB


def keep_freed_memory() -> None:
    """Make glibc keep the memory that a step frees, for the next one. Other allocators ignore this.

    By default, glibc returns large freed blocks to the system, and a new block costs a page fault
    for every 4 KiB; docs/benchmarks.md counts them. Once a program has freed a block of KEPT_BLOCK
    bytes, glibc keeps all smaller blocks, and up to 62 MiB of free memory at the end of its heap.
    Source: the man page mallopt(3), M_MMAP_THRESHOLD.
    """
    torch.empty(KEPT_BLOCK, dtype=torch.uint8)  # it is freed at once, as nothing holds it
