"""In which order threads that have branched apart take turns, so that they meet where their ways do.

A GPU's compiler marks where branches join again; here blocks are numbered so that whoever is at the lowest number
goes on, and waits for the others where they come together: each block behind those that lead to it, and what
follows a loop behind all of the loop.
"""

from collections.abc import Sequence


def ranks(successors: Sequence[Sequence[int]]) -> list[int]:
    """The number of each block of a graph that is entered at block 0."""
    loops = _loops(successors)
    last_first: list[int] = []
    seen = {0}
    # Depth first: a block is numbered from behind when all that follows it is. What leaves a loop goes first.
    stack = [(0, iter(_leaving_first(0, successors, loops)))]
    while stack:
        block, rest = stack[-1]
        for each in rest:
            if each not in seen:
                seen.add(each)
                stack.append((each, iter(_leaving_first(each, successors, loops))))
                break
        else:
            last_first.append(block)
            stack.pop()
    numbers = [len(successors)] * len(successors)
    for number, block in enumerate(reversed(last_first)):
        numbers[block] = number
    return numbers


def _leaving_first(block: int, successors, loops) -> list[int]:
    """The blocks behind this one, those in the fewest of its loops first."""
    return sorted(successors[block], key=lambda each: sum(block in loop and each in loop for loop in loops))


def _loops(successors) -> list[set[int]]:
    """The blocks of each cycle, for every edge that leads back in a walk from block 0."""
    before: list[list[int]] = [[] for _ in successors]
    for block, behind in enumerate(successors):
        for each in behind:
            before[each].append(block)
    back: list[tuple[int, int]] = []
    state = {0: "open"}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        for each in rest:
            if state.get(each) == "open":
                back.append((block, each))
            elif each not in state:
                state[each] = "open"
                stack.append((each, iter(successors[each])))
                break
        else:
            state[block] = "closed"
            stack.pop()
    found = []
    for end, head in back:
        loop, ahead = {head, end}, [end]
        while ahead:
            block = ahead.pop()
            if block == head:
                continue
            for each in before[block]:
                if each not in loop:
                    loop.add(each)
                    ahead.append(each)
        found.append(loop)
    return found
