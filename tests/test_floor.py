"""benchmarks/{kernels,floor,step_profile,growth}.py: kernels are read, counted and sorted, laws fitted."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPERATORS = ROOT / "src/localmim/models/operators.py"

GRAPH = """# IR entry: @kernel_graph0
  %1(CNode_1) = PrimFunc_MatMul(%0, Tensor(shape=[9, 4], dtype=Float32, value=
[[ 1.0 1.0]
 ...
 [ 1.0 1.0]]), Bool(1), Bool(0)) {instance name: matmul} primitive_attrs: {IsFeatureMapOutput: Bool(1)}
      : (<Tensor[Float32], (9, 6)>, <Ref[Tensor[Float32]], (9, 4), ref_key=w>) -> (<Tensor[Float32], (6, 4)>)
      : (Tensor, Tensor, Scalar, Scalar) -> (Tensor)
      # Fullname with scope: (Gradients/Default/MatMul-op0)
      # Corresponding forward node candidate:
      # In file {file}:{line}, 4~9/        {text}/
  %2(equiv_3_y) = PrimFunc_Exp(%1) primitive_attrs: {IsFeatureMapOutput: Bool(1)}
      : (<Tensor[Float32], (6, 4)>) -> (<Tensor[Float32], (6, 4)>)
      # Fullname with scope: (Default/Exp-op0)
      # In file {file}:{line}, 4~9/        {text}/
      # In file /site-packages/mindspore/ops/auto_generate/gen_ops_def.py:7~8/def exp(x):/
  Return(%2)
      : (<Tensor[Float32], (6, 4)>)
