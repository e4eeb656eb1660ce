"""How to measure anything: grid, timing, memory, records, progress, report. It knows nothing of models."""
