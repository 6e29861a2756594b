"""Readers of jaxprs: the parts that every analysis of a traced program shares.

Begin with `interpret`, which evaluates a program equation by equation on values of any kind. `control_flow` reads the
equations that run other programs (calls, loops, branches), `liveness` finds the values that a result is computed from,
and `source_lines` the user's line of an equation.
"""
