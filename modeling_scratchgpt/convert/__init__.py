"""Other formats: models from elsewhere as ScratchGPTs, and ScratchGPTs as models for other programs."""
