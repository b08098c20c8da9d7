"""One document a window: cut off or padded, from text, TFDS and token files alike."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train.data.padded_windows
import train.main
from models import SIZES, LlamaConfig
from tests.helpers.text_files import TEXTS, lines_of, prepared, t5_like, write_tfds
from train.config.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
)
from train.config.resolve import resolve
from train.data.dataset import Data, DataConfig, open_data
from train.data.padded_windows import TokenDocuments, document_window
from train.data.token_files import open_tokens
from train.data.tokenizer import open_tokenizer
from train.engine.mesh import make_mesh, to_devices
from train.main import main
from train.records.metrics import read_metrics
from train.run.checkpoint import stored_checksums
from train.run.first_state import initial
from train.run.loop import lower_step, work_of

END = 1
T = 48


def as_published(tokens: list[int], length: int) -> tuple[list[int], list[int]]:
    """Ids, and labels with -100 for padding, as the published scripts have them.

    t5's tokenizer cuts off the text's own tokens, then adds the end token, then pads.
    """
    own = [*tokens[:-1][: length - 1], END]
    padding = length - len(own)
    return own + [0] * padding, own + [-100] * padding


@given(
    st.lists(st.integers(2, 99), max_size=30).map(lambda ids: [*ids, END]),
    st.integers(2, 20),
)
def test_a_window_is_what_the_published_scripts_make(tokens, length):
    row = document_window(np.array(tokens, np.int32), length, END)
    ids, labels = as_published(tokens, length)
    assert row["tokens"].tolist() == ids
    assert row["weights"].tolist() == [float(label != -100) for label in labels]
    assert [row["tokens"].dtype, row["weights"].dtype] == [np.int32, np.float32]


@given(
    st.lists(
        st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=4
    ),
    st.integers(1, 9),
)
def test_documents_of_token_files_end_with_their_end_token(
    tmp_path_factory, files, block
):
    folder = tmp_path_factory.mktemp("tokens")
    expected = []
    for i, tokens in enumerate(files):
        tokens[len(tokens) // 2] = END
        np.array(tokens, "<u2").tofile(folder / f"{i}.u16")
        ends = [k + 1 for k, token in enumerate(tokens) if token == END]
        pieces = [tokens[a:b] for a, b in itertools.pairwise([0, *ends, len(tokens)])]
        expected += [piece for piece in pieces if piece]
    spans, _ = open_tokens(f"{folder}/*.u16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data.padded_windows, "_BLOCK", block)
        documents = TokenDocuments(spans, END, longest=7)
    found = [document.tolist() for document in documents]
    assert found == [document[:7] for document in expected]
    with pytest.raises(IndexError):
        documents[len(documents)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The texts as JSON lines, as TFDS has them, and as tokens; t5-like tokenizer."""
    folder = tmp_path_factory.mktemp("windows")
    t5_like(folder)
    for i in range(3):
        content = lines_of(TEXTS[i * 20 : (i + 1) * 20])
        (folder / f"{i}.jsonl").write_bytes(content)
    prepared(folder, folder / "tokens", [f"{folder}/*.jsonl"])
    write_tfds(folder)
    prepared(
        folder, folder / "of tfds", ["tfds:c4/en"], data_dir=str(folder), records=25
    )
    return folder


SOURCES = {
    "text": "{}/?.jsonl",
    "tokens": "{}/tokens/*.u16",
    "tfds": "tfds:c4/en",
    "tokens of tfds": "{}/of tfds/*.u16",
}
every_source = pytest.mark.parametrize("source", SOURCES)


def opened(folder: Path, source: str, config: dict | None = None, **options) -> Data:
    chosen = {
        "source": SOURCES[source].format(folder),
        "tokenizer": str(folder / "spiece.model"),
        "data_dir": str(folder),
        "windows": "documents",
    }
    options = {"seq_len": T, "batch_size": 4} | options
    return open_data(DataConfig(**(chosen | (config or {}))), **options)


def take(batches, count: int) -> dict[str, np.ndarray]:
    taken = list(itertools.islice(batches, count))
    return {name: np.stack([b[name] for b in taken]) for name in taken[0]}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys() == {"tokens", "weights"}
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def windows_of(folder: Path, texts: list[str]) -> set[tuple]:
    """What the texts become, by the rendering above."""
    own = open_tokenizer(folder / "spiece.model")
    return {tuple(as_published([*own.encode(x), END], T)[0]) for x in texts}


