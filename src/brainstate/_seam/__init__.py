"""The seam: the one place that knows how States and JAX's tracers meet.

Read in this order: `packing` (pytrees that leave a trace), `marker` and `scope` (one transformed call in progress, its
reads and writes), `staging` (a function traced once, abstractly), `step` (the call path of compiled functions).
`tokens`, `local_states` and `module_reads` deal with traces that JAX caches or begins itself; `donation` with arrays
that are given away; `run_time_errors` with programs that may raise while they run; `other_libraries` with reads whose
result a library would lose.
"""
