"""The model's parts against torch's own, and what must not depend on the layout beside the loss."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spawn import run_ranks
from torch import Tensor
from training_runs import tiny

from training.config import Config, OptimizerConfig, SampleConfig
from training.errors import DivergenceError
from training.generate import choose, generate
from training.layout import Layout
from training.mesh import Mesh
from training.model import GPT
from training.model_config import ModelConfig
from training.moe import balance_routers
from training.norms import RMSNorm
from training.optimizer import learning_rate
from training.parallel import fused_cross_entropy, gather_sequence, gather_vocab, reduce_scatter_sequence
from training.rotary import rotary_angles, rotary_frequencies, rotate
from training.router import rebalance, route
from training.sharding import gather_to_leader, initialise, specs_of
from training.trainer import Trainer

Array = np.ndarray[Any, np.dtype[Any]]
MOE = {"n_experts": 4, "top_k": 2}


def test_rotary_positions_turn_inner_products_into_functions_of_distance() -> None:
    cos, sin = rotary_angles(torch.arange(16), rotary_frequencies(ModelConfig(head_dim=8)))
    query, key = torch.randn(8), torch.randn(8)
    rotated_query, rotated_key = (rotate(x.expand(16, 1, 1, 8), cos, sin)[:, 0, 0] for x in (query, key))
    scores = rotated_query @ rotated_key.T
    for distance in range(-15, 16):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotated_query.norm(dim=-1), query.norm().expand(16))


def check_rms_norms(group: Any) -> None:
    """Outputs and gradients against the definition in fp64, of rows as they come and of parts of wider ones."""
    mesh = Mesh(group, Layout(dp=1, tp=1, ep=1))
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, part in (
        ((5, 3, 16), torch.float32, False),
        ((7, 1, 33), torch.float32, True),
        ((1, 1), torch.float32, False),
        ((0, 2, 8), torch.float32, False),
        ((4, 2, 64), torch.bfloat16, True),
    ):
        width, tolerance = shape[-1], {"rtol": 0.0, "atol": 2e-6 if dtype == torch.float32 else 2e-2}
        wide = torch.randn(*shape[:-1], 2 * width if part else width, generator=generator).to(dtype).requires_grad_()
        norm = RMSNorm(width, 1e-3, mesh)
        with torch.no_grad():
            norm.weight.copy_(torch.randn(width, generator=generator))
        norm.weight.requires_grad_()
        gradient = torch.randn(*shape[::-1], generator=generator).permute(*reversed(range(len(shape)))).to(dtype)
        y = norm(wide[..., :width])
        y.backward(gradient)
        exact, weight = (each.detach().double().requires_grad_() for each in (wide, norm.weight))
        rows = exact[..., :width]
        expected = rows / (rows.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
        expected.backward(gradient.double())
        assert y.dtype == dtype and wide.grad is not None and norm.weight.grad is not None
        largest = max([1.0, *(float(each.abs().max()) for each in (expected.detach(), exact.grad) if each.numel())])
        torch.testing.assert_close(y.double() / largest, expected / largest, **tolerance)
        torch.testing.assert_close(wide.grad.double() / largest, exact.grad / largest, **tolerance)
        torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=tolerance["atol"], atol=1e-5)


def test_rms_norms_are_the_definitions() -> None:
    run_ranks(check_rms_norms, 1)


def cross_entropy_of_vocab_parts(group: Any, chunk: int) -> tuple[float, Array, Array, Array]:
    mesh = Mesh(group, Layout(dp=1, tp=group.size, ep=1))
    x, whole_table, targets = cross_entropy_input()
    table = whole_table.chunk(group.size)[group.rank].clone().requires_grad_()
    x.requires_grad_()
    loss = fused_cross_entropy(x, table, targets, mesh, chunk)
    (loss * 3).backward()
    assert x.grad is not None and table.grad is not None
    whole_logits = gather_vocab((x @ table.T).detach(), mesh)
    return float(loss.detach()), x.grad.numpy(), table.grad.numpy(), whole_logits.numpy()


def cross_entropy_input() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, table = torch.randn(7, 5, generator=generator) * 10, torch.randn(12, 5, generator=generator)
    return x, table, torch.arange(7) * 5 % 12


@pytest.mark.parametrize(("tp", "chunk"), [(1, 3), (2, 3), (2, 100)])
def test_fused_cross_entropy_equals_torchs(tp: int, chunk: int) -> None:
    x, table, targets = cross_entropy_input()
    x.requires_grad_()
    table.requires_grad_()
    logits = x @ table.T
    expected = F.cross_entropy(logits, targets, reduction="sum")
    (expected * 3).backward()
    assert x.grad is not None and table.grad is not None
    results = run_ranks(cross_entropy_of_vocab_parts, tp, chunk)
    for loss, _, _, gathered in results:
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        np.testing.assert_allclose(gathered, logits.detach(), rtol=1e-5, atol=1e-5)
    of_x = sum(grad for _, grad, _, _ in results)  # a partial sum on each rank, as after gather_sequence
    np.testing.assert_allclose(of_x, x.grad, rtol=1e-4, atol=1e-5)
    of_table = np.concatenate([grad for _, _, grad, _ in results])
    np.testing.assert_allclose(of_table, table.grad, rtol=1e-4, atol=1e-5)


def sequence_operators(group: Any) -> list[Array]:
    """gather_sequence and reduce_scatter_sequence of integers, each with its gradient."""
    mesh = Mesh(group, Layout(dp=1, tp=group.size, ep=1))
    part = (torch.arange(6.0).view(2, 3) + 10 * group.rank).requires_grad_()
    whole = gather_sequence(part, mesh)
    whole.backward(torch.arange(whole.numel()).view_as(whole).float() * (group.rank + 1))
    partial = (torch.arange(12.0).view(4, 3) * (group.rank + 1)).requires_grad_()
    scattered = reduce_scatter_sequence(partial, mesh)
    scattered.backward(torch.full_like(scattered, group.rank + 1.0))
    assert part.grad is not None and partial.grad is not None
    return [each.detach().numpy() for each in (whole, part.grad, scattered, partial.grad)]


def test_sequence_operators_are_each_others_backward() -> None:
    results = run_ranks(sequence_operators, 2)
    counted = np.arange(12.0).reshape(4, 3)
    for rank, (whole, part_grad, scattered, partial_grad) in enumerate(results):
        rows = slice(2 * rank, 2 * rank + 2)
        assert np.array_equal(whole, np.concatenate([np.arange(6.0).reshape(2, 3) + 10 * r for r in range(2)]))
        assert np.array_equal(part_grad, 3 * counted[rows])  # ranks 0 and 1 sent 1 and 2 times counted
        assert np.array_equal(scattered, 3 * counted[rows])
        assert np.array_equal(partial_grad, np.repeat([[1.0], [1.0], [2.0], [2.0]], 3, 1))


def whole_parameters(group: Any, config: Config, layout: Layout) -> dict[str, Array]:
    mesh = Mesh(group, layout)
    model = GPT(config.model, mesh)
    initialise(model, mesh, config.train.seed)
    gathered = {
        name: gather_to_leader(parameter.detach(), specs_of(model)[name], mesh)
        for name, parameter in model.named_parameters()
    }
    return {name: whole.numpy() for name, whole in gathered.items() if whole is not None}


def test_every_layout_starts_from_the_same_parameters() -> None:
    config = tiny(model=MOE)
    alone = run_ranks(whole_parameters, 1, config, Layout(1, 1, 1))[0]
    for layout in (Layout(1, 4, 1), Layout(2, 2, 2)):
        together, *others = run_ranks(whole_parameters, 4, config, layout)
        assert together.keys() == alone.keys()
        for name in alone:
            assert np.array_equal(together[name], alone[name]), name
        assert all(name not in other for other in others for name in ("norm.weight",))


def test_the_future_does_not_reach_the_past() -> None:
    assert run_ranks(logits_before_a_change, 1)[0]


def logits_before_a_change(group: Any) -> bool:
    mesh = Mesh(group, Layout(1, 1, 1))
    model = GPT(tiny(model={"n_kv_heads": 2}).model, mesh)
    initialise(model, mesh, 0)
    tokens = torch.randint(0, 256, (16, 2))
    changed = tokens.clone()
    changed[10:] = 0
    with torch.no_grad():
        return torch.equal(model(tokens)[0][:10], model(changed)[0][:10])


def clipped_update(group: Any, config: Config) -> tuple[float, float, dict[str, Array]]:
    """The norm before clipping, the norm that is left, and the parameters after the update."""
    trainer = Trainer(config, group)
    norm = trainer.train_step().grad_norm
    share = torch.tensor([trainer.optimizer.norm_squared_share()])
    group.all_reduce(share)
    gathered = {
        name: gather_to_leader(trainer.optimizer.masters[name], spec, trainer.mesh)
        for name, spec in trainer.optimizer.specs.items()
    }
    trainer.close()
    return norm, float(share) ** 0.5, {name: w.numpy() for name, w in gathered.items() if w is not None}


def test_clipping_uses_the_norm_over_all_axes() -> None:
    # Plain momentum-free Adam with a large eps moves in proportion to the gradient, so that a wrong scale shows.
    optimizer = OptimizerConfig(lr=1.0, warmup_steps=0, eps=1.0, weight_decay=0.0, clip_norm=0.01)
    configs = [
        dataclasses.replace(config, optimizer=optimizer) for config in (tiny(model=MOE), tiny(tp=2, ep=2, model=MOE))
    ]
    norm, left, expected = run_ranks(clipped_update, 1, configs[0])[0]
    assert norm > 0.1
    assert left == pytest.approx(0.01, rel=1e-4)
    results = run_ranks(clipped_update, 4, configs[1])
    for other_norm, other_left, _ in results:
        assert other_norm == pytest.approx(norm, rel=1e-5)
        assert other_left == pytest.approx(0.01, rel=1e-4)
    for name, whole in expected.items():
        np.testing.assert_allclose(results[0][2][name], whole, rtol=1e-4, atol=1e-6, err_msg=name)


def broken(group: Any, config: Config) -> list[tuple[str, bool]]:
    """What a step says, and whether it left the parameters alone, when each of several things goes wrong."""
    trainer = Trainer(config, group)
    trainer.train_step()
    block = trainer.model.blocks["1"]

    def says() -> tuple[str, bool]:
        before = [master.clone() for master in trainer.optimizer.masters.values()]
        with pytest.raises(DivergenceError) as caught:
            trainer.train_step()
        after = trainer.optimizer.masters.values()
        return str(caught.value), all(map(torch.equal, before, after))

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * float("nan")

    said = []
    if group.rank == 1:  # a gradient of rank 1 alone
        handle = block.attention_norm.register_forward_hook(lambda m, args, y: y.register_hook(spoil) and None)
    said.append(says())
    if group.rank == 1:
        handle.remove()
    trainer.divergence.recent_losses.extend([1.0] * 10)  # the loss is about 5.5
    said.append(says())
    trainer.divergence.recent_losses.clear()
    if group.rank == 1:  # a weight of rank 1 alone
        with torch.no_grad():
            block.feed_forward.up.weight[3, 5] = float("inf")
    said.append(says())
    trainer.close()
    return said


@pytest.mark.parametrize("tp", [1, 2])  # with tp, what is not finite on one rank soon is on both
def test_a_step_that_diverges_stops_every_rank_before_the_update_and_names_rank_and_layer(tp: int) -> None:
    results = run_ranks(broken, 2, tiny(tp=tp))
    assert results[0] == results[1]
    (gradient, jump, weight) = (message for message, _ in results[0])
    assert all(untouched for _, untouched in results[0])
    assert gradient.startswith("step 2: the loss is 5.") and "the gradient norm nan" in gradient
    assert (
        "first nan in the gradient of blocks.1.attention_norm on rank 1;" in gradient
        and "a lower optimizer.lr" in gradient
    )
    assert "the loss jumped from 1.0000 to 5." in jump and "(monitor.max_loss_jump allows 3)" in jump
    assert re.search(r"the largest loss is rank [01]'s, 5\.\d+; the largest gradient is that of \S+ on rank [01]", jump)
    assert re.search(r"first (nan|inf) in blocks.1.feed_forward.up on rank 1;", weight)


def test_a_loss_that_is_no_number_after_a_wild_update_stops_the_run() -> None:
    optimizer = OptimizerConfig(lr=1e30, warmup_steps=0)
    for message in run_ranks(diverging, 2, dataclasses.replace(tiny(), optimizer=optimizer)):
        assert message.startswith("step 2: ") and "nan" in message and "on rank 0; resume from" in message


def diverging(group: Any, config: Config) -> str:
    trainer = Trainer(config, group)
    trainer.train_step()
    with pytest.raises(DivergenceError) as caught:
        trainer.train_step()
    trainer.close()
    return str(caught.value)


def test_documents_do_not_see_each_other() -> None:
    assert run_ranks(logits_of_documents, 1)[0] == []


def logits_of_documents(group: Any) -> list[str]:
    """The models whose packed documents have other logits than each document alone."""
    mesh = Mesh(group, Layout(1, 1, 1))
    wrong = []
    for name, changes in {"llama": {"n_kv_heads": 2}, "moe": MOE}.items():
        model = GPT(tiny(model=changes).model, mesh)
        initialise(model, mesh, 0)
        tokens = torch.randint(0, 256, (15, 2), generator=torch.Generator().manual_seed(0))
        lengths = [[4, 11], [9, 6]]  # of the documents of each sequence
        documents = torch.stack(
            [torch.repeat_interleave(torch.tensor([7, 3]), torch.tensor(each)) for each in lengths], 1
        )
        with torch.no_grad():
            packed = model(tokens, documents)[0]
            for sequence, (first, _) in enumerate(lengths):
                mine = tokens[:, sequence : sequence + 1]
                alone = torch.cat([model(mine[:first])[0], model(mine[first:])[0]])[:, 0]
                if not torch.allclose(packed[:, sequence], alone, rtol=1e-4, atol=1e-5):
                    wrong.append(name)
            if torch.allclose(packed, model(tokens)[0], rtol=1e-4, atol=1e-5):
                wrong.append(f"{name}, unmasked")
    return wrong


def test_routes_are_those_of_the_definition() -> None:
    """Against loops in numpy: groups by their two best, the bias in the choice but not in the weight, the scale."""
    config = ModelConfig(
        n_experts=12, top_k=3, router="sigmoid", n_expert_groups=4, topk_groups=2, router_bias=True, router_scale=2.5
    )
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(50, 12, generator=generator), torch.randn(12, generator=generator)
    routes = route(logits, config, bias)
    for row, experts, weights in zip(logits.double().numpy(), routes.experts, routes.weights, strict=True):
        scores = 1 / (1 + np.exp(-row))
        choice = scores + bias.numpy()
        groups = sorted(range(4), key=lambda g: -sum(sorted(choice[3 * g : 3 * g + 3])[-2:]))[:2]
        best = sorted((e for e in range(12) if e // 3 in groups), key=lambda e: -choice[e])[:3]
        assert experts.tolist() == best
        np.testing.assert_allclose(weights, 2.5 * scores[best] / scores[best].sum(), rtol=1e-5)
    softmax = route(logits, ModelConfig(n_experts=12, top_k=3), None)
    chosen = logits.topk(3).values.softmax(-1)  # topk then softmax is softmax, topk and their sum 1
    torch.testing.assert_close(softmax.weights, chosen)
    plain = route(logits, ModelConfig(n_experts=12, top_k=3, norm_topk_prob=False), None)
    torch.testing.assert_close(plain.weights, logits.softmax(-1).topk(3).values)


def biases_after_loads(group: Any) -> list[Array]:
    """The biases of two steps in which each rank saw other loads; by themselves the ranks would move otherwise."""
    mesh = Mesh(group, Layout(group.size, 1, 1))
    model = GPT(tiny(model={**MOE, "n_dense_layers": 1, "router_bias": True, "router_bias_speed": 0.5}).model, mesh)
    initialise(model, mesh, 0)
    experts = model.blocks["1"].experts
    biases = []
    for loads in ([[0.0, 1.0, 5.0, 6.0], [8.0, 3.0, 1.0, 0.0]], [[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 1.0]]):
        experts.load += torch.tensor(loads[group.rank])
        balance_routers(model, mesh)
        biases.append(experts.bias.detach().numpy().copy())
    return biases


def test_biases_move_by_the_loads_of_all_ranks() -> None:
    for first, second in run_ranks(biases_after_loads, 2):
        assert first.tolist() == [-0.5, 0.5, 0.0, 0.0]  # loads 8, 4, 6, 6
        assert second.tolist() == [0.0, 0.0, 0.0, 0.0]  # loads 1, 3, 2, 2


def test_a_bias_evens_out_the_loads_of_a_lopsided_router() -> None:
    config = ModelConfig(n_experts=4, top_k=1, router="sigmoid", router_bias=True)
    logits = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0.0, 0.0, -2.0])
    bias = torch.zeros(4)
    loads = []
    for _ in range(200):
        load = torch.bincount(route(logits, config, bias).experts.flatten(), minlength=4).float()
        rebalance(bias, load, 0.01)
        loads.append(load)
    assert loads[0].max() > 700 and loads[-1].max() < 300


def generated(group: Any, configs: list[Config]) -> list[list[list[int]]]:
    return [generated_by(Trainer(config, group), config) for config in configs]


def generated_by(trainer: Trainer, config: Config) -> list[list[int]]:
    for _ in range(5):
        trainer.train_step()
    prompts = (b"def ", b"x" * 40)  # both become longer than seq_len, the first while it grows
    samples = [list(generate(trainer, list(prompt), config.sample)) for prompt in prompts]
    text, cache = [*prompts[0], *samples[0]], trainer.new_cache()
    assert (cache is None) == (trainer.mesh.cp.size > 1)
    for end in (3, 4, 9, 31, 32, 33):  # what is kept, and several tokens at once, change nothing
        kept, whole = trainer.next_token_logits(text[:end], cache), trainer.next_token_logits(text[:end])
        torch.testing.assert_close(kept, whole, rtol=1e-4, atol=1e-5)
    if cache is not None and config.model.latent:  # no head's keys and values, nor twice what they come from
        width = config.model.kv_lora_rank + config.model.qk_rope_head_dim
        assert [[tuple(each.shape[1:]) for each in kept] for kept in cache._kept.values()] == 2 * [[(1, 1, width)]]
    trainer.close()
    return samples


def test_every_layout_generates_the_same_text_on_every_rank() -> None:
    sample = SampleConfig(n_tokens=30, temperature=0.7, top_k=5, seed=3)
    gpt2: dict[str, Any] = {"block": "gpt2", "max_seq_len": 32}  # as many as seq_len
    latent = {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 4, "v_head_dim": 6, "rope_scaling": "yarn"}
    latent |= {"rope_factor": 2.0, "rope_original_len": 16, "rope_mscale": 1.0}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (MOE, {"tp": 2, "ep": 2}),
        (MOE, {"pp": 2, "ep": 2}),
        (gpt2, {"tp": 4}),
        (latent, {"tp": 2}),
        ({"n_kv_heads": 2}, {"cp": 2, "tp": 2}),
        ({"n_kv_heads": 2}, {"zero": 3}),
    ]
    configs = [dataclasses.replace(tiny(model=model), sample=sample) for model, _ in cases]
    expected = run_ranks(generated, 1, configs)[0]
    assert all(len(tokens) == 30 for of_config in expected for tokens in of_config)
    cut = [
        dataclasses.replace(config, layout=dataclasses.replace(config.layout, **layout))
        for config, (_, layout) in zip(configs, cases, strict=True)
    ]
    assert all(result == expected for result in run_ranks(generated, 4, cut))


def test_choosing_a_token() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    assert choose(logits, 0.0, 0, generator) == 1
    assert {choose(logits, 5.0, 2, generator) for _ in range(200)} == {1, 2}
    assert {choose(logits, 5.0, 0, generator) for _ in range(400)} == {0, 1, 2, 3}
    assert {choose(logits, 0.01, 0, generator) for _ in range(50)} == {1}


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = OptimizerConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=4)
    rates = [learning_rate(step, 24, config) for step in range(30)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.55)
    assert rates[24:] == pytest.approx([0.1] * 6)
    assert rates[4:] == sorted(rates[4:], reverse=True)