@every_source
def test_an_epoch_has_each_document_once(folder, source):
    data = opened(folder, source)
    seen = take(data.train, 30)
    assert seen["tokens"].shape == seen["weights"].shape == (30, 4, T)
    rows = seen["tokens"].reshape(-1, T).tolist()
    held = {*map(tuple, next(iter(data.evaluation))["tokens"][:3].tolist())}
    first, second = rows[:57], rows[57:114]
    assert {*map(tuple, first)} == windows_of(folder, TEXTS) - held
    assert sorted(first) == sorted(second)
    assert first != second
    padding = seen["weights"] == 0
    assert padding.any()
    assert not padding.all(axis=-1).any()
    assert (seen["tokens"][padding] == 0).all()
    assert (padding[..., 1:] >= padding[..., :-1]).all()  # at the end alone
    last = (~padding).sum(axis=-1)[..., None] - 1
    assert (np.take_along_axis(seen["tokens"], last, axis=-1) == END).all()
    assert (last == T - 1).any()


@pytest.mark.parametrize("source", ["text", "tfds"])
def test_tokens_give_the_batches_of_their_texts(folder, source):
    tokens = "tokens" if source == "text" else "tokens of tfds"
    text, other = opened(folder, source), opened(folder, tokens)
    same(take(text.train, 40), take(other.train, 40))
    same(take(text.evaluation, 9), take(other.evaluation, 9))


@every_source
def test_what_is_held_out_is_evaluated_once_and_never_trained_on(folder, source):
    data = opened(folder, source)
    batches = list(data.evaluation)
    rows = np.concatenate([batch["tokens"] for batch in batches])
    kept = np.concatenate([batch["weights"] for batch in batches]).any(axis=1)
    assert len(rows) == 4
    held = {*map(tuple, rows[kept].tolist())}
    assert len(held & windows_of(folder, TEXTS)) == 3
    if "tfds" not in source:  # which has an order of its own
        assert held == windows_of(folder, TEXTS[19::20])
    assert kept.tolist() == [True, True, True, False]
    assert (rows[~kept] == 0).all()
    same(take(data.evaluation, 9), take(data.evaluation, 9))
    trained = take(data.train, 30)["tokens"].reshape(-1, T).tolist()
    assert not {*map(tuple, trained)} & held


def test_an_eval_source_has_documents_too(folder):
    tokens = f"{folder}/tokens/00002-2.u16"
    given = {"source": f"{folder}/tokens/0000[01]*.u16", "eval_source": tokens}
    data = opened(folder, "tokens", given)
    rows = np.concatenate([batch["tokens"] for batch in data.evaluation])
    assert {*map(tuple, rows.tolist())} == windows_of(folder, TEXTS[40:])
    seen = take(data.train, 10)["tokens"].reshape(-1, T).tolist()
    assert {*map(tuple, seen)} == windows_of(folder, TEXTS[:40])


@every_source
def test_the_seed_decides_the_order(folder, source):
    first = take(opened(folder, source, seed=1).train, 5)
    same(first, take(opened(folder, source, seed=1).train, 5))
    assert (first["tokens"] != take(opened(folder, source).train, 5)["tokens"]).any()


@every_source
def test_every_state_resumes_at_the_next_batch(folder, source):
    data = opened(folder, source)
    iterator = iter(data.train)
    states, batches = [], []
    for _ in range(32):
        states.append(json.dumps(iterator.get_state()))
        assert len(states[-1]) < 30
        batches.append(next(iterator))
    for step, state in enumerate(states):
        resumed = iter(opened(folder, source).train) if step == 20 else iter(data.train)
        resumed.set_state(json.loads(state))
        same(next(resumed), batches[step])


