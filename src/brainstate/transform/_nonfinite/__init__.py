"""``debug_nan``: which operation first made a number that is not finite.

Begin with `check` (when a result is looked at, and how a failed check leaves compiled code); `search` walks the
program to the first culprit, `advice` names the remedy, `linear_maps` does the same for products with linear maps.
"""
