"""What a run is: every choice that the command line offers, typed and checked."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from models import SIZES, LlamaConfig
from train.config.command_line import check_numbers, check_seed
from train.config.methods import BACKS, BASES, METHODS, ONCE
from train.config.presets import PRESETS
from train.config.ranks import parse_rank
from train.data.dataset import DataConfig
from train.host.paths import RunFolder, to_path
from train.host.processes import ProcessConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    OptimizerName = str
    Back = str
    Basis = str
    Size = str
    Preset = str
else:  # the names in the tables, which a type checker cannot know
    OptimizerName = Literal[tuple(METHODS)]
    Basis = Literal[("default", *BASES)]
    Back = Literal[tuple(BACKS)]
    Size = Literal[tuple(SIZES)]
    Preset = Literal[tuple(PRESETS)]


def _unless_own(option: str) -> object:
    """A flag whose help says which methods decide the option for themselves."""
    own = {name: m.own[option] for name, m in METHODS.items() if option in m.own}
    said = ", ".join(
        f"{name}: {'never again' if value == ONCE else f'always {value}'}"
        for name, value in own.items()
    )
    return tyro.conf.arg(help_behavior_hint=f"(default: {{}}; {said})".format)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The LLaMA that is trained.

    Attributes:
      size: which LLaMA; tiny trains on a laptop's CPU.
      vocab_size: tokens that the model knows, and the size of a tokenizer trained for
        it. Default: 4096 for tiny, 32000 for the others.
      weight_dtype: how weights are stored. bfloat16: half the memory, and every update
        is rounded at random, so that small ones arrive in the mean; int8: the matrices
        of attention and MLP likewise in 8 bits a number, all else in bfloat16.
      compute_dtype: dtype of activations and products. auto: bfloat16 on an
        accelerator, float32 on a CPU.
      remat: what the backward pass recomputes instead of storing: nothing, all but the
        outputs of the weights' products (dots), or all within a layer (full). auto:
        dots on an accelerator, where it is faster too, none on a CPU.
    """

    size: Size = "tiny"
    vocab_size: int | None = None
    weight_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["auto", "none", "dots", "full"] = "auto"

    def __post_init__(self) -> None:
        check_numbers(self, positive=("vocab_size",))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule. What is None gets the optimizer's own default.

    Attributes:
      name: adamw, or the method for the matrices of attention and MLP; all other
        weights then get full-rank AdamW (scale_sgd: embedding and head do not).
      basis: how the subspace is chosen at a refresh. svd: the dominant singular
        vectors; sketch: the same from a random sketch, much faster for large matrices;
        sara: a sample of them; walk: a step of a random walk; jump: a fresh
        random subspace; track: SubTrack++'s step along the estimation error; power:
        LDAdam's power step towards momentum and gradient; frozen: the first gradient's,
        for good; coordinates: rows chosen at random; default:
        the optimizer's own rule.
      basis_dtype: dtype in which a named basis is stored; the other states are float32.
      rank: dimension of the subspace. 64: that of every matrix; 0.25: a quarter of each
        matrix' smaller side; attention=64,mlp=0.25: by the first regular expression
        found in its path (layers/attention/q/kernel), and =full for full rank. Default:
        a quarter of the model's hidden size.
      refresh_every: steps between two choices of the subspace.
      learning_rate: the peak. Default: by optimizer.
      warmup: part of the steps with a linearly rising learning rate.
      final: learning rate of the last step, as a part of the peak; cosine in between.
        With 1, and no warmup, the rate is constant.
      b1: decay of the first moment. Default: by optimizer, 0.9 for most.
      b2: decay of the second moment. Default: by optimizer, 0.999 for most.
      scale: factor on the step inside the subspace. Default: by optimizer, 0.25 for
        those that follow galore or fira.
      rotate: which moments of subspace_adam rotate with the subspace: both, the first.
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
        all: also the gradient's share in the subspace at each step (GrassWalk, eq. 3),
        and at refreshes the 20 leading singular values of the estimation error's
        derivative (derivative/q/1 and so on, the largest of the layers'). No step
        changes.
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
    rank: Annotated[int | float | str | None, _unless_own("rank")] = None
    refresh_every: Annotated[int, _unless_own("refresh_every")] = 50
    learning_rate: float | None = None
    warmup: float = 0.1
    final: float = 0.1
    b1: float | None = None
    b2: float | None = None
    scale: float | None = None
    rotate: Literal["on", "first", "off"] = "on"
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
        for field in ("warmup", "b1", "b2"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{field}={value} must lie in [0, 1)")
        for field in ("final", "switch"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} must lie in [0, 1]")
        if self.basis != "default" and not METHODS[self.name].low_rank:
            raise ValueError(
                f"{self.name} has no subspace, so basis={self.basis!r} means nothing; "
                "leave it out or name a low-rank optimizer"
            )


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What a run writes, and how often. Nothing here changes the training.

    Attributes:
      log_every: steps between two lines of metrics.
      eval_every: steps between two evaluations on the held-out text; 0: only at the
        end.
      checkpoint_every: steps between two checkpoints; 0: none at all.
      keep: how many checkpoints to keep, the latest ones.
      prompt: beginning of the text that the trained model continues at the end.
      sample_tokens: length of that continuation; 0: none.
    """

    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 100
    keep: int = 2
    prompt: str = "The American people"
    sample_tokens: int = 60

    def __post_init__(self) -> None:
        at_least_0 = ("eval_every", "checkpoint_every", "sample_tokens")
        check_numbers(self, positive=("log_every", "keep"), not_negative=at_least_0)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Over which devices weights are sharded. A run may go on with other values.

    Attributes:
      fsdp: devices that share weights, gradients and the optimizer's state: each stores
        its part, a layer is gathered where it is computed, and each has its own
        rows of the batch.
      tensor: devices that compute the same rows together, each with its part of the
        attention heads and of the MLP; they are of one process. All devices are fsdp x
        tensor, or a multiple, which then has as many copies of the weights.
    """

    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, positive=("fsdp", "tensor"))


@dataclasses.dataclass(frozen=True)
class Config:
    """The work: what is trained, on how much, and where it is stored.

    Attributes:
      preset: a published setting to begin from: size, batch, steps, optimizer, rank,
        rate, as METHOD-SIZE. With it --help shows what it sets; other flags override
        it. The data are yours to name: --source, --tokenizer, --windows documents.
      out: folder of the run, or gs://BUCKET/FOLDER. Default: runs/SIZE-OPTIMIZER.
      resume: go on with the run in `out` from its latest checkpoint; from the start,
        if it was stopped before its first. Give the same flags; steps may be more if
        the learning rate is constant (warmup 0, final 1).
      resume_or_start: the same if `out` holds a run, and start one if it holds none:
        for a command that a scheduler runs again as it is.
      resume_from: step of the checkpoint to go on from, rather than the latest; later
        ones are set aside. Means --resume.
      init_from: RUN_FOLDER or RUN_FOLDER@STEP: begin with the weights of that run's
        newest checkpoint, or of that one, and its tokenizer; everything else is new.
      seed: fixes the weights at the start, the order of the data and every random
        subspace.
      steps: optimizer steps. The schedule ends at the last one.
      batch_size: windows of text in a step, over all devices and processes.
      seq_len: tokens in a window.
      microbatches: parts of a batch that go through the model one after the other, to
        save memory; the gradient is that of the whole batch.
      layerwise: whether each layer is updated as soon as the backward pass has its
        gradient, so that there is never more than one layer's. Then each layer is
        clipped by its own norm, and skipped by itself. auto: on where it was found to
        be faster too, on an accelerator with layers as large as 7b's that fsdp does not
        shard. With microbatches: a layer's gradients are summed in the subspace, for
        methods that give no residual back, and the step comes at the end, for all
        layers.
    """

    preset: Preset | None = None
    out: RunFolder | None = None
    resume: bool = False
    resume_or_start: bool = False
    resume_from: int | None = None
    init_from: str | None = None
    seed: int = 0
    steps: int = 300
    batch_size: int = 16
    seq_len: int = 128
    microbatches: int = 1
    layerwise: Literal["auto", "on", "off"] = "auto"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    processes: ProcessConfig = dataclasses.field(default_factory=ProcessConfig)

    def __post_init__(self) -> None:
        check_numbers(self, positive=("steps", "batch_size", "microbatches"))
        if self.steps >= 2**31:
            raise ValueError(f"steps={self.steps} must be below 2**31")
        check_seed(self.seed)
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len}: a window needs 2 tokens or more")
        sources = (self.data.source, self.data.eval_source or "")
        if self.data.data_dir and not any(s.startswith("tfds:") for s in sources):
            raise ValueError(
                f"data_dir={self.data.data_dir} is for prepared TFDS data sets; name "
                "files by --source"
            )
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"microbatches={self.microbatches}; change either"
            )


