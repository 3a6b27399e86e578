"""Runs steps one after the other, each in a process of its own, and saves what they find.

This process never touches the GPU. A step that hangs is killed with all that it started. A step
that crashes or loses the device is noted, and the next one starts in a new process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .steps import Step

ROOT = Path(__file__).parent.parent.parent

# A step that hasn't ended so many seconds after its time is up is killed.
GRACE = 8.0


class Session:
    """What a run has found so far.

    Args:
        folder: the folder that gpu.json goes to.
        budget: seconds from now until the last step is to have ended.
        rehearse: whether to run on a CPU, at tiny sizes.
    """

    def __init__(self, folder: Path, budget: float, rehearse: bool) -> None:
        self.path = folder / "gpu.json"
        self.budget, self.rehearse = budget, rehearse
        self.known: dict = {}
        self.steps: dict[str, dict] = {}
        self.unsaved: str | None = None
        self._start = time.monotonic()
        self._lock = threading.Lock()

    def run(self, steps: Sequence[Step], say: Callable[[str], None] = print) -> None:
        """Runs the steps.

        A step may run until its share of the budget and the shares of all earlier steps have
        passed, so that it gets the time that earlier steps left.
        """
        whole, due = sum(step.seconds for step in steps), 0.0
        for step in steps:
            due += step.seconds / whole * self.budget
            left = due - (time.monotonic() - self._start)
            self.steps[step.name] = {"status": "running", "seconds": 0.0, "records": []}
            say(f"== {step.name}: {step.what}; {left:.0f} s")
            if left < 1:
                self._end(step, "no time", 0.0)
                continue
            before = time.monotonic()
            status = self._run_step(step, left)
            self._end(step, status, time.monotonic() - before)
            say(f"-- {step.name}: {status}, {self.steps[step.name]['seconds']:.1f} s")

    def _end(self, step: Step, status: str, seconds: float) -> None:
        self.steps[step.name].update(status=status, seconds=round(seconds, 1))
        self._save()

    def _run_step(self, step: Step, seconds: float) -> str:
        """Returns how a step ended."""
        ours, theirs = os.pipe()
        command = [sys.executable, "-m", "benchmarks.gpu.step", step.module, str(theirs)]
        command += [str(seconds), *(["--rehearse"] if self.rehearse else [])]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=(theirs,),
            cwd=ROOT,
            env=self._environment(step),
            start_new_session=True,
        )
        os.close(theirs)
        reader = threading.Thread(target=self._read, args=(step, ours), daemon=True)
        reader.start()
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(json.dumps(self.known).encode())
            status = _how_it_ended(process.wait(seconds + GRACE))
        except subprocess.TimeoutExpired:
            status = "killed: it did not end in time"
        finally:
            # A step that has ended or crashed may have left processes that still run.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(GRACE)
        return status

    def _environment(self, step: Step) -> dict[str, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.rehearse:
            environment |= {
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "TRITON_INTERPRET": "1" if step.kernels else "0",
            }
        return environment

    def _read(self, step: Step, descriptor: int) -> None:
        """Stores each record of a step at once, and other lines as records of kind "rubbish"."""
        with open(descriptor, errors="replace") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                    kind = record["kind"]
                except (ValueError, TypeError, KeyError):
                    record = {"kind": "rubbish", "text": line.strip()[:200]}
                else:
                    if kind == "known":
                        self.known.update({k: v for k, v in record.items() if k != "kind"})
                self.steps[step.name]["records"].append(record)
                self._save()

    def as_dict(self) -> dict:
        """Returns what gpu.json holds."""
        return {
            "rehearsal": self.rehearse,
            "budget": self.budget,
            "seconds": round(time.monotonic() - self._start, 1),
            "known": self.known,
            "steps": self.steps,
        }

    def _save(self) -> None:
        """Writes gpu.json. If that fails, the earlier file stays, and the run goes on."""
        with self._lock:
            fresh = self.path.with_suffix(".tmp")
            try:
                fresh.write_text(json.dumps(self.as_dict(), indent=1))
                fresh.replace(self.path)
                self.unsaved = None
            except OSError as problem:
                self.unsaved = f"gpu.json is not up to date: {problem}"
                with contextlib.suppress(OSError):
                    fresh.unlink(missing_ok=True)


def _how_it_ended(status: int) -> str:
    if status == 0:
        return "done"
    if status < 0:
        return f"crashed: {signal.Signals(-status).name}"
    return f"failed: exit status {status}"
