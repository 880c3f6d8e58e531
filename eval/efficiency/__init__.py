"""Milliseconds, memory and FLOPs of every stage between a video file and the answer: `python -m eval.efficiency`."""
