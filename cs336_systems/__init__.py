"""The package of the workbook: a Transformer's systems, and what measures them.

The rooms, from the ground up:

- `model`, `loss`, `optimizer`, `attention/`: the systems that are measured; they know nothing of benchmarks.
- `analysis/`: what a step must cost (FLOPs, bytes, roofline), and what hardware can do.
- `bench/`: how to measure anything (grid, timing, memory, records, report); it knows nothing of models.
- `experiments/`: one measured thing each, where the two meet.
- `presentation/`: what they summarise as tables, figures and sentences.
- `workbook/`: notebooks, profiles, the problem index and the writeup.
"""
