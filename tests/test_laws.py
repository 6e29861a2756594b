"""The laws of the design, a test each (law 4, "never silently wrong", is a file of its own).

Laws 2 (one seam) and 6 (public JAX only) are about the text of the package and stand in `test_formalities`, as
the rules ``one_seam`` and ``public_jax_only``. The others are checked by counting: runs of the user's function,
calls while tracing, equations, instructions.
"""

import itertools
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainstate
from brainstate import ParamState, State, nn
from brainstate import transform as T
from brainstate._seam import marker
from brainstate._seam import scope as seam
from transforms import DERIVATIVES, ROW

# ------------------------------------------------------------------------- law 1: a State never holds a tracer


class Boom(Exception):
    pass


class Fuse:
    """Count the reads and writes of `Watched` States, and raise at the one that ``at`` numbers."""

    def __init__(self):
        self.at, self.count = None, 0

    def set(self, at=None):
        self.at, self.count = at, 0

    def tick(self):
        self.count += 1
        if self.count == self.at:
            raise Boom


FUSE = Fuse()


class Watched(State):
    """A State whose every read and write is a place where an exception can be injected."""

    @property
    def value(self):
        FUSE.tick()
        return State.value.fget(self)

    @value.setter
    def value(self, new):
        FUSE.tick()
        State.value.fset(self, new)


class World:
    """States of several sorts, and a function that reads, writes, changes in place, creates and calls inside."""

    def __init__(self):
        self.w = Watched(jnp.array(1.5))
        self.c = Watched(jnp.array(0.0))
        self.p = Watched({"a": jnp.array(2.0), "n": jnp.array(0)})
        self.idle = Watched(jnp.array(7.0))
        self.born = []
        self.inner = T.jit(self.add)

    def add(self, y):
        self.c.value = self.c.value + y
        return self.c.value

    def function(self, x):
        self.c.value = self.c.value + x
        w = self.w.value
        p = self.p.value
        p["a"] = p["a"] * w
        new = Watched(w * x)
        self.born.append(new)
        new.value = jnp.sin(new.value)
        self.p.value = {"a": self.p.value["a"], "n": self.p.value["n"] + 1}
        self.w.value = w * 2
        return new.value * w + self.inner(x)

    @property
    def states(self):
        return (self.w, self.c, self.p, self.idle)

    def snapshot(self):
        values = [State.value.fget(s) for s in self.states]
        return values, [jax.tree.flatten(v) for v in values]


def same(before, after):
    """Tell whether every value is the same object, and every container holds the same objects."""
    for a, b in zip(before[0], after[0], strict=True):
        if a is not b:
            return False
    for (leaves, tree), (leaves2, tree2) in zip(before[1], after[1], strict=True):
        if tree != tree2 or any(a is not b for a, b in zip(leaves, leaves2, strict=True)):
            return False
    return True


def _derived(name):
    """Return the form of a row in which both the State and the argument are differentiated."""
    row = ROW[name]
    return lambda f, w: row.derive(f, w, 0, **row.options)


DERIVED = {
    name: _derived(name) for name, row in DERIVATIVES.items() if row.kind == "gradient" or name in ("vjp", "jvp")
}
NESTS = DERIVED | {
    "jit": lambda f, w: T.jit(f),
    "jit-donate": lambda f, w: T.jit(f, donate_states=True),
    "jacrev": lambda f, w: T.jacrev(f, [w], 0),
    "jacfwd": lambda f, w: T.jacfwd(f, w, (0,)),
    "jit(grad)": lambda f, w: T.jit(T.grad(f, w)),
    "grad(jit)": lambda f, w: T.grad(T.jit(f), w),
    "jit(grad(jit))": lambda f, w: T.jit(T.grad(T.jit(f), w)),
    "grad(grad)": lambda f, w: T.grad(T.grad(f, w)),
    "jacfwd(jit(jacrev))": lambda f, w: T.jacfwd(T.jit(T.jacrev(f, w))),
    "jit(vjp)": lambda f, w: T.jit(DERIVED["vjp"](f, w)),
    "jit(hessian(jit))": lambda f, w: T.jit(T.hessian(T.jit(f), w)),
}


