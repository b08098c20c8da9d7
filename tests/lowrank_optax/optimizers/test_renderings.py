"""Each method of the family against its equations in numpy and float64.

Where a basis is drawn at random the rendering takes the draw from the library's state
(the rules' distributions are tested in test_bases.py); all else it computes itself, one
matrix at a time, every product formed.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.numpy_reference import (
    Array,
    Rules,
    left_singular_vectors,
    recovered,
    turned_moments,
)

RANK, EVERY, STEPS, SWITCH = 2, 3, 10, 5
SHAPES = {"wide": (5, 7), "stacked": (2, 6, 4)}  # the second lies on its side
COMMON: dict[str, Any] = {
    "rank": RANK,
    "refresh_every": EVERY,
    "dimension_numbers": [("stacked", lro.STACKED), ("", "matrix")],
}


def gradients() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(5)
    drift = {k: random.normal(size=s) for k, s in SHAPES.items()}
    return [
        {k: 0.5 * drift[k] + random.normal(size=s) for k, s in SHAPES.items()}
        for _ in range(STEPS)
    ]


def matrices(name: str, x: np.ndarray) -> list[np.ndarray]:
    return [layer.T for layer in x] if name == "stacked" else [x]


# ----------------------------------------------------------------- steps in numpy


class Adam:
    """Adam on G~; `rotate` is "", "first" or "both", `restart` forgets at a refresh."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8, rotate="", restart=False):
        self.rules = Rules(lambda _: 1.0, EVERY, b1=b1, b2=b2, eps=eps)
        self.rotate, self.restart, self.t = rotate, restart, 0
        self.m: Any = 0.0
        self.v: Any = 0.0

    def __call__(self, low: Array, turn: Array | None) -> Array:
        if turn is not None and self.restart:
            self.m, self.v, self.t = 0.0, 0.0, 0
        elif turn is not None and self.t:
            m, v = turned_moments(self.m, self.v, turn, self.t, self.rules)
            self.m = m if self.rotate else self.m
            self.v = v if self.rotate == "both" else self.v
        r, self.t = self.rules, self.t + 1
        self.m = r.b1 * self.m + (1 - r.b1) * low
        self.v = r.b2 * self.v + (1 - r.b2) * low**2
        m_hat, v_hat = self.m / (1 - r.b1**self.t), self.v / (1 - r.b2**self.t)
        return m_hat / (np.sqrt(v_hat) + r.eps)


class Average:
    """M <- b M + (1 - b) x, turned with the basis."""

    def __init__(self, b1: float):
        self.b1 = b1
        self.m: Any = 0.0

    def __call__(self, low: Array, turn: Array | None) -> Array:
        if turn is not None and np.ndim(self.m):
            self.m = turn @ self.m
        self.m = self.b1 * self.m + (1 - self.b1) * low
        return self.m


class Adafactor:
    def __init__(self, b1: float | None, clip: float = 1.0):
        self.t, self.b1, self.clip = 0, b1, clip
        self.rows: Any = 0.0
        self.cols: Any = 0.0
        self.m: Any = 0.0

    def rms(self, g: Array) -> Array:
        self.t += 1
        decay = 1 - self.t**-0.8
        self.rows = decay * self.rows + (1 - decay) * (g**2 + 1e-30).mean(1)
        self.cols = decay * self.cols + (1 - decay) * (g**2 + 1e-30).mean(0)
        return g / np.sqrt(np.outer(self.rows, self.cols) / self.rows.mean())

    def __call__(self, low: Array, turn: Array | None) -> Array:
        u = self.rms(low)
        u = u / max(1.0, float(np.sqrt((u**2).mean())) / self.clip)
        if self.b1 is None:
            return u
        self.m = self.b1 * self.m + (1 - self.b1) * u
        return self.m


# ----------------------------------------------------------------- bases in numpy