"""


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def line_of(file: Path, text: str) -> int:
    return file.read_text().split(text)[0].count("\n") + 1


def kernel(op: str, *shapes, out=(2, 2), flags=(False, False), sources=(), **more):
    from kernels import Kernel

    def tensors(shapes):
        return tuple(("Float32", tuple(shape)) for shape in shapes)

    return Kernel(more.pop("name", op), op, tensors(shapes), tensors([out]), flags, tuple(sources), **more)


def test_graph_is_read(tmp_path):
    """Shapes, flags and functions survive constants of several lines, references to weights and library frames."""
    import kernels

    line = line_of(OPERATORS, "density = ops.exp")
    text = GRAPH.replace("{file}", str(OPERATORS)).replace("{line}", str(line)).replace("{text}", "density = …")
    (tmp_path / "graph_build_0_0101.ir").write_text(text)
    product, exp = kernels.read(tmp_path)
    assert (product.op, product.name, product.flags) == ("MatMul", "Gradients/Default/MatMul-op0", (True, False))
    assert product.inputs == (("Float32", (9, 6)), ("Float32", (9, 4))) and product.outputs == (("Float32", (6, 4)),)
    assert product.sources == exp.sources == ("models/operators.py:_GeluAndPhi.bprop",)
    assert (product.gradient, product.shared, exp.gradient, exp.shared) == (True, False, False, True)
    assert exp.operands == (product.id,)
    with pytest.raises(RuntimeError, match="no graph"):
        kernels.read(tmp_path / "none")


def test_operations():
    """Two for each multiply-add; what only sums or copies is no product; an unknown product is not passed over."""
    assert kernel("MatMul", (9, 6), (9, 4), out=(6, 4), flags=(True, False)).operations == 2 * 6 * 9 * 4
    scores = kernel("BatchMatMul", (2, 3, 5, 8), (2, 3, 7, 8), out=(2, 3, 5, 7), flags=(False, True))
    assert scores.operations == 2 * 6 * 5 * 8 * 7 and scores.form == "6 x [5, 8] x [8, 7]T"
    assert not kernel("MatMul", (1, 9), (9, 4), out=(1, 4)).is_product  # a sum over rows
    assert kernel("Conv2D", (2, 4, 5, 5), (6, 2, 3, 3), out=(2, 6, 3, 3)).operations == 2 * (2 * 6 * 9) * (2 * 9)
    assert kernel("Add", (9, 6), (9, 6), out=(9, 6)).operations == 0
    with pytest.raises(ValueError, match="not counted yet"):
        _ = kernel("FlashAttentionScore", (2, 3, 5, 8)).operations


def test_kinds():
    """By the function first, then by the operator; a kernel of a shared function is of what takes its result."""
    import kernels

    attend = "models/layers.py:Attention.attend"
    graph = [
        kernel("MatMul", (4, 3), (3, 2), out=(4, 2), sources=["models/layers.py:Project.construct"], id="1"),
        kernel("Split", (4, 2), sources=["mim/hog.py:Hog.histograms"], id="2", operands=("1",), shared=True),
        kernel("Reshape", (4, 2), sources=[attend], id="3", operands=("2",)),
        kernel(
            "MatMul", (1, 3), (3, 2), out=(1, 2), name="bias", sources=["models/layers.py:Project.construct"], id="4"
        ),
        kernel(
            "MatMul", (4, 2), (2, 1), out=(4, 1), name="mean", sources=["models/operators.py:_Normalise.bprop"], id="5"
        ),
        kernel("Gather", (4, 2), sources=["models/layers.py:take_rows"], id="6"),
        kernel("UnsortedSegmentSum", (4,), sources=["mim/hog.py:Hog.histogram"], id="7"),
        kernel(
            "Mul", (4,), sources=["models/operators.py:Gelu.construct", "models/operators.py:_GeluAndPhi.bprop"], id="8"
        ),
        kernel(
            "Adam", (4,), sources=["training/step.py:_Update.construct", "training/optimizer.py:_update_one"], id="9"
        ),
        kernel("AddN", (4,), sources=["training/step.py:_Update.construct"], id="10"),
        kernel("Add", (4,), sources=["models/layers.py:Block.attend"], id="11"),
    ]
    expected = "matmul attention attention bias norm gather target activation optimizer checks rest"
    assert list(kernels.kinds(graph).values()) == expected.split()


def test_sources_exist():
    """The functions that layer types are told by are there: a renamed one would fall into the rest unseen."""
    import kernels

    source = ROOT / "src/localmim"
    names = {
        f"{file.relative_to(source).as_posix()}:{name}"
        for file in source.rglob("*.py")
        for _, _, name in kernels._functions(str(file))
    }
    told = [
        "training/optimizer.py:_update_one",
        "training/step.py:_Update.construct",
        "training/step.py:_sums_of_columns",
        "mim/hog.py:Hog.construct",
        "mim/targets.py:PixelTarget.construct",
        "mim/losses.py:squared_error",
        "models/layers.py:LayerNorm.construct",
        "models/operators.py:_Normalise.bprop",
        "models/operators.py:_GeluAndPhi.bprop",
        "models/operators.py:_Softmax.bprop",
        "models/operators.py:AddToRows.bprop",
        "models/operators.py:_AddBias.bprop",
        "models/layers.py:Attention.attend",
        "models/layers.py:Attention.weigh",
        "models/operators.py:SplitHeads.construct",
        "models/layers.py:Project.construct",
    ]
    assert [name for name in told if name not in names] == []


def test_floor():
    """Passes take the longer of operations and bytes, then the update its bytes; the distance is the step by that."""
    import floor

    graph = [
        kernel("MatMul", (100, 50), (50, 40), out=(100, 40)),
        kernel("MatMul", (1, 100), (100, 40), out=(1, 40)),
        kernel("Adam", (1000,), (1000,), (1000,)),
    ]
    work = floor.work(graph)
    assert work.operations == 2 * 100 * 50 * 40
    assert work.pass_bytes == 4 * (100 * 50 + 50 * 40 + 100 * 40) and work.update_bytes == 8 * 4 * 1000
    assert work.products == (floor.Product(100, 50, 40, False, False),)
    turns = [{"sum": 1e4, "update": 2e4, "product a": 1e5, "product b": b} for b in (2e5, 9e5, 1e5)]
    ceilings = floor.best(turns)
    assert ceilings == floor.Ceilings(2e5, 2e4)  # medians, then the best
    assert floor.floor_s(work, ceilings) == pytest.approx(44_000 / 2e4 + 32_000 / 2e4)
    report = floor.report(work, ceilings, 7.6)
    assert (report["distance"], report["matmul_share"]) == (2.0, pytest.approx(2 / 7.6, abs=1e-4))
    with pytest.raises(ValueError, match="no update by Adam"):
        floor.work(graph[:2])


def test_profile():
    """Events fall into steps, what runs side by side is busy once, and the shares of the table are of all kernels."""
    import step_profile

    text = "a;Host;1000000000,2.0,0 2000000000,4.0,0 \nb;Host;1001000000,3.0,0 2001000000,5.0,0 17\n"
    found = step_profile.profile(0.01, step_profile.parse_events(text))
    assert found.kernel_s == {"a": pytest.approx(0.003), "b": pytest.approx(0.004)}
    assert found.busy_s == pytest.approx((0.004 + 0.006) / 2)
    graph = [kernel("MatMul", (4, 3), (3, 2), out=(4, 2), name="a"), kernel("Gather", (4, 2), name="b", id="1")]
    table = step_profile.by_kind(found, graph)
    assert (
        "| gather | 4.0 | 57.1 | 1 |" in table and "| none runs | 5.0 |" in table and "| all kernels | 7.0 |" in table
    )
    assert step_profile.top_products(found, graph, 3).splitlines()[2:] == ["| 3.0 | 1 | [4, 3] x [3, 2] | 0 |  |"]
    with pytest.raises(RuntimeError, match=r"\[1, 2\] times"):
        step_profile.profile(1.0, step_profile.parse_events(text + "c;Host;1,1.0,0\n"))


def test_law():
    """An affine law is found again, its parts are not negative, and a point above it by more than 25 % is named."""
    import growth

    assert growth.fit([1, 2, 4], [5, 7, 11]) == pytest.approx((3, 2))
    assert growth.fit([1, 2, 4], [1, 4, 16]).a == 0 and growth.fit([1, 2, 4], [3, 2, 1]).b == 0
    axis = growth.AXES["batch"]
    points = [{"value": n, "step_s": 3 + 2 * n, "peak_rss_mb": 1000 + n} for n in axis.values]
    assert growth.too_fast(axis, points) == []
    points[-1]["step_s"] *= 1.3
    (line,) = growth.too_fast(axis, points)
    assert line.startswith("batch, 224 px: 32 takes 1.30 times")


def test_growth_is_drawn(tmp_path):
    """All three axes go into one small picture, and a table has each point on its law."""
    import growth

    found = {
        name: [
            {
                "value": v,
                "step_s": 0.1 * v,
                "peak_rss_mb": 100.0 + v,
                "gflop": 2.0 * v,
                "gbyte": 1.0 * v,
                "compile_s": 1,
            }
            for v in axis.values
        ]
        for name, axis in growth.AXES.items()
    }
    growth.draw(found, tmp_path / "docs" / "growth.webp")
    data = (tmp_path / "docs" / "growth.webp").read_bytes()
    assert data[8:12] == b"WEBP" and len(data) < 100_000
    assert growth.table(growth.AXES["depth"], found["depth"]).count("| 1.00 |") == 12
