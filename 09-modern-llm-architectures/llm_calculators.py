"""Topic 09 - Calculators: what a config costs, in parameters, FLOPs and bytes of cache, before it is built.

python 09-modern-llm-architectures/modern_llm_architectures.py size               # the published models below
python 09-modern-llm-architectures/modern_llm_architectures.py size --checkpoint path/to/folder

Every number is a sum of terms with a name; the tests compare it with transformers' own models on the meta device.
"""

from dataclasses import dataclass

from latent_attention import LatentConfig
from llm_config import ExpertConfig, ModelConfig
from llm_layers import RopeScaling

# Published configs, as their folders state them (read November 2026); what is left out is the default above


LLAMA3_SCALING = RopeScaling("llama3", 8.0, 8192)
PUBLISHED = {
    "Llama-2-7B": ModelConfig(32000, 4096, 32, 32, 32, 128, 11008, 4096, tie_embeddings=False),
    "Llama-3.1-8B": ModelConfig(
        128256, 4096, 32, 32, 8, 128, 14336, 131072, rope_theta=5e5, rope_scaling=LLAMA3_SCALING, tie_embeddings=False
    ),
    "Llama-3.1-70B": ModelConfig(
        128256, 8192, 80, 64, 8, 128, 28672, 131072, rope_theta=5e5, rope_scaling=LLAMA3_SCALING, tie_embeddings=False
    ),
    "Mistral-7B-v0.1": ModelConfig(32000, 4096, 32, 32, 8, 128, 14336, 32768, window_size=4096, tie_embeddings=False),
    "Qwen3-0.6B": ModelConfig(151936, 1024, 28, 16, 8, 128, 3072, 40960, 1e-6, 1e6, qk_norm=True),
    "Qwen3-8B": ModelConfig(151936, 4096, 36, 32, 8, 128, 12288, 40960, 1e-6, 1e6, qk_norm=True, tie_embeddings=False),
    "Mixtral-8x7B": ModelConfig(
        32000, 4096, 32, 32, 8, 128, 14336, 32768, 1e-5, 1e6, tie_embeddings=False, experts=ExpertConfig(8, 2, 14336)
    ),
    "DeepSeek-V3": ModelConfig(
        *(129280, 7168, 61, 128, 128, 64, 18432, 163840, 1e-6),
        rope_scaling=RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
        tie_embeddings=False,
        latent=LatentConfig(),
        experts=ExpertConfig(256, 8, 2048, 2048, 3, "sigmoid", 8, 4, 2.5),
    ),
}


# Parameters


@dataclass(frozen=True)
class Parameters:
    """How many weights a model has, and how many of them one token meets."""

    embedding: int  # the token embedding
    head: int  # the output matrix; 0 if it is the embedding
    attention: int  # all layers
    ffn: int  # all layers, every expert and router
    idle: int  # of ffn, the experts that a token does not visit
    norms: int  # gains of all norms

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.attention + self.ffn + self.norms

    @property
    def active(self) -> int:
        """Weights that one token meets: all but those of the experts it does not visit."""
        return self.total - self.idle

    @property
    def active_matmul(self) -> int:
        """Weights that one token is multiplied by: an embedding row is looked up, a tied one multiplies at the end."""
        return self.active - self.norms - (self.embedding if self.head else 0)


def attention_parameters(config: ModelConfig) -> tuple[int, int]:
    """Matrices with their biases, and norm gains, of one attention layer."""
    d_model, n_heads = config.d_model, config.n_heads
    if config.latent:
        widths = config.latent
        d_query = widths.d_nope + widths.d_rope
        queries = (d_model * widths.q_rank if widths.q_rank else 0) + (widths.q_rank or d_model) * n_heads * d_query
        down = d_model * (widths.kv_rank + widths.d_rope)
        up = widths.kv_rank * n_heads * (widths.d_nope + widths.d_value)
        return queries + down + up + n_heads * widths.d_value * d_model, widths.q_rank + widths.kv_rank
    d_q, d_kv = n_heads * config.d_head, config.n_kv_heads * config.d_head
    biases = (d_q + 2 * d_kv + d_model) if config.use_bias else 0
    return 2 * d_model * d_q + 2 * d_model * d_kv + biases, 2 * config.d_head if config.qk_norm else 0


