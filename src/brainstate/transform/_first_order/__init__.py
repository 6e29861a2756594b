"""First derivatives: with respect to States and arguments together.

Begin with `pure_function` (a function with States, as JAX differentiates it) and `gradient_transform` (one class for
every derivative); `gradients` are that class with JAX's transforms. `vjp_jvp`, `forward_gradient`,
`chunked_jacobians`, `implicit`, `custom_rules` and `stop_gradient` build on the same two; `vector_space` is the space
that gradients live in, `functional` the model as a pure function for code that does not know States.
"""