def svd(t: int, g: Array, s: Array | None, m: Any) -> Array:
    return left_singular_vectors(g)[:, :RANK]


def track(t: int, g: Array, s: Array | None, m: Any) -> Array:
    if s is None:
        return svd(t, g, s, m)
    a = np.linalg.lstsq(s, g, rcond=None)[0]
    descent = 2 * (g - s @ a) @ a.T
    u, sigma, vt = np.linalg.svd(descent - s @ s.T @ descent, full_matrices=False)
    u, v, angle = u[:, :1], vt[:1].T, 0.01 * sigma[0]
    along = s @ v * np.cos(angle) + u * np.sin(angle)
    return along @ v.T + s @ (np.eye(RANK) - v @ v.T)


def power(b1: float, rho: float) -> Callable[..., Array]:
    def choose(t: int, g: Array, s: Array | None, m: Any) -> Array:
        if s is None:
            return svd(t, g, s, m)
        b = rho * s @ m / (1 - b1**t) + (1 - rho) * g
        q, upper = np.linalg.qr(b @ b.T @ s)
        return q * np.sign(np.diag(upper))

    return choose


def coap(t: int, g: Array, s: Array | None, m: Any) -> Array:
    if s is None:
        return svd(t, g, s, m)
    if t // EVERY % 2 == 0:  # recompute_every=2
        q = np.linalg.qr(g.T @ s)[0]
        return left_singular_vectors(g @ q)

    def loss(s: Array) -> float:
        lost, up = s @ s.T @ g - g, s @ m
        cosines = [
            up[:, i] @ g[:, i] / np.linalg.norm(up[:, i]) / np.linalg.norm(g[:, i])
            for i in range(g.shape[1])
        ]
        return float((lost**2).mean() * (1 - np.mean(cosines)))

    grad, h = np.zeros_like(s), 1e-6
    for i in np.ndindex(*s.shape):  # central differences: another way than autodiff
        up, down = s.copy(), s.copy()
        up[i], down[i] = s[i] + h, s[i] - h
        grad[i] = (loss(up) - loss(down)) / (2 * h)
    return s - 0.1 * grad / max(1.0, float(np.linalg.norm(grad)))


# ------------------------------------------------------------------ back in numpy


def scaled_by(alpha: float) -> Callable[..., Array]:
    return lambda g, s, low, low_step, memory: alpha * s @ low_step


def fira(g: Array, s: Array, low: Array, low_step: Array, memory: dict) -> Array:
    residual, memory["last"] = recovered(g, s, low_step, memory.get("last"), 1.01)
    return s @ low_step + residual


def frugal(g: Array, s: Array, low: Array, low_step: Array, memory: dict) -> Array:
    rest = g - s @ low
    rest[np.abs(rest) < 1e-12] = 0  # inside a coordinate subspace, exactly
    return s @ low_step + 0.7 * np.sign(rest)


def apollo(channels: bool, alpha: float) -> Callable[..., Array]:
    def back(g: Array, s: Array, low: Array, low_step: Array, memory: dict) -> Array:
        axis = 0 if channels else None
        phi = np.linalg.norm(low_step, axis=axis) / np.linalg.norm(low, axis=axis)
        step = g * phi
        norm = np.linalg.norm(step)
        bound = 1.01 * memory.get("last", np.inf)
        step = step * min(1.0, float(bound / norm))
        memory["last"] = np.linalg.norm(step)
        return np.sqrt(alpha) * step

    return back


def spectral(g: Array, s: Array, low: Array, low_step: Array, memory: dict) -> Array:
    rest = g - s @ low
    x = rest / np.sum(np.linalg.svd(rest, compute_uv=False) ** 8) ** (1 / 8)
    for a, b, c in (
        (3.7204, -10.9562, 8.1173),
        (4.1768, -13.8770, 12.7534),
        (3.7235, -7.0583, 4.7225),
    ):
        q = x @ x.T
        x = (a * np.eye(len(q)) + b * q + c * q @ q) @ x
    return s @ low_step + 0.5 * np.sqrt(g.shape[1]) * x


