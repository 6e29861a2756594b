"""Sparse Jacobians and Hessians: the pattern is read from the traced function, few products give all entries.

Begin with `transforms`, the public functions. `dependence` finds the inputs that each element of an output depends on;
`rules` has one rule for each primitive, and `index_sets` the data structure that they compute with. `pattern` holds the
result, and colors it.
"""
