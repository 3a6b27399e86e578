"""The ticketed protocol, run in plain Python under hostile schedules.

The functions are those of `kernels/tickets.py` themselves; `tl` is a machine that may
switch to another program at each access to memory. Accesses happen one after the
other, but a program must not see another's plain store unless a barrier, a release
and an acquire of what was released lie in between: weaker memory shows as a race.
"""

import ctypes
import math
import random
import threading
from collections import Counter
from itertools import product
from types import SimpleNamespace

import pytest

from fastbn.kernels import tickets


@pytest.fixture(autouse=True)
def _plain_python(monkeypatch):
    """What AMD needs besides is seen in the compiled code (`test_compiled.py`)."""
    monkeypatch.setattr(tickets, "wait_for_own_stores", lambda: None)


class Deadlock(Exception):
    """All running programs wait for memory that none of them will change."""


class Race(AssertionError):
    """An access to what another program stored, and nothing orders the two."""


class Stopped(Exception):
    """Unwinds the other programs after a failure."""


class Cell:
    """A word of memory: its last plain store, and the stores released by atomics to it."""

    def __init__(self, value=None):
        self.value, self.store, self.released = value, None, set()


class Pointer:
    def __init__(self, cells, index=0):
        self.cells, self.index = cells, index

    def __add__(self, offset):
        return Pointer(self.cells, self.index + offset)

    @property
    def cell(self):
        return self.cells[self.index]


class Program:
    def __init__(self):
        self.baton = threading.Semaphore(0)
        self.ticket, self.last, self.turn = None, False, 0
        # Stores that it may see, and its own that no barrier has followed.
        self.known, self.pending = set(), set()
        self.polled = self.awaits = None

    def blocked(self):
        """About to read what it last read, in vain."""
        return self.awaits is not None and self.awaits.value == self.polled[1]


class Machine:
    """Runs so many programs at a time: threads of which one has the baton. Also their `tl`.

    Programs are alike until they draw a ticket: in which order they start is in
    which order they draw, and the schedule decides that.
    """

    int32, int64 = ctypes.c_int32, ctypes.c_int64

    def __init__(self, schedule, resident):
        self.schedule, self.resident = schedule, resident

    def launch(self, kernel, programs, total):
        self.programs, self.to_start, self.running = programs, programs, []
        self.total = total
        self.failure, self.steps, self.spins = None, 0, 0
        self.kernel, self.done = kernel, threading.Semaphore(0)
        self.hand_on()
        self.done.acquire()
        if self.failure:
            raise self.failure

    def run(self, program):
        program.baton.acquire()
        try:
            if not self.failure:
                self.kernel(program)
        except Stopped:
            pass
        except Exception as failure:
            self.failure = failure
        self.running.remove(program)
        self.hand_on()

    def hand_on(self):
        while not self.failure and self.to_start and len(self.running) < self.resident:
            self.to_start -= 1
            self.running.append(Program())
            threading.Thread(target=self.run, args=self.running[-1:], daemon=True).start()
        if not self.running:
            self.done.release()
            return
        self.steps += 1
        self.able = [program for program in self.running if not program.blocked()]
        if not self.able:
            self.failure = self.failure or Deadlock(f"{len(self.running)} programs wait")
        self.current = self.running[0] if self.failure else self.schedule(self)
        self.current.turn = self.steps
        self.current.baton.release()

    def switch(self, awaits=None):
        me = self.current
        me.awaits = awaits
        self.hand_on()
        me.baton.acquire()
        if self.failure:
            raise Stopped
        self.spins += awaits is not None
        return me

    def atomic(self, pointer, new, sem, awaits=None):
        me, cell = self.switch(awaits), pointer.cell
        self.check(me, cell)
        if sem in ("acquire", "acq_rel"):
            me.known |= cell.released
        if sem in ("release", "acq_rel"):
            cell.released |= me.known
        old, cell.value = cell.value, self.int64(new(cell.value)).value
        me.polled = cell, old
        return old

    def atomic_add(self, pointer, value, sem):
        me = self.current
        again = value == 0 and me.polled is not None and me.polled[0] is pointer.cell
        return self.atomic(pointer, lambda old: old + value, sem, pointer.cell if again else None)

    def atomic_xchg(self, pointer, value, sem):
        return self.atomic(pointer, lambda old: value, sem)

    def load(self, pointer):
        self.check(self.switch(), pointer.cell)
        return pointer.cell.value

    def store(self, pointer, value):
        me, cell = self.switch(), pointer.cell
        self.check(me, cell)
        cell.value = self.int64(value).value
        cell.store = (me.ticket, self.steps)
        me.pending.add(cell.store)

    def debug_barrier(self):
        me = self.switch()
        me.known |= me.pending
        me.pending.clear()

    def check(self, me, cell):
        if cell.store and cell.store not in me.known | me.pending:
            raise Race(f"ticket {me.ticket} at the store of ticket {cell.store[0]}")

    def cast(self, value, dtype):
        return dtype(value).value

    def num_programs(self, axis):
        return self.programs


