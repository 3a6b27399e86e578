"""Checks that NVIDIA's machine code hands results from program to program in order.

A program that arrives, or raises a flag, first stores its results, then waits at a barrier, and
then one of its threads executes a fence and an atomic. A program that goes on executes that atomic,
or a load of the flag, in one thread, invalidates the first-level cache, waits at a barrier, and
only then loads what other programs stored. These loads bypass the first-level cache.
"""

from __future__ import annotations

import re

# The instructions that matter, by what they do in the protocol. Tickets are drawn by relaxed
# atomics, which order nothing and are therefore left out.
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
    """Returns the kinds of those of a kernel's instructions that matter, in their order."""
    found = []
    for text in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", sass):
        found += [kind for kind, pattern in KINDS.items() if re.search(pattern, text)]
    # Flags have 64 bits, but results in float64 do too: only the load of a flag is followed by an
    # invalidation of the cache.
    return [
        "load" if kind == "poll" and after != "invalidate" else kind
        for kind, after in zip(found, [*found[1:], ""])
    ]


def order(sass: str) -> tuple[dict[str, int], list[str]]:
    """Returns how often a kernel arrives, raises a flag and polls, and what is out of order."""
    code, wrong = kinds(sass), []
    for i, kind in enumerate(code):
        if kind in ("arrive", "raise"):
            # Going back from here, the fence comes first, then the barrier, then the stores.
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
