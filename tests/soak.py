"""Interrupts, threads, donation and random numbers, for as long as one likes: ``make soak SECONDS=600``.

Two legs take turns. One places interrupts before bytecodes chosen at random (`interrupts`). In the other real signals
meet compiled calls, while other threads count in the same States, draw from the same generator and donate.
"""

import os

os.environ.setdefault("NPROC", "32")  # see conftest.py
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA logs each array that was donated in the meantime

import random as python_random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from brainstate import State, random
from brainstate._seam import scope as _scope
from brainstate.transform import Prepared, jit, prepare
from interrupts import SCENARIOS, Trial

ROUND = 10  # seconds, of which signals have a third
ENOUGH = 100_000  # placed interrupts
rounds = python_random.Random(0)
other_thread = ThreadPoolExecutor(1)


class Placed:
    """Interrupts calls at all of their places, in an order by chance, and begins again."""

    def __init__(self):
        self.trials = [Trial(scenario) for scenario in SCENARIOS if not scenario.meets]
        self.ahead: dict = {}  # trial -> its places that are left
        self.met = False

    def meet(self) -> None:
        """Let JAX's own code meet a State: from then on calls do more, and come by other places."""
        self.trials += [Trial(scenario) for scenario in SCENARIOS if scenario.meets]
        self.ahead, self.met = {}, True

    def run(self, seconds) -> int:
        """Interrupt calls: those that take long for a quarter of the time, all of the others for as long each."""
        begun, count = time.monotonic(), 0
        while time.monotonic() < begun + seconds / 4:
            count += self.one(rounds.choice([trial for trial in self.trials if trial.scenario.long]))
        others = [trial for trial in self.trials if not trial.scenario.long]
        for trial in others:
            end = time.monotonic() + seconds * 3 / 4 / len(others)
            while time.monotonic() < end:
                count += self.one(trial)
        return count

    def one(self, trial) -> bool:
        ahead = self.ahead.setdefault(trial, [])
        if not ahead:
            ahead += trial.look()
            rounds.shuffle(ahead)
        return trial.interrupt(ahead.pop())


class Signals:
    """Sends this process a SIGINT at a time chosen at random, which raises at most once in each ``armed`` call."""

    def __init__(self):
        self.armed, self.over = False, False
        self.before = signal.signal(signal.SIGINT, self.arrived)
        self.thread = threading.Thread(target=self.send)
        self.thread.start()

    def arrived(self, *_):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt

    def send(self):
        chance = python_random.Random(1)
        while not self.over:
            time.sleep(chance.uniform(0, 2e-3))
            os.kill(os.getpid(), signal.SIGINT)

    def stop(self):
        self.over = True
        self.thread.join()
        signal.signal(signal.SIGINT, self.before)


def counters():
    """Return calls that add one to all of their States, with these."""
    for donates in (False, True):
        states = [State(jnp.array(0)) for _ in range(30)]

        def add(states=states):
            for state in states:
                state.value = state.value + 1

        yield jit(add, donate_states=donates), states
        states = [State(jnp.array(0)) for _ in range(30)]
        yield prepare(lambda states=states, add=add: add(states), donate_states=donates), states


class Company:
    """Threads that count in one State, donate it, read it, and draw from one generator."""

    def __init__(self):
        self.total, self.other = State(jnp.array(0)), State(jnp.array(0))
        self.rng, self.keys, self.counts, self.over = random.RandomState(0), [], [], False
        self.errors: list = []

    def bump(self):
        self.total.value = self.total.value + 1

    def drawn(self):
        self.other.value = self.other.value + 1
        return jax.random.key_data(self.rng.split_key())

    def __enter__(self):
        counts = [jit(self.bump), jit(self.bump, donate_states=True), prepare(self.bump)]
        read = jit(lambda: self.total.value + 0)
        draws = [lambda: jax.random.key_data(self.rng.split_key()), jit(self.drawn), prepare(self.drawn)]
        self.threads = [threading.Thread(target=self.work, args=(call, self.counts)) for call in counts]
        self.threads += [threading.Thread(target=self.work, args=(call, self.keys)) for call in draws]
        self.threads.append(threading.Thread(target=self.work, args=(read, [])))
        for call in (*counts, *draws, read):
            call()
        self.total.value = jnp.array(0)
        for thread in self.threads:
            thread.start()
        return self

    def work(self, call, results):
        try:
            while not self.over:
                results.append(call())
                time.sleep(1e-3)
        except BaseException as error:
            self.errors.append(error)

    def __exit__(self, *_):
        self.over = True
        for thread in self.threads:
            thread.join()
        assert not self.errors, self.errors
        assert int(self.total.value) == len(self.counts), "an update is lost"
        keys = [tuple(key.tolist()) for key in self.keys]
        assert len(set(keys)) == len(keys), "two threads drew one key"


def signalled(seconds) -> int:
    """Meet compiled calls with signals."""
    subjects, count, end = list(counters()), 0, time.monotonic() + seconds
    for call, _ in subjects:
        call()
    signals = Signals()
    try:
        while time.monotonic() < end:
            call, states = rounds.choice(subjects)
            before, done = int(states[0].value), 0
            try:
                signals.armed = True
                while signals.armed:  # an exception in the middle of a garbage collection gets lost
                    call()
                    done += 1
            except KeyboardInterrupt as interrupt:
                count += 1
                if isinstance(call, Prepared) and "are gone" in "".join(getattr(interrupt, "__notes__", ())):
                    # JAX runs a prepared program in a Python frame of its own, where a signal may come between the end
                    # of the program and the commit: the interrupt names the States.
                    for state in states:
                        state.value = jnp.array(0)
                    continue
            values = {int(state.value) for state in states}
            # The last call may have been interrupted after its commit.
            assert values in ({before + done}, {before + done + 1}), f"half a commit: {values}"
            assert _scope.innermost() is None and not _scope._open
            if count % 100 == 0:
                assert other_thread.submit(call).result(20) is None  # no lock is held
    finally:
        signals.stop()
    return count


def soak(seconds) -> None:
    """Run both legs in turn, until the time is over and enough interrupts were placed."""
    began, placed, places, signs, passed = time.monotonic(), Placed(), 0, 0, 0.0
    while passed < seconds or places < ENOUGH:
        places += placed.run(ROUND * 2 / 3)
        with Company():
            signs += signalled(ROUND / 3)
        passed = time.monotonic() - began
        print(f"{places} placed interrupts of {ENOUGH}, {signs} signals, {passed:.0f} s of {seconds:.0f}", flush=True)
        if not placed.met and places >= ENOUGH / 2:
            placed.meet()


if __name__ == "__main__":
    soak(float(sys.argv[1]) if len(sys.argv) > 1 else 120)
