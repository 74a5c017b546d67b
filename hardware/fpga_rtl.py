"""A whole accelerator as SystemVerilog: a pipeline's units from `rtl/`, wired up, memory files and a test bench."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .cycles import Node, Pipeline
from .mvtu import RTL, write_memories
from .streams import Adder, Converter, Depthwise, Duplicator, Fifo, Matrix, Pool, Stage, Window

# Weights (rows, columns) and thresholds, as `mvtu.compute` takes them, by the name of the unit.
Tables = Mapping[str, tuple[np.ndarray, np.ndarray | None]]


def lanes_in(stage: Stage) -> tuple[tuple[int, int], ...]:
    """(elements, bits of one) of a word of each input."""
    match stage:
        case Matrix():
            return ((stage.unit.simd, stage.unit.a),)
        case Depthwise():
            return ((stage.unit.pe, stage.unit.a),)
        case Window():
            return ((stage.lanes, stage.bits // stage.lanes),)
        case Converter():
            return ((stage.wide_in, stage.bits),)
        case Pool():
            return ((stage.lanes, stage.bits),)
        case Adder():
            return ((stage.lanes, stage.bits[0]), (stage.lanes, stage.bits[1]))
        case Fifo() | Duplicator():
            return ((1, stage.bits),)
    raise TypeError(f"no such unit: {stage}")


def lanes_out(stage: Stage) -> tuple[tuple[int, int], ...]:
    """(elements, bits of one) of a word of each output."""
    match stage:
        case Matrix() | Depthwise():
            return ((stage.unit.pe, stage.unit.o or stage.unit.acc),)
        case Converter():
            return ((stage.wide_out, stage.bits),)
        case Pool() | Adder():
            return ((stage.lanes, stage.out_bits),)
        case Duplicator():
            return lanes_in(stage) * 2
    return lanes_in(stage)


def word_bits(lanes: tuple[int, int]) -> int:
    """Bits of a word."""
    return lanes[0] * lanes[1]


def emit_pipeline(pipeline: Pipeline, tables: Tables, folder: Path) -> None:
    """Write `accelerator.sv`, what it needs from `rtl/`, the memory files and `bench.sv` into `folder`.

    The top module `accelerator` has the ports clk, rst, in_valid, in_ready, in_data, out_valid, out_ready, out_data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for module in ("mvtu", "dwu", "swu", "dwc", "fifo", "dup", "add", "pool", "rescale"):
        shutil.copyfile(RTL / f"{module}.sv", folder / f"{module}.sv")
    widths: dict[int, int] = {}
    for node in pipeline.nodes:
        widths.update(zip(node.inputs, map(word_bits, lanes_in(node.stage)), strict=True))
        widths.update(zip(node.outputs, map(word_bits, lanes_out(node.stage)), strict=True))
    lines = [f"  wire v{s}, r{s};\n  wire [{width - 1}:0] d{s};" for s, width in sorted(widths.items())]
    lines += [_instance(number, node, tables, folder) for number, node in enumerate(pipeline.nodes)]
    source, sink = pipeline.source, pipeline.sink
    ports = (
        "    input wire clk,\n    input wire rst,\n    input wire in_valid,\n    output wire in_ready,\n"
        f"    input wire [{widths[source] - 1}:0] in_data,\n    output wire out_valid,\n    input wire out_ready,\n"
        f"    output wire [{widths[sink] - 1}:0] out_data\n"
    )
    ends = (
        f"  assign v{source} = in_valid;\n  assign in_ready = r{source};\n  assign d{source} = in_data;\n"
        f"  assign out_valid = v{sink};\n  assign r{sink} = out_ready;\n  assign out_data = d{sink};\n"
    )
    body = "\n".join(lines)
    (folder / "accelerator.sv").write_text(f"module accelerator (\n{ports});\n{body}\n{ends}endmodule\n")
    (folder / "bench.sv").write_text(
        BENCH.replace("IN_BITS", str(widths[source])).replace("OUT_BITS", str(widths[sink]))
    )


def _instance(number: int, node: Node, tables: Tables, folder: Path) -> str:
    """One unit with its parameters and connections."""
    parameters = ", ".join(
        f".{key}({_literal(value)})" for key, value in _parameters(number, node, tables, folder).items()
    )
    ports = []
    for side, streams in (("in", node.inputs), ("out", node.outputs)):
        for at, stream in enumerate(streams):
            name = side if len(streams) == 1 else f"{side}{at}"
            ports += [f".{name}_valid(v{stream}), .{name}_ready(r{stream}), .{name}_data(d{stream})"]
    return f"  {node.stage.module} #({parameters}) u{number} (.clk(clk), .rst(rst), {', '.join(ports)});"


