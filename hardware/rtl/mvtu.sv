// Folded matrix-vector product, then thresholds: PE rows x SIMD inputs a cycle, streams by valid and ready.
//
// A vector of MW inputs enters in SF = MW/SIMD beats, input s*SIMD+i in bits [i*A +: A] of beat s; MH rows leave in
// NF = MH/PE beats, row n*PE+p in slice p of beat n. With the matrix M, row r gives acc[r] = sum of M[r][c] * x[c],
// modulo 2**ACC, as a signed number.
//
//   W = 1          weight bit 1 means +1, bit 0 means -1
//   W > 1          weights are signed, two's complement
//   A = 1, W = 1   input bit 1 means +1, bit 0 means -1
//   otherwise      inputs are unsigned, or with A_SIGNED = 1 two's complement
//
//   O = 0          acc[r] itself leaves, ACC bits
//   O = 1 to 4     y[r] = number of k in 1..2**O-1 with acc[r] >= T[r][k]; T[r] ascends
//   O > 4          y[r] = clip(floor((acc[r] * scale[r] + offset[r]) / 2**SHIFT), 0, 2**O - 1), with a scale of
//                  16 signed bits and an offset of B = max(ACC + 16, SHIFT + O + 1) signed bits; 2**(SHIFT-1) within
//                  the offset rounds half up
//   O_SIGNED = 1   2**(O-1) less than that: with O > 4 the range of the clip is -2**(O-1) .. 2**(O-1)-1 instead;
//                  with thresholds y[r] - 2**(O-1)
//
// Files for $readmemh:
//   WEIGHTS     NF*SF words, address n*SF+s: M[n*PE+p][s*SIMD+i] in bits [(p*SIMD+i)*W +: W]
//   THRESHOLDS  O <= 4: address (p*2**clog2(NF) + n) * 2**O + k: T[n*PE+p][k], ACC bits; k = 0 is not read
//               O > 4: NF words, address n: {offset, scale} of row n*PE+p in bits [p*(B+16) +: B+16]
//
// Timing, exact. Each cycle issues at most one step (n, s) of NF*SF; steps with n = 0 take an input beat. The last
// step of a row group, s = SF-1, waits for one of DEPTH credits; a credit comes back in the cycle after an output beat
// is taken. The group's output beat is valid LATENCY cycles after its last step, in order; nothing else ever stalls:
//   LEVELS  = clog2(W = 1 and A = 1 ? ceil(SIMD/2) : SIMD)
//   LATENCY = 5 + LEVELS + (W = 1 and A > 1 ? 1 : 0) + (O = 0 ? 0 : O <= 4 ? 2*O : 3)
//   DEPTH   = 2**clog2(ceil((LATENCY + 1) / SF)), which keeps the interval at NF*SF cycles a vector
// There is no combinational path from out_ready to in_ready or from in_valid to out_valid.

