"""Conversion of models: from other formats to ScratchGPT, and from ScratchGPT to other formats."""
