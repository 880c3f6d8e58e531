"""A fine instrument: all methods at all ratios on tiny models, on the same features and questions, by kind of question.

    python -m eval.suite configs/suite/default.yaml

Unlike an evaluation through lmms-eval it computes the features of every video once, and answers all questions about a
video in one forward pass (`eval.tiny_data`).
"""
