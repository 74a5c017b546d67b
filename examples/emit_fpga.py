"""Write the accelerator for a rounded ONNX file: its circuit, memory files and test bench.

python examples/emit_fpga.py model.onnx folder --device ecp5-85 --simulate 2 --route
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from autocompress.hardware.files import read_file
from autocompress.hardware.fpga import DEVICES
from autocompress.hardware.fpga_emit import compile_network, emit, simulate_network
from autocompress.hardware.integers import run_integers


def main() -> None:
    devices = {device.name: device for device in DEVICES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=devices, default="ecp5-85", help="that it is folded for")
    parser.add_argument("--simulate", type=int, default=0, metavar="N", help="N random images in Icarus Verilog")
    parser.add_argument("--route", action="store_true", help="place and route for an ECP5-85")
    parser.add_argument("--seed", type=int, default=0, help="of the random images")
    options = parser.parse_args()

    artifact, task = read_file(options.file, f"fpga/{options.device}")
    emitted = emit(artifact, options.folder, devices[options.device])
    print(f"{options.folder}: {emitted.cycles} cycles an image, one every {emitted.interval}")
    if options.simulate:
        shape = (options.simulate, *task.data.input_shape)
        images = np.random.default_rng(options.seed).integers(0, 2**emitted.network.input.bits, shape)
        accumulators, run = simulate_network(emitted, images)
        same = np.array_equal(accumulators, run_integers(emitted.network, images))
        cycles = run.left.reshape(options.simulate, -1)[0, -1] + 1
        print(f"simulated: integers {'equal' if same else 'DIFFER'}, {cycles} cycles for the first image")
    if options.route:
        for figure in compile_network(emitted):
            print(f"{figure.name}: {figure.value:g} {figure.unit}".rstrip())


if __name__ == "__main__":
    main()
