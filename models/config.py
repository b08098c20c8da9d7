"""The shape and the numeric choices of a LLaMA, and the named sizes."""

from dataclasses import dataclass
from typing import Literal, get_args

from models.rope import RopeScaling

DType = Literal["bfloat16", "float16", "float32"]
Remat = Literal["none", "full", "dots"]
Attention = Literal["auto", "xla", "cudnn"]
AttentionBias = Literal["none", "qkv", "qkvo"]


@dataclass(frozen=True)
class LlamaConfig:
    """Everything that fixes a LLaMA's weights and how it computes; hashable.

    Weights are drawn in float32. Widths and counts are plain numbers of units.

    Attributes:
      vocab_size: number of token ids (V).
      hidden_size: width of the residual stream (D).
      mlp_size: width of the SwiGLU hidden layer (F).
      num_heads: query heads; without `head_dim` they must divide `hidden_size` into
        even head sizes.
      num_layers: number of blocks (L).
      num_kv_heads: key/value heads, each shared by `num_heads / num_kv_heads`
        query heads; None means one for each query head.
      rope_theta: base of the rotary wavelengths.
      norm_eps: added to the mean square in RMSNorm.
      init_std: standard deviation of every matrix at the start.
      compute_dtype: dtype of activations and of the matrix products' inputs.
      remat: what the backward pass recomputes. "none" stores everything, "dots"
        stores the outputs of the weight matmuls, "full" stores block inputs only.
      attention: the attention kernel. "auto" asks for cuDNN where it can run (a
        CUDA GPU of compute capability 8 or more, 16-bit compute, an even sequence
        length, a head size of at most 128), else XLA. It
        looks at JAX's default backend while the forward pass is traced, so to lower
        for another platform name the kernel.
      head_dim: width of an attention head (H), even; None means
        `hidden_size / num_heads`. Queries are (D, N H), and the output is (N H, D).
      tie_embeddings: whether the embedding is the head too: logits = x @ embedding.T.
        The weights then have no `head`.
      attention_bias: which projections of attention add a bias: "none", "qkv" (Qwen2)
        or "qkvo".
      mlp_bias: whether the three projections of the MLP add a bias.
      sliding_window: how many tokens a token sees, itself included; None for all that
        are before it.
      rope_scaling: a change of the rotary frequencies, `models.rope.LinearScaling` or
        `models.rope.Llama3Scaling`; None for none.
      max_positions: the longest sequence that the weights are made for. The model does
        not read it; exported weights state it.

    Raises:
      ValueError: if the fields contradict each other; the message says the fix.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_layers: int
    num_kv_heads: int | None = None
    rope_theta: float = 1e4
    norm_eps: float = 1e-6
    init_std: float = 0.02
    compute_dtype: DType = "bfloat16"
    remat: Remat = "none"
    attention: Attention = "auto"
    head_dim: int | None = None
    tie_embeddings: bool = False
    attention_bias: AttentionBias = "none"
    mlp_bias: bool = False
    sliding_window: int | None = None
    rope_scaling: RopeScaling | None = None
    max_positions: int | None = None

    @property
    def head_size(self) -> int:
        """Width of one attention head, with the default filled in."""
        default = self.hidden_size // self.num_heads
        return default if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, with the default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        self._check_heads()

    def _check_numbers(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "mlp_size",
            "num_heads",
            "num_layers",
            "kv_heads",
            "rope_theta",
            "norm_eps",
            "init_std",
            "head_dim",
            "sliding_window",
            "max_positions",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                field = "num_kv_heads" if name == "kv_heads" else name
                raise ValueError(f"{field}={value} must be positive; set it above 0")

    def _check_choices(self) -> None:
        for name, choices in (
            ("compute_dtype", get_args(DType)),
            ("remat", get_args(Remat)),
            ("attention", get_args(Attention)),
            ("attention_bias", get_args(AttentionBias)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not known; "
                    f"use one of {', '.join(choices)}"
                )

    def _check_heads(self) -> None:
        if self.head_size % 2 and self.head_dim is not None:
            raise ValueError(
                f"head_dim={self.head_dim} must be even, because RoPE rotates pairs "
                "within a head; change it"
            )
        if self.head_dim is None and self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 2 * num_heads="
                f"{2 * self.num_heads}, because RoPE rotates pairs within a head; "
                "change either"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.kv_heads} must divide num_heads="
                f"{self.num_heads}; change either, or use None for equal counts"
            )
        if self.attention == "cudnn" and self.compute_dtype == "float32":
            raise ValueError(
                "attention='cudnn' has no float32 kernel; "
                "set compute_dtype='bfloat16' or attention='xla'"
            )


# The widths of the GaLore paper's pre-training runs (Zhao et al., 2024,
# https://arxiv.org/abs/2403.03507); "tiny", which trains on a laptop's CPU; LLaMA's own
# next size; and LLaMA 3's of 70 billion weights (Grattafiori et al., 2024,
# https://arxiv.org/abs/2407.21783), whose query heads share keys and values.
SIZES: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(4096, 128, 344, num_heads=4, num_layers=4),
    "60m": LlamaConfig(32000, 512, 1376, num_heads=8, num_layers=8),
    "130m": LlamaConfig(32000, 768, 2048, num_heads=12, num_layers=12),
    "350m": LlamaConfig(32000, 1024, 2736, num_heads=16, num_layers=24),
    "1b": LlamaConfig(32000, 2048, 5461, num_heads=32, num_layers=24),
    "7b": LlamaConfig(32000, 4096, 11008, num_heads=32, num_layers=32),
    "13b": LlamaConfig(32000, 5120, 13824, num_heads=40, num_layers=40),
    "70b": LlamaConfig(
        128256,
        8192,
        28672,
        num_heads=64,
        num_layers=80,
        num_kv_heads=8,
        rope_theta=5e5,
        norm_eps=1e-5,
    ),
}