def count_parameters(config: ModelConfig) -> Parameters:
    """The weights of `CausalLM(config)`, term by term."""
    matrices, gains = attention_parameters(config)
    ffn, idle = config.n_layers * 3 * config.d_model * config.d_ff, 0
    if config.experts:
        experts, dense = config.experts, min(config.experts.n_dense_layers, config.n_layers)
        one = 3 * config.d_model * experts.d_expert
        router = experts.n_experts * config.d_model + (experts.n_experts if experts.router == "sigmoid" else 0)
        layer = experts.n_experts * one + router + 3 * config.d_model * experts.d_shared
        ffn = dense * 3 * config.d_model * config.d_ff + (config.n_layers - dense) * layer
        idle = (config.n_layers - dense) * (experts.n_experts - experts.n_active_experts) * one
    embedding = config.vocab_size * config.d_model
    return Parameters(
        embedding=embedding,
        head=0 if config.tie_embeddings else embedding,
        attention=config.n_layers * matrices,
        ffn=ffn,
        idle=idle,
        norms=config.n_layers * (2 * config.d_model + gains) + config.d_model,
    )


# Arithmetic


def check_positions(seq_len: int, least: int) -> None:
    if seq_len < least:
        raise ValueError(f"seq_len must be >= {least} positions, got {seq_len}")


def forward_flops(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Multiply-adds, two FLOPs each, of one forward pass over `seq_len` tokens, per token on average.

    matrices: every weight once. scores: each query meets the keys up to its own, on average (seq_len + 1) / 2 of them,
    or fewer under a window, and each meeting costs a dot product and a weighted sum. Norms, softmax and rotations,
    which are not matrix products, are left out. A training step costs three times as much.
    """
    check_positions(seq_len, 1)
    parameters = count_parameters(config)
    biases = (
        config.n_layers * (2 * config.n_kv_heads + config.n_heads) * config.d_head + config.n_layers * config.d_model
    )
    weights = parameters.active_matmul - (biases if config.use_bias and not config.latent else 0)
    if config.experts and config.experts.router == "sigmoid":
        n_sparse = max(0, config.n_layers - config.experts.n_dense_layers)
        weights -= config.experts.n_experts * n_sparse  # a bias of the choice
    latent = config.latent
    width = latent.d_nope + latent.d_rope + latent.d_value if latent else 2 * config.d_head
    met = 0.0
    for layer in range(config.n_layers):
        window = min(config.window_of(layer) or seq_len, seq_len)
        met += (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    return {"matrices": 2.0 * weights, "scores": 2.0 * met * config.n_heads * width}


# Memory


def kv_bytes_per_token(config: ModelConfig, bytes_per_number: float = 2) -> float:
    """Bytes that a cache grows by with each position, all layers, before a window stops it.

    Grouped queries: 2 n_kv_heads d_head numbers a layer; latent attention: kv_rank + d_rope.
    """
    latent = config.latent
    numbers = latent.kv_rank + latent.d_rope if latent else 2 * config.n_kv_heads * config.d_head
    return config.n_layers * numbers * bytes_per_number


def kv_bytes(config: ModelConfig, seq_len: int, batch_size: int = 1, bytes_per_number: float = 2) -> float:
    """Bytes of the caches of `batch_size` sequences of `seq_len` positions; a windowed layer keeps its window."""
    check_positions(seq_len, 0)
    layer = kv_bytes_per_token(config, bytes_per_number) / config.n_layers
    kept = (min(seq_len, config.window_of(index) or seq_len) for index in range(config.n_layers))
    return batch_size * layer * sum(kept)
