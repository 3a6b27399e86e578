"""Whether NVIDIA's machine code hands results from program to program in order.

A program that arrives, or raises a flag, has a barrier behind its stores, then one thread's fence
and atomic. A program that goes on has that thread's atomic or load, which empties the first-level
cache, then a barrier, and only then loads of what others stored. These pass by that cache.
"""

from __future__ import annotations

import re

# Instructions by what they do here. Tickets are drawn by relaxed atomics, which order nothing.
KINDS = {
    "arrive": r"\bATOM\S*\.ADD\.(?!64)",
    "raise": r"\bATOM\S*\.EXCH",
    "poll": r"\bLDG?\.E\.64\.STRONG\.GPU",
    "load": r"\bLDG?\.E\.(128\.)?STRONG\.GPU",
    "store": r"\bSTG?\.",
    "barrier": r"\bBAR\.",
    "fence": r"\bMEMBAR\.\S*GPU",
    "invalidate": r"\bCCTL\.IVALL",
    "read-only": r"\bLDG\S*\.CONSTANT",
    "overlap": r"\bACQBULK|\bPREEXIT",
}


def kinds(sass: str) -> list[str]:
    """Returns the kinds of a kernel's instructions, those that matter, in order."""
    found = []
    for text in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", sass):
        found += [kind for kind, pattern in KINDS.items() if re.search(pattern, text)]
    # Flags have 64 bits, and so have results in float64, which no invalidation follows.
    return [
        "load" if kind == "poll" and after != "invalidate" else kind
        for kind, after in zip(found, [*found[1:], ""])
    ]


def order(sass: str) -> tuple[dict[str, int], list[str]]:
    """Returns how often a kernel's programs arrive, raise flags and poll; and what is wrong."""
    code, wrong = kinds(sass), []
    for i, kind in enumerate(code):
        if kind in ("arrive", "raise"):
            # Towards the beginning: the fence, then the barrier, and no store before both.
            before = [k for k in code[:i] if k in ("store", "fence", "barrier")][-2:]
            if before != ["barrier", "fence"]:
                wrong.append(f"{kind} after {' and '.join(before)}")
        if kind in ("arrive", "poll"):
            after = [k for k in code[i + 1 :] if k in ("load", "invalidate", "barrier")][:2]
            if after != ["invalidate", "barrier"]:
                wrong.append(f"{' and '.join(after)} after {kind}")
        if kind in ("read-only", "overlap"):
            wrong.append(kind)
    return {kind: code.count(kind) for kind in ("arrive", "raise", "poll")}, wrong
