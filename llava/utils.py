"""A name that scripts written for LLaVA import."""


def disable_torch_init() -> None:
    """Nothing: `load_pretrained_model` never initialises weights that a checkpoint replaces, so none need skipping."""
