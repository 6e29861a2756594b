"""Interrupts, copies, threads and donation: what is left behind is whole, refers to the right States, and says so."""

import copy
import functools
import gc
import pickle
import threading
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainstate
import brainstate.transform as T
from brainstate import ParamState, State, StateTypeError, StateValueError, graph, nn, random
from brainstate._seam import donation as _taken
from interrupts import SCENARIOS, Trial, uncovered

WHOLE = 800  # steady calls with no more places are interrupted at each of them
MANY, FEW = 200, 10  # places of a longer one, and of one that takes long


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_b1_an_interrupt_leaves_all_or_nothing(scenario):
    trial = Trial(scenario)
    places = trial.look()
    sample = FEW if scenario.long else MANY
    chosen = places if len(places) <= WHOLE else places[:: -(-len(places) // sample)]
    came = [trial.interrupt(place) for place in chosen]
    assert len(places) > 100 and sum(came) >= 0.9 * len(came)  # a generator that is being closed loses an exception


def test_b1_every_jump_in_a_with_block_is_covered():
    """CPython 3.13 compiles jumps at which an interrupt passes the end of the block by."""
    package = Path(brainstate.__file__).parent
    files = {path: compile(path.read_text(), path, "exec") for path in package.rglob("*.py")}
    assert {str(path): lines for path, code in files.items() if (lines := uncovered(code))} == {}


# ------------------------------------------------------------------------------------------ A5: threads and keys


def drawing_calls():
    rng, total, w = random.RandomState(0), State(jnp.array(0.0)), ParamState(jnp.array(1.0))

    def draw():
        return jax.random.key_data(rng.split_key())

    def counted():
        total.value = total.value + 1.0
        return draw()

    return {
        "eager": draw,
        "several": lambda: jax.random.key_data(rng.split_key(3)),
        "jit": T.jit(counted),
        "jit that donates": T.jit(counted, donate_states=True),
        "prepare": T.prepare(counted),
        "vmap": lambda: T.vmap(lambda x: draw())(jnp.arange(2)),
        "jit of vmap": T.jit(lambda: T.vmap(lambda x: draw())(jnp.arange(2))),
        "grad": lambda: T.grad(lambda: (w.value * 1.0, draw()), w, has_aux=True)()[1],
        "for_loop": lambda: T.for_loop(lambda x: draw(), jnp.arange(2)),
    }


PAIRS = [
    *(("eager", other) for other in ("eager", "several", "jit", "jit that donates", "prepare", "vmap", "grad")),
    *[("jit", "prepare"), ("jit", "vmap"), ("grad", "grad"), ("vmap", "jit of vmap"), ("for_loop", "jit")],
]


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_a5_no_two_threads_get_one_key(pair):
    calls, keys, together = drawing_calls(), [], threading.Barrier(2)
    chosen = [calls[name] for name in pair]
    for call in chosen:
        call()

    def work(call, times):
        together.wait()
        keys.extend([call() for _ in range(times)])

    times = 12 if {"for_loop", "vmap", "grad"} & set(pair) else 200
    threads = [threading.Thread(target=work, args=(call, times)) for call in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 2 * times
    found = np.concatenate([np.reshape(np.asarray(key), (-1, 2)) for key in keys]).tolist()
    assert len(set(map(tuple, found))) == len(found)


def test_a5_a_draw_while_another_thread_computes_with_the_generator():
    rng, w, inner = random.RandomState(0), ParamState(jnp.array(1.0)), []

    def loss():
        drawn = rng.split_key()
        thread = threading.Thread(target=lambda: inner.append(rng.split_key()))
        thread.start()
        thread.join(20)  # nobody waits for the derivative
        return w.value * 1.0, drawn

    _, drawn = T.grad(loss, w, has_aux=True)()
    alone = random.RandomState(0)
    assert drawn == alone.split_key() and inner[0] != drawn  # this one draws what it draws alone
    assert rng.split_key() not in (drawn, inner[0])


# ------------------------------------------------------------------------------------------ A4: copies


class Model(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.fast = make(self)
        self.weight = ParamState(jnp.array(2.0))
        self.count = State(jnp.array(0))

    def forward(self, x):
        self.count.value = self.count.value + 1
        return self.weight.value * x

    @T.jit
    def decorated(self, x):
        return self.forward(x)


class Caller:
    def __init__(self, fun):
        self.fun = fun


MAKES = {
    "jit": lambda m: T.jit(m.forward),
    "jit of a lambda": lambda m: T.jit(lambda x: m.forward(x)),
    "method": lambda m: m.forward,
    "compiled method": lambda m: m.decorated,
    "grad of an argument": lambda m: T.grad(m.forward),
    "grad of States": lambda m: T.grad(m.forward, m),
    "jit of grad": lambda m: T.jit(T.grad(m.forward, m)),
    "watched grad": lambda m: T.grad(m.forward, m, debug_nan=True),
    "jacrev": lambda m: T.jacrev(m.forward),
    "hessian": lambda m: T.hessian(m.forward),
    "partial": lambda m: functools.partial(T.jit(m.forward)),
    "checkpoint": lambda m: T.checkpoint(m.forward),
    "checkpoint of jit": lambda m: T.checkpoint(T.jit(m.forward)),
    "vmap": lambda m: T.vmap(m.forward, in_axes=None, axis_size=1),
    "list": lambda m: [T.jit(m.forward), 3],
    "tuple": lambda m: (3, T.jit(m.forward)),
    "dict": lambda m: {"a": T.jit(m.forward)},
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "deepcopy in a list": lambda m: copy.deepcopy([m])[0],
    "deepcopy of what holds it": lambda m: copy.deepcopy(Caller(m)).fun,
    "clone": graph.clone,
    "clone in a list": lambda m: graph.clone([m])[0],
    "split and merge": lambda m: graph.treefy_merge(*graph.treefy_split(m)),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}
BY_NAME_ONLY = {"jit of a lambda", "checkpoint", "checkpoint of jit", "vmap"}  # Python pickles no closure


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("make", MAKES)
def test_a4_copies_act_on_the_states_of_the_copy(make, copied):
    if copied == "pickle" and make in BY_NAME_ONLY:
        pytest.skip("Python does not pickle functions without a name")
    model = Model(MAKES[make])

    def call(model):
        (fun,) = [f for f in jax.tree.leaves(model.fast) if callable(f)]
        fun(1.5)

    call(model)
    twin = COPIES[copied](model)
    assert type(twin.fast) is type(model.fast)
    call(twin)
    call(twin)
    call(model)
    assert (int(model.count.value), int(twin.count.value)) == (2, 3)


def test_a4_the_result_of_a_copy_is_of_its_states():
    model = Model(lambda m: T.jit(T.grad(lambda x: m.forward(x) ** 2, m)))
    twin = graph.clone(model)
    twin.weight.value = jnp.array(5.0)
    assert [*jax.tree.leaves(model.fast(1.0)), *jax.tree.leaves(twin.fast(1.0))] == [4.0, 10.0]


def test_a4_a_deep_copy_of_a_function_alone_keeps_its_updates():
    total = State(jnp.array(0))

    def add(x):
        total.value = total.value + x

    for fun in (T.jit(add), functools.partial(T.jit(add)), copy.copy(T.jit(add))):
        copy.deepcopy(fun)(1)
    assert int(total.value) == 3


def test_a4_a_transform_of_a_method_is_copied_with_its_object():
    model = Model(lambda m: None)
    for fun in (
        T.grad(model.forward, model.weight),
        T.jit(model.forward),
        T.vmap(model.forward, in_axes=None, axis_size=1),
    ):
        copy.deepcopy(fun)(1.0)
    assert int(model.count.value) == 0


def test_a4_functions_of_others_stay_what_they_are():
    other = Model(lambda m: None)
    model = Model(lambda m: [jnp.tanh, other.forward])
    twin = graph.clone(model)
    assert twin.fast[0] is jnp.tanh and twin.fast[1] == other.forward
    assert graph.graphdef(model) == graph.graphdef(model) == graph.graphdef(twin)


@pytest.mark.parametrize(
    "make", [lambda m: jax.jit(m.forward), lambda m: T.prepare(m.scaled, 1.0)], ids=["jax.jit", "prepare"]
)
def test_a4_what_cannot_be_made_again_is_refused(make):
    class Late(Model):
        def scaled(self, x):
            return self.weight.value * x

    model = Late(lambda m: None)
    model.fast = make(model)
    for copied in (graph.clone, copy.deepcopy):
        with pytest.raises(StateTypeError, match="for the copy"):
            copied(model)


# ------------------------------------------------------------------------------------------ B2: donation


@pytest.fixture
def no_donors():
    before = dict(_taken.donors)
    _taken.donors.clear()
    yield
    _taken.donors.update(before)


def failing(x):
    if x > 4:
        raise ValueError("too much")
    return np.float32(x)


@pytest.mark.parametrize("prepared", [False, True], ids=["jit", "prepare"])
def test_b2_an_error_in_a_donated_call_says_what_is_gone(prepared):
    w, other = State(jnp.arange(3.0), name="w"), State(jnp.ones(2), name="other")

    def step(x):
        w.value = w.value + jax.pure_callback(failing, jax.ShapeDtypeStruct((), "float32"), x)
        return other.value

    call = T.prepare(step, 1.0, donate_states=True) if prepared else T.jit(step, donate_states=True)
    call(1.0)
    with pytest.raises(StateValueError, match=r"step failed \(ValueError: too much\).*'w' \(donate.*Assign new values"):
        call(5.0)
    with pytest.raises(StateValueError, match=r"'w' are gone: given to .*step"):
        w.value  # noqa: B018
    assert other.value.tolist() == [1.0, 1.0]
    w.value = jnp.zeros(3)
    call(1.0)
    assert w.value.tolist() == [1.0, 1.0, 1.0]


USES = {
    "read": lambda m: m.weight.value,
    "jit": lambda m: T.jit(lambda: m.weight.value + 1)(),
    "write": lambda m: T.jit(m.bump)(),
    "grad": lambda m: T.grad(lambda: m.weight.value.sum(), m.weight)(),
    "for_loop": lambda m: T.for_loop(lambda x: m.weight.value + x, jnp.arange(2.0)),
    "donate": lambda m: T.jit(m.bump, donate_states=True)(),
}


@pytest.mark.parametrize("use", USES)
def test_b2_a_clone_of_a_donated_model_names_the_function(use, no_donors):
    class Bumped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = ParamState(jnp.ones(2))

        def bump(self):
            self.weight.value = self.weight.value + 1.0

    model = Bumped()
    twin = graph.clone(model)

    def train():
        model.bump()

    T.jit(train, donate_states=True)()
    with pytest.raises(StateValueError, match=r"weight are gone: given to .*train.*deepcopy"):
        USES[use](twin)
    assert model.weight.value.tolist() == [2.0, 2.0]
    twin.weight.value = jnp.zeros(2)
    USES[use](twin)


def test_b2_a_donated_argument_of_a_state_is_named(no_donors):
    s = State(jnp.ones(2), name="s")
    T.jit(lambda x: x + 1, donate_argnums=0)(s.value)
    with pytest.raises(StateValueError, match=r"'s' are gone: given to .*lambda"):
        s.value  # noqa: B018


@pytest.mark.parametrize("kind", ["jit", "prepare"])
def test_b2_reading_beside_donating(kind):
    total = State(jnp.zeros(64))

    def add():
        total.value = total.value + 1.0

    def look():
        return total.value.sum()

    made = T.jit if kind == "jit" else T.prepare
    step, read, errors, over = made(add, donate_states=True), made(look), [], threading.Event()
    step(), read()

    def reading():
        try:
            while not over.is_set():
                float(read())
                _ = total.value
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=reading) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        step()
    over.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert float(total.value[0]) == 501.0


# ------------------------------------------------------------------------------------------ C: what is kept alive


def test_c_a_deleted_jit_lets_go_of_its_function():
    class Kept:
        pass

    def made():
        kept = Kept()
        fun = T.jit(lambda x: (kept, x)[1])
        fun(1.0)
        return fun, weakref.ref(kept)

    gc.collect()
    gc.disable()
    try:
        fun, kept = made()
        del fun
        assert kept() is None
    finally:
        gc.enable()
