"""Sparse Jacobians and Hessians: the pattern is read from the traced function, few products give all entries.

Begin with `transforms`; `dependence` reads which input an output depends on, by the `rules` of each operation on
`index_sets`; `pattern` holds the result and colors it.
"""
