"""Programs that are compiled in half the time, for tests that compare to rounding.

Not for those of bits: what rounds how is another choice of this compiler's.
"""

import functools

import jax

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
jit = functools.partial(jax.jit, compiler_options=QUICK)
