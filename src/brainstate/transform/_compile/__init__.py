"""Compilation: ``jit``, programs prepared ahead of time, and answers about a function without running it.

Begin with `jit`, whose call path is the seam's `step`; then `ahead` (programs compiled before the first call; `prepare`
makes one in one step), and `retraces`, which says why a function was traced again (`signature` puts calls into words).
`inspect` and `state_finder` only look.
"""
