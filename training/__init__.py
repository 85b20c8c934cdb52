"""ScratchGPT's recipes. Each entry point runs from a clone: `accelerate launch training/pretrain.py --help`."""