# ------------------------------------------------------------------------- methods


def numpy_steps(
    grads: list[Array],
    step: Callable[[Array, Array | None], Array],
    back: Callable[..., Array],
    choose: Callable[..., Array] | list[Array],
    every: int = EVERY,
    feedback: float | None = None,
    before: Callable[[Array], Array] = lambda g: g,
) -> list[Array]:
    """The steps in full space; `choose` is a rule, or the basis of each step."""
    s, out, memory, error = None, [], {}, 0.0
    for t, g in enumerate(grads):
        g, turn, old = before(g) + error, None, s
        m = getattr(step, "m", 0.0)
        if t % every == 0:
            s = choose(t, g, s, m) if callable(choose) else choose[t]
            turn = np.eye(RANK) if old is None else s.T @ old
        assert s is not None
        low = s.T @ g
        low_step = step(low, turn)
        if feedback is not None:
            error = g - s @ low
            if old is not None and turn is not None:
                error += feedback / (1 - feedback) * (old @ m - s @ turn @ m)
        out.append(back(g, s, low, low_step, memory))
    return out


def online(grads: list[Array]) -> list[Array]:
    """Adam with P trained by Adam on the reconstruction loss, after it was used."""
    p, adam, pca, out = svd(0, grads[0], None, None), Adam(), Adam(), []
    for t, g in enumerate(grads):
        out.append(0.25 * p @ adam(p.T @ g, None))
        x = g / np.linalg.norm(g)
        lost = p @ p.T @ x - x
        excess = p.T @ p - np.eye(RANK)
        grad = 2 * (lost @ x.T + x @ lost.T) @ p + 4 * 0.3 * p @ excess
        if t > 0:
            p = p - 0.01 * pca(grad, None)
    return out


def ldadam(grads: list[Array], feedback: bool = True) -> list[Array]:
    return numpy_steps(
        grads,
        Adam(b1=0.85, b2=0.99, rotate="both"),
        scaled_by(1.0),
        power(0.85, 0.8),
        every=1,
        feedback=0.85 if feedback else None,
    )


def alice(grads: list[Array], bases: list[Array], b3: float | None) -> list[Array]:
    """The leading direction of each refresh by itself, and the drawn one as it was."""
    b1, b2, alpha, alpha_c = 0.9, 0.9, 0.3, 0.4
    m = v = p = last = 0.0
    s, out = np.zeros_like(bases[0]), []
    tracked = np.zeros((RANK, RANK))
    for t, g in enumerate(grads):
        rows = len(g)
        if t == 0:
            s = svd(0, g, None, None)
        elif t % EVERY == 0:
            q = g @ g.T
            if b3 is not None:
                q = b3 * s @ tracked @ s.T + (1 - b3) * q
            new = np.linalg.qr(q @ s)[0]
            values, vectors = np.linalg.eigh(new.T @ q @ new)
            new = new @ vectors[:, np.argsort(-values)]
            lead = new[:, :1] * np.sign(new[np.abs(new[:, 0]).argmax(), 0])
            drawn = bases[t][:, 1:]
            assert np.abs(new.T @ drawn).max() < 1e-12
            s = np.concatenate([lead, drawn], axis=1)
        low = s.T @ g
        if b3 is not None:
            tracked = b3 * tracked + (1 - b3) * low @ low.T
        m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
        p = b1 * p + (1 - b1) * ((g**2).sum(0) - (low**2).sum(0))
        c = np.sqrt(rows - RANK) * (g - s @ low) / np.sqrt(p)
        size = np.linalg.norm(c)
        c = c * (1.01 / max(float(size) / last, 1.01) if t else 1.0)
        last = float(np.linalg.norm(c))
        out.append(alpha * (s @ (m / (np.sqrt(v) + 1e-8)) + alpha_c * c))
    return out


