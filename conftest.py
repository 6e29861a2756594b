"""What has to be settled before JAX starts, and the documents as tests."""

import os

# JAX before 0.12 deadlocks on few cores, unless it is told of at least four times as many as it has devices.
os.environ.setdefault("NPROC", "32")

# Code that is made fast, not fast code: the tests compile far more than they compute. XLA_FLAGS that are
# set, also to nothing, are left alone: `XLA_FLAGS= make test` compiles as XLA does by default.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)

import hypothesis
import jax
from sybil import Sybil

from _docs import PARSERS

jax.config.update("jax_num_cpu_devices", 4)

# The first example compiles, which takes longer than the default deadline.
hypothesis.settings.register_profile("brainstate", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("brainstate")

pytest_collect_file = Sybil(PARSERS, patterns=["*.md"]).pytest()
