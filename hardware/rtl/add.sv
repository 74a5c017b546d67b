// Elementwise sum of two streams of PE unsigned elements, rescaled: (a * MUL0 + b * MUL1 + BIAS) / 2^SHIFT, rounded
// down, clipped to LOW .. 2^O - 1; 2^(SHIFT-1) within BIAS rounds halves up.
//
// Both words are taken in the same cycle. Three registers follow each other (products, sum, result), each of which moves
// on when the next is free or moves: a result is at the output three cycles later, and a word is taken while the first of
// three before it leaves.
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
  localparam int M0 = $clog2(MUL0 + 1) + 1, M1 = $clog2(MUL1 + 1) + 1;  // signed factors
  localparam int P0 = M0 + W0, P1 = M1 + W1;
  localparam int LARGEST = P0 > P1 ? P0 : P1;
  localparam int OFFSET = $clog2((BIAS < 0 ? -BIAS : BIAS) + 1) + 1;
  localparam int NEEDED = (LARGEST > OFFSET ? LARGEST : OFFSET) + 2;
  localparam int SW = NEEDED > SHIFT + O + 1 ? NEEDED : SHIFT + O + 1;

  reg [2:0] valid;
  wire move2 = !valid[2] || out_ready;
  wire move1 = !valid[1] || move2;
  wire move0 = !valid[0] || move1;
  assign in0_ready = move0 && in1_valid;
  assign in1_ready = move0 && in0_valid;
  assign out_valid = valid[2];
  always @(posedge clk) begin
    if (rst) valid <= 0;
    else begin
      if (move0) valid[0] <= in0_valid && in1_valid;
      if (move1) valid[1] <= valid[0];
      if (move2) valid[2] <= valid[1];
    end
  end

  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : lane
      localparam signed [M0-1:0] FACTOR0 = MUL0;
      localparam signed [M1-1:0] FACTOR1 = MUL1;
      localparam signed [SW-1:0] CONSTANT = BIAS;
      wire signed [W0:0] a = {1'b0, in0_data[p*W0+:W0]};
      wire signed [W1:0] b = {1'b0, in1_data[p*W1+:W1]};
      reg signed [P0:0] first;
      reg signed [P1:0] second;
      reg signed [SW-1:0] sum;
      reg [O-1:0] result;
      wire [O-1:0] clipped;
      rescale #(.W(SW), .O(O), .SHIFT(SHIFT), .LOW(LOW)) scaled (sum, clipped);
      always @(posedge clk) begin
        if (move0) first <= a * FACTOR0;
        if (move0) second <= b * FACTOR1;
        if (move1) sum <= first + second + CONSTANT;
        if (move2) result <= clipped;
      end
      assign out_data[p*O+:O] = result;
    end
  endgenerate
endmodule