def cosmos(grads: list[Array]) -> list[Array]:
    """COSMOS with the m rows projected: the source's equations of G^T."""
    b1, b2, b3, gamma, scale = 0.8, 0.9, 0.7, 0.3, 0.5
    m, v, out = np.zeros_like(grads[0]), 0.0, []
    u = svd(0, grads[0], None, None)
    gram = np.zeros((len(u), len(u)))  # the mean of G G^T, as far as U shows it
    for t, g in enumerate(grads, 1):
        gram = b3 * gram + (1 - b3) * g @ g.T
        if t > 1:
            u = np.linalg.qr(gram @ u)[0]
        gram_of_u = u.T @ gram @ u
        gram = u @ gram_of_u @ u.T
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (u.T @ g) ** 2
        a = u @ (u.T @ m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8))
        x = m - u @ u.T @ m
        x = x / np.linalg.norm(x)
        for _ in range(5):
            q = x @ x.T
            x = 3.4445 * x - 4.7750 * q @ x + 2.0315 * q @ q @ x
        d = a + gamma * np.sqrt(g.size) * x / np.linalg.norm(x)
        out.append(scale * np.sqrt(g.size) * d / np.linalg.norm(d))
    return out


def sumo(grads: list[Array]) -> list[Array]:
    s, m, last, out = None, np.zeros((RANK, grads[0].shape[1])), np.inf, []
    for t, g in enumerate(grads):
        if t % EVERY == 0:
            old, s = s, svd(t, g, None, None)
            m = m if old is None else s.T @ old @ m
        assert s is not None
        m = 0.8 * m + s.T @ g
        u, _, vt = np.linalg.svd(m, full_matrices=False)
        o = u @ vt
        o = o * min(1.0, 1.1 * last / float(np.linalg.norm(o)))
        last = float(np.linalg.norm(o))
        step = g - s @ (s.T @ g - o)
        out.append(0.5 * np.sqrt(max(g.shape)) * step)
    return out


def blocks(m: int) -> list[np.ndarray]:
    """The rows of each block, the larger blocks first."""
    return np.array_split(np.arange(m), RANK)


def foam(grads: list[Array]) -> list[Array]:
    m, out, unfold = Adam(), [], np.zeros((len(grads[0]), RANK))
    for j, rows in enumerate(blocks(len(grads[0]))):
        unfold[rows, j] = 1
    fold = (unfold / unfold.sum(0)).T
    for g in grads:
        means = fold @ g
        m(means, None)
        first = m.m / (1 - 0.9**m.t)
        second = m.v / (1 - 0.999**m.t)
        lost = g - unfold @ means
        root = np.sqrt(unfold @ second + lost**2)
        out.append(0.25 * (unfold @ first + lost) / (root + 1e-8))
    return out


def gwt(grads: list[Array]) -> list[Array]:
    """The transform in each block: its coarsest function first, then its details."""
    m, out, last = Adam(), [], np.inf
    inverse = []
    for rows in blocks(len(grads[0])):
        constant = np.eye(len(rows)) - 1 / len(rows)
        details = np.linalg.svd(constant)[0][:, :-1]
        inverse.append(
            np.column_stack([np.full(len(rows), len(rows) ** -0.5), details])
        )
    for g in grads:
        parts = [h.T @ g[rows] for h, rows in zip(inverse, blocks(len(g)), strict=True)]
        step = m(np.stack([x[0] for x in parts]), None)
        root = np.sqrt(m.v / (1 - 0.999**m.t)) + 1e-8
        shrunk = min(1.0, 1.01 * last / float(np.linalg.norm(step)))
        last = shrunk * float(np.linalg.norm(step))
        scaled = [
            np.concatenate([s[None], x[1:] / d]) * shrunk
            for s, x, d in zip(step, parts, root, strict=True)
        ]
        out.append(
            0.25 * np.concatenate([h @ x for h, x in zip(inverse, scaled, strict=True)])
        )
    return out


