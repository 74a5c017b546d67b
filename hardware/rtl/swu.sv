// Sliding window unit: an image, pixel by pixel, in; the windows of a convolution or of a pooling out.
//
// A pixel is CF words of W bits. Windows come row by row, each as KH * KW * CF words:
//   GROUPED = 0: for ky, for kx, for c (all channels of a position one after the other);
//   GROUPED = 1: for c, for ky, for kx (all positions of some channels one after the other: depthwise layers).
// Rows lie in a ring of ROWS rows (a power of two, at least KH dilated + SH to let writing go on while reading). A row
// is given free when the last window that begins in it has been read; images follow each other without a gap.
// Positions outside the image read as PAD. A word read is at the output one cycle after its address was issued, and
// its address is issued one cycle after the word was written at the earliest.
module swu #(
    parameter int W = 8,
    parameter int CF = 1,
    parameter int H = 8, WD = 8,
    parameter int KH = 3, KW = 3,
    parameter int SH = 1, SW = 1,
    parameter int DH = 1, DW = 1,
    parameter int PT = 1, PL = 1,
    parameter int OH = 8, OW = 8,
    parameter int ROWS = 4,
    parameter int GROUPED = 0,
    parameter logic [W-1:0] PAD = 0
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
  localparam int LINE = WD * CF;
  localparam int LW = LINE > 1 ? $clog2(LINE) : 1;
  localparam int RW = ROWS > 1 ? $clog2(ROWS) : 1;
  localparam int XW = $clog2(LINE + (KW * DW + SW + PL + 1) * CF + 1) + 2;  // signed columns
  localparam int YW = $clog2(H + KH * DH + SH + PT + ROWS + 1) + 2;  // signed rows

  reg [W-1:0] words[0:(1<<(LW+RW))-1];

  // Writing: `ahead` is the row being written, relative to the first row still needed; below 0 it is not needed.
  reg signed [YW-1:0] ahead;
  reg [RW-1:0] write_slot, base_slot;
  reg [LW-1:0] write_column;
  assign in_ready = ahead < ROWS;
  wire push = in_valid && in_ready;
  wire row_written = push && write_column == LINE - 1;

  // Reading.
  reg [$clog2(OH+1)-1:0] oy;
  reg [$clog2(OW+1)-1:0] ox;
  reg [$clog2(KH+1)-1:0] ky;
  reg [$clog2(KW+1)-1:0] kx;
  reg [$clog2(CF+1)-1:0] c;
  reg signed [YW-1:0] top;  // oy * SH - PT
  reg signed [YW-1:0] down;  // ky * DH
  reg signed [XW-1:0] left;  // (ox * SW - PL) * CF
  reg signed [XW-1:0] right;  // kx * DW * CF + c
  wire signed [YW-1:0] base = top < 0 ? 0 : top > H ? H : top;
  wire signed [YW-1:0] row = top + down;
  wire signed [YW-1:0] offset = row - base;
  wire signed [XW-1:0] column = left + right;
  wire in_image = row >= 0 && row < H && column >= 0 && column < LINE;
  wire signed [XW-1:0] written = $signed({1'b0, write_column});
  wire here = !in_image || offset < ahead || (offset == ahead && column < written);

  wire last_c = c == CF - 1, last_x = kx == KW - 1, last_y = ky == KH - 1;
  wire last_word = last_c && last_x && last_y, last_column = ox == OW - 1, last_row = oy == OH - 1;

  reg valid, padded;
  reg [W-1:0] data;
  wire moves = !valid || out_ready;
  wire issue = moves && here;
  wire row_read = issue && last_word && last_column;
  wire signed [YW-1:0] below = top + SH;
  wire signed [YW-1:0] next_base = last_row ? H : below < 0 ? 0 : below > H ? H : below;
  wire signed [YW-1:0] freed = row_read ? next_base - base : 0;
  wire [RW-1:0] read_slot = base_slot + offset[RW-1:0];

  assign out_valid = valid;
  assign out_data  = padded ? PAD : data;

  always @(posedge clk) begin
    if (push) words[{write_slot, write_column}] <= in_data;
    if (issue) begin
      data   <= words[{read_slot, column[LW-1:0]}];
      padded <= !in_image;
    end
    if (rst) begin
      ahead <= 0;
      write_slot <= 0;
      write_column <= 0;
      base_slot <= 0;
      valid <= 0;
    end else begin
      if (moves) valid <= here;
      ahead <= ahead + (row_written ? 1 : 0) - freed;
      base_slot <= base_slot + freed[RW-1:0];
      if (push) write_column <= row_written ? 0 : write_column + 1'b1;
      if (row_written) write_slot <= write_slot + 1'b1;
    end
  end

  always @(posedge clk) begin
    if (rst) begin
      oy <= 0;
      ox <= 0;
      ky <= 0;
      kx <= 0;
      c <= 0;
      top <= -PT;
      down <= 0;
      left <= -PL * CF;
      right <= 0;
    end else if (issue) begin
      if (GROUPED == 0) begin
        c <= last_c ? 0 : c + 1'b1;
        if (last_c) kx <= last_x ? 0 : kx + 1'b1;
        if (last_c && last_x) ky <= last_y ? 0 : ky + 1'b1;
        if (last_c && last_x) down <= last_y ? 0 : down + DH;
        right <= !last_c ? right + 1 : last_x ? 0 : right + (DW - 1) * CF + 1;
      end else begin
        kx <= last_x ? 0 : kx + 1'b1;
        if (last_x) ky <= last_y ? 0 : ky + 1'b1;
        if (last_x) down <= last_y ? 0 : down + DH;
        if (last_x && last_y) c <= last_c ? 0 : c + 1'b1;
        right <= !last_x ? right + DW * CF : !last_y ? $signed({1'b0, c}) : last_c ? 0 : $signed({1'b0, c}) + 1;
      end
      if (last_word) begin
        ox   <= last_column ? 0 : ox + 1'b1;
        left <= last_column ? -PL * CF : left + SW * CF;
      end
      if (last_word && last_column) begin
        oy  <= last_row ? 0 : oy + 1'b1;
        top <= last_row ? -PT : below;
      end
    end
  end
endmodule
