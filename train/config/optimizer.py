"""The optimizer of a run and its schedule, as the command line offers them."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from train.config.command_line import check_numbers
from train.config.methods import BACKS, BASES, METHODS, ONCE, Method
from train.config.ranks import parse_rank

if TYPE_CHECKING:
    OptimizerName = str
    Back = str
    Basis = str
else:  # the names in the tables, which a type checker cannot know
    OptimizerName = Literal[tuple(METHODS)]
    Basis = Literal[("default", *BASES)]
    Back = Literal[tuple(BACKS)]


def _by_method(option: str, default: Callable[[Method], float | None]) -> object:
    """A flag whose help has the default of each method, or what it decides itself."""
    names: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        if (value := method.own.get(option, default(method))) is not None:
            said = f"always {value:g}" if option in method.own else f"{value:g}"
            said = "once" if value == ONCE else said
            names.setdefault(said, []).append(name)
    said = "; ".join(f"{value}: {', '.join(of)}" for value, of in names.items())
    return tyro.conf.arg(help_behavior_hint=f"(default: {{}}; {said})".format)


# What a schedule does not read.
FOREIGN = {"cosine": ("decay",), "constant": ("decay", "final"), "wsd": ()}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule. What is None gets the optimizer's own default.

    Attributes:
      name: adamw, or the method for the matrices of attention and MLP; all other
        weights then get full-rank AdamW (scale_sgd: embedding and head do not). Of
        those measured (docs/choosing/index.md) spectral_adam had the lowest loss,
        and takes half as long again as AdamW at 16,384 tokens a step of LLaMA-1B;
        grass_jump, the default, is cheaper, and better with --basis sara.
      basis: how the subspace is chosen at a refresh. svd: the dominant singular
        vectors; sketch: the same from a random sketch, much faster for large matrices;
        iterate: the same from the old basis, by two steps of subspace iteration;
        sara: a sample of them; walk: a step of a random walk; jump: a fresh
        random subspace; track: SubTrack++'s step along the estimation error; power:
        LDAdam's power step towards momentum and gradient; frozen: the first gradient's,
        for good; coordinates: rows chosen at random; lotus: sketch, only for
        matrices whose basis captures too little of the gradients, with a look every
        refresh_every steps; default: the optimizer's own rule.
      basis_dtype: dtype in which a named basis is stored; the other states are float32.
      rank: dimension of the subspace. 64: that of every matrix; 0.25: a quarter of each
        matrix' smaller side; attention=64,mlp=0.25: by the first regular expression
        found in its path (layers/attention/q/kernel), and =full for full rank. Default:
        a quarter of the model's hidden size; 0.25 for 70b, whose keys and values are
        smaller.
      refresh_every: steps between two choices of the subspace. Default: by optimizer,
        with --schedule cosine at most a sixth of the steps: with fewer subspaces no
        rate was measured.
      stagger: whether each matrix gets its new subspace at its own step of the
        interval, rather than all at one, which then takes many times as long as others.
        From one of its refreshes to the next a matrix still has refresh_every steps.
        The first step chooses all, as without it. For refreshes that take time, such as
        those of svd and sara with large matrices.
      learning_rate: the peak. Default: by optimizer.
      schedule: the learning rate after the warm-up. cosine: down to the last step;
        constant: the peak; wsd (warm-up, stable, decay): the peak, then a straight line
        down over the last steps. A run of the last two can be given more steps, wsd
        from the checkpoint that it keeps of the step before the decay.
      warmup: steps with a linearly rising learning rate: a whole number (100), or a
        part of the steps (0.1).
      decay: steps in which the rate of wsd falls, given like warmup.
      final: learning rate of the last step, as a part of the peak.
      b1: decay of the first moment. Default: by optimizer, 0.9 for most.
      b2: decay of the second moment. Default: by optimizer, 0.999 for most.
      scale: factor on the step inside the subspace. Default: by optimizer, 0.25 for
        those that follow galore or fira.
      rotate: which moments of subspace_adam rotate with the subspace. on: both; first:
        the first alone; off: none.
      outside: the rotated second moment outside of the old subspace, of subspace_adam,
        grass_jump, grass_walk and spectral_adam. zero: as in the GrassWalk paper's eq.
        8; alike: as inside.
      back: what subspace_adam gives back of the gradient outside of the subspace.
        project: nothing; rescale: Fira's and GrassWalk's rescaled residual; sign: its
        signs (FRUGAL); compensate: its columns normalised (Alice); spectral: its polar
        factor; feedback: all of it, in the next gradient (LDAdam).
      residual_scale: factor on what sign, compensate or spectral give back, and on
        what alice, frugal, spectral_adam and sumo do. Default: by optimizer.
      angle: the largest angle, in radians, of a step of the walk (grass_walk, or the
        basis walk).
      walk_rank: directions that a step of the walk rotates. Default: the walk's own.
      precision: of the products with the subspace: JAX's default for the device,
        highest, or a dot algorithm that it knows, such as BF16_BF16_F32 (bfloat16
        operands, float32 sums).
      switch: part of the steps after which golore's subspace is random.
      square: which side of a square matrix has the subspace. method: the one that the
        method takes, of most the inputs; megatron: the outputs of o and the inputs of
        q, k and v, which --tensor does not shard. auto: megatron with --tensor above 1.
        A run that goes on has what it began with, on any mesh.
      measure: what is measured of the subspaces, as the metrics overlap/q, energy/up
        and so on, means over the layers, and in subspace.png. overlap: of a basis with
        the one before it (SARA, section 4.3), which costs nothing between refreshes;
        all: also the gradient's share in the subspace at each step (GrassWalk, eq. 3;
        by layer in layer_energy/q/1 and so on, and in layers.png), and at refreshes the
        20 leading singular values of the estimation error's derivative (derivative/q/1
        and so on, the largest of the layers'). No step changes.
      anchor: the refresh, from 0, whose basis later ones are compared with
        (anchor/q): r numbers for each row of a matrix' smaller side.
      weight_decay: decoupled weight decay of matrices and embedding, not norm scales.
      clip_norm: largest global norm of a gradient; None leaves gradients as they are.
      max_skipped: a step whose gradient is NaN or infinite is skipped and counted; this
        many in a row end the run.
    """

    name: Annotated[OptimizerName, tyro.conf.arg(name="optimizer")] = "grass_jump"
    basis: Basis = "default"
    basis_dtype: Literal["float32", "bfloat16"] = "float32"
    rank: Annotated[
        int | float | str | None, _by_method("rank", lambda method: None)
    ] = None
    refresh_every: Annotated[
        int | None, _by_method("refresh_every", lambda method: method.interval)
    ] = None
    stagger: bool = False
    learning_rate: Annotated[
        float | None, _by_method("learning_rate", lambda method: method.rate)
    ] = None
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int | float = 0.1
    decay: int | float = 0.1
    final: float = 0.1
    b1: float | None = None
    b2: float | None = None
    scale: float | None = None
    rotate: Literal["on", "first", "off"] = "on"
    outside: Literal["zero", "alike"] = "zero"
    back: Back = "rescale"
    residual_scale: float | None = None
    angle: float = 0.3
    walk_rank: int | None = None
    precision: str = "default"
    switch: float = 0.5
    square: Literal["auto", "method", "megatron"] = "auto"
    measure: Literal["none", "overlap", "all"] = "none"
    anchor: int | None = None
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    max_skipped: int = 20

    def __post_init__(self) -> None:
        above_0 = ("refresh_every", "learning_rate", "scale", "residual_scale")
        above_0 += ("angle", "walk_rank", "clip_norm", "max_skipped")
        not_negative = ("weight_decay", "anchor")
        check_numbers(self, positive=above_0, not_negative=not_negative)
        if self.rank is not None:
            parse_rank(self.rank)
        for field in ("b1", "b2"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{field}={value} must lie in [0, 1)")
        for field in ("warmup", "decay"):
            value = getattr(self, field)
            if value < 0 or (isinstance(value, float) and value >= 1):
                raise ValueError(
                    f"{field}={value} must be a whole number of steps, or a part of "
                    "them in [0, 1)"
                )
        for field, value in {"decay": 0.1, "final": 0.1}.items():
            if field in FOREIGN[self.schedule] and getattr(self, field) != value:
                raise ValueError(
                    f"{field} means nothing with schedule={self.schedule}: leave it out"
                )
        for field in ("final", "switch"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} must lie in [0, 1]")
        if self.basis != "default" and not METHODS[self.name].projects:
            raise ValueError(
                f"{self.name} has no subspace, so basis={self.basis!r} means nothing; "
                "leave it out or name a low-rank optimizer"
            )


class Lengths(NamedTuple):
    """Steps in which a learning rate rises, and falls."""

    warmup: int
    decay: int


def steps_of(optimizer: OptimizerConfig, steps: int) -> Lengths:
    """Counts the steps of warm-up and decay in a run of so many steps."""

    def count(given: int | float) -> int:
        return round(given * steps) if isinstance(given, float) else given

    decay = count(optimizer.decay) if optimizer.schedule == "wsd" else 0
    return Lengths(count(optimizer.warmup), decay)