`ifdef YOSYS
`define LUT_ROM logic_block = 1
`else
`define LUT_ROM rom_style = "distributed"
`endif

module mvtu #(
    parameter int MW = 8,
    parameter int MH = 8,
    parameter int PE = 2,
    parameter int SIMD = 2,
    parameter int W = 4,
    parameter int A = 4,
    parameter int ACC = 12,
    parameter int O = 4,
    parameter WEIGHTS = "weights.hex",
    parameter THRESHOLDS = "thresholds.hex",
    parameter RAM_STYLE = "auto",  // of the weights: "auto", "block" or "distributed" (look-up tables)
    parameter int A_SIGNED = 0,
    parameter int O_SIGNED = 0,
    parameter int SHIFT = 16
) (
    input wire clk,
    input wire rst,
    input wire in_valid,
    output wire in_ready,
    input wire [SIMD*A-1:0] in_data,
    output wire out_valid,
    input wire out_ready,
    output wire [PE*(O == 0 ? ACC : O)-1:0] out_data
);
  localparam int SF = MW / SIMD;
  localparam int NF = MH / PE;
  localparam int XNOR = (W == 1 && A == 1) ? 1 : 0;
  localparam int HALVES = (W == 1 && A > 1) ? 1 : 0;
  localparam int PRODUCTS = XNOR ? (SIMD + 1) / 2 : SIMD;
  localparam int LEVELS = $clog2(PRODUCTS);
  localparam int PRODUCT_BITS = XNOR ? 2 : (W == 1 ? A : W + A);
  localparam int SUM_BITS = PRODUCT_BITS + LEVELS;
  localparam int SUM_SIGNED = (W > 1 || (A_SIGNED && !XNOR)) ? 1 : 0;
  localparam int OUT_BITS = O == 0 ? ACC : O;
  localparam int LATENCY = 5 + LEVELS + HALVES + (O == 0 ? 0 : (O <= 4 ? 2 * O : 4));
  localparam int DEPTH = 1 << $clog2((LATENCY + SF) / SF);
  localparam int STEP_BITS = SF > 1 ? $clog2(SF) : 1;
  localparam int GROUP_BITS = NF > 1 ? $clog2(NF) : 1;
  localparam int ADDRESS_BITS = SF * NF > 1 ? $clog2(SF * NF) : 1;

  // Which step is next.
  reg [STEP_BITS-1:0] step;
  reg [GROUP_BITS-1:0] group;
  reg [ADDRESS_BITS-1:0] address;
  reg first_pass;
  wire credit;
  wire last_step = step == SF - 1;
  wire go = !last_step || credit;
  wire issue = go && (in_valid || !first_pass);
  assign in_ready = go && first_pass;

  always @(posedge clk) begin
    if (rst) begin
      step <= 0;
      group <= 0;
      address <= 0;
      first_pass <= 1;
    end else if (issue) begin
      step <= last_step ? 0 : step + 1'b1;
      address <= address == SF * NF - 1 ? 0 : address + 1'b1;
      if (last_step) begin
        group <= group == NF - 1 ? 0 : group + 1'b1;
        first_pass <= group == NF - 1;
      end
    end
  end

  // Weights and inputs, two cycles later.
  wire [PE*SIMD*W-1:0] weights_read;
  reg [PE*SIMD*W-1:0] weights;
  reg [SIMD*A-1:0] inputs;
  mvtu_rom #(
      .WIDTH(PE * SIMD * W),
      .DEPTH(SF * NF),
      .FILE(WEIGHTS),
      .STYLE(RAM_STYLE)
  ) weight_memory (
      .clk(clk),
      .address(address),
      .data(weights_read)
  );
  always @(posedge clk) weights <= weights_read;

  reg [SIMD*A-1:0] fresh_inputs;
  always @(posedge clk) fresh_inputs <= in_data;
  generate
    if (NF > 1 && SF > 1) begin : g_buffer
      wire [SIMD*A-1:0] kept_inputs;
      reg from_stream;
      mvtu_buffer #(
          .WIDTH(SIMD * A),
          .DEPTH(SF)
      ) kept (
          .clk(clk),
          .put(issue && first_pass),
          .address(step),
          .put_data(in_data),
          .data(kept_inputs)
      );
      always @(posedge clk) begin
        from_stream <= first_pass;
        inputs <= from_stream ? fresh_inputs : kept_inputs;
      end
    end else if (NF > 1) begin : g_hold
      reg from_stream;
      always @(posedge clk) begin
        from_stream <= issue && first_pass;
        if (from_stream) inputs <= fresh_inputs;
      end
    end else begin : g_stream
      always @(posedge clk) inputs <= fresh_inputs;
    end
  endgenerate

  // Steps travel along with their data; the accumulators see them after 3 + LEVELS cycles.
  localparam int TRAVEL = 3 + LEVELS;
  reg [TRAVEL-1:0] travelling;
  reg [TRAVEL-1:0] travelling_last;
  always @(posedge clk) begin
    travelling <= rst ? {TRAVEL{1'b0}} : {travelling[TRAVEL-2:0], issue};
    travelling_last <= {travelling_last[TRAVEL-2:0], last_step};
  end
  wire add = travelling[TRAVEL-1];
  wire add_last = travelling_last[TRAVEL-1];
  reg add_first;
  reg summed;
  always @(posedge clk) begin
    if (rst) add_first <= 1;
    else if (add) add_first <= add_last;
    summed <= !rst && add && add_last;
  end

  // With W = 1 and A > 1, sum(+-x) = 2 * sum(x where the weight is +1) - sum(x); the last sum is shared by all rows.
  wire [ACC-1:0] all_inputs;
  wire totals_valid;
  generate
    if (HALVES) begin : g_all
      wire [SUM_BITS-1:0] sum;
      mvtu_dot #(
          .SIMD(SIMD),
          .W(W),
          .A(A),
          .A_SIGNED(A_SIGNED)
      ) dot (
          .clk(clk),
          .weights({SIMD{1'b1}}),
          .inputs(inputs),
          .sum(sum)
      );
      mvtu_accumulator #(
          .SUM_BITS(SUM_BITS),
          .SUM_SIGNED(SUM_SIGNED),
          .ACC(ACC),
          .START(0),
          .DOUBLE(0)
      ) accumulator (
          .clk(clk),
          .add(add),
          .first(add_first),
          .sum(sum),
          .total(all_inputs)
      );
      reg later;
      always @(posedge clk) later <= !rst && summed;
      assign totals_valid = later;
    end else begin : g_none
      assign all_inputs = 0;
      assign totals_valid = summed;
    end
  endgenerate

  wire [PE*ACC-1:0] totals;
  wire [PE*OUT_BITS-1:0] results;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : g_row
      wire [SUM_BITS-1:0] sum;
      wire [ACC-1:0] total;
      mvtu_dot #(
          .SIMD(SIMD),
          .W(W),
          .A(A),
          .A_SIGNED(A_SIGNED)
      ) dot (
          .clk(clk),
          .weights(weights[p*SIMD*W+:SIMD*W]),
          .inputs(inputs),
          .sum(sum)
      );
      mvtu_accumulator #(
          .SUM_BITS(SUM_BITS),
          .SUM_SIGNED(SUM_SIGNED),
          .ACC(ACC),
          .START(XNOR ? -MW : 0),
          .DOUBLE(XNOR)
      ) accumulator (
          .clk(clk),
          .add(add),
          .first(add_first),
          .sum(sum),
          .total(total)
      );
      if (HALVES) begin : g_halves
        reg [ACC-1:0] difference;
        always @(posedge clk) difference <= {total[ACC-2:0], 1'b0} - all_inputs;
        assign totals[p*ACC+:ACC] = difference;
      end else begin : g_whole
        assign totals[p*ACC+:ACC] = total;
      end
    end
  endgenerate

  // Row groups arrive here in order, so that a counter tells which one it is.
  reg [GROUP_BITS-1:0] result_group;
  always @(posedge clk) begin
    if (rst) result_group <= 0;
    else if (totals_valid) result_group <= result_group == NF - 1 ? 0 : result_group + 1'b1;
  end
  wire results_valid;
  generate
    if (O == 0) begin : g_raw
      assign results = totals;
      assign results_valid = totals_valid;
    end else if (O <= 4) begin : g_thresholds
      mvtu_thresholds #(
          .NF(NF),
          .PE(PE),
          .ACC(ACC),
          .O(O),
          .O_SIGNED(O_SIGNED),
          .FILE(THRESHOLDS)
      ) thresholds (
          .clk(clk),
          .rst(rst),
          .totals_valid(totals_valid),
          .group(result_group),
          .totals(totals),
          .results_valid(results_valid),
          .results(results)
      );
    end else begin : g_requantise
      mvtu_requantise #(
          .NF(NF),
          .PE(PE),
          .ACC(ACC),
          .O(O),
          .O_SIGNED(O_SIGNED),
          .SHIFT(SHIFT),
          .FILE(THRESHOLDS)
      ) requantise (
          .clk(clk),
          .rst(rst),
          .totals_valid(totals_valid),
          .group(result_group),
          .totals(totals),
          .results_valid(results_valid),
          .results(results)
      );
    end
  endgenerate

  mvtu_queue #(
      .WIDTH(PE * OUT_BITS),
      .DEPTH(DEPTH)
  ) queue (
      .clk(clk),
      .rst(rst),
      .reserve(issue && last_step),
      .free(credit),
      .put(results_valid),
      .put_data(results),
      .out_valid(out_valid),
      .out_ready(out_ready),
      .out_data(out_data)
  );
endmodule


// Read-only memory with a registered output.
module mvtu_rom #(
    parameter int WIDTH = 8,
    parameter int DEPTH = 8,
    parameter FILE = "weights.hex",
    parameter STYLE = "auto"
) (
    input wire clk,
    input wire [(DEPTH > 1 ? $clog2(DEPTH) : 1)-1:0] address,
    output reg [WIDTH-1:0] data
);
  generate
    if (STYLE == "block") begin : g_block
      (* ram_style = "block", rom_style = "block" *) reg [WIDTH-1:0] memory[0:DEPTH-1];
      initial $readmemh(FILE, memory);
      always @(posedge clk) data <= memory[address];
    end else if (STYLE == "distributed") begin : g_distributed
      (* `LUT_ROM *) reg [WIDTH-1:0] memory[0:DEPTH-1];
      initial $readmemh(FILE, memory);
      always @(posedge clk) data <= memory[address];
    end else begin : g_auto
      reg [WIDTH-1:0] memory[0:DEPTH-1];
      initial $readmemh(FILE, memory);
      always @(posedge clk) data <= memory[address];
    end
  endgenerate
