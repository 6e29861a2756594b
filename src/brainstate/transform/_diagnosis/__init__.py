"""Questions about a derivative: is it right (`check_grads`), and why is it zero (`explain`).

Both look at a function through `flat_function`: as a function of a list of arrays, with the names of the user.
"""
