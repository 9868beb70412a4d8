"""The kernels of a compiled step, read from the graph that MindSpore writes: operators, shapes, the lines they are of.

    os.environ.update(WRITES_GRAPHS, MS_DEV_SAVE_GRAPHS_PATH=folder)  # before MindSpore is imported; then compile
    kernels = read(folder)

MindSpore can write the graph that it runs as text (only the pass `graph_build`, which costs next to no time). For each
kernel it says the shapes and which lines of Python it comes from, for a gradient's those of what it is the gradient of.
So a kernel's layer type is read, not guessed, with one exception: a function of MindSpore's own, such as `ops.sqrt`, is
read once for all who call it, and its kernels all name the first caller. Those count to what they exchange values with.
This file does not import MindSpore.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

BYTES = {"Float64": 8, "Int64": 8, "Float32": 4, "Int32": 4, "Float16": 2, "BFloat16": 2, "Bool": 1}

# What writes the graph as it is run; to be in the environment before MindSpore is imported.
WRITES_GRAPHS = {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_DUMP_IR_PASSES": "graph_build"}

KINDS = (
    "matmul",
    "attention",
    "norm",
    "activation",
    "gather",
    "bias",
    "target",
    "loss",
    "optimizer",
    "checks",
    "rest",
)

# By the first that fits one of the functions a kernel comes from, "file:Class.function" under src/localmim.
_BY_SOURCE = (
    ("optimizer", r"training/optimizer\.py:"),
    ("checks", r"training/step\.py:_(Update\.|sums_of_columns|square_one|times_one)"),
    ("target", r"mim/(hog|targets)\.py:"),
    ("loss", r"mim/losses\.py:"),
    ("norm", r"models/(layers\.py:LayerNorm|operators\.py:_?Normalise)\."),
    ("activation", r"models/operators\.py:_?Gelu"),
    (
        "attention",
        r"models/(layers\.py:Attention\.(attend|weigh|weights)\b|operators\.py:(_?Softmax|SplitHeads)\.|relative\.py:)",
    ),
)
_ENDS = ("target", "loss", "checks", "optimizer")  # what goes into them is theirs
_BIAS = re.compile(r"models/(operators\.py:(_?AddBias|AddToRows)|layers\.py:Project)\.")
_GATHERS = re.compile(r"Gather|Scatter|SegmentSum|EmbeddingLookup")
_PRODUCTS = re.compile(r"MatMul|Conv|Dense|Einsum|FlashAttention|PromptFlash")


class Kernel(NamedTuple):
    """One operator of the graph.

    Attributes:
        name: As the profiler names it, with its scope.
        op: MatMul, Add, ...
        inputs, outputs: Tensors, each (type, shape).
        flags: Its Boolean arguments in order; of a product: whether the left and the right factor are transposed.
        sources: The functions under src/localmim it comes from, outermost first, each "file:Class.function".
        shared: It comes from a function of MindSpore's own, so `sources` may be another caller's.
        gradient: It is part of a gradient that MindSpore made.
        id: Unique.
        operands: Ids of the kernels whose outputs it takes.
    """

    name: str
    op: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    flags: tuple[bool, ...] = ()
    sources: tuple[str, ...] = ()
    shared: bool = False
    gradient: bool = False
    id: str = ""
    operands: tuple[str, ...] = ()

    def sizes(self) -> tuple[int, int, int, int] | None:
        """(batch, m, k, n) of [batch, m, k] x [batch, k, n], of convolutions as what they are summed up from.

        None for what is no product.

        Raises:
            ValueError: A product of a kind that this file does not know.
        """
        if not _PRODUCTS.search(self.op):
            return None
        if self.op in ("MatMul", "BatchMatMul"):
            left, out = self.inputs[0][1], self.outputs[0][1]
            k = left[-2 if self.flags[0] else -1]
            return math.prod(out[:-2]), out[-2], k, out[-1]
        if self.op == "Conv2D":
            weight, out = self.inputs[1][1], self.outputs[0][1]
        elif self.op == "Conv2DBackpropInput":
            weight, out = self.inputs[1][1], self.inputs[0][1]
        elif self.op == "Conv2DBackpropFilter":
            weight, out = self.outputs[0][1], self.inputs[0][1]
        else:
            raise ValueError(f"{self.name} is a product whose operations are not counted yet")
        return 1, out[0] * math.prod(out[2:]), math.prod(weight[1:]), out[1]  # weight [O, I / groups, kernel...]

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product with more than one row, column and summand; the others are sums and copies."""
        sizes = self.sizes()
        return sizes is not None and min(sizes[1:]) > 1

    @property
    def operations(self) -> int:
        """Floating-point operations of a matrix product, a multiplication and an addition for each m, k, n; else 0."""
        return 2 * math.prod(self.sizes()) if self.is_product else 0

    @property
    def bytes(self) -> int:
        """Of its inputs and outputs."""
        return sum(BYTES[kind] * math.prod(shape) for kind, shape in self.inputs + self.outputs)

    @property
    def named_kind(self) -> str | None:
        """The layer type that its sources name, if they do."""
        for kind, pattern in _BY_SOURCE:
            if any(re.search(pattern, source) for source in self.sources):
                return kind
        return None

    @property
    def kind_by_operator(self) -> str:
        """The layer type of what no source names one for."""
        if self.is_product:
            return "matmul"
        if _GATHERS.search(self.op):
            return "gather"
        if self.op.startswith("BiasAdd") or (self.sizes() and any(map(_BIAS.search, self.sources))):
            return "bias"
        return "rest"

    @property
    def form(self) -> str:
        """A product in words: [m, k] x [k, n], a factor that lies transposed with a T."""
        batch, m, k, n = self.sizes()
        left, right = ("T" if flag else "" for flag in (*self.flags, False, False)[:2])
        return f"{f'{batch} x ' if batch > 1 else ''}[{m}, {k}]{left} x [{k}, {n}]{right}"


