// First in, first out: DEPTH words of W bits between two units.
//
// FAST = 1: words lie in flip-flops or LUT RAM, and a word written in cycle t can be taken in cycle t + 1.
// FAST = 0: words lie in block RAM behind an output register, one more cycle; the register is not among DEPTH.
// `in_ready` depends on registers alone, so chains of units have no path through all of them.
module fifo #(
    parameter int W = 8,
    parameter int DEPTH = 2,
    parameter int FAST = 1
) (
    input  wire         clk,
    input  wire         rst,
    input  wire         in_valid,
    output wire         in_ready,
    input  wire [W-1:0] in_data,
    output wire         out_valid,
    input  wire         out_ready,
    output wire [W-1:0] out_data
);
  localparam int AW = DEPTH > 1 ? $clog2(DEPTH) : 1;
  localparam int CW = $clog2(DEPTH + 1);

  reg [W-1:0] words[0:DEPTH-1];
  reg [AW-1:0] head, tail;
  reg [CW-1:0] count;

  wire push = in_valid && in_ready;
  wire pop;
  assign in_ready = count != DEPTH;

  always @(posedge clk) begin
    if (push) words[tail] <= in_data;
    if (rst) begin
      head  <= 0;
      tail  <= 0;
      count <= 0;
    end else begin
      if (push) tail <= tail == DEPTH - 1 ? 0 : tail + 1'b1;
      if (pop) head <= head == DEPTH - 1 ? 0 : head + 1'b1;
      if (push && !pop) count <= count + 1'b1;
      if (pop && !push) count <= count - 1'b1;
    end
  end

  generate
    if (FAST != 0) begin : fast
      assign out_valid = count != 0;
      assign out_data  = words[head];
      assign pop = out_valid && out_ready;
    end else begin : registered
      reg valid;
      reg [W-1:0] data;
      wire moves = !valid || out_ready;
      assign pop = moves && count != 0;
      always @(posedge clk) begin
        if (pop) data <= words[head];
        if (rst) valid <= 0;
        else if (moves) valid <= count != 0;
      end
      assign out_valid = valid;
      assign out_data  = data;
    end
  endgenerate
endmodule
