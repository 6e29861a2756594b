"""Readers of jaxprs: what every analysis of a traced program shares.

`interpret` evaluates a program with other values, equation by equation; `source_lines` finds the user's line of an
equation.
"""