def of_galore(make: Callable[[], Any], choose: Any = svd, alpha: float = 0.25) -> Any:
    return lambda g, bases: numpy_steps(g, make(), scaled_by(alpha), choose or bases)


KEY: dict[str, Any] = {"key": 3}
GAUSSIAN = lro.bases.gaussian(3, stored=True)
POWER = lro.bases.power_iterate(0.8, b1=0.85)
NO_REFRESH = {k: v for k, v in COMMON.items() if k != "refresh_every"}
# The library's optimizer, and (gradients, basis of each step) -> steps in numpy.
METHODS: dict[str, tuple[Any, Any]] = {
    "galore_adafactor": (
        lro.recipes.galore_adafactor(1.0, clip=0.8, **COMMON),
        of_galore(lambda: Adafactor(0.9, clip=0.8)),
    ),
    "galore_2": (  # the sketch of a matrix as small as these loses nothing
        lro.recipes.galore_2(1.0, scale=0.5, **KEY, **COMMON),
        of_galore(Adam, alpha=0.5),
    ),
    "golore": (
        lro.recipes.golore(1.0, switch_step=SWITCH, **KEY, **COMMON),
        of_galore(lambda: Adam(rotate="first"), None),
    ),
    "msgd": (
        lro.recipes.msgd(1.0, b1=0.8, **KEY, **COMMON),
        of_galore(lambda: Average(0.8), None, alpha=1.0),
    ),
    "online_subspace_descent": (
        lro.recipes.online_subspace_descent(
            1.0, optimizer_of_basis=optax.adam(0.01), penalty=0.3, **NO_REFRESH
        ),
        lambda g, bases: online(g),
    ),
    "subtrack": (
        lro.recipes.subtrack(1.0, step_size=0.01, **COMMON),
        lambda g, bases: numpy_steps(g, Adam(rotate="both"), fira, track),
    ),
    "ldadam": (
        lro.ldadam(1.0, rho=0.8, b1=0.85, **NO_REFRESH),
        lambda g, bases: ldadam(g),
    ),
    "spectral_adam": (  # its own products in bfloat16 are for narrower gradients
        lro.spectral_adam(1.0, b1=0.85, basis=POWER, **COMMON),
        lambda g, bases: numpy_steps(
            g, Adam(0.85, 0.99, rotate="both"), spectral, power(0.85, 0.8)
        ),
    ),
    "apollo": (
        lro.apollo(1.0, basis=GAUSSIAN, scale=2.0, **COMMON),
        lambda g, bases: numpy_steps(g, Adam(), apollo(True, 2.0), bases),
    ),
    "apollo_mini": (
        lro.apollo_mini(1.0, basis=GAUSSIAN, **COMMON),
        lambda g, bases: numpy_steps(g, Adam(), apollo(False, 128.0), bases),
    ),
    "frugal": (
        lro.frugal(1.0, residual_scale=0.7, **COMMON),
        lambda g, bases: numpy_steps(g, Adam(restart=True), frugal, svd),
    ),
    "frugal_coordinates": (
        lro.frugal(1.0, residual_scale=0.7, basis=lro.bases.coordinates(4), **COMMON),
        lambda g, bases: numpy_steps(g, Adam(restart=True), frugal, bases),
    ),
    "grass_sparse": (
        lro.recipes.grass_sparse(1.0, **KEY, **COMMON),
        of_galore(lambda: Adam(restart=True), None),
    ),
    "flora": (
        # Stored, so that the draw can be read; lro.recipes.flora is this
        # chain but for that; tests/lowrank_optax/bases compares the two bit by bit.
        optax.chain(
            lro.low_rank(
                optax.chain(
                    lro.steps.in_full_space(
                        lro.steps.per_matrix(
                            optax.scale_by_factored_rms(min_dim_size_to_factor=1)
                        )
                    ),
                    GAUSSIAN,
                    lro.project(),
                    lro.rotate_moments(optax.ema(0.9, debias=False)),
                    lro.project_back(),
                ),
                **COMMON,
            ),
            optax.scale(-1.0),
        ),
        lambda g, bases: numpy_steps(
            g, Average(0.9), scaled_by(1.0), bases, before=Adafactor(None).rms
        ),
    ),
    "alice": (
        lro.recipes.alice(1.0, b3=0.7, **KEY, **COMMON),
        lambda g, bases: alice(g, bases, 0.7),
    ),
    "alice_0": (
        lro.recipes.alice(1.0, b3=None, **KEY, **COMMON),
        lambda g, bases: alice(g, bases, None),
    ),
    "sumo": (
        lro.recipes.sumo(1.0, b1=0.8, scale=0.5, **COMMON),
        lambda g, bases: sumo(g),
    ),
    "coap": (
        lro.recipes.coap(1.0, recompute_every=2, **COMMON),
        of_galore(lambda: Adam(eps=1e-6), coap),
    ),
    "foam": (lro.recipes.foam(1.0, **NO_REFRESH), lambda g, bases: foam(g)),
    "gwt": (lro.recipes.gwt(1.0, **NO_REFRESH), lambda g, bases: gwt(g)),
    "cosmos": (
        lro.recipes.cosmos(
            1.0, b1=0.8, b2=0.9, b3=0.7, residual_scale=0.3, scale=0.5, **NO_REFRESH
        ),
        lambda g, bases: cosmos(g),
    ),
}


