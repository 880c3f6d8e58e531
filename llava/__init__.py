"""LLaVA-Scissor: training-free video token compression in a LLaVA-OneVision model tree."""

__version__ = "0.1.0"
