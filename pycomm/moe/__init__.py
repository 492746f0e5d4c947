"""Mixture of experts: the exchange of tokens between ranks, and what decides where they go.

    ep = ExpertParallel(group, num_experts, hidden, top_k)
    dispatched = ep.dispatch(x, topk_idx, topk_weights)           # x [T, H], topk_idx [T, K], topk_weights [T, K]
    y = ep.combine(run_my_experts(dispatched.rows.split(dispatched.sizes)), dispatched)   # [T, H]

exchange   ExpertParallel: plan, dispatch, combine       placement  which rank holds which experts
plan       where each row of a batch goes                cost       what each way costs, and the choice
transport  rows on their way, and the order of sums      rows       kernels, and rows in fp8
waits      collectives whose errors name the stage       checks     what is refused
autograd   gradients                                     static     the same with sizes known beforehand
router     loads, loss, bias, hosts a token              balance    placements from loads
adapters   for torchtitan, Megatron-Core, all_to_all_single"""

from pycomm.moe.adapters import MegatronDispatcher, TorchtitanDispatcher, all_to_all_single
from pycomm.moe.balance import balanced_placement
from pycomm.moe.exchange import Dispatched, ExpertParallel
from pycomm.moe.placement import Placement
from pycomm.moe.plan import ExchangePlan
from pycomm.moe.router import RouterBias, balance_loss, choose_experts, expert_loads
from pycomm.moe.static import StaticDispatched, StaticExpertParallel, StaticPlan
from pycomm.moe.waits import RowsGroup

__all__ = [
    "Dispatched",
    "ExchangePlan",
    "ExpertParallel",
    "MegatronDispatcher",
    "Placement",
    "RouterBias",
    "RowsGroup",
    "StaticDispatched",
    "StaticExpertParallel",
    "StaticPlan",
    "TorchtitanDispatcher",
    "all_to_all_single",
    "balance_loss",
    "balanced_placement",
    "choose_experts",
    "expert_loads",
]
