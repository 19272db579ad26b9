"""Play a small run in this process that gets a signal at a chosen place: python killed_run.py DIRECTORY PLACE [SIGNAL].

PLACE is a key of PLACES, or `never`; the signal is SIGKILL unless named. Used by test_loop.py.
"""

import dataclasses
import os
import signal
import sys

import conftest

from tpaw_jax.generation import engine, generation_file
from tpaw_jax.runtime import preemption
from tpaw_jax.selfplay import loop, round_store, round_training
from tpaw_jax.storage import ring
from tpaw_jax.training import scoring

DIRECTORY, PLACE, *SIGNAL = sys.argv[1:] if __name__ == "__main__" else ("", "never")


def die(*_, **__):
    os.kill(os.getpid(), signal.Signals[SIGNAL[0]] if SIGNAL else signal.SIGKILL)


def at_call(module, name, number, after=False):
    """Die at the given call of a function, before or after its work."""
    original, calls = getattr(module, name), []

    def wrapped(*arguments, **named):
        calls.append(1)
        if len(calls) == number and not after:
            die()
        result = original(*arguments, **named)
        if len(calls) == number and after:
            die()
        return result

    setattr(module, name, wrapped)


def while_training(steps):
    """Die after so many steps of a round have been dispatched."""
    original = round_training.train

    def train(this, *arguments):
        calls = []

        def step(*inputs):
            calls.append(1)
            if len(calls) == steps:
                die()
            return this.session.step(*inputs)

        return original(this._replace(session=dataclasses.replace(this.session, step=step)), *arguments)

    round_training.train = train


PLACES = {
    "sampling": lambda: at_call(engine._Engine, "_collect", 2),
    "keeping": lambda: at_call(generation_file, "append", 1, after=True),
    "sampled": lambda: at_call(round_store, "append", 1, after=True),
    "scoring": lambda: at_call(scoring, "score", 1, after=True),
    "scored": lambda: at_call(round_store, "add_scores", 2, after=True),
    "training": lambda: while_training(6),
    "saving": lambda: at_call(ring, "save_training", 1, after=True),
    "pushing": lambda: at_call(ring, "push", 1, after=True),
}

if __name__ == "__main__":
    if PLACE != "never":
        PLACES[PLACE]()
    with preemption.PreemptionNotice() as notice:
        try:
            # One device: the eight that the tests see would only slow this down.
            loop.play(conftest.small_run(DIRECTORY, **{"mesh.fsdp": -1}), notice=notice)
        except preemption.Preempted as stopped:
            print(stopped)
            sys.exit(preemption.EXIT_CODE)