@every_source
def test_processes_make_the_batches_of_one(folder, source):
    whole = opened(folder, source)
    for count in 2, 4:
        parts = [
            opened(folder, source, process_index=i, process_count=count)
            for i in range(count)
        ]
        for kind in "train", "evaluation":
            iterators = [iter(getattr(data, kind)) for data in (whole, *parts)]
            for _ in range(20 if kind == "train" else 1):
                expected, *rows = map(next, iterators)
                joined = {n: np.concatenate([r[n] for r in rows]) for n in expected}
                same(joined, expected)
                if kind == "train":
                    first, *others = (json.dumps(i.get_state()) for i in iterators)
                    assert others == [first] * count
        resumed = iter(parts[-1].train)  # of another number of processes
        resumed.set_state({"next_index": 11})
        expected = take(whole.train, 12).items()
        same(next(resumed), {name: x[11, -4 // count :] for name, x in expected})


def test_what_has_no_documents_is_refused(folder, tmp_path):
    np.full(99, 5, "<u2").tofile(tmp_path / "a.u16")
    np.full(99, END, "<u2").tofile(tmp_path / "b.u16")
    (tmp_path / "a.jsonl").write_bytes(lines_of([*TEXTS[:18], "", ""]))
    for name, config, options, message in (
        ("tokens", {"tokenizer": None}, {}, "give the tokenizer they were made with"),
        (
            "text",
            {},
            {"batch_size": 60},
            "has 57 documents, but at least 60 are needed",
        ),
        ("text", {"source": f"{tmp_path}/a.jsonl"}, {}, "held-out .* and text in one"),
        ("tokens", {"source": f"{tmp_path}/a.u16"}, {}, r"a\.u16 has no token 1, with"),
        ("tokens", {"source": f"{tmp_path}/b.u16"}, {}, "and text in one: add text"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(folder, name, config, **options)


@pytest.fixture
def micro(monkeypatch):
    monkeypatch.setitem(SIZES, "micro", MODEL)


MODEL = LlamaConfig(64, 16, 24, num_heads=4, num_layers=2, compute_dtype="float32")


def config_of(name: str = "adamw", fsdp: int = 1, tensor: int = 1, **how) -> Config:
    optimizer = OptimizerConfig(name, clip_norm=None)
    return resolve(
        Config(
            steps=8,
            batch_size=16,
            seq_len=T,
            model=ModelConfig(size="micro"),
            optimizer=optimizer,
            data=DataConfig(windows="documents"),
            mesh=MeshConfig(fsdp, tensor),
            **how,
        )
    )


def step_of(config: Config, devices: int = 1) -> Callable[[dict], list[float]]:
    """The first step as the trainer compiles it: loss and gradient norm of a batch."""
    mesh = make_mesh(config, jax.devices()[:devices])
    work = work_of(config, jax.random.key(1))
    make, like = initial(work, mesh)
    step = lower_step(config, mesh, work, like, refresh=False).compile()

    def run(batch: dict) -> list[float]:
        with jax.set_mesh(mesh):
            state = make(jax.random.key(0))
            _, metrics = step(state, to_devices(mesh, batch))
        return [float(metrics[name]) for name in ("loss", "grad_norm")]

    return run


@pytest.mark.slow
def test_padding_has_no_part_in_a_step(micro):
    """Whatever the token that pads is, and however the batch is cut."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 2 * T, 16)  # so that parts of the batch differ in weight
    documents = [rng.integers(2, MODEL.vocab_size, length) for length in lengths]
    rows = [document_window(document, T, END) for document in documents]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    padding = batch["weights"] == 0
    step = step_of(config_of())
    alone = step(batch)
    assert step(batch | {"tokens": np.where(padding, 7, batch["tokens"])}) == alone
    assert step(batch | {"weights": np.ones_like(batch["weights"])}) != alone
    for config, devices in (
        (config_of(microbatches=4), 1),
        (config_of(layerwise="on"), 1),
        (config_of(fsdp=2, tensor=2, microbatches=2), 8),
    ):
        # float32's rounding, of sums in another order
        assert step_of(config, devices)(batch) == pytest.approx(alone, 2e-5)
    summed = config_of("galore", layerwise="on", microbatches=2)  # of S^T G, so not G
    assert step_of(summed)(batch)[0] == pytest.approx(alone[0], 2e-5)


def flags_of(folder: Path, source: str, out: Path) -> list[str]:
    return [
        *("--source", SOURCES[source].format(folder), "--windows", "documents"),
        *("--tokenizer", str(folder / "spiece.model"), "--vocab-size", "100"),
        *("--batch-size", "8", "--seq-len", str(T), "--steps", "6", "--warmup", "0"),
        *("--log-every", "1", "--eval-every", "3", "--checkpoint-every", "3"),
        *("--microbatches", "2", "--optimizer", "adamw"),
        *("--sample-tokens", "0", "--out", str(out)),
    ]


@pytest.fixture
def one_device(monkeypatch):
    mesh = make_mesh(Config(), jax.devices()[:1])
    monkeypatch.setattr(train.main, "make_mesh", lambda config: mesh)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(one_device, folder, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    main(flags_of(folder, "text", whole))
    with monkeypatch.context() as patch:
        patch.setattr(train.run.loop.Stop, "reached", lambda _, step: step == 4)
        with pytest.raises(SystemExit):
            main(flags_of(folder, "text", stopped))
    assert read_metrics(stopped)[-1]["step"] == 4
    main([*flags_of(folder, "text", stopped), "--resume"])
    last = Path("checkpoints", "6")
    assert stored_checksums(stopped / last) == stored_checksums(whole / last)
    names = ("step", "loss", "eval_loss", "grad_norm", "skipped")
    there, here = (
        [
            {k: v for k, v in record.items() if k in names}
            for record in read_metrics(out)
        ]
        for out in (whole, stopped)
    )
    assert here == there
    assert there[-1]["loss"] < there[0]["loss"]
    assert [record["skipped"] for record in there] == [0] * 6
    with pytest.raises(SystemExit, match="--windows: documents there, packed"):
        main([*flags_of(folder, "text", stopped), "--resume", "--windows", "packed"])
