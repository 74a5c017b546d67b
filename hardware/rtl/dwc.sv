// Width converter: words of IN elements to words of OUT elements of W bits; the first element lies in the lowest bits.
//
// One of IN and OUT divides the other. Packing (OUT >= IN): the word is there one cycle after its last part came.
// Unpacking: the first part is there one cycle after the word came; the next word is taken along with the last part.
module dwc #(
    parameter int W = 8,
    parameter int IN = 1,
    parameter int OUT = 1
) (
    input  wire             clk,
    input  wire             rst,
    input  wire             in_valid,
    output wire             in_ready,
    input  wire [IN*W-1:0]  in_data,
    output wire             out_valid,
    input  wire             out_ready,
    output wire [OUT*W-1:0] out_data
);
  localparam int RATIO = OUT >= IN ? OUT / IN : IN / OUT;
  localparam int CW = RATIO > 1 ? $clog2(RATIO) : 1;

  reg [CW-1:0] at;
  generate
    if (OUT >= IN) begin : pack
      reg valid;
      reg [OUT*W-1:0] parts;
      assign in_ready  = !valid || out_ready;
      assign out_valid = valid;
      assign out_data  = parts;
      always @(posedge clk) begin
        if (in_valid && in_ready) parts[at*IN*W+:IN*W] <= in_data;
        if (rst) begin
          valid <= 0;
          at <= 0;
        end else if (in_ready) begin
          valid <= in_valid && at == RATIO - 1;
          if (in_valid) at <= at == RATIO - 1 ? 0 : at + 1'b1;
        end
      end
    end else begin : unpack
      reg valid;
      reg [IN*W-1:0] parts;
      wire last = at == RATIO - 1;
      assign in_ready  = !valid || (last && out_ready);
      assign out_valid = valid;
      assign out_data  = parts[OUT*W-1:0];
      always @(posedge clk) begin
        if (in_valid && in_ready) parts <= in_data;
        else if (out_valid && out_ready) parts <= parts >> (OUT * W);
        if (rst) begin
          valid <= 0;
          at <= 0;
        end else begin
          if (in_ready) valid <= in_valid;
          if (out_valid && out_ready) at <= last ? 0 : at + 1'b1;
        end
      end
    end
  endgenerate
endmodule
