"""Runs programs in processes that are forked from this one, which has done the imports that they share: each line of
its input asks for one (`tests.native.bindings.run`), each line of its output is the exit status of one."""

import json
import os
import sys
import traceback

import pytest
import torch._dynamo
import torch.testing._internal.optests  # noqa: F401 - of torch.library.opcheck

import sensibert.ops  # noqa: F401


def enter(asked: dict) -> None:
    said = os.open(asked["said"], os.O_WRONLY | os.O_CREAT)
    for descriptor, to in ((os.open(os.devnull, os.O_RDONLY), 0), (said, 1), (said, 2)):
        os.dup2(descriptor, to)
    os.environ["SENSIBERT_TEST_BINDING"] = asked["binding"]
    status = 1
    try:
        exec(compile(asked["code"], "program", "exec"), {"__name__": "__main__"})
        status = int(pytest.main(asked["pytest"])) if asked["pytest"] else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        if not (child := os.fork()):
            enter(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