# Where it is not rounding in another order: optax computes Adafactor's decay 1 - t^-0.8
# in float32, and COAP's gradient is by differences here.
TOLERANCES = {"galore_adafactor": 1e-7, "flora": 1e-7, "coap": 1e-7}


def basis_matrix(basis: np.ndarray, m: int) -> np.ndarray:
    """S, from its columns or from its coordinates."""
    if np.issubdtype(basis.dtype, np.integer):
        return np.eye(m)[:, basis]
    return basis


@pytest.mark.parametrize("name", METHODS)
def test_every_step_is_the_sources_in_float64(name: str) -> None:
    tx, rendering = METHODS[name]
    grads, out, bases = gradients(), [], []
    with jax.enable_x64(True):
        params = {k: jnp.zeros(s) for k, s in SHAPES.items()}
        state, update = tx.init(params), jax.jit(tx.update)
        for grad in grads:
            updates, state = update(jax.tree.map(jnp.asarray, grad), state, params)
            out.append(jax.tree.map(np.asarray, updates))
            for _, basis in optax.tree.get_all_with_path(state, "basis")[:1]:
                bases.append(jax.tree.map(np.asarray, basis))
    for leaf in SHAPES:
        for i in range(len(matrices(leaf, grads[0][leaf]))):
            own = [matrices(leaf, g[leaf])[i] for g in grads]
            drawn = [
                basis_matrix(b[leaf][i] if leaf == "stacked" else b[leaf], len(own[0]))
                for b in bases
            ]
            expected = np.array(rendering(own, drawn))
            ours = -np.array([matrices(leaf, u[leaf])[i] for u in out])
            worst = np.abs(ours - expected).max() / np.abs(expected).max()
            assert worst < TOLERANCES.get(name, 1e-11), (leaf, i, worst)


TORCH = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
# Torch's weights, (out, in).
TORCH_SHAPES = {"wide": (4, 6), "tall": (6, 4), "square": (6, 6), "other": (5, 5)}


