"""Rewrites the two constructs of CUDA C++ that no C++ compiler parses."""

from __future__ import annotations

import re

# __shared__ float sums[8];  ->  a reference to memory that the emulator owns, fills and frees
_SHARED = re.compile(
    r"__shared__\s+([\w:]+(?:\s+(?:int|long|char|short))*)\s+(\w+)((?:\[[^\]]*\])*)\s*;"
)
_DYNAMIC = re.compile(r"extern\s+__shared__\s+([\w:\s]+?)\s+(\w+)\[\]\s*;")
_LAUNCH = re.compile(r"([\w:]+(?:<[\w:,\s]*>)?)<<<(.*?)>>>\s*\(", re.DOTALL)


def translate(source: str, path: str) -> str:
    """Returns the source for g++, line for line; `path` is what messages call the file."""
    source = _DYNAMIC.sub(
        r"\1* \2 = static_cast<\1*>(cuda_emulation::dynamic_shared_memory());", source
    )
    source = _SHARED.sub(
        r"static char \2_key; using \2_type = \1\3; "
        r"auto& \2 = cuda_emulation::shared_variable<\2_type>(&\2_key);",
        source,
    )
    source = _translate_launches(source)
    for left in ("__shared__", "<<<"):
        if left in source:
            line = source[: source.index(left)].count("\n") + 1
            raise ValueError(f"{path}:{line}: a use of {left} that the emulation cannot rewrite")
    return f'#line 1 "{path}"\n{source}'


def _translate_launches(source: str) -> str:
    """kernel<<<grid, block>>>(a, b)  ->  launch([&] { kernel(a, b); }, grid, block)"""
    done = []
    while match := _LAUNCH.search(source):
        end = match.end()
        depth = 1
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        arguments = source[match.end() : end - 1]
        done.append(source[: match.start()])
        done.append(
            f"cuda_emulation::launch([&] {{ {match[1]}({arguments}); }}, {match[2].strip()})"
        )
        source = source[end:]
    return "".join(done) + source
