"""Words in the names of parameters, and what they say a leaf is."""

import functools
import re

Shape = tuple[int, ...]

# Names that say nothing; then the part of the path before them is the name.
GENERIC = {"kernel", "weight", "weights", "w", "array", "param"}
TABLE = {
    *("pos", "position", "positions", "positional", "relative", "rel", "rotary"),
    *("rope", "alibi", "table", "tokens", "cls", "prompt", "prefix", "latent"),
    *("latents", "register", "registers", "codebook", "codebooks"),
}
VECTOR = {
    *TABLE,
    *("bias", "biases", "scale", "scales", "gamma", "beta", "offset", "shift", "gain"),
    *("norms", "log", "logit", "temperature", "decay", "sink", "sinks", "lambda"),
    *("null", "mem", "memory", "cache", "bq", "bk", "bv", "bo", "qbias", "kbias"),
    *("vbias", "qscale", "absmax", "zeros", "ls"),
}
HEAD = re.compile(r"(?i)(\w+_)?heads?(_?\d+)?|(\w+_)?logits(_\w+)?")
# Beside the layers these are heads too.
LAST = {"classifier", "score", "readout", "decoder"}
ADAPTER = {"lora", "adapter", "adapters", "dora", "ia", "lokr", "hada", "loha", "maa"}
ROUTER = {"router", "routers"}
GATES = {"gate", "gating", "wg", "g", "switch", "score", "scores", "selector"}
EXPERTS = {"expert", "experts", "moe"}
STACKS = {
    *("layers", "blocks", "stack", "stacked", "scan", "scanned", "repeat", "repeats"),
    *("encoderblock", "decoderblock"),
}
IN = {
    *("q", "k", "v", "qkv", "kv", "wq", "wk", "wv", "wqkv"),
    *("query", "key", "value"),
}
OUT = {"o", "out", "output", "wo", "vec", "post"}
GATED = {"gating", "gate", "up", "wi"}
ATTENTION = {"attn", "attention"}
BLOCK = {
    *ATTENTION,
    *EXPERTS,
    *("mlp", "ffn", "ffw", "feedforward", "mixer", "ssm", "mamba"),
}
PROJECTION = {
    *IN,
    *OUT,
    *GATED,
    *BLOCK,
    *("kernel", "weight", "w", "proj", "projection", "einsum", "dense", "linear"),
    *("lin", "fc", "down", "in", "c", "to", "intermediate", "mixing", "wd", "wg", "wu"),
}
INDEXED = re.compile(
    r"(?i)\d+|(h|\w*layers?|\w*blocks?|resblocks?|stages?|groups?)[_.]?\d+"
)


@functools.cache
def words_of(part: str) -> tuple[str, ...]:
    """The words of a part of a path: "MlpBlock_0" has mlp, block and 0."""
    part = re.sub("(?i)lora", "_lora_", part)
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", part)
    return tuple(word.lower() for word in found)


def has(words: set[str], *parts: str) -> bool:
    return any(word in words for part in parts for word in words_of(part))


def is_norm(part: str) -> bool:
    return any(re.fullmatch(r"\w*norm|ln[a-z]?", word) for word in words_of(part))


def is_norm_of(path: str) -> bool:
    """Whether a leaf is a norm's: "norm/scale", "input_layernorm/weight"."""
    parts = path.split("/")
    own = own_index(parts)
    return is_norm(parts[own]) or (
        has(VECTOR, parts[own]) and any(map(is_norm, parts[own - 1 : own]))
    )


def is_embedding(*parts: str) -> bool:
    pattern = "(un)?emb(ed|eds|edding|eddings|edder|edders)?|w[tp]e"
    return any(re.fullmatch(pattern, w) for part in parts for w in words_of(part))


def is_head(parts: list[str]) -> bool:
    """Whether a part names an output head, which attention's heads are not."""
    return any(map(HEAD.fullmatch, parts)) and not has(ATTENTION, *parts)


def is_table(path: str) -> bool:
    """Whether a leaf stands beside the layers, by its name alone."""
    parts, name = path.split("/"), name_of(path)
    return is_embedding(*parts) or is_head(parts) or has(TABLE, name)


def own_index(parts: list[str]) -> int:
    """The index of the part that names a leaf: "q" in "attn/q/kernel"."""
    named = [i for i, part in enumerate(parts) if part not in GENERIC]
    return named[-1] if named else len(parts) - 1


def name_of(path: str) -> str:
    parts = path.split("/")
    return parts[own_index(parts)]


def is_in_block(parts: list[str]) -> bool:
    """Whether a part is one of many layers, or a stack of them."""
    return any(map(INDEXED.fullmatch, parts)) or has(STACKS, *parts[:-1])


def has_feed_forward(parts: list[str]) -> bool:
    return any("feed forward" in " ".join(words_of(part)) for part in parts)


def is_conv(parts: list[str], sizes: Shape) -> bool:
    """Whether it is Flax's kernel of a convolution, patches into an embedding too."""
    if parts[-1] != "kernel":
        return False
    patches = len(sizes) == 4 and (is_embedding(*parts) or sizes[:2] == (1, 1))
    return patches or _names_conv(parts)


def is_depthwise(parts: list[str], sizes: Shape) -> bool:
    """Whether it is the taps of a convolution of each channel by itself."""
    taps = len(sizes) == 2 and parts[-1] != "kernel" and min(sizes) <= 8
    inputs = sizes[-2] if parts[-1] == "kernel" else sizes[1]  # of one group
    return _names_conv(parts) and (taps or (len(sizes) > 2 and inputs == 1))


def _names_conv(parts: list[str]) -> bool:
    return any("conv" in word for part in parts[-2:] for word in words_of(part))
