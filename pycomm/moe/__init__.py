"""Mixture of experts: the exchange of tokens between ranks, and what decides where they go.

    ep = ExpertParallel(group, num_experts, hidden, top_k)
    dispatched = ep.dispatch(x, topk_idx, topk_weights)           # x [T, H], topk_idx [T, K], topk_weights [T, K]
    y = ep.combine(run_my_experts(dispatched.rows.split(dispatched.sizes)), dispatched)   # [T, H]

exchange   ExpertParallel: plan, dispatch, combine       stream      the three as a loop that overlaps
planning   what all ranks decide alike: way, pieces      cost        what each way costs, and the choice
plan       where each row of a batch goes: tables        placement   which rank holds which experts
                                                         movement    rows and weights by a plan
transport  rows on their way, and the order of sums      rows        kernels, and rows in fp8
through_hosts  likewise, once to each host               form        how rows look while they travel
host_memory  what a host's ranks read of each other      waits       collectives whose errors name the stage
autograd   gradients                                     backward    one that fails elsewhere is noticed
checks     what is refused
static     the same with sizes known beforehand          dispatched  what a dispatch gives
router     loads, loss, bias, hosts a token              balance     placements from loads
adapters   for torchtitan, Megatron-Core, all_to_all_single"""

from pycomm.moe.adapters import MegatronDispatcher, TorchtitanDispatcher, all_to_all_single
from pycomm.moe.balance import balanced_placement
from pycomm.moe.dispatched import Dispatched
from pycomm.moe.exchange import ExpertParallel
from pycomm.moe.placement import Placement
from pycomm.moe.router import RouterBias, balance_loss, choose_experts, expert_loads
from pycomm.moe.static import StaticDispatched, StaticExpertParallel, StaticPlan
from pycomm.moe.stream import Chunk, ExpertStream
from pycomm.moe.tables import ExchangePlan
from pycomm.moe.waits import RowsGroup

__all__ = [
    "Chunk",
    "Dispatched",
    "ExchangePlan",
    "ExpertParallel",
    "ExpertStream",
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
