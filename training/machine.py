"""What a rank may use of its machine, what it used, and what the machine can do."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from training.device import HOST, Device, Span, of_this_machine

if TYPE_CHECKING:
    from pycomm.group import Group


def peak_memory_bytes(device: Device = HOST) -> int:
    """The most memory that this process has had resident, or that its tensors have had of a GPU."""
    if device.is_gpu:
        return torch.cuda.max_memory_allocated(device.where)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.cache
def process_nbytes(dtype: torch.dtype = torch.float32) -> int:
    """What Python and the libraries have resident in this process once a step has made them load what they load late:
    measured after a step of a few numbers, at the first call; it belongs before anything large is made. dtype: of what
    the step computes in."""
    width = 64
    table = torch.ones(16, width, requires_grad=True)
    layer = torch.nn.Linear(width, width).to(dtype)
    optimizer = torch.optim.AdamW([table, *layer.parameters()], fused=True)
    tokens = torch.arange(16)
    x = F.embedding(tokens, table).to(dtype)
    x = x * x.float().square().mean(-1, keepdim=True).rsqrt().to(dtype)
    heads = layer(x).view(1, 16, 4, width // 4).permute(0, 2, 1, 3)
    heads = torch.cat([heads.cos(), heads.sin()], -1)
    y = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).flatten()[: 16 * width].view(16, width)
    logits = F.linear(F.silu(y) * x, table.to(dtype)).float()
    target = (logits - logits.amax(-1, keepdim=True)).exp().gather(-1, tokens.unsqueeze(-1))
    target.log().sum().backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    torch.stack([torch.linalg.vector_norm(each, dtype=torch.float64) for each in gradients if each is not None])
    optimizer.step()
    return resident_nbytes()


def resident_nbytes() -> int:
    """What this process has in memory now, shared pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back_free_memory() -> None:
    """The kernel gets the pages that malloc() keeps and nothing uses; glibc alone has a call for it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def share_cores(world: Group) -> None:
    """Gives each rank its share of its machine's cores, unless OMP_NUM_THREADS says how many it has.

    Emulated hosts share cores too."""
    ranks_here = sum(of_this_machine(world))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))


def be_deterministic() -> None:
    """The same numbers from run to run on the same machines: operators that cannot promise it raise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def matmul_flops(dtype: torch.dtype, device: Device = HOST, n_tries: int = 5) -> float:
    """FLOP/s that this rank reaches in a matrix product [n, n] × [n, n], the best of n_tries: what MFU is a share of
    where no peak is given. All ranks at once see what sharing the machine leaves them."""
    n = 8192 if device.is_gpu else 768
    a, b = (torch.ones(n, n, dtype=dtype, device=device.where) for _ in range(2))
    best_s = float("inf")
    for _ in range(n_tries):
        span = Span(device)
        torch.mm(a, b)
        span.stop()
        best_s = min(best_s, span.seconds())
    return 2 * n**3 / best_s
