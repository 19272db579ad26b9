"""A small run whose process gets a signal at a chosen place, for test_loop.py."""

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


def at_call(die, module, name, number, after=False):
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


def while_training(die, steps):
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
    "sampling": lambda die: at_call(die, engine._Engine, "_collect", 2),
    "keeping": lambda die: at_call(die, generation_file, "append", 1, after=True),
    "sampled": lambda die: at_call(die, round_store, "append", 1, after=True),
    "scoring": lambda die: at_call(die, scoring, "score", 1, after=True),
    "scored": lambda die: at_call(die, round_store, "add_scores", 2, after=True),
    "training": lambda die: while_training(die, 6),
    "saving": lambda die: at_call(die, ring, "save_training", 1, after=True),
    "pushing": lambda die: at_call(die, ring, "push", 1, after=True),
}


def play(directory, place=None, by=signal.SIGKILL, settings=()):
    """Play the run; the process sends itself the signal `by` at `place`, a key of PLACES."""
    if place is not None:
        PLACES[place](lambda: os.kill(os.getpid(), by))
    with preemption.PreemptionNotice() as notice:
        try:
            loop.play(conftest.small_run(directory, **{"mesh.fsdp": -1}, **dict(settings)), notice=notice)
        except preemption.Preempted as stopped:
            print(stopped)
            sys.exit(preemption.EXIT_CODE)
