"""Control flow and maps: JAX's loops, branches, ``checkpoint``, ``vmap``, ``shard_map``, ``checkify``, with States.

Begin with `loops` (`scan` carries the writes of its body), then `branches`; the others follow the same pattern.
"""