@pytest.mark.parametrize("nest", NESTS)
def test_law_1_an_exception_anywhere_leaves_every_state(nest):
    x = jnp.array(0.5)
    world = World()
    FUSE.set()
    expected = NESTS[nest](world.function, world.w)(x), world.snapshot()[0]
    points = FUSE.count
    assert points > 10
    for k in range(1, points + 1):
        world = World()
        transformed = NESTS[nest](world.function, world.w)
        before = world.snapshot()
        FUSE.set(k)
        with pytest.raises(Boom):
            transformed(x)
        assert same(before, world.snapshot()), k
        assert seam.innermost() is None and marker.thread.given is None
        if k % 5 == 1:  # usable again; the call compiles, so not at every point
            FUSE.set()
            jax.tree.map(np.testing.assert_array_equal, (transformed(x), world.snapshot()[0]), expected)
    FUSE.set()


@pytest.mark.parametrize("nest", ["jit", "jit-donate", "jit(grad)", "jit(grad(jit))"])
def test_law_1_an_exception_in_a_later_trace_leaves_what_was_compiled(nest):
    FUSE.set()
    world = World()

    def function(x):
        return world.function(x.sum())

    transformed = NESTS[nest](function, world.w)
    transformed(jnp.array([0.5]))
    FUSE.set()
    transformed(jnp.array([0.5, 0.5]))
    points = FUSE.count
    for _ in range(3):  # the States that the first calls create become inputs
        transformed(jnp.array([0.5]))
        transformed(jnp.array(0.5))
    for k in range(1, points + 1, 3):
        before, w = world.snapshot(), float(State.value.fget(world.w))
        FUSE.set(k)
        with pytest.raises(Boom):
            transformed(jnp.ones(k + 2))
        assert same(before, world.snapshot()), k
        FUSE.set()
        transformed(jnp.array(0.5))
        assert FUSE.count == 0  # still compiled
        assert float(State.value.fget(world.w)) == 2 * w


@pytest.mark.parametrize("nest", NESTS)
def test_law_1_no_state_holds_a_tracer(nest, no_leaks):
    FUSE.set()
    world = World()
    transformed = NESTS[nest](world.function, world.w)
    for _ in range(2):
        transformed(jnp.array(0.5))
        for state in (*world.states, *world.born):
            if seam.innermost() is None:
                assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state.value))
    assert int(world.p.value["n"]) == 2


def test_law_1_a_state_made_by_a_failed_call_says_so():
    kept = []

    @T.jit
    def fail(x):
        kept.append(State(x, name="kept"))
        raise Boom

    with pytest.raises(Boom):
        fail(1.0)
    with pytest.raises(brainstate.TraceContextError, match="kept"):
        _ = kept[0].value
    kept[0].value = jnp.array(3.0)
    assert float(kept[0].value) == 3.0