_NODE = re.compile(r"  %(\d+)\(.*?\) = (?:PrimFunc_|Primitive::)?(\w+)\(")
_END_OF_ARGUMENTS = re.compile(r"\) (?:\{|primitive_attrs|cnode_attrs|cnode_primal_attrs)")
_TENSOR = re.compile(r"Tensor\[(\w+)\]\]?>?, \(([\d, ]*)\)")
_FRAME = re.compile(r"\s+# In file (.+?):(\d+)")
_ORDERS = {"Depend": 1, "UpdateState": 0, "Load": 1}  # nodes that order others: how many of their operands are values


def parse(text: str, graph: str = "") -> Iterator[Kernel]:
    """The nodes of a graph's text, kernels and those that only order or bundle values.

    Args:
        graph: Its name, a part of the ids.
    """
    for block in re.split(r"\n(?=  (?:%\d+\(|Return\())", text):
        node = _NODE.match(block)
        if node is None:
            continue
        head, _, rest = block.partition("\n      : (")  # the arguments may hold a constant's values, line by line
        op, arguments = node[2], _END_OF_ARGUMENTS.split(head[node.end() :])[0]
        inputs, outputs = (rest.partition("\n")[0].split(") -> (") + [""])[:2]
        name, sources, shared = "", [], False
        for line in rest.split("\n"):
            if "# Fullname with scope: (" in line:
                name = line.split("scope: (")[1].rstrip()[:-1]
            elif frame := _FRAME.match(line):
                shared = "/localmim/" not in frame[1]
                if not shared:
                    file = frame[1].rpartition("/localmim/")[2]
                    sources.append(f"{file}:{function_at(frame[1], int(frame[2]))}")
        yield Kernel(
            name,
            op,
            _tensors(inputs),
            _tensors(outputs),
            flags=tuple(flag == "1" for flag in re.findall(r"Bool\(([01])\)", arguments)),
            sources=tuple(sources),
            shared=shared,
            gradient="# Corresponding forward node candidate:" in rest,
            id=f"{graph}%{node[1]}",
            operands=tuple(f"{graph}%{n}" for n in re.findall(r"%(\d+)", arguments)[: _ORDERS.get(op)]),
        )


def _tensors(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((kind, tuple(int(n) for n in shape.split(",") if n.strip())) for kind, shape in _TENSOR.findall(text))


def read(folder: str | os.PathLike) -> list[Kernel]:
    """The nodes of all graphs in a folder.

    Raises:
        RuntimeError: There is none.
    """
    files = sorted(Path(folder).glob("graph_build_*.ir"))
    if not files:
        raise RuntimeError(f"MindSpore wrote no graph into {folder}")
    return [kernel for file in files for kernel in parse(file.read_text("utf-8", errors="replace"), file.stem)]


def _heads(kernel: Kernel) -> bool:
    """Whether it can be what makes queries, keys and values of rows, or rows of heads."""
    return kernel.op in ("Transpose", "Split") or (kernel.op == "Concat" and kernel.gradient)


def kinds(kernels: Sequence[Kernel]) -> dict[str, str]:
    """The layer type of each kernel, one of KINDS, by its name."""
    by_id, takers = {kernel.id: kernel for kernel in kernels}, defaultdict(list)
    for kernel in kernels:
        for operand in kernel.operands:
            takers[operand].append(kernel.id)

    def beside(kernel: Kernel, after: bool) -> list[str | None]:
        """What the nearest kernels before or after it name, that are of no shared function."""
        seen, edge, found = {kernel.id}, [kernel.id], []
        while edge and not found:
            reached = [i for e in edge for i in (takers[e] if after else by_id[e].operands) if i in by_id]
            reached = [i for i in dict.fromkeys(reached) if i not in seen]
            seen.update(reached)
            found = [by_id[i].named_kind for i in reached if by_id[i].sources and not by_id[i].shared]
            edge = reached
        return found

    def kind(kernel: Kernel) -> str | None:
        if not kernel.shared:
            return kernel.named_kind
        # A forward kernel's results are taken where it is called; a gradient's come from the gradients of that place.
        near, far = beside(kernel, not kernel.gradient), beside(kernel, kernel.gradient)
        if not near + far or (kernel.named_kind and kernel.named_kind in near + far):
            return kernel.named_kind
        if _heads(kernel) and "attention" in near + far:
            return "attention"
        common = Counter(near).most_common(1)[0][0] if near else None
        return common if common in far or common in _ENDS else None

    found = {}
    for kernel in kernels:
        named = kind(kernel)
        moves = _GATHERS.search(kernel.op) and named not in _ENDS
        found[kernel.name] = kernel.kind_by_operator if moves or named is None else named
    return found


@functools.cache
def _functions(path: str) -> Sequence[tuple[int, int, str]]:
    """(first line, last line, name) of all functions and classes of a file, the inner ones after the outer."""
    found = []

    def visit(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = (*names, child.name)
                found.append((child.lineno, child.end_lineno, ".".join(inner)))
            visit(child, inner)

    visit(ast.parse(Path(path).read_text("utf-8")), ())
    return found


@functools.cache
def function_at(path: str, line: int) -> str:
    """The function or class at a line of a file, "Class.function"; "" outside."""
    names = [name for first, last, name in _functions(path) if first <= line <= last]
    return names[-1] if names else ""
