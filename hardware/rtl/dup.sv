// Stream duplicator: every word goes to both outputs; the next is taken when both are free or being taken.
module dup #(
    parameter int W = 8
) (
    input  wire         clk,
    input  wire         rst,
    input  wire         in_valid,
    output wire         in_ready,
    input  wire [W-1:0] in_data,
    output wire         out0_valid,
    input  wire         out0_ready,
    output wire [W-1:0] out0_data,
    output wire         out1_valid,
    input  wire         out1_ready,
    output wire [W-1:0] out1_data
);
  reg valid0, valid1;
  reg [W-1:0] data;
  assign in_ready = (!valid0 || out0_ready) && (!valid1 || out1_ready);
  assign {out0_valid, out0_data} = {valid0, data};
  assign {out1_valid, out1_data} = {valid1, data};
  always @(posedge clk) begin
    if (in_valid && in_ready) data <= in_data;
    if (rst) {valid0, valid1} <= 0;
    else if (in_ready) {valid0, valid1} <= {2{in_valid}};
    else begin
      if (out0_ready) valid0 <= 0;
      if (out1_ready) valid1 <= 0;
    end
  end
endmodule