def in_threads(*jobs):
    """Run the jobs at once; raise what any of them raised."""
    errors = []

    def guarded(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def switch_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_law_1_threads_lose_no_update_and_see_no_half_step(switch_often):
    a, b = State(jnp.array(0)), State(jnp.array(0))
    done = threading.Event()

    @T.jit
    def step():
        a.value += 1
        b.value -= 1

    @T.jit
    def difference():
        return a.value + b.value

    step()
    seen = {int(difference())}

    def write():
        for _ in range(100):
            step()

    def look():
        while not done.is_set():
            seen.add(int(difference()))

    reader = threading.Thread(target=look)
    reader.start()
    in_threads(*[write] * 8)
    done.set()
    reader.join()
    assert (int(a.value), int(b.value)) == (801, -801)
    assert seen == {0}


def test_law_1_threads_lose_no_update_when_they_race_to_compile(switch_often):
    for _ in range(40):
        a, b = State(jnp.array(0)), State(jnp.array(0))
        start = threading.Barrier(8)

        @T.jit
        def step(a=a, b=b):
            a.value += 1
            b.value += 2

        def work(start=start, step=step):
            start.wait()
            for _ in range(3):
                step()

        in_threads(*[work] * 8)
        assert (int(a.value), int(b.value)) == (24, 48)


def test_law_1_scopes_are_per_thread():
    w, c = State(jnp.array(2.0)), State(jnp.array(0.0))
    seen = []

    def f(x):
        c.value = x
        in_threads(lambda: seen.append((seam.innermost(), float(c.value), float(w.value))))
        return w.value * x

    assert float(T.grad(f, w)(3.0)) == 3.0
    assert seen == [(None, 0.0, 2.0)]
    assert float(c.value) == 3.0


# ------------------------------------------------------------------------- law 3: one Python run per trace

OURS = {"jit": T.jit, "grad": T.grad, "jacrev": T.jacrev}
JAX = {"jit": jax.jit, "grad": jax.grad, "jacrev": jax.jacrev}


def nested(table, names, function):
    for name in reversed(names):
        function = table[name](function)
    return function


def nests(depth):
    return itertools.product(OURS, repeat=depth)


class Counted:
    """``x^7 w`` with a State that counts the steps, and a list that counts the runs."""

    def __init__(self):
        self.w, self.steps, self.runs = State(jnp.array(0.5)), State(jnp.array(0)), []

    def __call__(self, x):
        self.runs.append(1)
        self.steps.value += 1
        return self.w.value * x**7

    @staticmethod
    def pure(x):
        return 0.5 * x**7


def check_nest(names):
    x = jnp.array(1.25)
    function = Counted()
    got = nested(OURS, names, function)(x)
    assert len(function.runs) == 1 and int(function.steps.value) == 1, names
    np.testing.assert_allclose(got, nested(JAX, names, Counted.pure)(x), rtol=1e-5, err_msg=str(names))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_law_3_one_run_and_the_result_of_jax_at_every_nesting(depth):
    for names in nests(depth):
        check_nest(names)


@pytest.mark.parametrize("depth", [4, 5])
def test_law_3_one_run_at_every_deeper_nesting(depth):
    x = jnp.array(1.25)
    for number, names in enumerate(nests(depth)):
        function = Counted()
        shape = T.jit(nested(OURS, names, function)).eval_shape(x)
        assert len(function.runs) == 1 and int(function.steps.value) == 0, names
        assert shape.shape == ()
        if number % 27 == 5:
            check_nest(names)


def test_law_3_a_second_call_of_jit_runs_nothing():
    function = Counted()
    step = T.jit(T.grad(T.jit(T.jacrev(function))))
    step(jnp.array(1.0))
    step(jnp.array(2.0))
    assert len(function.runs) == 1
    assert int(function.steps.value) == 2


def python_calls(make, *args):
    """Return how many Python functions are called by ``make()(*args)``, when JAX's own caches are warm.

    Without what JAX spends on the traceback of an exception: it looks at all frames, so it counts the depth.
    """
    make()(*args)
    fresh, count = make(), 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call" and not frame.f_code.co_filename.endswith(("traceback.py", "linecache.py"))

    old = sys.getprofile()
    sys.setprofile(profile)
    try:
        fresh(*args)
    finally:
        sys.setprofile(old)
    return count


def test_law_3_tracing_grows_linearly_with_depth():
    x = jnp.array(1.25)
    counts = [python_calls(lambda d=d: nested(OURS, ["jit"] * d, Counted()).eval_shape, x) for d in range(2, 9)]
    steps = np.diff(counts)
    assert steps.max() <= 1.1 * steps.min(), counts


def test_law_3_tracing_costs_a_constant_factor_of_jax():
    x = jnp.array(1.25)
    ratios = []
    for depth in range(1, 5):
        names = ["jit", "grad"] * depth  # differentiation itself grows faster than linearly, in JAX as well
        ours = python_calls(lambda names=names: nested(OURS, names, Counted()).eval_shape, x)
        pure = python_calls(lambda names=names: nested(JAX, names, lambda x: Counted.pure(x)).eval_shape, x)
        ratios.append(ours / pure)
    assert max(ratios[1:]) <= 1.25 * ratios[0] + 0.25, ratios


# ------------------------------------------------------------------------- trace counts


class Runs(list):
    def __call__(self):
        self.append(1)


def test_traces_once_per_signature():
    runs, total = Runs(), State(jnp.zeros(()))  # jnp.array(0.0) would be weakly typed, and become strong by `+=`

    @T.jit
    def f(x):
        runs()
        total.value += x.sum().astype("float32")

    for _ in range(3):
        f(jnp.ones(2))
    assert len(runs) == 1
    for _ in range(2):
        f(jnp.ones(3))
        f(jnp.ones(2))
    assert len(runs) == 2
    f(jnp.ones(2, "int32"))
    f(jnp.ones(3))
    assert len(runs) == 3
    assert float(total.value) == 6 + 6 + 4 + 2 + 3


def test_traces_again_when_a_state_changes_its_shape_or_dtype():
    runs, s = Runs(), State(jnp.ones(2))

    @T.jit
    def f():
        runs()
        return s.value * 2

    f()
    for value in (jnp.ones(3), jnp.ones(2, "int32"), {"a": jnp.ones(2)}["a"], jnp.zeros(3)):
        s.value = value
        np.testing.assert_array_equal(f(), value * 2)
    assert len(runs) == 3


def test_traces_once_per_static_argument():
    runs, s = Runs(), State(jnp.array(1.0))

    def f(double):
        runs()
        s.value = s.value * 2 if double else s.value + 1

    step = T.jit(f, static_argnums=0)
    for _ in range(3):
        step(True)
        step(False)
    assert len(runs) == 2
    assert float(s.value) == 15.0


def test_a_branch_with_states_of_its_own_is_found():
    runs, a, b = Runs(), State(jnp.array(1.0)), State(jnp.array(1.0))

    def f(which):
        runs()
        state = a if which else b
        state.value += 1

    step = T.jit(f, static_argnums=0)
    for _ in range(3):
        step(True)
        step(False)
    # The first branch is traced again once, since `b` became an input of the program.
    assert len(runs) <= 3
    assert (float(a.value), float(b.value)) == (4.0, 4.0)


def test_a_state_replaced_on_a_module_adds_one_trace():
    runs = Runs()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = ParamState(jnp.array(2.0))

        def update(self, x):
            runs()
            return self.w.value * x

    model = Model()
    call = T.jit(model)
    assert float(call(3.0)) == 6.0
    model.w = ParamState(jnp.array(10.0))
    assert [float(call(3.0)) for _ in range(3)] == [30.0] * 3
    assert len(runs) == 2


def test_a_lazily_created_state_adds_one_trace():
    runs, cache = Runs(), {}

    @T.jit
    def f(x):
        runs()
        if "sum" not in cache:
            cache["sum"] = State(jnp.array(0.0))
        cache["sum"].value += x
        return cache["sum"].value

    assert [float(f(2.0)) for _ in range(4)] == [2.0, 4.0, 6.0, 8.0]
    assert len(runs) == 2


@pytest.mark.parametrize("keys", ["static", "shape"])
def test_a_lazily_created_state_of_each_branch_is_kept(keys):
    cache = {}

    def f(x, key):
        key = key if keys == "static" else x.shape
        if key not in cache:
            cache[key] = State(jnp.array(0.0))
        cache[key].value += 1.0
        return cache[key].value

    step = T.jit(f, static_argnums=1)
    got = [float(step(jnp.ones(k + 1), k)) for k in (0, 1, 0, 1, 2, 0, 1, 2)]
    assert got == [1, 1, 2, 2, 1, 3, 3, 2]


def test_states_created_anew_at_each_call_stabilise_at_two_traces():
    runs, kept = Runs(), {}

    @T.jit
    def f(x):
        runs()
        kept["state"] = State(x * 2)
        return kept["state"].value

    for i in range(5):
        assert float(f(float(i))) == 2 * i
        assert float(kept["state"].value) == 2 * i
    assert len(runs) == 2


def test_a_state_that_dies_inside_costs_nothing():
    runs = Runs()

    @T.jit
    def f(x):
        runs()
        inner = State(x)
        inner.value *= 2
        return inner.value

    assert [float(f(float(i))) for i in range(3)] == [0.0, 2.0, 4.0]
    assert len(runs) == 1
    assert len(f.trace(1.0).jaxpr.jaxpr.invars) == 1


# ------------------------------------------------------------------------- law 5: nothing on top of JAX


def canonical(jaxpr):
    """Return equations and outputs of a jaxpr with variables numbered by first use: names and input order go."""
    numbers, inputs = {}, set(jaxpr.invars) | set(jaxpr.constvars)

    def name(atom):
        if isinstance(atom, jax.extend.core.Literal):
            return ("literal", str(atom.val), str(atom.aval))
        kind = "input" if atom in inputs else "local"
        return (kind, numbers.setdefault(atom, len(numbers)), str(atom.aval))

    def inner(value):
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            return canonical(value.jaxpr)
        if isinstance(value, jax.extend.core.Jaxpr):
            return canonical(value)
        if isinstance(value, tuple | list):
            return tuple(inner(v) for v in value)
        return "function" if callable(value) else str(value)

    equations = []
    for eqn in jaxpr.eqns:
        params = tuple((k, inner(v)) for k, v in sorted(eqn.params.items()))
        equations.append(
            (
                eqn.primitive.name,
                tuple(name(v) for v in eqn.invars),
                params,
                tuple(name(v) for v in eqn.outvars),
            )
        )
    return equations, [name(v) for v in jaxpr.outvars]


def pure_loss(params, x, noise):
    return ((sum(w * x for w in params) + noise - 1.0) ** 2).sum()


def pure_step(params, x):
    loss, grads = jax.value_and_grad(pure_loss)(params, x, 0.0)
    return loss, [w - 0.1 * g for w, g in zip(params, grads, strict=True)]


def pure_noisy_step(params, data, x):
    keys = jax.random.split(jax.random.wrap_key_data(data), 2)
    data, key = jax.random.key_data(keys[0]), keys[1]
    loss, grads = jax.value_and_grad(pure_loss)(params, x, jax.random.normal(key, (3,), "float32"))
    return loss, data, [w - 0.1 * g for w, g in zip(params, grads, strict=True)]


def stateful_step(params, rng):
    def loss(x):
        noise = 0.0 if rng is None else rng.normal(size=3, dtype="float32")
        return pure_loss([w.value for w in params], x, noise)

    @T.jit
    def step(x):
        grads, value = T.grad(loss, params, return_value=True)(x)
        for w, g in zip(params, grads, strict=True):
            w.value = w.value - 0.1 * g
        return value

    return step


def instructions(compiled):
    """Return the number of instructions of the optimised program."""
    return sum(" = " in line for line in compiled.as_text().splitlines())


@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noisy"])
@pytest.mark.parametrize("n", [1, 2, 10])
def test_law_5_the_program_is_that_of_the_pure_step(n, noisy):
    x = jnp.arange(3.0)
    values = [jnp.full(3, 0.1 * i) for i in range(n)]
    rng = brainstate.random.RandomState(0) if noisy else None
    step = stateful_step([ParamState(v) for v in values], rng)
    if noisy:
        pure, args = jax.jit(pure_noisy_step), (values, rng.value, x)
    else:
        pure, args = jax.jit(pure_step), (values, x)

    assert canonical(step.trace(x).jaxpr.jaxpr) == canonical(pure.trace(*args).jaxpr.jaxpr)
    assert instructions(step.lower(x).compile()) == instructions(pure.lower(*args).compile())


def test_law_5_the_comparison_can_fail():
    x, values = jnp.arange(3.0), [jnp.ones(3)]

    def other(params, x):
        loss, new = pure_step(params, x)
        return loss, [w * 1.5 for w in new]

    programs = [jax.jit(f) for f in (pure_step, other)]
    one, two = (canonical(f.trace(values, x).jaxpr.jaxpr) for f in programs)
    assert one != two
    swapped = jax.jit(lambda x, params: pure_step(params, x)).trace(x, values).jaxpr.jaxpr
    assert canonical(swapped) == one


# ------------------------------------------------------------------------- law 7: importing costs nothing

IMPORT = """
import sys
import jax
before = set(sys.modules)
import brainstate
print(*sorted(m for m in set(sys.modules) - before if m.split(".")[0] != "brainstate"))
"""


def test_law_7_importing_brings_little_beside_jax():
    """How long it takes, `make bench` says."""
    run = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
    modules = run.stdout.split()
    extra = {name.split(".")[0] for name in modules}
    assert extra <= set(sys.stdlib_module_names) | {"jax", "jaxlib", "numpy"}, extra
    assert len(modules) <= 40, modules
