// Elementwise sum of two streams of PE unsigned elements, rescaled: round((a * MUL0 + b * MUL1 + BIAS) / 2^SHIFT).
//
// Both words are taken in the same cycle; the sum is at the output one cycle later.
module add #(
    parameter int PE = 1,
    parameter int W0 = 8, W1 = 8, O = 8,
    parameter longint MUL0 = 1, MUL1 = 1, BIAS = 0,
    parameter int SHIFT = 0,
    parameter int LOW = 0
) (
    input  wire             clk,
    input  wire             rst,
    input  wire             in0_valid,
    output wire             in0_ready,
    input  wire [PE*W0-1:0] in0_data,
    input  wire             in1_valid,
    output wire             in1_ready,
    input  wire [PE*W1-1:0] in1_data,
    output wire             out_valid,
    input  wire             out_ready,
    output wire [ PE*O-1:0] out_data
);
  localparam int SW = 2 + ($clog2(MUL0 + 1) + W0 > $clog2(MUL1 + 1) + W1 ? $clog2(MUL0 + 1) + W0 : $clog2(MUL1 + 1) + W1);
  reg valid;
  reg [PE*O-1:0] data;
  wire [PE*O-1:0] sums;
  wire moves = !valid || out_ready;
  assign in0_ready = moves && in1_valid;
  assign in1_ready = moves && in0_valid;
  assign out_valid = valid;
  assign out_data  = data;
  genvar p;
  generate
    for (p = 0; p < PE; p++) begin : lane
      localparam signed [SW-1:0] FACTOR0 = MUL0, FACTOR1 = MUL1;
      wire signed [W0:0] a = {1'b0, in0_data[p*W0+:W0]};
      wire signed [W1:0] b = {1'b0, in1_data[p*W1+:W1]};
      wire signed [SW-1:0] sum = a * FACTOR0 + b * FACTOR1;
      rescale #(.W(SW), .O(O), .BIAS(BIAS), .SHIFT(SHIFT), .LOW(LOW)) scaled (sum, sums[p*O+:O]);
    end
  endgenerate
  always @(posedge clk) begin
    if (moves) data <= sums;
    if (rst) valid <= 0;
    else if (moves) valid <= in0_valid && in1_valid;
  end
endmodule