@pytest.mark.parametrize(
    ("feedback", "ours_are"),
    [(True, "torch's"), (True, "transposed"), (True, "stacked"), (False, "torch's")],
)
def test_ldadam_projects_the_side_that_the_release_projects(
    feedback: bool, ours_are: str
) -> None:
    """The right one where a torch weight has more rows, else the left: a square one's
    outputs, where GaLore takes its inputs."""
    random = np.random.default_rng(8)
    drift = {k: random.normal(size=s) for k, s in TORCH_SHAPES.items()}
    grads = [
        {k: 0.5 * drift[k] + random.normal(size=s) for k, s in TORCH_SHAPES.items()}
        for _ in range(STEPS)
    ]

    def to_ours(x: np.ndarray) -> np.ndarray:
        flax = x if ours_are == "torch's" else x.T
        return np.stack([flax, -flax]) if ours_are == "stacked" else flax

    def to_torchs(x: np.ndarray) -> np.ndarray:
        flax = x[0] if ours_are == "stacked" else x
        return flax if ours_are == "torch's" else flax.T

    specs = {"torch's": TORCH, "transposed": None, "stacked": lro.STACKED}
    tx = lro.ldadam(
        1.0,
        rank=RANK,
        rho=0.8,
        b1=0.85,
        feedback=feedback,
        dimension_numbers=specs[ours_are],
    )
    ours = []
    with jax.enable_x64(True):
        params = {k: jnp.zeros_like(to_ours(x)) for k, x in grads[0].items()}
        state, update = tx.init(params), jax.jit(tx.update)
        for grad in grads:
            leaves = {k: jnp.asarray(to_ours(x)) for k, x in grad.items()}
            updates, state = update(leaves, state, params)
            ours.append({k: -to_torchs(np.asarray(x)) for k, x in updates.items()})
    for name, (rows, columns) in TORCH_SHAPES.items():
        right = rows > columns
        own = [g[name].T if right else g[name] for g in grads]
        steps = np.array(ldadam(own, feedback))
        expected = steps.swapaxes(1, 2) if right else steps
        found = np.array([x[name] for x in ours])
        worst = np.abs(found - expected).max() / np.abs(expected).max()
        assert worst < 1e-11, (name, worst)


# ------------------------------------------------------------- moments of low rank


def sketched(x: Array, sketch: Array) -> Array:
    """The randomized SVD of rank r, in the shorter side's columns."""
    if x.shape[0] > x.shape[1]:
        return sketched(x.T, sketch).T
    q = np.linalg.qr(x @ sketch)[0]
    q = np.linalg.qr(x @ (x.T @ q))[0]
    return q @ (q.T @ x)


def mlorc(grads: list[Array], sketches: list[tuple[Array, Array]]) -> list[Array]:
    m, v, out = np.zeros_like(grads[0]), np.zeros_like(grads[0]), []
    for t, (g, of_step) in enumerate(zip(grads, sketches, strict=True), 1):
        if (v < 0).any():
            v = np.where(v < 0, np.abs(v[v < 0]).mean(), v)
        m, v = 0.8 * m + 0.2 * g, 0.99 * v + 0.01 * g**2
        root = np.sqrt(v / (1 - 0.99**t))
        out.append(0.5 * m / (1 - 0.8**t) / (root + 1e-8))
        m, v = map(sketched, (m, v), of_step)
    return out


def sketches_of(state: Any, leaf: str, columns: int, steps: int) -> list[Any]:
    """X of M and of V at each step, from the keys that the state says."""
    key = jax.random.wrap_key_data(optax.tree.get(state, "rng_key"))
    drawn = []
    for _ in range(steps):
        key, now = jax.random.split(key)
        own = jax.random.fold_in(now, zlib.crc32(leaf.encode()))
        keys = (jax.random.fold_in(own, tree) for tree in (1, 2))  # after the count
        drawn.append([np.asarray(jax.random.normal(k, (columns, RANK))) for k in keys])
    return drawn


