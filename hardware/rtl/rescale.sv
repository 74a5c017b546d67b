// round((sum * MUL + BIAS) / 2^SHIFT), halves upwards, clipped to LOW .. 2^O - 1; without a clock.
module rescale #(
    parameter int W = 16,  // bits of the signed sum
    parameter int O = 8,
    parameter longint MUL = 1,
    parameter longint BIAS = 0,  // what rounds and the zero point's share, in units of 2^-SHIFT
    parameter int SHIFT = 0,
    parameter int LOW = 0
) (
    input  wire signed [W-1:0] sum,
    output wire        [O-1:0] result
);
  localparam int PW = W + $clog2(MUL + 1) + 2 > 64 ? 64 : W + $clog2(MUL + 1) + 2;
  localparam int TW = PW > SHIFT + O + 2 ? PW : SHIFT + O + 2;
  localparam signed [TW-1:0] FACTOR = MUL, OFFSET = BIAS;
  wire signed [TW-1:0] scaled = (sum * FACTOR + OFFSET) >>> SHIFT;
  assign result = scaled < LOW ? LOW : scaled > (1 << O) - 1 ? (1 << O) - 1 : scaled[O-1:0];
endmodule