def resolved(config: object, field: str) -> Any:
    """The field's value; ValueError for a None that `resolve` would have filled."""
    value = getattr(config, field)
    if value is None:
        raise ValueError(f"{field} is None; give it a value, or call resolve() first")
    return value


def label(optimizer: OptimizerConfig) -> str:
    """ "galore+sara": the optimizer and, where it is not its own, the basis rule."""
    return f"{optimizer.name}+{optimizer.basis}".removesuffix("+default")


def title(optimizer: OptimizerConfig) -> str:
    """ "galore+sara@0.01", of a resolved config."""
    return f"{label(optimizer)}@{resolved(optimizer, 'learning_rate'):g}"


def model_config(model: ModelConfig) -> LlamaConfig:
    """The shape of the LLaMA that a resolved `ModelConfig` names."""
    return dataclasses.replace(
        SIZES[model.size],
        vocab_size=resolved(model, "vocab_size"),
        compute_dtype=model.compute_dtype,
        remat=model.remat,
    )


def to_json(config: "DataclassInstance") -> str:
    """A config dataclass as indented JSON, paths as strings."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str) -> Config:
    """The config that `to_json` wrote; a field that is not there has its default.

    Raises:
      ValueError: it is not JSON, or has fields or values that no config has.
    """
    try:
        stored = json.loads(text)
        parts: dict[str, Any] = {}
        for field in dataclasses.fields(Config):
            make: Any = field.default_factory
            if make is not dataclasses.MISSING:
                parts[field.name] = make(**stored.pop(field.name, {}))
        out = stored.pop("out", None)
        return Config(**stored, **parts, out=out and to_path(out))
    except (AttributeError, TypeError) as error:
        raise ValueError(f"it is no config of this version ({error})") from error
