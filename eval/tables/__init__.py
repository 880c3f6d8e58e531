"""The paper's tables: what is published, what is measured here, and how far apart they are.

`python -m eval.tables` runs the grid behind them (see `eval.tables.__main__`). `published` reads the data files,
`cells` says what is known of each cell, `bootstrap` compares question by question, `write` and `plots` put it on disk.
"""