def _literal(value: int | str) -> str:
    """Numbers beyond 32 bits need a width."""
    if isinstance(value, str):
        return f'"{value}"'
    return str(value) if abs(value) < 2**31 else f"{'-' if value < 0 else ''}64'sd{abs(value)}"


def _parameters(number: int, node: Node, tables: Tables, folder: Path) -> dict[str, int | str]:
    match node.stage:
        case Matrix() | Depthwise():
            return _with_memories(number, node, tables, folder)
        case Window() as s:
            element = s.bits // s.lanes
            pad = sum((s.pad & ((1 << element) - 1)) << (lane * element) for lane in range(s.lanes))
            named: dict[str, int | str] = {"W": s.bits, "CF": s.fold, "ROWS": s.rows, "GROUPED": int(s.grouped)}
            named |= {"H": s.size[0], "WD": s.size[1], "KH": s.kernel[0], "KW": s.kernel[1]}
            named |= {"SH": s.stride[0], "SW": s.stride[1], "DH": s.dilation[0], "DW": s.dilation[1]}
            named |= {"PT": s.before[0], "PL": s.before[1], "OH": s.out[0], "OW": s.out[1]}
            return named | ({"PAD": pad} if pad else {})
        case Converter() as s:
            return {"W": s.bits, "IN": s.wide_in, "OUT": s.wide_out}
        case Fifo() as s:
            return {"W": s.bits, "DEPTH": s.depth, "FAST": int(s.fast)}
        case Duplicator() as s:
            return {"W": s.bits}
        case Pool() as s:
            named = {"PE": s.lanes, "W": s.bits, "O": s.out_bits, "CF": s.fold, "N": s.count, "SUM": int(s.sums)}
            return named | dict(zip(("MUL", "BIAS", "SHIFT", "LOW"), s.scale, strict=True))
        case Adder() as s:
            named = {"PE": s.lanes, "W0": s.bits[0], "W1": s.bits[1], "O": s.out_bits}
            return named | dict(zip(("MUL0", "MUL1", "BIAS", "SHIFT", "LOW"), s.scale, strict=True))
    raise TypeError(f"no such unit: {node.stage}")


def _with_memories(number: int, node: Node, tables: Tables, folder: Path) -> dict[str, int | str]:
    assert isinstance(node.stage, (Matrix, Depthwise))
    unit = node.stage.unit
    weights, thresholds = tables[node.name]
    found = write_memories(unit, weights, thresholds, folder, f"u{number}")
    if isinstance(node.stage, Depthwise):
        del found["MW"], found["MH"], found["SIMD"]
        found |= {"C": unit.mh, "K": unit.mw}
    return found


# Offers the words of inputs.hex without a pause; prints the cycle and the word for each that leaves. With CHECK, it
# compares them with expected.hex.
BENCH = """\
module bench;
  reg clk = 0, rst = 1;
  reg [IN_BITS-1:0] words[0:`WORDS-1];
  integer at = 0, cycle = 0, left = `RESULTS;
  wire in_ready, out_valid;
  wire [OUT_BITS-1:0] out_data;
  wire in_valid = !rst && at < `WORDS;
  accelerator dut (
      .clk(clk), .rst(rst), .in_valid(in_valid), .in_ready(in_ready), .in_data(words[at]),
      .out_valid(out_valid), .out_ready(1'b1), .out_data(out_data)
  );
  always #1 clk = ~clk;
`ifdef CHECK
  reg [OUT_BITS-1:0] wanted[0:`RESULTS-1];
  integer wrong = 0;
  initial $readmemh("expected.hex", wanted);
`endif
  initial begin
    $readmemh("inputs.hex", words);
    repeat (4) @(posedge clk);
    #1 rst = 0;
  end
  always @(posedge clk) begin
    if (!rst) begin
      if (in_valid && in_ready) begin
        at <= at + 1;
        $display("in %0d", cycle);
      end
      if (out_valid) begin
        $display("%0d %h", cycle, out_data);
`ifdef CHECK
        if (out_data !== wanted[`RESULTS-left]) wrong = wrong + 1;
        if (left == 1) $display("of %0d words of the results, %0d are wrong", `RESULTS, wrong);
`endif
        left = left - 1;
        if (left == 0) $finish;
      end
      cycle <= cycle + 1;
      if (cycle == `LIMIT) begin
        $display("stuck");
        $finish;
      end
    end
  end
endmodule
"""
