// sum / 2^SHIFT, rounded down and clipped to LOW .. 2^O - 1; without a clock.
module rescale #(
    parameter int W = 16,  // bits of the signed sum
    parameter int O = 8,
    parameter int SHIFT = 0,
    parameter int LOW = 0
) (
    input  wire signed [W-1:0] sum,
    output wire        [O-1:0] result
);
  wire signed [W-1:0] shifted = sum >>> SHIFT;
  assign result = shifted < LOW ? LOW : shifted > (1 << O) - 1 ? (1 << O) - 1 : shifted[O-1:0];
endmodule
