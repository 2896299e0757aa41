"""Workers seen from outside: each job in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from typing import Any

from .base import LeftOut


class Process(AbstractContextManager["Process"]):
    """A new process at a job of ``worker``, its output kept off the terminal; ends with the ``with`` block.

    Args:
        kind: of the job. variables: of the environment, added to this process's. arguments: of the job.
    """

    def __init__(self, kind: str, variables: dict[str, str], **arguments: Any) -> None:
        self.kind = kind
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self.tell({"kind": kind, **arguments})

    def tell(self, message: Any) -> None:
        """Send one message; a process that has died says so at the next answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass

    def answer(self) -> Any:
        """Wait for the next message of the process.

        Raises:
            LeftOut: it died; what it said last.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._said.seek(0)
        lines = [line for line in self._said.read().splitlines() if line.strip()] or ["it said nothing"]
        raise LeftOut(f"failed ({self.kind}, exit code {code}): {lines[-1]}")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        # Not communicate(): a message that the dead process left unread would raise again.
        for pipe in (self._process.stdout, self._process.stdin, self._said):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass
        self._process.wait()


def run_job(kind: str, variables: dict[str, str], **arguments: Any) -> Any:
    """Do a job of ``worker`` in a new process and give its result.

    Raises:
        LeftOut: the engine cannot take part, or the process died; what it said last.
    """
    with Process(kind, variables, **arguments) as process:
        answer = process.answer()
    if "left_out" in answer:
        raise LeftOut(answer["left_out"])
    return answer
