"""Programs compiled in half the time whatever the environment's flags, as conftest has.

Not for tests against bits of other programs: what rounds how is this compiler's choice.
"""

import functools

import jax

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
jit = functools.partial(jax.jit, compiler_options=QUICK)
