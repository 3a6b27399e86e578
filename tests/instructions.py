"""Counts the instructions that a kernel's program executes, in the machine code of NVIDIA GPUs.

A program's way leads from its beginning to its end, or in a ticketed launch from one ticket to
the next, through the loop over tiles that need no mask. Outside of that loop the way is the
shortest one: no tile is masked, and the program is not the last to arrive, which would have to
merge the partial results of all programs.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

WIDE = r"\bLDG\S*\.128\b"

# Stands for the block that would follow the end of the program.
END = -1


@dataclass(frozen=True)
class Way:
    """Instructions of a thread on its way through a run of tiles.

    Attributes:
        stores: whether the loop over tiles has stores.
        loop: instructions of one turn of the loop.
        fixed: instructions outside of the loop.
        barriers: barriers in one turn of the loop.
    """

    stores: bool
    loop: int
    fixed: int
    barriers: int


def ways(sass: str) -> list[Way]:
    """Returns the way through each loop over tiles that need no mask, one loop for each phase.

    These loops are recognised by their accesses of 16 bytes. For a kernel with narrower accesses
    the list is empty.
    """
    code = Code(sass)
    inner = sorted(loop for loop in code.loops if not any(_within(o, loop) for o in code.loops))
    over_tiles = [(start, blocks) for start, blocks in inner if code.count(blocks, WIDE)]
    if not over_tiles:
        return []
    # A loop around all others draws tickets: the way then leads from one ticket to the next.
    start, blocks = code.loops[-1] if code.loops else (0, [])
    tickets = start < over_tiles[0][0] and blocks[-1] >= over_tiles[-1][1][-1]
    begin, end = (start, start) if tickets else (0, END)
    found = []
    # The loop over whole tiles is followed by one over masked tiles.
    for (first, turn), (masked, _) in zip(over_tiles[::2], over_tiles[1::2]):
        stops = [begin, first]
        if not code.count(turn, "STG"):
            arrivals = [b for b in code.starts if b > masked and code.count([b], "ATOM")]
            # The sums of columns are added up to those of channels in a loop of its own, which
            # stores the results.
            stops += [b for b, its in inner if masked < b < arrivals[0] and code.count(its, "STG")]
            stops.append(arrivals[0])
        loop = sum(len(code.texts(block)) for block in turn)
        fixed = code.through([*stops, end]) - loop
        found.append(Way(bool(code.count(turn, "STG")), loop, fixed, code.count(turn, "BAR")))
    return found


def _within(inner: tuple[int, list[int]], outer: tuple[int, list[int]]) -> bool:
    """Says whether one loop is a part of another."""
    return inner != outer and set(inner[1]) <= set(outer[1])


class Code:
    """The machine code of a kernel, as basic blocks: each ends at a jump or before a target."""

    def __init__(self, sass: str) -> None:
        found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)
        self.instructions = [(int(at, 16), text) for at, text in found]
        at = {address: i for i, (address, _) in enumerate(self.instructions)}
        starts, jumps = {0}, {}
        for i, (_, text) in enumerate(self.instructions):
            target = re.search(r"\b(?:BRA|CALL)\b.*?(0x[0-9a-f]+)", text)
            if target:
                jumps[i] = at[int(target[1], 16)]
                starts |= {jumps[i], i + 1}
            elif re.search(r"\bEXIT\b", text):
                starts.add(i + 1)
        self.starts = sorted(start for start in starts if start < len(self.instructions))
        self.next: dict[int, list[int]] = {}
        for start, end in zip(self.starts, [*self.starts[1:], len(self.instructions)]):
            # In an A100's machine code some jumps are calls that never return.
            last = self.instructions[end - 1][1]
            leaves = re.search(r"^(@!?U?P\w+ )?(BRA|CALL|EXIT)\S*( !?U?P)?", last)
            after = [] if leaves is None else [jumps.get(end - 1, END)]
            # A jump with a predicate, before or behind its name, may not be taken.
            if leaves is None or leaves[1] or leaves[3]:
                after.append(end)
            self.next[start] = after

    def texts(self, block: int) -> list[str]:
        """Returns the instructions of the block that starts here."""
        later = [start for start in self.starts if start > block]
        end = later[0] if later else len(self.instructions)
        return [text for _, text in self.instructions[block:end]]

    @cached_property
    def loops(self) -> list[tuple[int, list[int]]]:
        """The loops, as their first blocks and all their blocks; inner ones come first."""
        found = [
            (after, [block for block in self.starts if after <= block <= start])
            for start in self.starts
            for after in self.next[start]
            if 0 <= after <= start
        ]
        return sorted(found, key=lambda loop: len(loop[1]))

    def count(self, blocks: list[int], kind: str) -> int:
        """Returns how many instructions in these blocks match a regular expression."""
        return sum(bool(re.search(kind, text)) for block in blocks for text in self.texts(block))

    def shortest(self, start: int, end: int) -> int:
        """Returns the fewest instructions from a block's beginning to the beginning of another."""
        heap, done = [(0, start)], set()
        while heap:
            length, block = heapq.heappop(heap)
            if block == end and (length or start != end):
                return length
            if block not in done and block in self.next:
                done.add(block)
                for after in self.next[block]:
                    heapq.heappush(heap, (length + len(self.texts(block)), after))
        raise ValueError(f"no way leads from {start} to {end}")

    def through(self, blocks: list[int]) -> int:
        """Returns the fewest instructions through these blocks, one after the other."""
        return sum(self.shortest(a, b) for a, b in pairwise(blocks))
