"""Gradients of batches: in parts that are added up, or one for each example.

`accumulate` is a scan over parts of a batch; `per_example` maps a gradient over examples, and `per_example_norms` has
their norms without the gradients.
"""
