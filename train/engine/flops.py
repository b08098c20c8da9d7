"""Floating-point operations of a training step, and the devices' peak rates."""

import re

from models import LlamaConfig

# Dense bfloat16, in TFLOP/s, by the whole of `device_kind`. From the vendors' data
# sheets: NVIDIA's H100 SXM and H200 SXM (half of what they state with sparsity) and
# A100; Google's Cloud TPU pages of v4, v5e, v5p and v6e. One device is one GPU or chip.
PEAKS = (
    (r"NVIDIA H100( SXM5?)?( 80GB HBM3)?|NVIDIA H200", 989),
    (r"NVIDIA A100.*", 312),
    (r"TPU v4", 275),
    (r"TPU v5 ?(lite|e)", 197),
    (r"TPU v5p?", 459),
    (r"TPU v6 ?(lite|e)", 918),
)


def multiplied_weights(model: LlamaConfig) -> int:
    """Numbers in the matrices of layers and head; the embedding is looked up.

    A tied embedding counts once, as the head.
    """
    width, heads = model.hidden_size, model.num_heads + model.kv_heads
    attention, mlp = 2 * width * heads * model.head_size, 3 * width * model.mlp_size
    return model.num_layers * (attention + mlp) + width * model.vocab_size


def flops_per_token(model: LlamaConfig, seq_len: int) -> int:
    """6 N + 12 L A S: the model's own operations, forward and backward, of one token.

    N is `multiplied_weights`. The second term is causal attention, whose heads together
    are A wide (D, unless `head_dim` differs). In the mean a token sees S = T / 2 of the
    T tokens or, with a sliding window of W < T, S = W - W^2 / 2 T. What the backward
    pass recomputes does not count.
    """
    window = min(model.sliding_window or seq_len, seq_len)
    width = model.num_layers * model.num_heads * model.head_size
    attention = width * window * (2 * seq_len - window) // seq_len
    return 6 * (multiplied_weights(model) + attention)


def peak_flops(device_kind: str) -> float | None:
    """A device's peak bfloat16 rate, in operations a second; None if unknown."""
    rates = (rate for kind, rate in PEAKS if re.fullmatch(kind, device_kind))
    rate = next(rates, None)
    return None if rate is None else 1e12 * rate
