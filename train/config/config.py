"""The configuration of a run: every option of the command line, typed and checked."""

import dataclasses
import json
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro

from models import SIZES, LlamaConfig
from train.config.command_line import check_numbers, check_seed
from train.config.optimizer import Basis as Basis
from train.config.optimizer import OptimizerConfig, steps_of
from train.config.optimizer import OptimizerName as OptimizerName
from train.config.presets import PRESETS
from train.config.shape import name_of, shape_of
from train.data.dataset import DataConfig
from train.data.secrets import check_no_password
from train.host.paths import RunFolder, to_path
from train.host.processes import ProcessConfig
from train.records.trackers import TrackerName

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Size = str
    Preset = str
else:  # the names in the tables, which a type checker cannot know
    Size = Literal[tuple(SIZES)]
    Preset = Literal[tuple(PRESETS)]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The LLaMA that is trained.

    Attributes:
      size: which LLaMA; tiny trains on a laptop's CPU.
      shape_from: a folder with a config.json of Hugging Face transformers, or the file:
        that model's shape in place of a size (llama, mistral, qwen2). Default: that of
        --init-from hf:FOLDER.
      shape: what is stored of it.
      vocab_size: tokens that the model knows, and the size of a tokenizer trained for
        it. Default: that of shape_from, or 4096 for tiny, 128256 for 70b, 32000 for the
        others.
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
    shape_from: Annotated[
        str | None, tyro.conf.arg(name="model", metavar="FOLDER_OR_FILE")
    ] = None
    shape: tyro.conf.Fixed[dict | None] = None
    vocab_size: int | None = None
    weight_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["auto", "none", "dots", "full"] = "auto"

    def __post_init__(self) -> None:
        check_numbers(self, positive=("vocab_size",))
        if self.shape_from is not None and self.size != "tiny":
            raise ValueError(
                f"--model {self.shape_from} and --size {self.size} both give a shape; "
                "leave out one"
            )

    @property
    def name(self) -> str:
        """ "LLaMA-60m", or the name of a published model."""
        if self.shape_from is None:
            return f"LLaMA-{self.size}"
        return name_of(self.shape_from)

    @property
    def base(self) -> LlamaConfig:
        """The shape, without this run's own choices."""
        return SIZES[self.size] if self.shape is None else shape_of(self.shape)


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """The output of a run, and its intervals. Nothing here changes the training.

    Attributes:
      log_every: steps between two lines of metrics.
      eval_every: steps between two evaluations on the held-out text; 0: only at the
        end.
      checkpoint_every: steps between two checkpoints; 0: none at all.
      keep: how many checkpoints to keep, the latest ones.
      prompt: beginning of the text that the trained model continues at the end; with
        windows=examples, what a user says, which it answers.
      sample_tokens: length of that continuation; 0: none.
      track: services that get the metrics too, wandb or trackio or both; each is an
        extra to be installed. JSON lines and TensorBoard's files are always written.
      track_project: the project in which they show the run.
    """

    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 100
    keep: int = 2
    prompt: str = "The American people"
    sample_tokens: int = 60
    track: tuple[TrackerName, ...] = ()
    track_project: str = "lowrank_optax"

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
      preset: a published setting to begin from. METHOD-SIZE: size, batch, steps,
        optimizer, rank, rate of pre-training. Those without a size are for fine-tuning:
        give --init-from and --steps too. With it --help shows what it sets; other flags
        override it. The data are yours to name: --source, --tokenizer, --windows.
      out: folder of the run, or gs://BUCKET/FOLDER. Default: runs/SIZE-OPTIMIZER.
      resume: go on with the run in `out` from its latest checkpoint; from the start,
        if it was stopped before its first. Its config.json has all flags that are not
        given. More steps may be given if the schedule is constant or wsd.
      resume_or_start: the same if `out` holds a run, and start one if it holds none:
        for a command that a scheduler runs again as it is.
      resume_from: step of the checkpoint to go on from, rather than the latest; later
        ones are set aside. Means --resume.
      init_from: RUN_FOLDER or RUN_FOLDER@STEP: begin with the weights of that run's
        newest checkpoint, or of that one, and its tokenizer; everything else is new.
        hf:FOLDER: with published weights, as transformers saves them (config.json,
        safetensors, and its tokenizer.json or tokenizer.model).
      seed: fixes the weights at the start, the order of the data and every random
        subspace.
      steps: optimizer steps. Schedules of cosine and wsd end at the last one.
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
        check_no_password("init_from", self.init_from)
        check_no_password("out", self.out and str(self.out))
        scheduled = sum(steps_of(self.optimizer, self.steps))
        left = 1 if self.optimizer.schedule == "cosine" else 0
        if scheduled + left > self.steps:
            raise ValueError(
                f"warmup and decay take {scheduled} of steps={self.steps}: lower them"
            )
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
        model.base,
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
      ValueError: it is not JSON, lacks a part, or has fields or values that no config
        has.
    """
    try:
        stored = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    whole = {field.name: field for field in dataclasses.fields(Config)}
    if not isinstance(stored, dict):
        raise ValueError(f"it is {stored!r:.40}, not the object that a run stores")
    if unknown := sorted(stored.keys() - whole.keys()):
        raise ValueError(
            f"it is no run's of this version: no run has {', '.join(unknown[:5])}"
        )
    parts: dict[str, Any] = {}
    for name, field in whole.items():
        make: Any = field.default_factory
        if make is not dataclasses.MISSING:
            if name not in stored:
                raise ValueError(f"it lacks {name}, which all runs have")
            parts[name] = _built(make, stored.pop(name), name)
    out = stored.pop("out", None)
    if not isinstance(out, str | None):
        raise ValueError(f"out: {out!r} is no folder")
    return _built(Config, stored, "it", **parts, out=out and to_path(out))


def _built(make: Any, values: Any, name: str, **others: Any) -> Any:
    """Makes a config dataclass of JSON; ValueError for what it cannot be."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {values!r:.40}, not the object that a run stores")
    kinds = get_type_hints(make)
    for field, value in values.items():
        if field not in kinds:
            raise ValueError(f"{name} has {field}, which no run of this version has")
        if not _fits(value, kinds[field]):
            raise ValueError(f"{name} has {field}={value!r:.40}, which no run has")
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return make(**own, **others)


def _fits(value: object, kind: Any) -> bool:
    """Whether a value of JSON is of a type, as annotations have it."""
    if get_origin(kind) is Literal:
        return value in (tuple(SIZES) if kind == Size else get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(
            _fits(x, get_args(kind)[0]) for x in value
        )
    if get_args(kind):
        return any(_fits(value, one) for one in get_args(kind))
    if kind in (int, float):
        numbers = int if kind is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, kind)
