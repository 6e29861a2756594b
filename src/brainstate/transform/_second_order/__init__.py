"""Derivatives of derivatives, as operators: products with curvature matrices that are never formed.

Begin with `linear_operator`, which all of them return; then `linearize`, `hvp_ggn`, `fisher`. `laplacian`, and
`taylor` with its `power_series`, are higher derivatives along directions.
"""
