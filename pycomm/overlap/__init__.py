"""Communication beside computation, on CPU and CUDA tensors: each part works alone, on a pycomm.Group or a wrapper.

    buckets     GradientBuckets: gradients reduced while backward computes the rest
    prefetch    ShardedModules: ZeRO, each module's parameters gathered ahead of its use and freed after it
    matmul      all_gather_matmul, matmul_reduce_scatter: products whose operand or result crosses ranks piece by piece
    ring_time   RingTime: how long such a product takes, split and unsplit
    delayed     WeightGradients: weight gradients put off until there is something to wait for
    scorecard   measure(): what overlapping gains, by FLUX's definition
    cost        LinkCost: what a collective costs here, from which sizes and refusals to overlap follow

pycomm.moe has the expert stream, ExpertParallel.stream(). docs/overlap.md has measured figures and what was not
measured."""

from pycomm.overlap.bucket import Bucket, Landed
from pycomm.overlap.buckets import GradientBuckets
from pycomm.overlap.cost import LinkCost
from pycomm.overlap.cut import Cut, InMemory, ShardMemory
from pycomm.overlap.delayed import WeightGradients
from pycomm.overlap.matmul import (
    MatmulPlan,
    all_gather_matmul,
    all_gather_matmuls,
    matmul_reduce_scatter,
    plan_all_gather_matmul,
    plan_matmul_reduce_scatter,
)
from pycomm.overlap.prefetch import ShardedModules, in_backward
from pycomm.overlap.ring_time import RingTime
from pycomm.overlap.scorecard import Scorecard, measure

__all__ = [
    "Bucket",
    "Cut",
    "GradientBuckets",
    "InMemory",
    "Landed",
    "LinkCost",
    "MatmulPlan",
    "RingTime",
    "Scorecard",
    "ShardMemory",
    "ShardedModules",
    "WeightGradients",
    "all_gather_matmul",
    "all_gather_matmuls",
    "in_backward",
    "matmul_reduce_scatter",
    "measure",
    "plan_all_gather_matmul",
    "plan_matmul_reduce_scatter",
]