class Counters:
    """What outlives a launch; and launches, as `ticketed.py` has them, in place of its maths."""

    def __init__(self, groups, generation=0):
        word = ctypes.c_int64(generation << 32).value
        self.tickets = [Cell(word), *(Cell(0) for _ in range(groups))]
        self.arrivals = [Cell(0) for _ in range(groups)]
        self.generation = generation

    def launch(self, machine, programs, groups, slice_groups, tiles, splits):
        slices = -(-groups // slice_groups)
        total, runs = 2 * slices * slice_groups * tiles * splits, tiles * splits
        # Not yet written; what is written is the generation, which no other launch writes.
        partials = [Cell() for _ in range(groups * runs)]
        results = [Cell() for _ in range(groups)]
        self.generation += 1
        now = ctypes.c_int32(self.generation).value
        work = Counter()

        def kernel(program):
            program.ticket, generation = tickets.draw_ticket.fn(Pointer(self.tickets), total)
            while program.ticket < total:
                serve(program, generation)
                program.ticket, _ = tickets.draw_ticket.fn(Pointer(self.tickets), total)

        def serve(program, generation):
            applies, group, tile, split = tickets.work_of.fn(
                program.ticket, slices, slice_groups, tiles, splits
            )
            if group >= groups:
                return
            flag, result = Pointer(self.tickets, 1 + group), Pointer(results, group)
            if applies:
                tickets.wait_for_flag.fn(flag, generation)
                assert machine.load(result) == now, "a result read before it is written"
            else:
                machine.store(Pointer(partials, group * runs + tile * splits + split), now)
                program.last = tickets.last_to_arrive.fn(Pointer(self.arrivals, group), runs)
                if program.last:
                    for index in range(group * runs, (group + 1) * runs):
                        found = machine.load(Pointer(partials, index))
                        assert found == now, "a partial result read before it is written"
                    machine.store(result, now)
                    tickets.raise_flag.fn(flag, generation)
                    program.last = False
            work[bool(applies), group, tile, split] += 1

        machine.launch(kernel, programs, total)
        cells = product((False, True), range(groups), range(tiles), range(splits))
        assert work == Counter(cells)
        assert not any(cell.value for cell in self.arrivals)
        assert self.tickets[0].value == ctypes.c_int64(self.generation << 32).value
        # The end of a launch orders its stores before whatever comes next.
        for cell in (*self.tickets, *self.arrivals):
            cell.store, cell.released = None, set()


def at_random(machine):
    """Also those that wait: they poll."""
    return random.choice(machine.running)


def in_turn(machine):
    return min(machine.running, key=lambda program: program.turn)


def latest_start(machine):
    return machine.able[-1]


def highest_ticket(machine):
    return max(machine.able, key=lambda p: machine.total if p.ticket is None else p.ticket)


def without(stalls):
    """A program stalls until no other can go on."""

    def schedule(machine):
        others = [program for program in machine.able if not stalls(machine, program)]
        return random.choice(others or machine.able)

    return schedule


SCHEDULES = {
    "random": at_random,
    "in turn": in_turn,
    "latest start": latest_start,
    "highest ticket": highest_ticket,
    "first stalls": without(lambda machine, program: program.ticket == 0),
    "middle stalls": without(lambda machine, program: program.ticket == machine.total // 2),
    "last to arrive stalls": without(lambda machine, program: program.last),
}
# (groups, groups in a slice, tiles, splits)
SIZES = [
    (1, 1, 1, 1), (1, 1, 1, 5), (5, 4, 1, 3), (2, 1, 1, 1), (4, 2, 3, 1), (3, 3, 1, 2),
    (7, 3, 1, 1), (5, 1, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize("programs", [1, 2, 5, 30])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_launch_after_launch(schedule, programs, monkeypatch):
    """On the same counters, whose generation overflows 32 bits on the way.

    Some launches have more programs than the device holds, or than there are tickets.
    """
    random.seed(0)
    counters = Counters(8, generation=2**31 - 20)
    for resident in (1, 2, programs, programs):
        machine = Machine(SCHEDULES[schedule], resident)
        monkeypatch.setattr(tickets, "tl", machine)
        for sizes in SIZES:
            counters.launch(machine, programs, *sizes)
            assert min(resident, programs) > 1 or machine.spins == 0


def order_of(slices, *sizes):
    count = 2 * slices * math.prod(sizes)
    work = [tickets.work_of.fn(ticket, slices, *sizes) for ticket in range(count)]
    return [(bool(applies), *rest) for applies, *rest in work]


@pytest.mark.parametrize(
    ("slice_groups", "tiles", "splits"),
    [(1, 1, 1), (3, 1, 1), (1, 1, 4), (4, 1, 3), (2, 3, 2), (1, 3, 1)],
)
def test_order(slice_groups, tiles, splits):
    """reduce(0) reduce(1) apply(0) reduce(2) apply(1) ... apply(last)."""
    phase = slice_groups * tiles * splits
    for slices in range(1, 7):
        expected = [(False, 0)]
        for slice in range(1, slices):
            expected += [(False, slice), (True, slice - 1)]
        expected += [(True, slices - 1)]
        order = order_of(slices, slice_groups, tiles, splits)
        phases = [order[first : first + phase] for first in range(0, len(order), phase)]
        for (applies, slice), found in zip(expected, phases, strict=True):
            groups = range(slice * slice_groups, (slice + 1) * slice_groups)
            runs = product(range(splits), range(tiles), groups)
            assert found == [(applies, group, tile, split) for split, tile, group in runs]
        for ticket, (applies, group, *_) in enumerate(order):
            runs = product(range(tiles), range(splits)) if applies else []
            assert all(order.index((False, group, *run)) < ticket for run in runs)


def wrongs(machine):
    """Protocols that must not pass, by name: what to replace, where, and by what."""
    work_of, last_to_arrive, atomic = tickets.work_of, tickets.last_to_arrive, machine.atomic

    def any_flag(flag, generation):
        while machine.atomic_add(flag, 0, sem="acquire") == 0:
            pass

    return {
        "order": (tickets, "work_of", lambda t, *s: work_of.fn(machine.total - 1 - t, *s)),
        "arrivals": (tickets, "last_to_arrive", lambda a, n: last_to_arrive.fn(a, n - 1)),
        "flag": (tickets, "wait_for_flag", any_flag),
        "barrier": (machine, "debug_barrier", machine.switch),
        "sem": (machine, "atomic", lambda p, new, _, *a: atomic(p, new, "relaxed", *a)),
    }


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("order", Deadlock),
        ("arrivals", AssertionError),
        ("flag", AssertionError),
        ("barrier", Race),
        ("sem", Race),
    ],
)
def test_what_is_wrong_is_found(wrong, error, monkeypatch):
    random.seed(0)
    machine, counters = Machine(at_random, resident=5), Counters(8)
    monkeypatch.setattr(tickets, "tl", machine)
    counters.launch(machine, 30, 5, 2, 1, 3)
    where, name, replacement = wrongs(machine)[wrong]
    replacement = SimpleNamespace(fn=replacement) if where is tickets else replacement
    monkeypatch.setattr(where, name, replacement)
    with pytest.raises(error):
        counters.launch(machine, 30, 5, 2, 1, 3)
