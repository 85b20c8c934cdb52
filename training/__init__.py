"""The recipes of ScratchGPT. Each program runs from a clone: `accelerate launch training/pretrain.py --help`."""
