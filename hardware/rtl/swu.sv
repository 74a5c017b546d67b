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

  // Rows are counted on from image to image, modulo 2^YW; a row's place in the ring are the lowest bits.
  reg signed [YW-1:0] write_row;  // being written
  reg signed [YW-1:0] base_row;  // the first that is still needed; may be ahead of the one being written
  reg [LW-1:0] write_column;
  wire signed [YW-1:0] held = write_row - base_row;
  assign in_ready = held < ROWS;
  wire push = in_valid && in_ready;
  wire row_written = push && write_column == LINE - 1;

  // Reading. Positions are registers that constants are added to, so that only comparing them is left to do in the
  // cycle in which a word is issued.
  reg [$clog2(OH+1)-1:0] oy;  // of the next row of windows
  reg [$clog2(OW+1)-1:0] ox;
  reg [$clog2(KH+1)-1:0] ky;
  reg [$clog2(KW+1)-1:0] kx;
  reg [$clog2(CF+1)-1:0] c;
  reg signed [YW-1:0] row;  // in the image
  reg signed [YW-1:0] read_row;  // the same, counted on from image to image
  reg signed [XW-1:0] column;  // position * CF + c
  reg signed [YW-1:0] next_top;  // oy * SH - PT
  reg signed [YW-1:0] advance;  // rows that are not needed any more after this row of windows
  wire in_image = row >= 0 && row < H && column >= 0 && column < LINE;
  wire signed [XW-1:0] written = $signed({1'b0, write_column});
  wire signed [YW-1:0] ahead = write_row - read_row;
  wire here = !in_image || ahead > 0 || (ahead == 0 && column < written);

  localparam signed [YW-1:0] UP = (KH - 1) * DH;
  localparam signed [YW-1:0] TO_NEXT = H - (OH - 1) * SH;  // from the last row of windows to the next image's first
  localparam signed [XW-1:0] BACK = (KW - 1) * DW * CF;
  wire last_c = c == CF - 1, last_x = kx == KW - 1, last_y = ky == KH - 1;
  wire last_word = last_c && last_x && last_y, last_column = ox == OW - 1, end_row = last_word && last_column;
  wire last_row = oy == 0;  // the next row of windows is the next image's first
  wire turn = GROUPED != 0 ? last_x : last_x && last_c;  // on to the next row of the window
  wire signed [YW-1:0] move_down = !turn ? 0 : !last_y ? DH : -UP;
  wire signed [XW-1:0] move_right = GROUPED == 0
      ? (!last_c ? 1 : !last_x ? (DW - 1) * CF + 1 : (last_y ? SW * CF : 0) - BACK - (CF - 1))
      : (!last_x ? DW * CF : !last_y ? -BACK : !last_c ? 1 - BACK : SW * CF - BACK - (CF - 1));
  wire signed [YW-1:0] now_base = next_top < 0 ? 0 : next_top > H ? H : next_top;
  wire signed [YW-1:0] after = next_top + SH;
  wire signed [YW-1:0] after_base = oy == OH - 1 ? H : after < 0 ? 0 : after > H ? H : after;
  localparam signed [YW-1:0] FIRST_BASE = OH == 1 ? H : SH - PT < 0 ? 0 : SH - PT > H ? H : SH - PT;

  reg valid, padded;
  reg [W-1:0] data;
  wire moves = !valid || out_ready;
  wire issue = moves && here;

  assign out_valid = valid;
  assign out_data  = padded ? PAD : data;

  always @(posedge clk) begin
    if (push) words[{write_row[RW-1:0], write_column}] <= in_data;
    if (issue) begin
      data   <= words[{read_row[RW-1:0], column[LW-1:0]}];
      padded <= !in_image;
    end
    if (rst) begin
      write_row <= 0;
      write_column <= 0;
      valid <= 0;
    end else begin
      if (moves) valid <= here;
      if (push) write_column <= row_written ? 0 : write_column + 1'b1;
      if (row_written) write_row <= write_row + 1;
    end
  end

  always @(posedge clk) begin
    if (rst) begin
      oy <= OH == 1 ? 0 : 1;
      ox <= 0;
      ky <= 0;
      kx <= 0;
      c <= 0;
      row <= -PT;
      read_row <= -PT;
      column <= -PL * CF;
      next_top <= OH == 1 ? -PT : SH - PT;
      base_row <= 0;
      advance <= FIRST_BASE;
    end else if (issue) begin
      if (GROUPED == 0 || (last_x && last_y)) c <= last_c ? 0 : c + 1'b1;
      if (GROUPED != 0 || last_c) kx <= last_x ? 0 : kx + 1'b1;
      if (turn) ky <= last_y ? 0 : ky + 1'b1;
      if (last_word) ox <= last_column ? 0 : ox + 1'b1;
      row <= end_row ? next_top : row + move_down;
      read_row <= read_row + (end_row ? (last_row ? TO_NEXT : SH) - UP : move_down);
      column <= end_row ? -PL * CF : column + move_right;
      if (end_row) begin
        oy <= oy == OH - 1 ? 0 : oy + 1'b1;
        next_top <= oy == OH - 1 ? -PT : after;
        base_row <= base_row + advance;
        advance <= after_base - now_base;
      end
    end
  end
endmodule
