"""The shape of a model, with the names of `params.json`."""

from dataclasses import dataclass

from llama.errors import ArgumentError, check_number

# The upper limits, far above any Llama; larger values mean a damaged file and are refused up front.
LARGEST = {
    **dict.fromkeys(("dim", "vocab_size", "multiple_of"), 2**22),
    **dict.fromkeys(("n_layers", "n_heads", "n_kv_heads", "head_dim"), 2**12),
    **dict.fromkeys(("max_batch_size", "max_seq_len", "original_max_position_embeddings"), 2**31),
    **dict.fromkeys(("norm_eps", "rope_theta", "low_freq_factor", "high_freq_factor"), 1e30),
    **dict.fromkeys(("ffn_dim_multiplier", "rope_scaling_factor"), 1e30),
}


@dataclass
class ModelArgs:
    """The shape of a model, with the names of `params.json`, and the size of its cache.

    Raises ArgumentError if the numbers contradict each other.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = None  # type: ignore[assignment]  # by default n_heads
    vocab_size: int = -1
    multiple_of: int = 256  # the feed-forward's hidden size is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000

    max_batch_size: int = 32
    max_seq_len: int = 2048

    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None  # None: that of the released model of this shape
    # Scaled RoPE, with the names of Hugging Face's configurations. Meta's files omit these.
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1
    high_freq_factor: float = 4
    head_dim: int = None  # type: ignore[assignment]  # by default dim / n_heads

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        for name, most in LARGEST.items():
            if (value := getattr(self, name)) != getattr(ModelArgs, name):
                check_number(name, value, most)
        check_number("the feed-forward size", self.hidden_dim, LARGEST["dim"])
        if self.low_freq_factor >= self.high_freq_factor:
            raise ArgumentError(f"low_freq_factor={self.low_freq_factor} must be less than high_freq_factor")
        if self.head_dim is None:
            self.head_dim = self.dim // self.n_heads if self.dim % self.n_heads == 0 else 1
        if self.head_dim % 2:
            raise ArgumentError(
                f"dim={self.dim} does not split into n_heads={self.n_heads} heads of even size"
            )
        if self.n_heads % self.n_kv_heads:
            raise ArgumentError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.use_scaled_rope and self.rope_scaling_factor is None:
            # Not in params.json: Llama 3.2 1B and 3B were extended by 32, the others by 8.
            self.rope_scaling_factor = 32.0 if (self.dim, self.n_layers) in {(2048, 16), (3072, 28)} else 8.0

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward: 2/3 of 4·dim (Shazeer 2020), scaled and rounded up."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)
