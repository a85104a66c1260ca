"""What a run will take, by estimate: memory, traffic, time; from sizes alone, without a weight and without a GPU.

The formulas are in docs/planning.md. Nothing here knows how training is done; it is told the sizes.
"""
