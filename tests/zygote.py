"""A process that has imported torch and fairseq, and forks for every command of a test.

The imports are most of what a command on tiny data takes. Neither the plugin nor a command has been
imported here: a fork does what ``python -m MODULE ARGUMENTS`` does from there on.
"""

from __future__ import annotations

import json
import logging
import os
import runpy
import sys

import fairseq.sequence_generator
import fairseq.trainer  # noqa: F401 (with most of what the commands import)


def serve() -> dict | None:
    """Fork for each order on stdin and answer with its status; the order, in a fork."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def become(order: dict) -> None:
    """Take the order's files, folder and environment."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, (name, how) in enumerate(
        ((order["stdin"], os.O_RDONLY), (order["stdout"], flags), (order["stderr"], flags))
    ):
        file = os.open(name, how, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (what this process had read is gone)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    sys.path[0] = order["cwd"]
    sys.argv = [order["module"], *order["arguments"]]


# The imports have spoken, which sets logging up; a command does that itself, before it imports.
logging.root.handlers.clear()
logging.root.setLevel(logging.WARNING)
order = serve()
if order is not None:
    become(order)
    if order["module"] == "-c":
        sys.argv[:2] = ["-c"]
        code = order["arguments"][0]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
