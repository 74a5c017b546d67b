// Depthwise unit: PE channels a cycle, each with its own K weights, then thresholds as in mvtu.sv.
//
// A position of C channels enters in NF*K beats, NF = C/PE: for each group of PE channels its K values, channel n*PE+p in
// slice p of a beat (what swu.sv gives with GROUPED = 1). NF beats leave. acc[c] = sum of M[c][k] * x[c][k]; weights are
// signed and have at least two bits.
//
//   WEIGHTS     NF*K words, address n*K+k: M[n*PE+p][k] in bits [p*W +: W]
//   THRESHOLDS  as in mvtu.sv, with channels for rows
//
// Timing: as a unit of mvtu.sv with SF = K steps a group, every one of which takes a beat, and LEVELS = 0.
module dwu #(
    parameter int C = 4,
    parameter int K = 9,
    parameter int PE = 1,
    parameter int W = 4,
    parameter int A = 4,
    parameter int ACC = 12,
    parameter int O = 4,
    parameter WEIGHTS = "weights.hex",
    parameter THRESHOLDS = "thresholds.hex",
    parameter RAM_STYLE = "auto",
    parameter int A_SIGNED = 0,
    parameter int O_SIGNED = 0,
    parameter int SHIFT = 16
) (
    input wire clk,
    input wire rst,
    input wire in_valid,
    output wire in_ready,
    input wire [PE*A-1:0] in_data,
    output wire out_valid,
    input wire out_ready,
    output wire [PE*(O == 0 ? ACC : O)-1:0] out_data
);
  localparam int NF = C / PE;
  localparam int OUT_BITS = O == 0 ? ACC : O;
  localparam int LATENCY = 5 + (O == 0 ? 0 : (O <= 4 ? 2 * O : 4));
  localparam int DEPTH = 1 << $clog2((LATENCY + K) / K);
  localparam int STEP_BITS = K > 1 ? $clog2(K) : 1;
  localparam int GROUP_BITS = NF > 1 ? $clog2(NF) : 1;
  localparam int ADDRESS_BITS = K * NF > 1 ? $clog2(K * NF) : 1;

  reg [STEP_BITS-1:0] step;
  reg [ADDRESS_BITS-1:0] address;
  wire credit;
  wire last_step = step == K - 1;
  assign in_ready = !last_step || credit;
  wire issue = in_ready && in_valid;
  always @(posedge clk) begin
    if (rst) begin
      step <= 0;
      address <= 0;
    end else if (issue) begin
      step <= last_step ? 0 : step + 1'b1;
      address <= address == K * NF - 1 ? 0 : address + 1'b1;
    end
  end

  wire [PE*W-1:0] weights_read;
  reg [PE*W-1:0] weights;
  reg [PE*A-1:0] fresh, inputs;
  mvtu_rom #(.WIDTH(PE * W), .DEPTH(K * NF), .FILE(WEIGHTS), .STYLE(RAM_STYLE)) memory (
      .clk(clk), .address(address), .data(weights_read)
  );
  always @(posedge clk) begin
    weights <= weights_read;
    fresh   <= in_data;
    inputs  <= fresh;
  end

  reg [2:0] travelling, travelling_last;
  reg add_first, summed;
  wire add = travelling[2], add_last = travelling_last[2];
  reg [GROUP_BITS-1:0] group;
  always @(posedge clk) begin
    travelling <= rst ? 3'b0 : {travelling[1:0], issue};
    travelling_last <= {travelling_last[1:0], last_step};
    if (rst) add_first <= 1;
    else if (add) add_first <= add_last;
    summed <= !rst && add && add_last;
    if (rst) group <= 0;
    else if (summed) group <= group == NF - 1 ? 0 : group + 1'b1;
  end

  wire [PE*ACC-1:0] totals;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : g_lane
      wire [W+A-1:0] product;
      mvtu_dot #(.SIMD(1), .W(W), .A(A), .A_SIGNED(A_SIGNED)) dot (
          .clk(clk), .weights(weights[p*W+:W]), .inputs(inputs[p*A+:A]), .sum(product)
      );
      mvtu_accumulator #(.SUM_BITS(W + A), .SUM_SIGNED(1), .ACC(ACC), .START(0), .DOUBLE(0)) accumulator (
          .clk(clk), .add(add), .first(add_first), .sum(product), .total(totals[p*ACC+:ACC])
      );
    end
  endgenerate

  wire results_valid;
  wire [PE*OUT_BITS-1:0] results;
  generate
    if (O == 0) begin : g_raw
      assign results = totals;
      assign results_valid = summed;
    end else if (O <= 4) begin : g_thresholds
      mvtu_thresholds #(.NF(NF), .PE(PE), .ACC(ACC), .O(O), .O_SIGNED(O_SIGNED), .FILE(THRESHOLDS)) thresholds (
          .clk(clk), .rst(rst), .totals_valid(summed), .group(group), .totals(totals),
          .results_valid(results_valid), .results(results)
      );
    end else begin : g_requantise
      mvtu_requantise #(
          .NF(NF), .PE(PE), .ACC(ACC), .O(O), .O_SIGNED(O_SIGNED), .SHIFT(SHIFT), .FILE(THRESHOLDS)
      ) requantise (
          .clk(clk), .rst(rst), .totals_valid(summed), .group(group), .totals(totals),
          .results_valid(results_valid), .results(results)
      );
    end
  endgenerate

  mvtu_queue #(.WIDTH(PE * OUT_BITS), .DEPTH(DEPTH)) queue (
      .clk(clk), .rst(rst), .reserve(issue && last_step), .free(credit), .put(results_valid), .put_data(results),
      .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data)
  );
endmodule
