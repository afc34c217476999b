"""python crash_worker.py WORKDIR [PHASE CALL MILLISECONDS]: a short run that kills itself.

The process kills itself MILLISECONDS after it begins PHASE for the CALL-th time. PHASE is 'step'
(the steps of a chunk), 'checkpoint' (writing one) or 'evaluation'.
"""

import os
import signal
import sys
import threading
import time

from runs_of_tests import tiny

from layermatch_jax import evaluate, train
from layermatch_jax.data import feed
from layermatch_jax.runtime import checkpoint

FIELDS = {
    "train_steps": 16,
    "input.steps_per_call": 2,
    "checkpoint_every": 4,
    "eval_every": 2,
    "log_every": 6,  # a window may begin before a checkpoint and end after it
    "model.name": "linear",
    "parallelism": "jit",
}


def kill_in(milliseconds):
    def kill():
        time.sleep(int(milliseconds) / 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def main(workdir, phase=None, call=None, milliseconds=None):
    left = [int(call or 0)]

    def begins(which):
        if which == phase:
            left[0] -= 1
            if left[0] == 0:
                kill_in(milliseconds)

    def told(which, function):
        def replacement(*args, **kwargs):
            begins(which)
            return function(*args, **kwargs)

        return replacement

    create = feed.create

    def told_feed(*args):
        created = create(*args)

        def chunks(steps):
            for step, chunk in created.chunks(steps):
                begins("step")
                yield step, chunk

        return created._replace(chunks=chunks)

    feed.create = told_feed
    checkpoint.save = told("checkpoint", checkpoint.save)
    evaluate.evaluate = told("evaluation", evaluate.evaluate)
    train.train_and_evaluate(tiny("flexmatch+layerwise", **FIELDS), workdir)


if __name__ == "__main__":
    main(*sys.argv[1:])