def lora_pre(grads: list[Array], a: Array, a_v: Array) -> list[Array]:
    b, b_v = (np.zeros((len(grads[0]), RANK)) for _ in range(2))
    out: list[Array] = []
    keep, keep_v = 0.8**0.5, 0.9**0.25
    for t, g in enumerate(grads, 1):
        m = 0.8 * b @ a + 0.2 * g
        v = 0.9 * (b_v @ a_v) ** 2 + 0.1 * g**2
        out.append(0.25 * m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8))
        b, a = (
            keep * b + (1 - keep) * g @ np.linalg.pinv(a),
            keep * a + (1 - keep) * np.linalg.pinv(b) @ g,
        )
        b_v, a_v = (
            keep_v * b_v + (1 - keep_v) * np.abs(g) @ np.linalg.pinv(a_v),
            keep_v * a_v + (1 - keep_v) * np.linalg.pinv(b_v) @ np.abs(g),
        )
    return out


def mofasgd(grads: list[Array], vt: Array) -> list[Array]:
    u, sizes, v, out = np.zeros((len(grads[0]), RANK)), np.zeros(RANK), vt.T, []
    for g in grads:
        p, r_u = np.linalg.qr(np.concatenate([u, g @ v], axis=1))
        q, r_v = np.linalg.qr(np.concatenate([v, g.T @ u], axis=1))
        eye = np.eye(RANK)
        corner = 0.9 * np.diag(sizes) - u.T @ g @ v
        core = r_u @ np.block([[corner, eye], [eye, 0 * eye]]) @ r_v.T
        left, values, right = np.linalg.svd(core)
        u, sizes, v = p @ left[:, :RANK], values[:RANK], q @ right[:RANK].T
        out.append(0.5 * np.sqrt(max(g.shape)) * u @ v.T)
    return out


# The optimizer, the names of what it draws at the start, and the rendering.
OF_LOW_RANK_MOMENTS: dict[str, tuple[Any, tuple[str, ...], Any]] = {
    "mlorc": (
        lro.recipes.mlorc(1.0, scale=0.5, b1=0.8, b2=0.99, **KEY, **NO_REFRESH),
        (),
        mlorc,
    ),
    "lora_pre": (
        lro.recipes.lora_pre(1.0, b1=0.8, b2=0.9, **KEY, **NO_REFRESH),
        ("mu_right", "nu_right"),
        lora_pre,
    ),
    "mofasgd": (
        lro.recipes.mofasgd(1.0, scale=0.5, b1=0.9, **KEY, **NO_REFRESH),
        ("right",),
        mofasgd,
    ),
}


@pytest.mark.parametrize("name", OF_LOW_RANK_MOMENTS)
def test_every_step_with_moments_of_low_rank_is_the_sources(name: str) -> None:
    tx, drawn, rendering = OF_LOW_RANK_MOMENTS[name]
    grads, out = gradients(), []
    with jax.enable_x64(True):
        params = {k: jnp.zeros(s) for k, s in SHAPES.items()}
        state, update = tx.init(params), jax.jit(tx.update)
        starts = [optax.tree.get(state, field) for field in drawn]
        sketches = {
            leaf: sketches_of(state, leaf, max(shape[-2:]), len(grads))
            for leaf, shape in SHAPES.items()
            if name == "mlorc"
        }
        for grad in grads:
            updates, state = update(jax.tree.map(jnp.asarray, grad), state, params)
            out.append(jax.tree.map(np.asarray, updates))
    for leaf, shape in SHAPES.items():
        for i in range(len(matrices(leaf, np.zeros(shape)))):
            own = [matrices(leaf, g[leaf])[i] for g in grads]
            begun = [
                np.asarray(x[leaf][i] if leaf == "stacked" else x[leaf]) for x in starts
            ]
            begun += [sketches[leaf]] if sketches else []
            expected = np.array(rendering(own, *begun))
            ours = -np.array([matrices(leaf, u[leaf])[i] for u in out])
            worst = np.abs(ours - expected).max() / np.abs(expected).max()
            assert worst < 1e-11, (leaf, i, worst)
