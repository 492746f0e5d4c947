"""Communication beside computation, on CPU tensors: each part works alone, on a pycomm.Group or what wraps one.

    buckets     GradientBuckets: gradients reduced while backward computes the rest
    prefetch    ShardedModules: ZeRO-3, each module's parameters gathered ahead of its use and freed after it
    matmul      all_gather_matmul, matmul_reduce_scatter: products whose operand or result crosses ranks piece by piece
    delayed     WeightGradients: weight gradients put off until there is something to wait for
    scorecard   measure(): what overlapping gains, by FLUX's definition
    cost        LinkCost: what a collective costs here, from which sizes and refusals to overlap follow

pycomm.moe has the expert stream, ExpertParallel.stream(). docs/overlap.md has measured figures and what was not
measured."""

from pycomm.overlap.buckets import Bucket, GradientBuckets, Landed
from pycomm.overlap.cost import LinkCost
from pycomm.overlap.delayed import WeightGradients
from pycomm.overlap.matmul import MatmulPlan, all_gather_matmul, matmul_reduce_scatter
from pycomm.overlap.prefetch import ShardedModules
from pycomm.overlap.scorecard import Scorecard, measure

__all__ = [
    "Bucket",
    "GradientBuckets",
    "Landed",
    "LinkCost",
    "MatmulPlan",
    "Scorecard",
    "ShardedModules",
    "WeightGradients",
    "all_gather_matmul",
    "matmul_reduce_scatter",
    "measure",
]
