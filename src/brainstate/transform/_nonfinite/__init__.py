"""``debug_nan``: a derivative has to be finite, and the error names the operation that first made NaN or an infinity.

Read in this order: `check` (a derivative with a check, and when its result is looked at), `callback` (the same inside a
program), `linear_maps` (a derivative that is a linear map, whose products come later), `report` (a program that can be
searched, and the text of the error), `search` (runs the program operation by operation, to the first culprit) and
`advice` (the table of remedies).
"""
