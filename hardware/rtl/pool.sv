// Pooling over windows of N positions, each CF words of PE unsigned elements, all channels of a position together.
//
// SUM = 0: the largest element. SUM = 1: the sum, rescaled: round((sum * MUL + BIAS) / 2^SHIFT), clipped to O bits.
// The result of a word of the window's last position is at the output one cycle after that word was taken.
module pool #(
    parameter int PE = 1,
    parameter int W = 8, O = 8,
    parameter int CF = 1, N = 4,
    parameter int SUM = 0,
    parameter longint MUL = 1, BIAS = 0,
    parameter int SHIFT = 0,
    parameter int LOW = 0
) (
    input  wire            clk,
    input  wire            rst,
    input  wire            in_valid,
    output wire            in_ready,
    input  wire [PE*W-1:0] in_data,
    output wire            out_valid,
    input  wire            out_ready,
    output wire [PE*O-1:0] out_data
);
  localparam int SW = SUM != 0 ? W + $clog2(N) : W;
  localparam int CW = CF > 1 ? $clog2(CF) : 1;

  reg [PE*SW-1:0] so_far[0:(1<<CW)-1];
  reg [$clog2(N+1)-1:0] at;
  reg [CW-1:0] c;
  reg valid;
  reg [PE*O-1:0] data;
  wire [PE*SW-1:0] held = so_far[c];
  wire [PE*SW-1:0] now;
  wire [PE*O-1:0] result;
  wire last_c = c == CF - 1, last = at == N - 1;
  assign in_ready  = !valid || out_ready;
  assign out_valid = valid;
  assign out_data  = data;

  genvar p;
  generate
    for (p = 0; p < PE; p++) begin : lane
      wire [SW-1:0] old = held[p*SW+:SW];
      wire [W-1:0] came = in_data[p*W+:W];
      if (SUM != 0) begin : sum
        assign now[p*SW+:SW] = at == 0 ? came : old + came;
        wire signed [SW:0] total = {1'b0, now[p*SW+:SW]};
        rescale #(.W(SW + 1), .O(O), .MUL(MUL), .BIAS(BIAS), .SHIFT(SHIFT), .LOW(LOW)) scaled (total, result[p*O+:O]);
      end else begin : max
        assign now[p*SW+:SW] = at == 0 || came > old ? came : old;
        assign result[p*O+:O] = now[p*SW+:SW];
      end
    end
  endgenerate

  wire taken = in_valid && in_ready;
  always @(posedge clk) begin
    if (taken) so_far[c] <= now;
    if (in_ready) data <= result;
    if (rst) begin
      valid <= 0;
      at <= 0;
      c <= 0;
    end else begin
      if (in_ready) valid <= in_valid && last;
      if (taken) c <= last_c ? 0 : c + 1'b1;
      if (taken && last_c) at <= last ? 0 : at + 1'b1;
    end
  end
endmodule
