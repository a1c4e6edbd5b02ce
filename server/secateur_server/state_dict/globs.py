"""Names and globs, matched with the names of tensors as fnmatch.fnmatchcase does.

Many globs of a list become one automaton, which reads each name once. Globs with the same beginning
share its nodes, so the work grows with the names, and hardly with the globs. Nothing is kept
between calls.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate

from secateur_server.errors import InvalidSpec
from secateur_server.runtime.context import RequestContext

# In one list. Each character of a glob takes about 200 bytes while the list is matched.
MOST_GLOBS = 10_000
MOST_GLOB_CHARACTERS = 1 << 19

# Longer globs match nothing. People do not write them.
LONGEST_GLOB = 1000

# So few globs are tried one by one with each name.
FEW_GLOBS = 4

# Visits of nodes, about 2 s of work. Only many globs of several stars each take so many.
MOST_VISITS = 5_000_000

# Nodes of all states. With more, the states are dropped, and made again when needed.
KEPT_NODES = 500_000

Test = Callable[[str], object]


@dataclass(frozen=True)
class Matches:
    """The tensors that a list of names and globs means.

    Attributes:
        first: For each of these tensors, the index of the first item that matches it.
        unmatched: The index of the first item that matches no tensor; None if all match.
    """

    first: dict[str, int]
    unmatched: int | None


def matches(
    context: RequestContext,
    field: str,
    patterns: Sequence[str],
    exact: Mapping[str, str],
    globbed: Mapping[str, str] | None = None,
) -> Matches:
    """Finds the tensors that names and globs mean.

    Args:
        context: The request.
        field: The path of `patterns` in the request, for errors.
        patterns: An item that is a key of `exact` is a name, even one with brackets.
        exact: From each name of a tensor to the tensor.
        globbed: The same for tensors that globs may mean. Default: `exact`.

    Returns:
        The matches.

    Raises:
        InvalidSpec: The list has too many globs, or they take too long to match.
    """
    first: dict[str, int] = {}
    others: dict[str, int] = {}
    for index, pattern in enumerate(context.each(patterns)):
        if pattern in exact:
            first.setdefault(exact[pattern], index)
        else:
            others.setdefault(pattern, index)
    globs = {pattern: index for pattern, index in others.items() if is_glob(pattern)}
    names, found = exact if globbed is None else globbed, set()
    if globs and names:
        found = _match_globs(context, field, globs, names, first)
    return Matches(first, next((i for i in others.values() if i not in found), None))


def is_glob(pattern: str) -> bool:
    """Whether an item that is not the name of a tensor is matched as a glob."""
    return len(pattern) <= LONGEST_GLOB and any(mark in pattern for mark in "*?[")


def _match_globs(
    context: RequestContext,
    field: str,
    globs: Mapping[str, int],
    names: Mapping[str, str],
    first: dict[str, int],
) -> set[int]:
    """Adds the matches of globs to `first`, and returns the indices of the globs that match."""
    characters = sum(map(len, globs))
    if len(globs) > MOST_GLOBS or characters > MOST_GLOB_CHARACTERS:
        raise InvalidSpec(
            field,
            f"{len(globs)} globs of {characters} characters are more than the limits of "
            f"{MOST_GLOBS} and {MOST_GLOB_CHARACTERS}; give whole names, which have no limit",
        )
    if len(globs) <= FEW_GLOBS and not any(mark in glob for glob in globs for mark in "?["):
        return _match_few(context, globs, names, first)
    automaton = _Automaton(context, field, globs)
    for name, tensor in context.each(names.items()):
        if (index := automaton.read(name)) is not None:
            first[tensor] = min(first.get(tensor, index), index)
    return automaton.matched


def _match_few(
    context: RequestContext,
    globs: Mapping[str, int],
    names: Mapping[str, str],
    first: dict[str, int],
) -> set[int]:
    """Does `_match_globs` for few globs without sets, for which states take longer to make."""
    parts = [(glob.split("*"), index) for glob, index in globs.items()]
    found: set[int] = set()
    for name, tensor in context.each(names.items()):
        for glob_parts, index in parts:
            if _fits(glob_parts, name):
                found.add(index)
                first[tensor] = min(first.get(tensor, index), index)
    return found


def _fits(parts: Sequence[str], name: str) -> bool:
    """Whether a name begins with the first part, ends with the last, and has the others between."""
    begin, *inner, end = parts
    if not name.startswith(begin) or not name.endswith(end):
        return False
    at, last = len(begin), len(name) - len(end)
    for part in inner:  # the first place of each leaves the most for the others
        at = name.find(part, at, last)
        if at < 0:
            return False
        at += len(part)
    return at <= last


@dataclass
class _State:
    """The possible positions in the globs after the beginning of a name.

    Attributes:
        nodes: Nodes from which a glob can go on, and at which one ends.
        first: The lowest index of a glob that matches whatever follows; None if there is none.
        ends: The lowest index of a glob that matches if the name ends here; None if there is none.
        next: The known states after one more character.
    """

    nodes: frozenset[int]
    first: int | None
    ends: int | None
    next: dict[str, "_State"] = field(default_factory=dict)


class _Automaton:
    """A trie of globs. Nodes are numbers, and all globs begin at 0. Edges are their tokens."""

    def __init__(self, context: RequestContext, field: str, globs: Mapping[str, int]) -> None:
        """field: For errors.  globs: Each with its index in the list, ascending."""
        self.matched: set[int] = set()
        self._context, self._field = context, field
        self._edges: dict[tuple[int, str], int] = {}
        self._tests: dict[str, Test] = {}  # by token: of `?` and `[...]`
        self._sets: dict[int, list[tuple[int, Test]]] = {}  # by node: its edges by such tokens
        self._stars: set[int] = set()  # nodes behind a star: any character leads back to them
        self._star_after: dict[int, int] = {}  # from the node before a star
        self._inner: set[int] = set()  # nodes with edges
        self._ends: dict[int, int] = {}  # by node: the lowest index of a glob that ends there
        self._unmatched: dict[int, list[int]] = {}  # by node: the globs that end there
        self._visits = self._kept = 0
        self._states: dict[tuple[frozenset[int], int | None], _State] = {}
        for glob, index in context.each(globs.items()):
            self._add(glob, index)
        self._ending = frozenset(self._ends)
        self._tails = self._ending & self._stars  # whatever follows, a glob matches
        self._begin = self._state(self._reached([0]), None)

    def _add(self, glob: str, index: int) -> None:
        node = 0
        for token in _tokens(glob):
            if token == "*" and node in self._stars:
                continue
            key = node, token
            if key not in self._edges:
                self._edges[key] = child = len(self._edges) + 1
                self._inner.add(node)
                if token == "*":
                    self._stars.add(child)
                    self._star_after[node] = child
                elif token == "?" or len(token) > 1:
                    if token not in self._tests:
                        self._tests[token] = re.compile(translate(token)).match
                    self._sets.setdefault(node, []).append((child, self._tests[token]))
            node = self._edges[key]
        self._ends.setdefault(node, index)
        self._unmatched.setdefault(node, []).append(index)

    def read(self, name: str) -> int | None:
        """The lowest index of a glob that matches a name; adds all that do to `matched`."""
        state = self._begin
        for character in name:
            if not state.nodes:
                return state.first
            state = state.next.get(character) or self._step(state, character)
        if state.ends is None:
            return state.first
        self._match(state.nodes)
        return state.ends if state.first is None else min(state.first, state.ends)

    def _match(self, nodes: Iterable[int]) -> None:
        """Records that the globs that end at some nodes have matched."""
        for node in nodes if self._unmatched else ():
            self.matched.update(self._unmatched.pop(node, ()))

    def _step(self, state: _State, character: str) -> _State:
        """The state after one more character."""
        edges, ahead = self._edges, [*(state.nodes & self._stars)]
        if character not in "*?":  # edges with these names are wildcards
            found = [edges.get((node, character)) for node in state.nodes]
            ahead += [child for child in found if child is not None]
        for node in state.nodes & self._sets.keys():
            ahead += [child for child, test in self._sets[node] if test(character)]
            self._visits += len(self._sets[node])
        self._visits += len(state.nodes)
        if self._visits > MOST_VISITS:
            raise InvalidSpec(
                self._field,
                f"the globs take more than {MOST_VISITS} steps to match; give whole names, or "
                "globs with fewer stars",
            )
        self._context.check()
        state.next[character] = self._state(self._reached(ahead), state.first)
        return state.next[character]

    def _reached(self, nodes: Iterable[int]) -> set[int]:
        """The nodes, and those after a star that follows them, as it may match no character."""
        found = set(nodes)
        found.update([self._star_after[node] for node in found if node in self._star_after])
        return found

    def _state(self, nodes: set[int], first: int | None) -> _State:
        """The state with some nodes. `first` is that of the state before."""
        whatever = nodes & self._tails
        self._match(whatever)
        before = [] if first is None else [first]
        first = min([*before, *(self._ends[n] for n in whatever)], default=None)
        kept = frozenset(nodes - (whatever - self._inner))
        if (kept, first) not in self._states:
            if self._kept > KEPT_NODES:
                self._drop_states()
            self._kept += len(kept) + 1
            ends = min((self._ends[n] for n in kept & self._ending), default=None)
            self._states[kept, first] = _State(kept, first, ends)
        return self._states[kept, first]

    def _drop_states(self) -> None:
        for state in self._states.values():
            state.next.clear()
        self._states.clear()
        self._kept = 0


def _tokens(glob: str) -> Iterator[str]:
    """The parts of a glob: characters, `?`, `*` and `[...]`. A `[` alone is a character."""
    begin = 0
    while begin < len(glob):
        end = begin + 1
        if glob[begin] == "[":
            inside = end + (glob[end : end + 1] == "!")
            inside += glob[inside : inside + 1] == "]"
            end = max(end, glob.find("]", inside) + 1)
        yield glob[begin:end]
        begin = end
