"""What a model is, without torch: its shape and options, the parameters and FLOPs that follow, and what cannot be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from training.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The model. Widths are whole; a layout cuts them."""

    block: Literal["llama", "gpt2"] = "llama"  # gpt2: learned positions, LayerNorm, GELU and biases
    vocab_size: int = 256  # bytes
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    n_kv_heads: int = 4  # fewer than n_heads: grouped-query attention
    head_dim: int = 0  # 0: d_model / n_heads; with latent attention the part of a query or key that does not turn
    d_ff: int = 384
    max_seq_len: int = 2048  # gpt2: rows of the position table; else only told to Hugging Face
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    kv_lora_rank: int = 0  # width of the latent of keys and values (latent attention, MLA); 0: keys and values of heads
    q_lora_rank: int = 0  # the same of queries; 0: they come from x
    qk_rope_head_dim: int = 0  # what turns of a query and of the one key that all heads share, beside head_dim
    v_head_dim: int = 0  # 0: head_dim

    rope_base: float = 10000.0
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"  # training/rotary.py
    rope_factor: float = 1.0  # positions are seen as this much closer together
    rope_low_freq_factor: float = 1.0  # llama3, yarn: wavelengths above rope_original_len / this are scaled whole,
    rope_high_freq_factor: float = 4.0  # those below rope_original_len / this not at all
    rope_original_len: int = 8192
    rope_mscale: float = 0.0  # yarn: scores are multiplied by (0.1 · this · ln(rope_factor) + 1)²; its authors: 1

    n_experts: int = 0  # 0: every block is dense
    top_k: int = 2
    d_ff_expert: int = 0  # width of one expert; 0: d_ff
    moe_every: int = 1  # every n-th block is a mixture of experts, counted from the last of each n,
    n_dense_layers: int = 0  # but for the first so many
    n_shared_experts: int = 0  # that every token visits: one feed-forward of so many experts' width
    router: Literal["softmax", "sigmoid"] = "softmax"  # how a logit becomes a score
    norm_topk_prob: bool = True  # the top_k scores sum to 1; with softmax that is a softmax of the top_k logits
    router_scale: float = 1.0  # of the routed experts' output
    n_expert_groups: int = 1  # hosts, say: a token's experts lie in
    topk_groups: int = 1  # this many of them
    best_of_group: int = 2  # a group's score is the sum of so many of its best experts' (DeepSeek-V3: 2, V2: 1)
    router_bias: bool = False  # balance by a bias on each expert's score that no gradient moves
    router_bias_speed: float = 1e-3  # its change a step
    aux_loss_weight: float = 0.01

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def latent(self) -> bool:
        """Whether attention is multi-head latent attention (training/attention.py)."""
        return self.kv_lora_rank > 0

    @property
    def qk_width(self) -> int:
        """Of one head's query or key."""
        return self.head_width + self.qk_rope_head_dim

    @property
    def v_width(self) -> int:
        """Of one head's value."""
        return self.v_head_dim or self.head_width

    @property
    def n_attention_parameters(self) -> int:
        """Of one layer's matrices, and the norms between them."""
        d, q, kv, rope, heads = self.d_model, self.q_lora_rank, self.kv_lora_rank, self.qk_rope_head_dim, self.n_heads
        if not self.latent:
            return (2 * heads + 2 * self.n_kv_heads) * self.head_width * d
        query = q * (d + 1 + heads * self.qk_width) if q else d * heads * self.qk_width
        return query + d * (kv + rope) + kv + heads * (kv * (self.head_width + self.v_width) + self.v_width * d)

    @property
    def expert_width(self) -> int:
        return self.d_ff_expert or self.d_ff

    def has_experts(self, layer: int) -> bool:
        """Whether block `layer` (0 is the first) is a mixture of experts."""
        return self.n_experts > 0 and layer >= self.n_dense_layers and (layer + 1) % self.moe_every == 0

    @property
    def n_moe_layers(self) -> int:
        return sum(self.has_experts(layer) for layer in range(self.n_layers))

    def _n_parameters(self, experts_a_layer: int) -> int:
        gpt2, d, q, kv = self.block == "gpt2", self.d_model, self.n_heads, self.n_kv_heads
        matrices = 2 if gpt2 else 3  # of a feed-forward
        biases = (q + 2 * kv) * self.head_width + d + self.d_ff + d if gpt2 else 0
        norm = 2 * d if gpt2 else d
        routed = experts_a_layer + self.n_shared_experts
        moe = matrices * d * self.expert_width * routed + self.n_experts * d
        dense_layers = self.n_layers - self.n_moe_layers
        tables = self.vocab_size * (1 if self.tie_embeddings else 2) + (self.max_seq_len if gpt2 else 0)
        return (
            self.n_layers * (self.n_attention_parameters + biases + 2 * norm)
            + dense_layers * matrices * d * self.d_ff
            + self.n_moe_layers * moe
            + norm
            + tables * d
        )

    @property
    def n_parameters(self) -> int:
        """Trained parameters of the whole model."""
        return self._n_parameters(self.n_experts)

    @property
    def n_active_parameters(self) -> int:
        """Those that one token meets."""
        return self._n_parameters(self.top_k if self.n_experts else 0)

    def flops_per_token(self, seq_len: int) -> float:
        """Of forward and backward: 6 a parameter that multiplies the token, and 6 · layers · heads · seq_len times a
        head's query and value widths (12 · layers · heads · head_dim · seq_len where they are equal).

        Source: PaLM, arXiv:2204.02311, appendix B (attention counted whole, as if it were not causal)."""
        looked_up = (0 if self.tie_embeddings else self.vocab_size) + (self.max_seq_len if self.block == "gpt2" else 0)
        multiplied = self.n_active_parameters - looked_up * self.d_model
        return 6.0 * multiplied + 6.0 * self.n_layers * self.n_heads * (self.qk_width + self.v_width) * seq_len

    def check(self) -> None:
        """Raises ConfigError for what cannot be, naming the keys and the values."""
        self._check_numbers()
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"model.n_kv_heads ({self.n_kv_heads}) does not divide model.n_heads ({self.n_heads}); change one of "
                "them"
            )
        if not self.head_dim and self.d_model % (2 * self.n_heads):
            raise ConfigError(
                f"twice model.n_heads ({2 * self.n_heads}) does not divide model.d_model ({self.d_model}); change one "
                "of them, or set model.head_dim"
            )
        if self.head_dim % 2 and not self.latent:
            raise ConfigError(f"model.head_dim is {self.head_dim}; rotary positions need an even one")
        if self.rope_scaling != "none" and (self.block == "gpt2" or self.rope_factor < 1):
            raise ConfigError(
                f"model.rope_scaling is {self.rope_scaling!r} with block {self.block!r} and rope_factor "
                f"{self.rope_factor}; it needs block 'llama' and a factor of at least 1"
            )
        if self.rope_mscale and self.rope_scaling != "yarn":
            raise ConfigError(
                f"model.rope_mscale is {self.rope_mscale}, but model.rope_scaling {self.rope_scaling!r} does not read "
                "it; set that to 'yarn', or leave it out"
            )
        if self.rope_scaling == "yarn" and self.rope_base <= 1:
            raise ConfigError(
                f"model.rope_base is {self.rope_base}, model.rope_scaling 'yarn' needs one above 1, such as 10000"
            )
        self._check_latent()
        if self.rope_scaling in ("llama3", "yarn") and self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ConfigError(
                f"model.rope_high_freq_factor ({self.rope_high_freq_factor}) must be above model.rope_low_freq_factor "
                f"({self.rope_low_freq_factor})"
            )
        if self.n_experts:
            self._check_experts()
        elif self.n_shared_experts or self.router_bias:
            raise ConfigError("model.n_shared_experts and model.router_bias need model.n_experts, which is 0")

    def _check_numbers(self) -> None:
        """Each for itself."""
        for name in _AT_LEAST_1:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name, meaning in _AT_LEAST_0.items():
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"model.{name} is {value}; give {meaning}")
        for name in _ABOVE_0:
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise ConfigError(f"model.{name} is {value}; give a number above 0, such as {getattr(_DEFAULT, name)}")

    def _check_latent(self) -> None:
        widths = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim")
        given = {name: getattr(self, name) for name in widths}
        if not self.latent:
            if others := [f"model.{name}" for name, value in given.items() if value]:
                raise ConfigError(
                    f"{' and '.join(others)} belong to latent attention, but model.kv_lora_rank is 0; set it to the "
                    "width of the latent, or leave them out"
                )
            return
        if self.block == "gpt2":
            raise ConfigError("model.kv_lora_rank needs rotary positions; set model.block to 'llama'")
        if self.n_kv_heads != self.n_heads:
            raise ConfigError(
                f"model.n_kv_heads is {self.n_kv_heads}, but in latent attention each of the model.n_heads "
                f"({self.n_heads}) has a key of its own; make them equal"
            )
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"model.qk_rope_head_dim is {self.qk_rope_head_dim}; latent attention turns an even number of a key's "
                "numbers, at least 2"
            )

    def _check_experts(self) -> None:
        if self.block == "gpt2":
            raise ConfigError("model.block 'gpt2' is dense; set model.n_experts to 0, or block to 'llama'")
        if self.moe_every < 1 or self.n_layers % self.moe_every:
            raise ConfigError(
                f"model.moe_every ({self.moe_every}) does not divide model.n_layers ({self.n_layers}); change one of "
                "them"
            )
        if not self.n_moe_layers:
            raise ConfigError(
                f"model.n_dense_layers ({self.n_dense_layers}) leaves no block of {self.n_layers} with experts; lower "
                "it, or set model.n_experts to 0"
            )
        if not 1 <= self.top_k <= self.n_experts:
            raise ConfigError(f"model.top_k is {self.top_k}: choose 1 to model.n_experts, which is {self.n_experts}")
        if self.n_expert_groups < 1 or self.n_experts % self.n_expert_groups:
            raise ConfigError(
                f"model.n_expert_groups ({self.n_expert_groups}) does not divide model.n_experts ({self.n_experts}); "
                "change one of them"
            )
        if not 1 <= self.topk_groups <= self.n_expert_groups:
            raise ConfigError(
                f"model.topk_groups is {self.topk_groups}: choose 1 to model.n_expert_groups, which is "
                f"{self.n_expert_groups}"
            )
        if self.best_of_group < 1:
            raise ConfigError(f"model.best_of_group is {self.best_of_group}; a group's score needs at least 1 expert")
        reachable = self.topk_groups * (self.n_experts // self.n_expert_groups)
        if self.top_k > reachable:
            raise ConfigError(
                f"model.top_k is {self.top_k}, but {self.topk_groups} groups of "
                f"{self.n_experts // self.n_expert_groups} experts hold {reachable}; raise model.topk_groups"
            )


_DEFAULT = ModelConfig()
_AT_LEAST_1 = (
    "vocab_size",
    "n_layers",
    "d_model",
    "n_heads",
    "n_kv_heads",
    "d_ff",
    "max_seq_len",
    "rope_original_len",
    "top_k",
    "n_expert_groups",
    "topk_groups",
)
_AT_LEAST_0 = {
    "head_dim": "a width, or 0 for model.d_model / model.n_heads",
    "kv_lora_rank": "a width, or 0 for none",
    "q_lora_rank": "a width, or 0 for none",
    "qk_rope_head_dim": "a width, or 0 for none",
    "v_head_dim": "a width, or 0 for that of model.head_dim",
    "rope_mscale": "1 for the temperature of yarn's authors, or 0 for none",
    "n_experts": "experts, or 0 for none",
    "d_ff_expert": "a width, or 0 for model.d_ff",
    "n_dense_layers": "layers, or 0 for none",
    "n_shared_experts": "experts, or 0 for none",
    "router_bias_speed": "a change a step, such as 1e-3, or 0 for none",
    "aux_loss_weight": "a weight, such as 0.01, or 0 for no balance loss",
}
_ABOVE_0 = ("norm_eps", "rope_base", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "router_scale")