endmodule


// One vector of inputs: written in the first pass, read in the others.
module mvtu_buffer #(
    parameter int WIDTH = 8,
    parameter int DEPTH = 8
) (
    input wire clk,
    input wire put,
    input wire [$clog2(DEPTH)-1:0] address,
    input wire [WIDTH-1:0] put_data,
    output reg [WIDTH-1:0] data
);
  generate
    if (DEPTH <= 64) begin : g_distributed
      (* ram_style = "distributed" *) reg [WIDTH-1:0] memory[0:DEPTH-1];
      always @(posedge clk) begin
        if (put) memory[address] <= put_data;
        data <= memory[address];
      end
    end else begin : g_block
      (* ram_style = "block" *) reg [WIDTH-1:0] memory[0:DEPTH-1];
      always @(posedge clk) begin
        if (put) memory[address] <= put_data;
        data <= memory[address];
      end
    end
  endgenerate
endmodule


// Sum of SIMD products, 1 + LEVELS cycles later: products, then a tree of adders, a register behind each.
module mvtu_dot #(
    parameter int SIMD = 2,
    parameter int W = 4,
    parameter int A = 4,
    parameter int A_SIGNED = 0,
    parameter int XNOR = (W == 1 && A == 1) ? 1 : 0,
    parameter int PRODUCTS = XNOR ? (SIMD + 1) / 2 : SIMD,
    parameter int BITS = XNOR ? 2 : (W == 1 ? A : W + A),
    parameter int LEVELS = $clog2(PRODUCTS)
) (
    input wire clk,
    input wire [SIMD*W-1:0] weights,
    input wire [SIMD*A-1:0] inputs,
    output wire [BITS+LEVELS-1:0] sum
);
  localparam int SIGNED = (W > 1 || (A_SIGNED && !XNOR)) ? 1 : 0;
  genvar i, l;
  generate
    for (l = 0; l <= LEVELS; l = l + 1) begin : level
      localparam int COUNT = (PRODUCTS + (1 << l) - 1) >> l;
      reg [COUNT*(BITS+l)-1:0] value;
    end
    for (i = 0; i < PRODUCTS; i = i + 1) begin : g_product
      if (XNOR) begin : g_xnor
        // Two matches are counted at once, which fills look-up tables of four inputs.
        wire one = weights[2*i] ~^ inputs[2*i];
        wire two;
        if (2 * i + 1 < SIMD) assign two = weights[2*i+1] ~^ inputs[2*i+1];
        else assign two = 1'b0;
        always @(posedge clk) level[0].value[i*BITS+:BITS] <= {one & two, one ^ two};
      end else if (W == 1) begin : g_select
        always @(posedge clk) level[0].value[i*BITS+:BITS] <= inputs[i*A+:A] & {A{weights[i]}};
      end else begin : g_multiply
        wire signed [W-1:0] weight = weights[i*W+:W];
        wire signed [A:0] value = {A_SIGNED ? inputs[i*A+A-1] : 1'b0, inputs[i*A+:A]};
        wire signed [W+A:0] product = weight * value;
        always @(posedge clk) level[0].value[i*BITS+:BITS] <= product[BITS-1:0];
      end
    end
    for (l = 1; l <= LEVELS; l = l + 1) begin : g_level
      localparam int COUNT = (PRODUCTS + (1 << l) - 1) >> l;
      localparam int BEFORE = (PRODUCTS + (1 << (l - 1)) - 1) >> (l - 1);
      localparam int B = BITS + l - 1;
      for (i = 0; i < COUNT; i = i + 1) begin : g_add
        wire [B-1:0] left = level[l-1].value[2*i*B+:B];
        if (2 * i + 1 < BEFORE) begin : g_two
          wire [B-1:0] right = level[l-1].value[(2*i+1)*B+:B];
          always @(posedge clk)
            level[l].value[i*(B+1)+:B+1] <= {SIGNED ? left[B-1] : 1'b0, left} + {SIGNED ? right[B-1] : 1'b0, right};
        end else begin : g_one
          always @(posedge clk) level[l].value[i*(B+1)+:B+1] <= {SIGNED ? left[B-1] : 1'b0, left};
        end
      end
    end
  endgenerate
  assign sum = level[LEVELS].value;
endmodule


module mvtu_accumulator #(
    parameter int SUM_BITS = 8,
    parameter int SUM_SIGNED = 0,
    parameter int ACC = 12,
    parameter int START = 0,
    parameter int DOUBLE = 0
) (
    input wire clk,
    input wire add,
    input wire first,
    input wire [SUM_BITS-1:0] sum,
    output reg [ACC-1:0] total
);
  wire signed [SUM_BITS:0] extended = {SUM_SIGNED ? sum[SUM_BITS-1] : 1'b0, sum};
  wire signed [ACC-1:0] addend = DOUBLE ? extended <<< 1 : extended;
  wire signed [ACC-1:0] start = START;
  always @(posedge clk) if (add) total <= (first ? start : total) + addend;
endmodule


// Counts thresholds that are reached, by binary search: two cycles a bit, a new row group may enter in every cycle.
module mvtu_thresholds #(
    parameter int NF = 4,
    parameter int PE = 2,
    parameter int ACC = 12,
    parameter int O = 4,
    parameter int O_SIGNED = 0,
    parameter FILE = "thresholds.hex",
    parameter int GROUP_BITS = NF > 1 ? $clog2(NF) : 1
) (
    input wire clk,
    input wire rst,
    input wire totals_valid,
    input wire [GROUP_BITS-1:0] group,
    input wire [PE*ACC-1:0] totals,
    output wire results_valid,
    output wire [PE*O-1:0] results
);
  localparam int ROW_BITS = NF > 1 ? $clog2(NF) : 0;  // of the address of one row's thresholds

  reg [2*O-1:0] valid;
  always @(posedge clk) valid <= rst ? {(2 * O) {1'b0}} : {valid[2*O-2:0], totals_valid};
  assign results_valid = valid[2*O-1];

  genvar p, j;
  generate
    // Which row group is in which stage.
    for (j = 0; j < O; j = j + 1) begin : stage
      wire [GROUP_BITS-1:0] now;
      reg [GROUP_BITS-1:0] between;
      reg [GROUP_BITS-1:0] after;
      if (j == 0) assign now = group;
      else assign now = stage[j-1].after;
      always @(posedge clk) begin
        between <= now;
        after <= between;
      end
    end
    for (p = 0; p < PE; p = p + 1) begin : g_row
      // All reads share constant address bits with this row's place, so that each keeps only its own part of the table.
      (* `LUT_ROM *) reg [ACC-1:0] memory[0:(PE<<(ROW_BITS+O))-1];
      initial $readmemh(FILE, memory);
      for (j = 0; j < O; j = j + 1) begin : bits
        wire [O-1:0] known;  // the bits found so far, at the top
        wire [ACC-1:0] total;
        if (j == 0) begin : g_first
          assign known = {O{1'b0}};
          assign total = totals[p*ACC+:ACC];
        end else begin : g_later
          assign known = bits[j-1].found;
          assign total = bits[j-1].total_after;
        end
        wire [31:0] row = NF > 1 ? (p << ROW_BITS) + stage[j].now : p;
        wire [31:0] address = (row << O) | known | (1 << (O - 1 - j));
        reg signed [ACC-1:0] threshold;
        reg signed [ACC-1:0] total_between;
        reg [O-1:0] known_between;
        reg [ACC-1:0] total_after;
        reg [O-1:0] found;
        always @(posedge clk) begin
          threshold <= memory[address];
          total_between <= total;
          known_between <= known;
          total_after <= total_between;
          found <= known_between | ((total_between >= threshold ? 1 : 0) << (O - 1 - j));
        end
      end
      wire [O-1:0] count = bits[O-1].found;
      assign results[p*O+:O] = O_SIGNED ? count ^ (1 << (O - 1)) : count;
    end
  endgenerate
endmodule


// clip(floor((total * scale + offset) / 2**SHIFT)), four cycles.
module mvtu_requantise #(
    parameter int NF = 4,
    parameter int PE = 2,
    parameter int ACC = 20,
    parameter int O = 8,
    parameter int O_SIGNED = 0,
    parameter int SHIFT = 16,
    parameter FILE = "thresholds.hex",
    parameter int GROUP_BITS = NF > 1 ? $clog2(NF) : 1
) (
    input wire clk,
    input wire rst,
    input wire totals_valid,
    input wire [GROUP_BITS-1:0] group,
    input wire [PE*ACC-1:0] totals,
    output wire results_valid,
    output wire [PE*O-1:0] results
);
  localparam int WIDE = ACC + 16 > SHIFT + O + 1 ? ACC + 16 : SHIFT + O + 1;  // the sum has one bit more
  localparam int ENTRY = WIDE + 16;
  localparam int LOW = O_SIGNED ? -(1 << (O - 1)) : 0;
  localparam int HIGH = O_SIGNED ? (1 << (O - 1)) - 1 : (1 << O) - 1;

  reg [3:0] valid;
  always @(posedge clk) valid <= rst ? 4'b0 : {valid[2:0], totals_valid};
  assign results_valid = valid[3];

  (* `LUT_ROM *) reg [PE*ENTRY-1:0] memory[0:NF-1];
  initial $readmemh(FILE, memory);
  reg [PE*ENTRY-1:0] entries;
  always @(posedge clk) entries <= memory[NF > 1 ? group : 0];

  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : g_row
      wire signed [15:0] scale = entries[p*ENTRY+:16];
      reg signed [ACC-1:0] total;
      reg signed [WIDE-1:0] offset;
      reg signed [WIDE-1:0] product;
      reg signed [WIDE:0] scaled;
      reg [O-1:0] result;
      wire signed [WIDE:0] shifted = scaled >>> SHIFT;
      always @(posedge clk) begin
        total <= totals[p*ACC+:ACC];
        product <= total * scale;
        offset <= entries[p*ENTRY+16+:WIDE];
        scaled <= product + offset;
        result <= shifted < LOW ? LOW : (shifted > HIGH ? HIGH : shifted);
      end
      assign results[p*O+:O] = result;
    end
  endgenerate
endmodule


// DEPTH results that wait for the stream's receiver; places are reserved when a row group's last step is issued.
module mvtu_queue #(
    parameter int WIDTH = 8,
    parameter int DEPTH = 2
) (
    input wire clk,
    input wire rst,
    input wire reserve,
    output wire free,
    input wire put,
    input wire [WIDTH-1:0] put_data,
    output wire out_valid,
    input wire out_ready,
    output wire [WIDTH-1:0] out_data
);
  localparam int BITS = $clog2(DEPTH) + 1;
  reg [BITS-1:0] reserved;
  reg [BITS-1:0] held;
  wire taken = out_valid && out_ready;
  assign free = reserved != DEPTH;
  assign out_valid = held != 0;
  always @(posedge clk) begin
    if (rst) begin
      reserved <= 0;
      held <= 0;
    end else begin
      // Plus 1, minus 1, which is all ones, or as it is.
      reserved <= reserved + {{BITS{taken && !reserve}} | (reserve && !taken)};
      held <= held + {{BITS{taken && !put}} | (put && !taken)};
    end
  end
  generate
    if (DEPTH == 1) begin : g_single
      reg [WIDTH-1:0] place;
      always @(posedge clk) if (put) place <= put_data;
      assign out_data = place;
    end else begin : g_ring
      reg [WIDTH-1:0] places[0:DEPTH-1];
      reg [BITS-2:0] write;
      reg [BITS-2:0] read;
      always @(posedge clk) begin
        if (put) places[write] <= put_data;
        if (rst) begin
          write <= 0;
          read <= 0;
        end else begin
          if (put) write <= write + 1'b1;
          if (taken) read <= read + 1'b1;
        end
      end
      assign out_data = places[read];
    end
  endgenerate
endmodule
