"""What a step must cost: FLOPs, bytes, hardware peaks, and the time they bound. Nothing here runs a model."""
