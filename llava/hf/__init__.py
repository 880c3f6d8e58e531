"""Compression for the Video-LLMs of `transformers`, as they come from there.

    with compression(model, retention_ratio=0.1):
        model.generate(**inputs)

`family.py` says what a family of models has to tell, the file of each family tells it, `families.py` finds it, and
`mechanism.py` does the rest: it shortens the prompt between the vision tower and the language model. Nothing here
imports a model of transformers.
"""
