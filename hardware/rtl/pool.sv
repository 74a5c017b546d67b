// Pooling over windows of N positions, each CF words of PE unsigned elements, all channels of a position together.
//
// SUM = 0: the largest element; at the output one cycle after the word of the window's last position was taken.
// SUM = 1: the sum, rescaled: (sum * MUL + BIAS) / 2^SHIFT, rounded down, clipped to LOW .. 2^O - 1; 2^(SHIFT-1) within
// BIAS rounds halves up. Four registers follow each other (sum, product, with BIAS, result), each of which moves on when
// the next is free or moves: the result is at the output four cycles after that word was taken.
// No word is taken while the first register can't move on.
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
  localparam int MW = $clog2(MUL + 1) + 1;  // a signed factor
  localparam int OFFSET = $clog2((BIAS < 0 ? -BIAS : BIAS) + 1) + 1;
  localparam int NEEDED = (MW + SW > OFFSET ? MW + SW : OFFSET) + 1;
  localparam int TW = NEEDED > SHIFT + O + 1 ? NEEDED : SHIFT + O + 1;

  reg [PE*SW-1:0] so_far[0:(1<<CW)-1];
  reg [$clog2(N+1)-1:0] at;
  reg [CW-1:0] c;
  reg [PE*SW-1:0] total;
  reg total_valid;
  wire [PE*SW-1:0] held = so_far[c];
  wire [PE*SW-1:0] now;
  wire last_c = c == CF - 1, last = at == N - 1;
  wire move;  // of the first register
  assign in_ready = move;
  wire taken = in_valid && in_ready;

  always @(posedge clk) begin
    if (taken) so_far[c] <= now;
    if (move) total <= now;
    if (rst) begin
      total_valid <= 0;
      at <= 0;
      c <= 0;
    end else begin
      if (move) total_valid <= in_valid && last;
      if (taken) c <= last_c ? 0 : c + 1'b1;
      if (taken && last_c) at <= last ? 0 : at + 1'b1;
    end
  end

  genvar p;
  generate
    if (SUM == 0) begin : g_max
      assign move = !total_valid || out_ready;
      assign out_valid = total_valid;
      assign out_data = total;
    end else begin : g_sum
      reg [2:0] valid;
      wire move3 = !valid[2] || out_ready;
      wire move2 = !valid[1] || move3;
      wire move1 = !valid[0] || move2;
      assign move = !total_valid || move1;
      assign out_valid = valid[2];
      always @(posedge clk) begin
        if (rst) valid <= 0;
        else begin
          if (move1) valid[0] <= total_valid;
          if (move2) valid[1] <= valid[0];
          if (move3) valid[2] <= valid[1];
        end
      end
    end
    for (p = 0; p < PE; p = p + 1) begin : lane
      wire [SW-1:0] old = held[p*SW+:SW];
      wire [W-1:0] came = in_data[p*W+:W];
      if (SUM == 0) begin : g_largest
        assign now[p*SW+:SW] = at == 0 || came > old ? came : old;
      end else begin : g_rescaled
        localparam signed [MW-1:0] FACTOR = MUL;
        localparam signed [TW-1:0] CONSTANT = BIAS;
        wire signed [SW:0] sum = {1'b0, total[p*SW+:SW]};
        reg signed [MW+SW-1:0] product;
        reg signed [TW-1:0] moved;
        reg [O-1:0] result;
        wire [O-1:0] clipped;
        assign now[p*SW+:SW] = at == 0 ? came : old + came;
        rescale #(.W(TW), .O(O), .SHIFT(SHIFT), .LOW(LOW)) scaled (moved, clipped);
        always @(posedge clk) begin
          if (g_sum.move1) product <= sum * FACTOR;
          if (g_sum.move2) moved <= product + CONSTANT;
          if (g_sum.move3) result <= clipped;
        end
        assign out_data[p*O+:O] = result;
      end
    end
  endgenerate
endmodule
